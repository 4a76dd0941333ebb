"""Load or compute? A stored prefix is restored only where that is faster than computing it again.

Both speeds are measured as calls go by: prefill tokens a second for each model, bytes a second for each tier that is
not memory. Where loading is slow but not hopeless, both happen at once: KV of later tokens does not have to wait for
that of earlier ones to be *loaded*, so the first blocks are computed while the last ones are read. With ``c`` tokens
a second computed and ``b`` loaded, ``n`` tokens then take ``n / (b + c)`` seconds, and the first ``n * c / (b + c)``
of them are computed. (From both ends as in Cake, arXiv:2410.03065, which lets them meet where they may; here the split
is decided beforehand, so that the computed part ends on a block edge.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvembed._codecs.names import LOSSLESS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._matching import Match
    from kvembed._store import KVStore, StoredBlock

__all__ = ["Plan", "Speeds", "plan_of"]

_IN_MEMORY = frozenset({"cpu", "gpu"})
"""Tiers that are as fast as memory."""

_MARGIN = 1.25
"""Computing must be this much faster, as measured, to be preferred: measurements are noisy, reading costs no power."""

_WORTH_SPLITTING_S = 0.02
_BELIEVED_S = 600.0
"""A speed is measured anew after ten minutes: a disk that was cold, or busy, must not be avoided for ever."""

_SAME = 0.25
_LEAST_BYTES = 4 << 20  # less tells latency, not bandwidth
_MACHINE = bytes(32)  # notes of no model


@dataclass(frozen=True)
class Plan:
    """What to do with a match.

    Args:
        match: What of it to use.
        front: Leading tokens to compute while the blocks after them are read; a multiple of the block size.
        reason: Why not all of it is restored, in words, or None.
    """

    match: Match
    front: int = 0
    reason: str | None = None


class Speeds:
    """Bytes a second of the tiers of one store, measured as calls go by and kept in its catalog.

    Each codec has a speed of its own: stored bytes a second, decoding included.

    Args:
        store: Whose tiers they are.
    """

    def __init__(self, store: KVStore) -> None:
        self._store = store

    def of(self, tier: str, codec: str = LOSSLESS) -> float | None:
        """Return bytes a second, or None while nobody measured it lately."""
        noted = self._store.get_note(_MACHINE, self._name(tier, codec))
        if not isinstance(noted, dict):
            return None
        speed, at = noted.get("bytes_per_second"), noted.get("at")
        if not isinstance(speed, int | float) or not isinstance(at, int | float) or speed <= 0:
            return None
        return float(speed) if 0 <= time.time() - at <= _BELIEVED_S else None

    @staticmethod
    def _name(tier: str, codec: str) -> str:
        return f"speed/{tier}" if codec == LOSSLESS else f"speed/{tier}/{codec}"

    def note(self, tier: str, nbytes: int, seconds: float, codec: str = LOSSLESS) -> None:
        """Remember one measurement."""
        if _is_copied(tier, codec) or nbytes < _LEAST_BYTES or seconds <= 0:
            return
        speed, known = nbytes / seconds, self.of(tier, codec)
        if known is not None:
            if abs(speed / known - 1.0) < _SAME:
                return  # not worth a write to the catalog
            speed = 0.5 * speed + 0.5 * known
        self._store.set_note(_MACHINE, self._name(tier, codec), {"bytes_per_second": speed, "at": time.time()})


def _is_copied(tier: str, codec: str) -> bool:
    """True for what is no slower than memory: never slower than computing. What has to be decoded may be."""
    return tier in _IN_MEMORY and codec == LOSSLESS


def plan_of(match: Match, speeds: Speeds, rate: float | None, *, may_split: bool) -> Plan:
    """Decide what of a match to restore.

    Args:
        match: What is stored.
        speeds: How fast tiers are read.
        rate: Tokens a second of a cold prefill, or None when it was never measured.
        may_split: Whether leading blocks can be computed while others are read: rows of full attention only.
    """
    stored = match.stored
    near = next((i for i, (block, _) in enumerate(stored) if not _is_copied(block.tier, block.info.codec)), len(stored))
    far = stored[near:]
    if rate is None or not far:
        return Plan(match)
    load_s = _seconds_to_load(far, speeds)
    if load_s is None:
        return Plan(match)
    tokens = sum(n for _, n in far)
    compute_s = tokens / rate
    size = match.block_size
    if may_split and near == 0 and match.live is None:
        share = load_s / (load_s + compute_s)
        blocks = min(int(tokens * share) // size, len(match.blocks))
        gain_s = min(load_s, compute_s) - load_s * (1.0 - blocks * size / tokens)
        if blocks and tokens - blocks * size >= size and gain_s >= _WORTH_SPLITTING_S:
            return Plan(match, blocks * size, f"computed {blocks * size:,} tokens while the rest was loading")
    if load_s <= _MARGIN * compute_s:
        return Plan(match)
    kept = replace(match, blocks=match.blocks[:near], tail=None, snapshot=None)
    if match.snapshot is not None:
        kept = replace(kept, blocks=[])  # without their state the blocks before it are of no use
    return Plan(kept, 0, "recomputed: faster than loading")


def _seconds_to_load(far: Sequence[tuple[StoredBlock, int]], speeds: Speeds) -> float | None:
    known: dict[tuple[str, str], float | None] = {}
    total = 0.0
    for block, n in far:
        kind = block.tier, block.info.codec
        if kind not in known:
            known[kind] = None if _is_copied(*kind) else speeds.of(*kind)
        speed = known[kind]
        if speed is not None:
            total += block.info.nbytes * n / max(1, block.info.n_tokens) / speed
        elif not _is_copied(*kind):
            return None
    return total
