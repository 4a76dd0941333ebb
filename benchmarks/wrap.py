"""What it costs to wrap a model, and to see before each call that it is still the same one."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import common

from kvembed import CachedModel, KVStore
from kvembed._attention import AttentionSwitch
from kvembed._oracle import run_oracle


def one_round(model: Any, tokenizer: Any) -> dict[str, float]:
    """Seconds of everything, once."""
    with tempfile.TemporaryDirectory() as folder, KVStore(folder) as store:
        wrap = partial(CachedModel, model, tokenizer, store=store, progress=False)
        times = {}
        times["wrap, never seen"], cached = common.timed(wrap)
        wrapped = cached._engine.wrapped
        spec, fingerprint = wrapped.spec, wrapped.fingerprint
        assert spec is not None
        assert fingerprint is not None
        attention = wrapped.attn_implementation
        switch = AttentionSwitch(model, spec.block_size)
        switch.enabled = True
        times["of it the trial"] = common.timed(partial(run_oracle, model, spec, switch, wrapped._logits))[0]
        times["of it the checksum of all weights"] = common.timed(partial(fingerprint.refresh, attention))[0]
        scans = [common.timed(partial(fingerprint.changed, attention)) for _ in range(21)]
        assert not any(changed for _, changed in scans)
        times["scan before a call"] = common.median([seconds for seconds, _ in scans])
        cached.close()
        times["wrap, seen before"], cached = common.timed(wrap)
        cached.close()
    return times


def main() -> None:
    args = common.arguments(__doc__ or "")
    model, tokenizer = common.load(args.model)
    one_round(model, tokenizer)  # warms up
    rounds = [one_round(model, tokenizer) for _ in range(args.rounds)]
    rows = [{"what": name, "ms": 1e3 * common.median([times[name] for times in rounds])} for name in rounds[0]]
    weights = sum(p.numel() for p in model.parameters())
    common.report("wrap", rows, [f"Median of {args.rounds} rounds, {weights:,} weights in float32."])


if __name__ == "__main__":
    main()
