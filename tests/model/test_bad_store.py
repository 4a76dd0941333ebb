"""Stores that are full, too small, damaged, read-only or shared: the text is right, and one warning says why."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TextStreamer

from kvembed import StoreReadOnlyError, StoreWarning, _restore

from ._lab import BLOCK, Lab, assert_equal_bits, cat, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed import CachedModel

PROMPT = random_ids(5 * BLOCK + 11)


def run_all(cached: CachedModel, prompts: list[torch.Tensor]) -> tuple[list[list[int]], list[str]]:
    """Return the tokens of several calls, and the store's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StoreWarning)
        results = []
        for prompt in prompts:
            results.append(tokens(run(cached, prompt)))
            cached.store.flush()  # the disk's answer is seen by the next call
    return results, [str(w.message) for w in caught if issubclass(w.category, StoreWarning)]


def several(n: int = 4) -> list[torch.Tensor]:
    return [cat(PROMPT, random_ids(9, seed=1)), PROMPT, *(random_ids(50, seed=s) for s in range(2, n))]


# ---------------------------------------------------------------------------------- no room


@pytest.mark.parametrize(
    "budgets",
    [
        {"max_cpu_bytes": 4096, "max_disk_bytes": 4096},
        {"max_cpu_bytes": None, "max_disk_bytes": 4096},
        {"max_cpu_bytes": 4096, "max_disk_bytes": None},
    ],
)
def test_budgets_too_small_for_one_block(
    lab: Lab, llama: Any, plain: Callable[..., Any], budgets: dict[str, Any]
) -> None:
    lab.expect_sound = False
    cached = lab.wrap(llama, lab.store(**budgets), max_live=0)
    found, messages = run_all(cached, several())
    assert found == [tokens(plain(llama, prompt)) for prompt in several()]
    assert cached.usage.cached_tokens == 0
    assert len(messages) == 1
    assert "too small for one block" in messages[0]
    assert "raise max_" in messages[0]
    assert cached.store.verify().problems == ()


def test_a_store_that_keeps_nothing(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    # No tier at all is a choice, not a problem: only live sequences are reused.
    cached = lab.wrap(llama, lab.store(max_cpu_bytes=None, max_disk_bytes=None))
    found, messages = run_all(cached, several())
    assert found == [tokens(plain(llama, prompt)) for prompt in several()]
    assert messages == []


@pytest.mark.parametrize("cpu", [1 << 20, None])
def test_a_disk_that_becomes_full(
    lab: Lab, llama: Any, plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, cpu: int | None
) -> None:
    lab.expect_sound = False  # the problem was taken by the warning, and the store is verified here
    cached = lab.wrap(llama, lab.store(max_cpu_bytes=cpu), max_live=0)
    assert run_all(cached, several(3)) == ([tokens(plain(llama, p)) for p in several(3)], [])
    real = os.write
    real_v = os.writev

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(os, "writev", full)
    prompts = [random_ids(76, seed=s) for s in range(20, 24)]
    found, messages = run_all(cached, prompts)
    assert found == [tokens(plain(llama, prompt)) for prompt in prompts]
    assert len(messages) == 1
    assert "No space left" in messages[0]
    run(cached, prompts[0])
    assert cached.usage.cached_tokens == (75 if cpu else 0)  # memory still serves
    monkeypatch.setattr(os, "write", real)
    monkeypatch.setattr(os, "writev", real_v)
    assert cached.store.verify().problems == ()
    run(cached, PROMPT)
    assert cached.usage.cached_tokens == PROMPT.shape[1] - 1  # what was there before still is


# -------------------------------------------------------------------------------- bad files


class Pieces(TextStreamer):
    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def files_by_start(store: Any) -> list[Path]:
    """Return the block files of a store, first block of the prompt first."""
    rows = sorted(store._disk.catalog.rows(), key=lambda row: row.info.start)
    return [store._disk.path(row.info.key) for row in rows]


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40  # in the values of the last layer
    path.write_bytes(data)


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def garbage(path: Path, other: Path) -> None:
    path.write_bytes(b"\xff" * 20_000)


# Only a flipped bit is found while rows are read, by whichever thread; the rest shows when the file is opened.
@pytest.mark.parametrize(
    ("damage", "threads"),
    [(flip, False), (flip, True), (cut, False), (empty, False), (swap, False), (garbage, False)],
)
@pytest.mark.parametrize("where", [0, 3])
def test_a_bad_file_met_by_a_restore(
    lab: Lab,
    model: Any,
    plain: Callable[..., Any],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path, Path], None],
    where: int,
    threads: bool,
) -> None:
    if where == 0 and damage is flip and model.config.model_type == "mistral":
        pytest.skip("no window reaches the first block: its KV is not read")
    if threads:
        monkeypatch.setattr(_restore, "_INLINE_BYTES", 0)
    lab.expect_sound = False
    first = lab.wrap(model, lab.store())
    expected = run_full(first, PROMPT)
    first.close()
    paths = files_by_start(first.store)
    first.store.close()
    damage(paths[where], paths[where + 1])
    cached = lab.wrap(model, lab.store(), deterministic=True)
    pieces, plain_pieces = Pieces(tiny_tokenizer), Pieces(tiny_tokenizer)
    with pytest.warns(StoreWarning) as caught:
        found = run_full(cached, PROMPT, streamer=pieces)
    assert len(caught) == 1
    assert "was dropped" in str(caught[0].message)
    run(model, PROMPT, streamer=plain_pieces)
    assert pieces.text == plain_pieces.text
    assert_equal_bits(found, expected)
    assert tokens(found) == tokens(plain(model, PROMPT))
    assert cached.usage.cached_tokens == where * BLOCK
    # Set aside, written anew, and found again.
    name = paths[where].name
    assert (cached.store.path / "quarantine" / name).exists()  # pyright: ignore[reportOptionalOperand]
    cached.store.flush()
    assert paths[where].exists()
    assert cached.store.verify().problems == ()
    lab.leave_only(cached, "disk")
    assert_equal_bits(run_full(cached, PROMPT), expected)
    assert cached.usage.cached_tokens_by_tier == {"disk": 5 * BLOCK}


def test_all_files_are_bad(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    # More bad blocks than attempts: the last attempt restores nothing.
    lab.expect_sound = False
    first = lab.wrap(llama, lab.store())
    long = random_ids(12 * BLOCK + 3)
    run(first, long)
    first.close()
    paths = files_by_start(first.store)
    first.store.close()
    for path in paths:
        flip(path, path)
    cached = lab.wrap(llama, lab.store())
    with pytest.warns(StoreWarning, match="was dropped"):
        found = run(cached, long)
    assert tokens(found) == tokens(plain(llama, long))
    assert tokens(run(cached, long)) == tokens(plain(llama, long))


def test_prefill_meets_a_bad_file(lab: Lab, llama: Any) -> None:
    lab.expect_sound = False
    first = lab.wrap(llama, lab.store())
    first.prefill(PROMPT)
    first.close()
    paths = files_by_start(first.store)
    first.store.close()
    flip(paths[2], paths[3])
    cached = lab.wrap(llama, lab.store())
    with pytest.warns(StoreWarning, match="was dropped"):
        usage = cached.prefill(PROMPT)
    assert usage.cached_tokens == 2 * BLOCK


def test_a_file_that_vanishes(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(model)
    run(cached, PROMPT)
    lab.leave_only(cached, "disk")
    files_by_start(cached.store)[2].unlink()
    assert tokens(run(cached, PROMPT)) == tokens(plain(model, PROMPT))
    assert cached.usage.cached_tokens_by_tier == {"disk": 2 * BLOCK}


# ------------------------------------------------------------------------- catalog and folder


def test_a_catalog_replaced_by_garbage_between_runs(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    first = lab.wrap(model, lab.store())
    run(first, PROMPT)
    first.close()
    first.store.close()
    for path in (lab.folder / "store").glob("kvembed.db*"):
        path.write_bytes(os.urandom(20_000))
    with pytest.warns(StoreWarning, match="made again"):
        store = lab.store()
    cached = lab.wrap(model, store)
    assert tokens(run(cached, PROMPT)) == tokens(plain(model, PROMPT))
    assert cached.usage.cached_tokens_by_tier == {"disk": PROMPT.shape[1] - 1}


def test_a_catalog_broken_under_an_open_store(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    lab.expect_sound = False
    cached = lab.wrap(llama, max_live=0)
    run(cached, PROMPT)
    lab.leave_only(cached, "disk")
    for path in (lab.folder / "store").glob("kvembed.db*"):
        with path.open("r+b") as file:
            file.write(os.urandom(path.stat().st_size))
    prompts = several()
    found, messages = run_all(cached, prompts)
    assert found == [tokens(plain(llama, prompt)) for prompt in prompts]
    assert messages


def test_a_read_only_store(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    first = lab.wrap(model, lab.store())
    run(first, PROMPT)
    first.close()
    first.store.close()
    before = sorted(p.name for p in (lab.folder / "store").rglob("*") if not p.name.endswith(("-shm", "-wal")))
    cached = lab.wrap(model, lab.store(read_only=True), max_live=0)
    other = random_ids(60, seed=9)
    for prompt in (PROMPT, other, other):
        assert tokens(run(cached, prompt)) == tokens(plain(model, prompt))
    assert cached.usage.cached_tokens_by_tier == {"cpu": 59}  # kept in memory, not on disk
    with pytest.raises(StoreReadOnlyError, match="read_only=False"):
        cached.store.clear()
    cached.close()
    cached.store.close()
    after = sorted(p.name for p in (lab.folder / "store").rglob("*") if not p.name.endswith(("-shm", "-wal")))
    assert after == before


def test_two_models_and_two_stores_on_one_folder(lab: Lab, model: Any, llama: Any, plain: Callable[..., Any]) -> None:
    one, two = lab.wrap(model, lab.store()), lab.wrap(model, lab.store())
    history = PROMPT
    for turn in range(6):
        cached = (one, two)[turn % 2]
        reply = run(cached, history)
        assert tokens(reply) == tokens(plain(model, history))
        if turn:
            # The other's last turn; over windows at least its own last one, two turns ago.
            assert cached.usage.cached_tokens >= history.shape[1] - (23 if model is llama else 36)
        cached.store.flush()
        history = cat(reply, random_ids(4, seed=turn))


def test_two_models_on_one_store(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    store = lab.store()
    one, two = lab.wrap(model, store), lab.wrap(model, store)
    run(one, PROMPT)
    assert tokens(run(two, PROMPT)) == tokens(plain(model, PROMPT))
    assert two.usage.cached_tokens_by_tier == {"cpu": PROMPT.shape[1] - 1}
    two.close()
    run(one, PROMPT)
    assert one.usage.cached_tokens_by_tier == {"live": PROMPT.shape[1] - 1}
