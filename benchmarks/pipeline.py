"""How much of reading a prefix from disk hides behind the compute: restore by layer against restore first.

Every round runs each case once with the block files dropped from the page cache before it (``posix_fadvise``), and
once more with them in it. Tokens, logits and KV of both ways must be the same bits.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING, Any

import common
import torch

from kvembed import CachedModel, KVStore
from kvembed._plan import Plan
from kvembed._restore import Restore
from kvembed._transfer.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUFFIX = 20
OPTIONS = {"max_new_tokens": 1, "do_sample": False}


def main() -> None:
    args = common.arguments(__doc__ or "", rounds=7, lengths=(4096,))
    model, tokenizer = common.load(args.model)
    ids = common.text_ids(tokenizer)
    rows = []
    for length in args.lengths:
        with tempfile.TemporaryDirectory() as folder:
            with (
                KVStore(folder) as store,
                CachedModel(model, tokenizer, store=store, progress=False, deterministic=True) as cached,
            ):
                ask(cached, ids, length, 0)
                store.flush()
            os.sync()
            # Only the disk: what was read is not kept in memory for the next round.
            with (
                KVStore(folder, max_cpu_bytes=None) as store,
                CachedModel(model, tokenizer, store=store, progress=False, deterministic=True) as cached,
                KVStore(max_disk_bytes=None) as memory,
                CachedModel(model, tokenizer, store=memory, progress=False) as live,
            ):
                rows.append(measure(cached, live, ids, length, args.rounds))
    common.report(
        "pipeline",
        rows,
        [
            f"Suffix of {SUFFIX} tokens over a document on disk; medians over rounds, each round runs every case.",
            "read: the restore alone. compute: the same call with the document live. first: the restore ends before "
            "the forward begins. by layer: as kvembed does it. hidden: (read + compute - by layer) / read in a round. "
            "gained: (first - by layer) / read.",
            "possible: the same with what the simulator says of these times, every layer reading and computing alike.",
        ],
    )


def measure(cached: CachedModel, live: CachedModel, ids: torch.Tensor, length: int, rounds: int) -> dict[str, Any]:
    """Return one row of the table."""
    prefix = common.prompt(ids, length, SUFFIX)
    live.generate(prefix, attention_mask=torch.ones_like(prefix), **OPTIONS)
    files = sorted(cached.store.path.glob("blocks/*/*.safetensors")) if cached.store.path else []
    found: dict[str, list[float]] = {}
    for r in range(1, rounds + 1):
        for state in ("cold", "cached"):

            def prepare(state: str = state) -> None:
                cached.drop_live()
                if state == "cold":
                    drop(files)

            prepare()
            found.setdefault(f"read {state}", []).append(read_alone(cached, ids, length))
            # In turn, so that neither always comes after the same thing.
            ways = ["first", "layer"] if r % 2 else ["layer", "first"]
            for way in ways:
                prepare()
                with restore_first() if way == "first" else contextlib.nullcontext():
                    ask(cached, ids, length, r)
                assert set(cached.usage.cached_tokens_by_tier) == {"disk"}, cached.usage
                found.setdefault(f"{way} {state}", []).append(cached.usage.ttft_s)
        prompt = common.prompt(ids, length, SUFFIX, r)
        live.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS)
        found.setdefault("compute", []).append(live.usage.ttft_s)
        assert set(live.usage.cached_tokens_by_tier) == {"live"}, live.usage
    # Apart from the timing: what a caller holds on to is memory that the next call has to touch anew.
    cached.drop_live()
    whole = ask_for_all(cached, ids, length)
    with restore_first():
        same = equal(whole, ask_for_all(cached, ids, length))
    return row_of(cached, length, found, same)


def row_of(cached: CachedModel, length: int, found: dict[str, list[float]], same: bool) -> dict[str, Any]:
    """Return medians, and what is hidden, round by round."""
    row: dict[str, Any] = {
        "document tokens": length,
        "KV MB": length * cached.kv_bytes_per_token / 1e6,
        "compute ms": 1e3 * common.median(found["compute"]),
    }
    layers = sum(1 for _ in cached._engine.spec.rows())
    for state in ("cold", "cached"):
        read, first, layer = (found[f"{name} {state}"] for name in ("read", "first", "layer"))
        hidden = [(a + c - b) / a for a, b, c in zip(read, layer, found["compute"], strict=True)]
        gained = [(f - b) / a for a, b, f in zip(read, layer, first, strict=True)]
        alone, compute = common.median(read), common.median(found["compute"])
        possible = simulate([compute / layers] * layers, [2 * alone / layers] * layers).hidden
        row |= {
            f"{state}: read ms": 1e3 * alone,
            f"{state}: first ms": 1e3 * common.median(first),
            f"{state}: by layer ms": 1e3 * common.median(layer),
            f"{state}: hidden": common.median(hidden),
            f"{state}: gained": common.median(gained),
            f"{state}: possible": possible,
        }
    return {**row, "same bits": same}


def drop(files: list[Path]) -> None:
    """Have files read from the disk again."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def ask(cached: CachedModel, ids: torch.Tensor, length: int, variant: int, **options: Any) -> Any:
    """Generate one token."""
    forget_speed(cached)
    prompt = common.prompt(ids, length, SUFFIX, variant)
    return cached.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS, **options)


def ask_for_all(cached: CachedModel, ids: torch.Tensor, length: int) -> Any:
    """Return all that comes of a call that restores."""
    result = ask(cached, ids, length, 1, return_dict_in_generate=True, output_logits=True)
    assert set(cached.usage.cached_tokens_by_tier) == {"disk"}, cached.usage
    return result


def forget_speed(cached: CachedModel) -> None:
    """Have the next call load, whatever the last ones measured."""
    cached.store.set_note(bytes(32), "speed/disk", None)


def read_alone(cached: CachedModel, ids: torch.Tensor, length: int) -> float:
    """Return the seconds of a restore with nothing beside it."""
    engine = cached._engine
    prompt = common.prompt(ids, length, SUFFIX)[0].numpy().astype("int32")
    match = engine.match(prompt, deterministic=True)
    assert match.tokens == length, match

    def restore() -> None:
        _, under_way, _ = engine.open(Plan(match).match, prompt, length + SUFFIX + 256)
        assert under_way is not None
        under_way.finish()

    return common.timed(restore)[0]


@contextlib.contextmanager
def restore_first() -> Iterator[None]:
    """Have restores end before the forward begins."""
    start = Restore.start

    def start_and_wait(self: Restore) -> None:
        start(self)
        for index in range(len(self._layers)):
            self._ready[index].wait()

    Restore.start = start_and_wait
    try:
        yield
    finally:
        Restore.start = start


def equal(a: Any, b: Any) -> bool:
    """True when two calls have the same tokens, logits and KV, bit for bit."""
    pairs = [(a.sequences, b.sequences), (torch.stack(a.logits), torch.stack(b.logits))]
    for x, y in zip(a.past_key_values.layers, b.past_key_values.layers, strict=True):
        pairs += [(x.keys, y.keys), (x.values, y.values)]
    return all(torch.equal(x, y) for x, y in pairs)


if __name__ == "__main__":
    main()
