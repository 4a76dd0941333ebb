"""What a call allocates: no logits of whole prompts, no cache that grows, no memory that is kept for ever."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import _memory
from kvembed._rows import Rows
from kvembed.hf import FullLayer, SlidingLayer

from ._lab import BLOCK, Lab, assert_close, cat, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

LONG = random_ids(20 * BLOCK + 9)


class StopAfter:
    """A stopping criterion: makes room for many tokens, and generates few."""

    def __init__(self, new: int) -> None:
        self.new = new
        self.calls = 0

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return torch.full((1,), self.calls >= self.new)


def test_logits_are_made_for_the_last_position_only_and_none_in_prefill(
    lab: Lab, makers: dict[str, Callable[..., Any]]
) -> None:
    for name in ("llama", "gemma3"):
        model = makers[name]()
        shapes: list[int] = []
        model.lm_head.register_forward_hook(lambda module, args, output, s=shapes: s.append(output.shape[1]))
        cached = lab.wrap(model, lab.store(name))
        shapes.clear()
        run(cached, LONG, 4)
        assert shapes == [0] * 20 + [1] * 4
        cached.prefill(cat(LONG, random_ids(50, seed=1)))
        lab.leave_only(cached, "cpu")
        run(cached, LONG, 4)
        assert set(shapes) == {0, 1}


def test_a_model_that_takes_only_a_number_of_logits_is_served_too(
    lab: Lab, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(model, LONG, 6)
    original = model.forward
    asked: list[Any] = []

    def forward(*args: Any, logits_to_keep: int = 0, position_ids: Any = None, **kwargs: Any) -> Any:
        if isinstance(logits_to_keep, torch.Tensor):
            raise TypeError("logits_to_keep is a number here")
        asked.append(logits_to_keep)
        return original(*args, logits_to_keep=logits_to_keep, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    cached = lab.wrap(model)
    asked.clear()  # the trial asks for several
    assert torch.equal(run(cached, LONG, 6), plain)
    assert torch.equal(run(cached, LONG, 6), plain)
    assert cached.usage.cached_tokens > 0
    assert set(asked) == {1}


def buffers(cached: Any) -> list[Any]:
    return list(cached._engine.live._sequences[0].cache.layers)


def count_growth(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Return a list that gets the type of every layer whose rows are moved to a larger buffer."""
    grown: list[type] = []
    original = Rows._grow
    monkeypatch.setattr(Rows, "_grow", lambda self, rows: grown.append(type(self)) or original(self, rows))
    return grown


def test_a_cold_or_restored_cache_never_grows(lab: Lab, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = lab.wrap(model)
    grown = count_growth(monkeypatch)
    for tier in ("live", "cpu", "disk"):
        run(cached, LONG, 60)
        capacities = {layer.capacity for layer in buffers(cached) if isinstance(layer, FullLayer)}
        assert capacities <= {LONG.shape[1] + 60 + BLOCK}
        cached.drop_live()
        if tier == "cpu":
            lab.leave_only(cached, "disk")
    # Windows do, in a long reply: its tokens are kept until the call ends, to be stored.
    assert FullLayer not in grown


def test_a_taken_over_cache_grows_rarely(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = lab.wrap(llama)
    grown = count_growth(monkeypatch)
    history = LONG
    for turn in range(12):
        history = cat(run(cached, history, 10), random_ids(10, seed=turn))
    # By a quarter each time, in each of three layers: three times over 240 tokens, not at every turn.
    assert len(grown) == 9


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_rows_of_a_window_stay_bounded(
    lab: Lab, models: dict[str, Any], plain: Callable[..., Any], family: str
) -> None:
    model = models[family]
    cached = lab.wrap(model)
    prompt = random_ids(600)
    assert tokens(run(cached, prompt, 20)) == tokens(plain(model, prompt, 20))
    sliding = [layer for layer in buffers(cached) if isinstance(layer, SlidingLayer)]
    assert len(sliding) == (3 if family == "mistral" else 2)
    for layer in sliding:
        assert layer.capacity <= 2 * 24 + 2 * BLOCK
    lab.leave_only(cached, "cpu")
    assert_close(run_full(cached, prompt, 20), plain(model, prompt, 20))


def our_layers() -> list[Any]:
    """Return every cache layer of ours that is alive."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (FullLayer, SlidingLayer)]


def test_caches_are_let_go(lab: Lab, model: Any) -> None:
    before = len(our_layers())  # tests that failed, or broke off, may keep some
    cached = lab.wrap(model, max_live=2)
    for seed in range(6):
        run(cached, random_ids(60, seed=seed), 3)
        run_full(cached, random_ids(60, seed=100 + seed), 3)  # given away, and dropped by the caller
    # Those of two live sequences, and no others.
    assert len(our_layers()) == before + 2 * model.config.num_hidden_layers
    cached.close()
    assert len(our_layers()) == before


def test_a_closed_model_is_freed(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    import weakref

    from kvembed import CachedModel

    model = makers["llama"]()
    reference = weakref.ref(model)
    cached = CachedModel(model, store=lab.store(), block_size=BLOCK, progress=False)
    run(cached, LONG, 3)
    cached.close()
    del cached, model
    gc.collect()
    assert reference() is None


# --------------------------------------------------------------------- memory used again

ROOM = 3000
"""Tokens that make a cache large enough (2.3 MB) for memory that is kept and handed out again."""


def test_memory_that_is_used_again_holds_nothing_of_before(
    lab: Lab, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = _memory._mapping
    monkeypatch.setattr(_memory, "_mapping", lambda nbytes: made.append(nbytes) or original(nbytes))
    monkeypatch.setattr(_memory, "_HUGE", 64 << 10)
    cached = lab.wrap(model, max_live=1)
    for seed in range(8):
        prompt = random_ids(100 + 10 * seed, seed=seed)
        found = run(cached, prompt, ROOM - prompt.shape[1], stopping_criteria=[StopAfter(6)])
        assert tokens(found) == tokens(run(model, prompt, 6))
        lab.leave_only(cached, ("live", "cpu", "disk")[seed % 3])
        turn = cat(found, random_ids(9, seed=seed))
        found = run(cached, turn, ROOM - turn.shape[1], stopping_criteria=[StopAfter(6)])
        assert tokens(found) == tokens(run(model, turn, 6))
        live = cached._engine.live
        assert live.nbytes + cached._engine._pool.free_bytes <= live.max_bytes + max(made, default=0)
    if made:  # only where the system has such memory
        assert len(made) <= 2


def test_a_returned_cache_keeps_its_memory_to_itself(lab: Lab, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "_HUGE", 64 << 10)
    cached = lab.wrap(model, max_live=1)
    prompt = random_ids(100)
    given = run_full(cached, prompt, ROOM, stopping_criteria=[StopAfter(5)])
    expected = run_full(model, prompt, 5)
    assert_close(given, expected)
    for seed in range(3):  # these would write over it
        run(cached, random_ids(150, seed=seed), ROOM, stopping_criteria=[StopAfter(5)])
        cached.drop_live()
        gc.collect()
    assert_close(given, expected)
    # Only one tensor of it is kept: the memory of all is kept with it.
    kept = given.past_key_values.layers[0].keys
    copy = kept.clone()
    del given
    gc.collect()
    for seed in range(3, 5):
        run(cached, random_ids(150, seed=seed), ROOM, stopping_criteria=[StopAfter(5)])
        cached.drop_live()
        gc.collect()
    assert torch.equal(kept, copy)
