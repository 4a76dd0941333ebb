"""Snapshots among blocks: listed with their sequence, explained, pinned and forgotten with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import CachedModel, KVStore

from .zoo import build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 16


def ids(n: int, seed: int) -> torch.Tensor:
    """Return ``[1, n]`` ids."""
    return torch.randint(0, 250, (1, n), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, prompt: torch.Tensor, new: int = 6) -> torch.Tensor:
    """Generate greedily."""
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)


@pytest.fixture(params=["qwen3_next", "mamba2"])
def cached(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CachedModel]:
    with KVStore(tmp_path / "store") as store:
        model = CachedModel(build(request.param), store=store, block_size=BLOCK, progress=False, max_live=0)
        yield model
        store.flush()
        assert store.verify().problems == ()


@pytest.mark.parametrize("flushed", [False, True])
def test_a_sequence_is_listed_once_with_its_own_tokens(cached: CachedModel, flushed: bool) -> None:
    reply = generate(cached, ids(5 * BLOCK + 3, 1))
    if flushed:
        cached.store.flush()
    # The turn's end, and the prompt's: it was kept for other replies.
    tokens = sorted(entry.n_tokens for entry in cached.store.ls())
    assert tokens == [5 * BLOCK + 2, reply.shape[1] - 1]
    again = torch.cat([reply, ids(2 * BLOCK, 2)], dim=1)
    generate(cached, again)
    if flushed:
        cached.store.flush()
    assert max(entry.n_tokens for entry in cached.store.ls()) == again.shape[1] + 5


def test_it_goes_with_the_sequence(cached: CachedModel) -> None:
    store = cached.store
    kept = generate(cached, ids(4 * BLOCK + 9, 1))
    generate(cached, ids(4 * BLOCK + 9, 2))
    store.flush()
    before = len(store.ls())
    for entry in store.ls():
        store.remove(entry.key)
    assert before == 4
    assert store.ls() == []
    assert cached.lookup(kept).num_tokens == 0


def test_why_a_branch_is_not_reused_further(cached: CachedModel) -> None:
    long = ids(12 * BLOCK, 1)
    generate(cached, long)
    # It leaves the long prompt where its tokens are stored, but no state.
    branch = torch.cat([long[:, : 11 * BLOCK + 8], ids(70, 3)], dim=1)
    explanation = cached.explain(branch)
    assert explanation.cached_tokens < 11 * BLOCK + 8
    if explanation.cached_tokens + 8 < 11 * BLOCK:
        assert "where a state was kept" in explanation.hint
    generate(cached, branch)
    assert cached.usage.bypass_reason is None


def test_a_document_is_taken_up_at_its_end(cached: CachedModel, tiny_tokenizer: Any) -> None:
    cached.tokenizer = tiny_tokenizer
    document = cached.document("The lighthouse keeper counts the ships at dusk. " * 5, pin=True)
    for question in ("How many?", "When does he do that?"):
        answer = document.ask(question, max_new_tokens=5)
        assert answer.usage.cached_tokens == document.tokens
    cached.store.flush()
    cached.store.prune(max_bytes=0)
    assert document.ask("Who?", max_new_tokens=2).usage.cached_tokens == document.tokens
    cached.store.forget(document)
    assert cached.lookup(torch.from_numpy(document.prefix_ids.astype("int64"))).num_tokens < document.tokens
