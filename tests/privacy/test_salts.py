"""`cache_salt` isolates: nothing stored under one salt can be found, or felt, under another."""

from __future__ import annotations

import collections
import contextlib
import re
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import CachedModel, ConfigError, KVStore
from kvembed._keys import as_token_ids, chain_keys, root_key
from kvembed._testing import FINGERPRINT, forget_memory, keys_of, put_all, random_block, random_chain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 16


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    with KVStore(tmp_path / "store", max_cpu_bytes="8MiB", max_disk_bytes="64MiB") as store:
        yield store


class Work:
    """Counts what a store does: statements by kind, rows they return, files opened, ids compared."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Work) and self.counts == other.counts

    def __repr__(self) -> str:
        return f"Work({dict(self.counts)})"

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@contextlib.contextmanager
def counted(store: KVStore) -> Iterator[Work]:
    """Count the work of this thread in ``store`` for the length of a ``with`` block."""
    work = Work()
    catalog, disk = store._catalog, store._disk
    assert catalog is not None
    assert disk is not None
    here = threading.get_ident()

    def statement(sql: str) -> None:
        work.counts[re.sub(r"x?'[^']*'|\b\d+\b", "?", sql)] += 1

    def watch(owner: Any, name: str) -> Any:
        plain = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            if threading.get_ident() != here:
                return result  # the writer's, which comes when it comes
            work.counts[name] += 1
            work.counts[f"{name} rows"] += len(result) if isinstance(result, list | dict) else result is not None
            return result

        patch.setattr(owner, name, call)

    with pytest.MonkeyPatch.context() as patch, catalog.connection() as db:
        for name in ("_query", "get", "tails", "children", "row"):
            watch(catalog, name)
        for name in ("open", "read_ids"):
            watch(disk, name)
        watch(store, "_token_ids")
        db.set_trace_callback(statement)
        try:
            yield work
        finally:
            db.set_trace_callback(None)


def test_no_call_of_the_store_finds_the_keys_of_another_salt(store: KVStore) -> None:
    theirs = random_chain(4, salt="a")
    put_all(store, theirs)
    ids = as_token_ids(np.concatenate([block.token_ids for block in theirs]))
    for _ in ("from memory", "from disk"):
        for salt in ("", "b", "A", "a ", "a\0"):
            root = root_key(FINGERPRINT, salt)
            mine = chain_keys(root, ids, 16)
            assert not set(mine) & set(keys_of(theirs))
            assert store.lookup(mine) == []
            assert store.known(mine) == [None] * 4
            assert store.find_tail(root, ids) is None
            assert store.children(root) == []
            assert store.token_ids(mine[0]) is None
            assert store.open(mine[0]) is None
            assert [store.why_missing(key) for key in mine] == [None] * 4
        assert len(store.lookup(keys_of(theirs))) == 4
        forget_memory(store)


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_miss_under_another_salt_costs_what_an_unknown_prompt_costs(store: KVStore, tier: str) -> None:
    theirs, mine = random_chain(4, salt="a"), random_chain(3, salt="b", seed=9)
    put_all(store, [*theirs, *mine])
    store.flush()
    if tier == "disk":
        forget_memory(store)
    known = as_token_ids(np.concatenate([block.token_ids for block in theirs]))
    unknown = as_token_ids(np.random.default_rng(3).integers(0, 50_000, len(known)))

    def ask(ids: Any, salt: str = "b") -> Work:
        root = root_key(FINGERPRINT, salt)
        keys = chain_keys(root, ids, 16)
        with counted(store) as work:
            store.lookup(keys)
            store.known(keys)
            store.find_tail(root, ids)
            store.children(root)
            store.open(keys[0])
            store.why_missing(keys[0])
        return work

    assert ask(known) == ask(unknown)
    # The count is worth something: under its own salt the same prompt is more work on this tier.
    if tier == "disk":
        assert ask(known, "a") != ask(unknown, "a")


def test_a_salt_that_is_no_text_is_refused(tiny_llama: Any, store: KVStore) -> None:
    with pytest.raises(ConfigError, match="cache_salt"):
        CachedModel(tiny_llama(), store=store, cache_salt=7)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def model(tiny_llama: Any) -> Any:
    return tiny_llama()


def wrap(model: Any, store: KVStore, salt: str, tokenizer: Any = None) -> CachedModel:
    return CachedModel(model, tokenizer, store=store, cache_salt=salt, block_size=BLOCK, progress=False, max_live=0)


def run(cached: CachedModel, ids: torch.Tensor) -> Any:
    return cached.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)


def test_nothing_a_model_says_shows_what_another_salt_stored(model: Any, store: KVStore, tiny_tokenizer: Any) -> None:
    theirs, mine = wrap(model, store, "a", tiny_tokenizer), wrap(model, store, "b", tiny_tokenizer)
    generator = torch.Generator().manual_seed(1)
    known = torch.randint(0, 250, (1, 70), generator=generator)
    unknown = torch.randint(0, 250, (1, 70), generator=generator)
    run(theirs, known)
    run(mine, torch.randint(0, 250, (1, 40), generator=generator))
    forget_memory(store)
    mine.explain(torch.randint(0, 250, (1, 40), generator=generator))  # ids that were read once are remembered
    works: list[list[Work]] = []
    said: list[list[Any]] = []
    for prompt in (known, unknown):
        counts: list[Work] = []
        with counted(store) as work:
            found = mine.lookup(prompt)
        counts.append(work)
        with counted(store) as work:
            explained = mine.explain(prompt)
        counts.append(work)
        works.append(counts)
        said.append([(found.num_tokens, found.tokens_by_tier, found.blocks), explained.kind, explained.nearest_tokens])
    assert works[0] == works[1]
    assert said[0] == said[1]
    assert said[0][1] == "never_seen"
    usages = []
    for prompt in (known, unknown):
        run(mine, prompt)
        usages.append((mine.usage.cached_tokens, mine.usage.miss_reason, mine.usage.stored_tokens))
    assert usages[0] == usages[1]
    # And the first one keeps its own.
    assert theirs.lookup(known).num_tokens >= 64


def test_the_work_of_a_whole_call_is_that_of_an_unknown_prompt(model: Any, store: KVStore) -> None:
    theirs, mine = wrap(model, store, "a"), wrap(model, store, "b")
    generator = torch.Generator().manual_seed(2)
    known = torch.randint(0, 250, (1, 70), generator=generator)
    unknown = torch.randint(0, 250, (1, 70), generator=generator)
    run(theirs, known)
    for _ in range(2):  # what the first calls of a model do once
        run(mine, torch.randint(0, 250, (1, 70), generator=generator))
    works: list[Work] = []
    for prompt in (known, unknown):
        forget_memory(store)
        with counted(store) as work:
            run(mine, prompt)
        assert mine.usage.computed_tokens == 70
        works.append(work)
    assert works[0] == works[1]


def test_what_one_salt_evicts_or_forgets_is_not_told_to_another(
    model: Any, store: KVStore, tiny_tokenizer: Any
) -> None:
    theirs, mine = wrap(model, store, "a", tiny_tokenizer), wrap(model, store, "b", tiny_tokenizer)
    prompt = torch.randint(0, 250, (1, 70), generator=torch.Generator().manual_seed(3))
    run(theirs, prompt)
    store.prune(max_bytes=0)
    forget_memory(store)
    assert theirs.explain(prompt).kind == "removed"
    assert mine.explain(prompt).kind == "never_seen"


def test_a_memory_only_store_isolates_too() -> None:
    with KVStore(max_disk_bytes=None, max_cpu_bytes="1MiB") as store:
        block = random_block(salt="a")
        store.put(block)
        root = root_key(FINGERPRINT, "b")
        assert store.lookup(chain_keys(root, block.token_ids, 16)) == []
        assert store.find_tail(root, block.token_ids) is None
