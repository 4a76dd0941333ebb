"""``explain()``: each kind of miss made to happen, and named, with the right token in its context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import CachedModel

from ._lab import BLOCK, Lab, random_ids, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog while the band plays on and the moon rises behind the hills."
TIERS = ["live", "cpu", "disk"]


@pytest.fixture
def cached(lab: Lab, llama: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> CachedModel:
    return lab.wrap(llama, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("tier", TIERS)
def test_hit(lab: Lab, cached: CachedModel, tier: str) -> None:
    cached.prefill(TEXT)
    lab.leave_only(cached, tier)
    explanation = cached.explain(TEXT)
    assert explanation.kind == "hit"
    # From blocks, a last piece of fewer than 8 tokens is computed again.
    assert len(TEXT) - 1 - 7 <= explanation.cached_tokens <= len(TEXT) - 1
    assert explanation.cached_tokens == cached.lookup(TEXT).num_tokens


def test_never_seen(cached: CachedModel) -> None:
    cached.prefill(TEXT)
    explanation = cached.explain("Something else altogether, of which nothing is known here.")
    assert (explanation.kind, explanation.position, explanation.cached_tokens) == ("never_seen", 0, 0)
    assert explanation.here == "Somethin"
    assert explanation.there is None


def test_too_short(cached: CachedModel) -> None:
    assert cached.explain("Hi").kind == "too_short"


@pytest.mark.parametrize("tier", TIERS)
def test_diverged(lab: Lab, cached: CachedModel, tier: str) -> None:
    cached.prefill(TEXT)
    lab.leave_only(cached, tier)
    at = TEXT.index("lazy")
    explanation = cached.explain(TEXT[:at] + "tired cat, which sleeps all day long.")
    assert explanation.kind == "diverged"
    assert explanation.position == at
    assert (explanation.expected_token, explanation.actual_token) == ("l", "t")
    assert explanation.here == TEXT[at - 12 : at] + "tired ca"
    assert explanation.there == TEXT[at - 12 : at + 8]
    assert explanation.nearest_tokens >= at + 8
    assert at - 7 <= explanation.cached_tokens <= at
    lines = str(explanation).splitlines()
    marker = next(line for line in lines if line.strip() == "^")
    assert lines[1][marker.index("^")] == "t"
    assert lines[2][marker.index("^")] == "l"


def test_going_on_past_what_is_stored(cached: CachedModel) -> None:
    cached.prefill(TEXT)
    explanation = cached.explain(TEXT + " And then nothing more happened that evening.")
    assert explanation.kind == "diverged"
    assert explanation.position == explanation.cached_tokens == len(TEXT)
    assert explanation.expected_token is None
    assert "ends here" in explanation.hint


@pytest.mark.parametrize("tier", TIERS)
def test_template_changed(lab: Lab, cached: CachedModel, tier: str) -> None:
    cached.prefill("You are helpful. " + TEXT)
    lab.leave_only(cached, tier)
    explanation = cached.explain("You are very helpful. " + TEXT)
    assert explanation.kind == "template_changed"
    assert explanation.position == len("You are ")
    assert (explanation.expected_token, explanation.actual_token) == ("h", "v")
    assert "5 tokens were put in" in explanation.hint


@pytest.mark.parametrize("tier", TIERS)
def test_date_changed(lab: Lab, cached: CachedModel, tier: str) -> None:
    cached.prefill(f"Today is 2026-03-14. {TEXT}")
    lab.leave_only(cached, tier)
    explanation = cached.explain(f"Today is 2026-03-15. {TEXT}")
    assert explanation.kind == "date_changed"
    assert explanation.position == len("Today is 2026-03-1")
    assert (explanation.expected_token, explanation.actual_token) == ("4", "5")


def test_evicted(lab: Lab, llama: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    store = lab.store(max_cpu_bytes=None, max_disk_bytes=200 << 10)
    cached = lab.wrap(llama, store, tokenizer=tiny_tokenizer, max_live=0)
    cached.prefill(TEXT)
    store.flush()
    assert cached.explain(TEXT).kind == "hit"
    for seed in range(4):
        run(cached, random_ids(100, seed=seed), 2)
        store.flush()
    explanation = cached.explain(TEXT)
    assert explanation.kind == "evicted"
    assert explanation.position == explanation.cached_tokens == cached.lookup(TEXT).num_tokens
    assert "raise max_disk_bytes" in explanation.hint
    cached.prefill(TEXT)
    assert cached.usage.miss_reason is None  # only generate() says why


def test_removed(cached: CachedModel) -> None:
    cached.prefill(TEXT)
    cached.drop_live()
    entry = cached.store.ls()[0]
    cached.store.remove(entry.id)
    explanation = cached.explain(TEXT)
    assert explanation.kind == "removed"
    assert explanation.cached_tokens == 0


def test_quarantined(lab: Lab, cached: CachedModel) -> None:
    lab.expect_sound = False
    cached.prefill(TEXT)
    lab.leave_only(cached, "disk")
    store = cached.store
    assert store._disk is not None
    row = next(row for row in store._disk.catalog.rows() if row.info.start == 2 * BLOCK)
    path = store._disk.path(row.info.key)
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    assert store.verify(fix=True).fixed == 1
    store.take_problems()
    explanation = cached.explain(TEXT)
    assert explanation.kind == "quarantined"
    assert explanation.position == explanation.cached_tokens == 2 * BLOCK
    assert explanation.here[explanation.here_offset or 0] == TEXT[2 * BLOCK]


def test_other_model(lab: Lab, makers: dict[str, Callable[..., Any]], cached: CachedModel) -> None:
    cached.prefill(TEXT)
    other = lab.wrap(makers["llama"](seed=4), cached.store, tokenizer=cached.tokenizer)
    explanation = other.explain(TEXT)
    assert explanation.kind == "other_model"
    assert set(explanation.differences) == {"weights"}
    assert explanation.nearest_tokens == len(TEXT)
    run(other, torch.tensor([cached.tokenizer(TEXT)["input_ids"]]))
    assert other.usage.miss_reason is not None
    assert other.usage.miss_reason.startswith("model changed (weights: ")


def test_several_differences_are_all_named(
    lab: Lab, makers: dict[str, Callable[..., Any]], cached: CachedModel
) -> None:
    cached.prefill(TEXT)
    model = makers["llama"](num_hidden_layers=2, attn_implementation="eager")
    explanation = lab.wrap(model, cached.store, tokenizer=cached.tokenizer).explain(TEXT)
    assert explanation.kind == "other_model"
    assert {"weights", "config", "attention", "cache"} <= set(explanation.differences)
    assert explanation.differences["attention"] == ("sdpa", "eager")
    assert explanation.differences["cache"] == ("full x3", "full x2")


def test_deterministic_says_what_it_costs(lab: Lab, llama: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    cached = lab.wrap(llama, tokenizer=tiny_tokenizer, deterministic=True)
    cached.prefill(TEXT)
    at = 3 * BLOCK + 5
    explanation = cached.explain(TEXT[:at] + "###" * 10)
    assert explanation.kind == "diverged"
    assert (explanation.position, explanation.cached_tokens) == (at, 3 * BLOCK)
    assert "deterministic=True" in explanation.hint


def test_explaining_computes_and_keeps_nothing(cached: CachedModel) -> None:
    before = cached.store.stats()
    cached.explain(TEXT)
    cached.lookup(TEXT)
    assert cached.store.stats() == before
    assert len(cached._engine.live) == 0
