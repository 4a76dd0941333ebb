"""What a model's calls and documents do to the budgets of their store."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from kvembed import StoreWarning

from ._lab import random_ids, run, tokens

if TYPE_CHECKING:
    from ._lab import Lab


def test_a_document_is_written_when_pinned_although_the_day_is_spent(lab: Lab, llama: Any, tiny_tokenizer: Any) -> None:
    store = lab.store(max_write_bytes_per_day=0)
    cached = lab.wrap(llama, store, tiny_tokenizer)
    lab.expect_sound = False  # what is spent is one warning
    # When depends on how soon the writer gets to the first block.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        document = cached.document("A text that goes on for some blocks, but not for long. " * 3, name="doc")
        store.flush()
        assert store.stats().tiers[1].blocks == 0
        assert document.ask("What?", max_new_tokens=2).usage.cached_tokens > 100
    (warning,) = caught
    assert warning.category is StoreWarning
    assert "write budget" in str(warning.message)
    document.pin()
    store.flush()
    assert store.stats().tiers[1].blocks >= document.tokens // 16
    assert store.stats().written_today > 0


def test_calls_are_counted_with_what_they_reused(lab: Lab, llama: Any) -> None:
    store = lab.store()
    cached = lab.wrap(llama, store)
    ids = random_ids(100)
    first = tokens(run(cached, ids))
    lab.leave_only(cached, "disk")
    assert tokens(run(cached, ids)) == first
    stats = store.stats()
    assert (stats.calls, stats.prompt_tokens) == (2, 200)
    reused = stats.reused_tokens or {}
    assert sum(reused.values()) == cached.usage.cached_tokens > 80
    assert stats.tiers[1].ever_hits > 0
    # Whole blocks of prompt and reply, the second time found.
    curve = store.hit_curve()
    assert (curve.calls, curve.best) == (2, 0.5)
    cached.prefill(random_ids(50, seed=1))
    assert store.stats().calls == 3
