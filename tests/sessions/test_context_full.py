"""A context that is full, and a cache that is switched off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvembed import CacheBypassWarning, ContextFullError

if TYPE_CHECKING:
    from kvembed import CachedModel

LONG = "tell me of rivers, and of bread, and of the moon; " * 4


def test_a_full_context_says_what_leaving_out_turns_would_cost(model: CachedModel) -> None:
    session = model.session("long")
    for _ in range(3):
        session.send(LONG * 12, max_new_tokens=4)
    with pytest.raises(ContextFullError, match='when_full="drop"') as full:
        session.send(LONG * 12, max_new_tokens=4)
    error = full.value
    assert (error.limit, error.new_tokens) == (8192, 4)
    assert error.tokens > error.limit
    session.when_full = "drop"
    reply = session.send(LONG * 12, max_new_tokens=4)
    assert reply.dropped_turns == error.dropped_turns
    assert reply.usage.computed_tokens <= error.again_tokens


def test_switched_off_nothing_is_computed_or_pinned_for_a_document(
    model: CachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVEMBED_DISABLE", "1")
    session = model.session("plain")
    usage = session.attach(LONG, name="rivers")
    assert usage.bypass_reason == "KVEMBED_DISABLE is set"
    with pytest.warns(CacheBypassWarning, match="KVEMBED_DISABLE"):
        assert session.send("What of bread?", max_new_tokens=4).usage.cached_tokens == 0
    model.store.flush()
    assert model.store.ls() == []
