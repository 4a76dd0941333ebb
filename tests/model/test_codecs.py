"""Calls over a store with a lossy codec: close to a cold one, marked as such, and never mistaken for lossless ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed._codecs.names import LOSSLESS
from tests.families.zoo import build

from ._lab import BLOCK, assert_equal_bits, cat, leave_only, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from kvembed import CachedModel
    from kvembed._store_types import StoredBlock

    from ._lab import Lab

PROMPT = random_ids(5 * BLOCK + 9, seed=3)
LOSSY = ("bf16", "k16v8", "int8", "fp8")


def stored_blocks(cached: CachedModel, ids: torch.Tensor) -> list[StoredBlock]:
    """What this model's own store would restore of a prompt."""
    found = cached._engine.match(np.asarray(ids[0], dtype="<i4"), deterministic=False)
    return [stored for stored, _ in found.stored]


def drift(a: Any, b: Any) -> float:
    """The largest difference of the first logits, relative to their spread."""
    x, y = a.logits[0].float(), b.logits[0].float()
    return float((x - y).abs().max() / (x.max() - x.min()))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_call_over_lossy_blocks_is_close_and_says_so(lab: Lab, model: Any, codec: str, tier: str) -> None:
    plain = run_full(model, PROMPT, new=4)
    cached = lab.wrap(model, lab.store(codec=codec))
    run(cached, PROMPT, new=4)
    assert cached.usage.lossy is None  # computed: nothing came out of a codec
    leave_only(cached, tier)
    warm = run_full(cached, PROMPT, new=4)
    usage = cached.usage
    assert usage.cached_tokens_by_tier.get(tier, 0) >= 5 * BLOCK
    assert usage.lossy == codec
    assert f"stored as {codec}" in str(usage)
    assert codec in usage._repr_mimebundle_()["text/html"]
    assert usage.to_dict()["lossy"] == codec
    assert 0 < drift(plain, warm) < {"bf16": 0.02, "k16v8": 0.04, "int8": 0.04, "fp8": 0.25}[codec]
    # What is live then was computed on top of it.
    run(cached, PROMPT, new=4)
    run(cached, warm.sequences, new=1)
    assert set(cached.usage.cached_tokens_by_tier) == {"live"}
    assert cached.usage.lossy == codec


@pytest.mark.parametrize("codec", LOSSY)
def test_deterministic_calls_and_lossless_stores_do_not_touch_lossy_blocks(lab: Lab, llama: Any, codec: str) -> None:
    first = lab.wrap(llama, lab.store(codec=codec), deterministic=True)
    cold = run_full(first, PROMPT)
    leave_only(first, "disk")
    again = run_full(first, PROMPT)
    assert first.usage.cached_tokens == 0
    assert first.usage.lossy is None
    assert_equal_bits(cold, again)
    first.close()
    first.store.close()

    second = lab.wrap(llama, lab.store())
    assert second.lookup(PROMPT).num_tokens == 0
    plain = run_full(second, PROMPT)
    assert (second.usage.cached_tokens, second.usage.lossy) == (0, None)
    assert second.usage.miss_reason is not None
    assert codec in second.usage.miss_reason
    assert_equal_bits(cold, plain)
    # It has put its own in their place, which the lossy store reads as well: they are exact.
    leave_only(second, "disk")
    assert_equal_bits(cold, run_full(lab.wrap(llama, second.store, deterministic=True), PROMPT))
    second.store.flush()
    third = lab.wrap(llama, lab.store(codec=codec), deterministic=True)
    assert_equal_bits(cold, run_full(third, PROMPT))
    assert third.usage.cached_tokens == 5 * BLOCK
    assert third.usage.lossy is None


def test_what_is_computed_on_top_of_a_lossy_block_is_never_taken_for_lossless(lab: Lab, llama: Any) -> None:
    """Turn by turn, through tails, restarts and forks, in both directions."""
    text = PROMPT
    for turn in range(4):
        cached = lab.wrap(llama, lab.store(codec="int8"))
        text = torch.as_tensor([tokens(run(cached, text, new=5))])
        assert cached.usage.lossy == (None if turn == 0 else "int8")
        text = cat(text, random_ids(7, seed=turn))
        cached.close()
        cached.store.close()
    store = lab.store(codec="int8")
    infos = [row.info for row in store._disk.catalog.rows()]  # type: ignore[union-attr]
    assert {info.codec for info in infos} == {"int8"}
    assert not any(info.exact for info in infos)
    lossless = lab.wrap(llama, lab.store())
    assert lossless.lookup(text).num_tokens == 0
    assert tokens(run(lossless, text)) == tokens(run(llama, text))
    store.close()


def test_a_tensor_that_was_stored_as_it_is_on_top_of_lossy_ones_is_lossy(
    lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = lab.wrap(llama, lab.store(codec="int8"))
    run(cached, PROMPT, new=2)
    leave_only(cached, "cpu")
    # From here on nothing can be encoded, as if every tensor had a value that is not finite.
    monkeypatch.setattr("kvembed._codecs.blocks._quantised", lambda *_: None)
    longer = cat(PROMPT, random_ids(3 * BLOCK, seed=9))
    run(cached, longer, new=2)
    assert cached.usage.lossy == "int8"
    infos = [stored.info for stored in stored_blocks(cached, cat(longer, random_ids(1)))]
    assert not infos  # live
    cached.drop_live()
    infos = [stored.info for stored in stored_blocks(cached, cat(longer, random_ids(1)))]
    assert len(infos) >= 8
    assert {info.codec for info in infos} == {"int8"}
    new = cached.store.open(infos[-2].key)
    assert new is not None
    assert new.info.nbytes == new.layout.nbytes(new.info.n_tokens)  # in no codec, and marked all the same
    # Computed from the start, the same blocks are lossless, and take the place of those.
    cached.drop_live()
    fresh = lab.wrap(llama, lab.store("other", codec="int8"))
    run(fresh, longer, new=2)
    fresh.drop_live()
    assert {stored.info.codec for stored in stored_blocks(fresh, longer)[:7]} == {LOSSLESS}


def test_a_fork_before_the_first_lossy_token_is_not_marked(lab: Lab, llama: Any) -> None:
    """Blocks of a lossless store, and lossy ones after them."""
    first = lab.wrap(llama, lab.store())
    run(first, PROMPT[:, : 2 * BLOCK + 1], new=1)
    first.close()
    first.store.close()
    cached = lab.wrap(llama, lab.store(codec="fp8"))
    run(cached, PROMPT, new=2)
    assert cached.usage.lossy is None
    assert [stored.info.codec for stored in stored_blocks(cached, PROMPT)] == []
    leave_only(cached, "disk")
    codecs = [stored.info.codec for stored in stored_blocks(cached, PROMPT)]
    assert codecs[:2] == [LOSSLESS] * 2
    assert set(codecs[2:]) == {"fp8"}
    run(cached, PROMPT, new=2)
    assert cached.usage.lossy == "fp8"
    fork = cat(PROMPT[:, : 2 * BLOCK], random_ids(2 * BLOCK, seed=5))
    assert tokens(run(cached, fork)) == tokens(run(llama, fork))
    assert cached.usage.cached_tokens >= 2 * BLOCK
    assert cached.usage.lossy is None


@pytest.mark.parametrize("family", ["falcon_h1", "qwen3_next"])
def test_states_stay_as_they_are_and_know_what_they_were_computed_on(lab: Lab, family: str) -> None:
    model = build(family)
    cached = lab.wrap(model, lab.store(codec="int8"))
    run(cached, PROMPT, new=2)
    leave_only(cached, "disk")
    longer = cat(PROMPT, random_ids(2 * BLOCK, seed=8))
    warm = run_full(cached, longer, new=2)
    assert cached.usage.lossy == "int8"
    assert drift(run_full(model, longer, new=2), warm) < 0.04
    rows = cached.store._disk.catalog.rows() if cached.store.flush() else ()  # type: ignore[union-attr]
    states = [row.info for row in rows if row.info.n_tokens == 1]
    assert {info.codec for info in states} == {LOSSLESS, "int8"}  # of the first call, and of the one on top of it
    for info in states:
        source = cached.store.open(info.key)
        assert source is not None
        assert source.layout.tensors[0].name == "tree"
        source.close()


def test_blocks_in_a_codec_are_audited_within_its_bound(lab: Lab, llama: Any) -> None:
    first = lab.wrap(llama, lab.store(codec="int8"), audit=1.0)
    run(first, PROMPT, new=2)
    leave_only(first, "disk")
    run(first, PROMPT, new=2)
    assert first.usage.audited
    assert first.usage.cached_tokens >= 5 * BLOCK
    report = first.recheck()
    assert report.ok
    assert report.lossy == report.blocks > 0
    assert "int8 0.08" in str(report)
    first.close()
    first.store.close()
    # Also from a store that would not read them.
    second = lab.wrap(llama, lab.store())
    report = second.recheck()
    assert report.ok
    assert report.lossy == report.blocks > 0
    # Another text's values are out of any bound.
    other = random_ids(6 * BLOCK, seed=77)
    lab.expect_sound = False
    third = lab.wrap(llama, lab.store("third", codec="int8", max_disk_bytes=0))
    run(third, PROMPT, new=1)
    run(third, other, new=1)
    cpu = third.store._cpu
    assert cpu is not None
    third.drop_live()
    mine, foreign = (stored_blocks(third, ids)[2].info.key for ids in (PROMPT, other))
    good, bad = cpu.get(mine), cpu.get(foreign)
    assert good is not None
    assert bad is not None
    cpu.remove([mine])
    cpu.put(type(good)(good.info, good.token_ids, good.layout, bad.data))
    report = third.recheck()
    assert len(third.store.take_problems()) == 1
    assert [key for key, _ in report.bad] == [mine.hex()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_codec_that_changes_nothing_is_lossless(lab: Lab, makers: dict[str, Any], dtype: str) -> None:
    model = makers["llama"]().to(getattr(torch, dtype))
    cached = lab.wrap(model, lab.store(codec="bf16"), deterministic=True)
    run(cached, PROMPT, new=2)
    leave_only(cached, "disk")
    cold = run_full(lab.wrap(model, lab.store("cold"), deterministic=True), PROMPT)
    warm = run_full(cached, PROMPT)
    if dtype == "bfloat16":
        assert cached.usage.cached_tokens == 5 * BLOCK
        assert cached.usage.lossy is None
    else:
        assert cached.usage.cached_tokens == 0
    assert_equal_bits(cold, warm)
