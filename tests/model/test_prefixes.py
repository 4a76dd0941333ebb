"""What a model knows of its store's tree beside the store: live caches, and sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._lab import BLOCK, random_ids, run

if TYPE_CHECKING:
    from ._lab import Lab

PROMPT = random_ids(4 * BLOCK + 3)


def test_live_caches_are_a_tier(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama)
    run(cached, PROMPT)
    (row,) = cached.prefixes().rows
    assert (row.start, row.end, row.tier) == (0, PROMPT.shape[1] + 11, "live")
    assert row.nbytes["live"] == row.end * cached.kv_bytes_per_token == row.nbytes["cpu"]
    live, *stored = cached.tiers()
    assert (live.name, live.blocks, [tier.name for tier in stored]) == ("live", 1, ["cpu", "disk"])
    assert 0 < live.nbytes <= live.max_bytes
    assert stored[0].nbytes >= live.nbytes + row.nbytes["cpu"]  # it is counted there too
    cached.drop_live()
    assert cached.prefixes().rows[0].tier == "cpu"
    cached.drop_live(release=True)  # without it the memory is kept for the next cache
    assert cached.tiers()[0].nbytes == 0


def test_a_model_that_is_passed_through_shows_what_is_stored(lab: Lab, llama: Any, monkeypatch: Any) -> None:
    cached = lab.wrap(llama)
    run(cached, PROMPT, new=2)
    monkeypatch.setattr(type(cached), "support", "for some reason")
    assert cached.prefixes().rows[0].tier == "cpu"
    assert [tier.name for tier in cached.tiers()] == ["cpu", "disk"]
