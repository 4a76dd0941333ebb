"""Audited hits: stored KV computed again and compared, now and then or for a whole store.

Checksums say that the bytes are those that were stored; only computing them again says that they were right.
A block is computed on top of the stored ones before it. Where that differs, the whole prefix is computed from the
start, which tells which blocks are wrong; they are quarantined, and the call answers from what is left.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed import hf
from kvembed._codecs.names import LOSSLESS, worst
from kvembed._oracle import error_limit, relative_error
from kvembed._snapshot import decode_states
from kvembed._units import format_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvembed._block import BlockInfo
    from kvembed._engine import Engine
    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence
    from kvembed._matching import Match
    from kvembed._store_types import StoredBlock

__all__ = ["AuditReport", "Auditor"]

_LOSSY_LIMITS = {"bf16": 0.02, "k16v8": 0.05, "int8": 0.08, "fp8": 0.25}
"""Largest difference, relative to the spread of a tensor's values, that blocks of a codec may have: some times what was
measured on real models, and less than what another text's KV has."""


@dataclass(frozen=True)
class AuditReport:
    """What recomputing the blocks of one model found.

    Args:
        blocks: Blocks that were computed again and compared.
        skipped: Blocks that cannot be: with media, of another salt's, or after a state that is not kept.
        lossy: How many of ``blocks`` have been through a lossy codec; they are held to the codec's bound.
        bad: For each block that differs, its key (hex) and by how much, relative to the spread of its values.
        largest: Largest difference of the others.
    """

    blocks: int = 0
    skipped: int = 0
    bad: tuple[tuple[str, float], ...] = ()
    largest: float = 0.0
    lossy: int = 0

    @property
    def ok(self) -> bool:
        """True when nothing differed."""
        return not self.bad

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON types."""
        bad = [{"key": key, "difference": drift} for key, drift in self.bad]
        return {
            "blocks": self.blocks,
            "skipped": self.skipped,
            "bad": bad,
            "largest_difference": self.largest,
            "lossy": self.lossy,
            "ok": self.ok,
        }

    def __str__(self) -> str:
        lines = [
            f"{format_count(self.blocks)} blocks computed again, {len(self.bad)} of them wrong and quarantined, "
            f"{format_count(self.skipped)} skipped; largest difference of the others {self.largest:.2g}"
        ]
        if self.lossy:
            lines.append(
                f"{format_count(self.lossy)} of them have been in a lossy codec, and were only held to its bound: "
                f"{', '.join(f'{name} {limit:g}' for name, limit in _LOSSY_LIMITS.items())}"
            )
        return "\n".join([*lines, *(f"{key[:16]}: differs by {drift:.2g}" for key, drift in self.bad)])


@dataclass
class _Findings:
    checked: int = 0
    lossy: int = 0
    largest: float = 0.0
    bad: dict[bytes, float] = field(default_factory=dict)


class Auditor:
    """Recomputes stored blocks of one model.

    Args:
        engine: Where the model runs.
        share: Part of the calls with stored blocks that are audited, from 0 to 1.
    """

    def __init__(self, engine: Engine, share: float) -> None:
        self._engine = engine
        self._share = share
        self._random = random.Random()  # not the caller's generator: sampling must not notice

    # --- one call --------------------------------------------------------------------------------------

    def is_due(self, match: Match) -> bool:
        """Decide whether a call with this match is audited."""
        return bool(match.blocks) and self._share > 0 and self._random.random() < self._share

    def audit(self, ids: TokenIds, match: Match) -> bool:
        """Compute one of the matched blocks again; quarantine what is wrong; True when all is well.

        Args:
            ids: The prompt.
            match: What is stored of it.
        """
        number = self._random.randrange(len(match.blocks))
        if match.live is None and match.snapshot is None and self._is_right(ids, match, number):
            return True
        found = self._recompute(ids, match)
        self._discard(found)
        return not found.bad

    def _is_right(self, ids: TokenIds, match: Match, number: int) -> bool:
        """Compute one block on top of the stored ones before it."""
        engine, size = self._engine, self._engine.block_size
        start = number * size
        before = replace(match, blocks=match.blocks[:number], tail=None)
        sequence, restore, _ = engine.open(before, ids, start + size)
        if restore is not None:
            restore.finish()
        if len(sequence.ids) != start:
            return False
        engine.prefill(sequence, ids, upto=start + size)
        drift = self._drift(sequence, match.blocks[number].info, size)
        # Those before it count too: it was computed on top of them.
        codec = worst(*(stored.info.codec for stored in match.blocks[: number + 1]))
        return drift is not None and drift <= self._limit(codec)

    def _recompute(self, ids: TokenIds, match: Match) -> _Findings:
        """Compute a whole match from the start, comparing each block on the way."""
        found = _Findings()
        sequence = self._engine.new_sequence(match.tokens + self._engine.block_size)
        for stored, n in match.stored:
            self._compare(sequence, ids, stored.info, n, found)
        if match.snapshot is not None:
            self._compare_state(sequence, match.snapshot, found)
        return found

    # --- a whole store ---------------------------------------------------------------------------------

    def sweep(self, on_progress: Callable[[int, int], object] | None = None) -> AuditReport:
        """Compute every block of this model and salt again; quarantine what is wrong.

        Args:
            on_progress: Called with (blocks seen, blocks there are).
        """
        engine, found, skipped, seen = self._engine, _Findings(), 0, set[bytes]()
        paths = list(self._paths())
        total = len({info.key for path, tails in paths for info in [*path, *tails]})
        for path, tails in paths:
            ids = self._ids_of(path)
            if ids is None or bool((ids < 0).any()):
                skipped += len({info.key for info in [*path, *tails]} - seen)
                seen |= {info.key for info in [*path, *tails]}
                continue
            sequence = engine.new_sequence(len(ids) + 2 * engine.block_size)
            for info in path:
                self._compare(sequence, ids, info, info.n_tokens, found, skip=info.key in seen)
                seen.add(info.key)
                if on_progress is not None:
                    on_progress(len(seen), total)
            for tail in tails:
                seen.add(tail.key)
                own = engine.store.token_ids(tail.key)
                back = len(sequence.ids)
                if own is None or bool((own < 0).any()) or sequence.has_state or back != tail.start:
                    skipped += 1
                    continue
                self._compare(sequence, np.concatenate([ids, own]), tail, len(own), found)
                if sequence.can_keep(back, engine.block_size):
                    sequence.cut(back, engine.block_size)
        self._discard(found)
        bad = tuple((key.hex(), drift) for key, drift in found.bad.items())
        return AuditReport(found.checked, skipped, bad, found.largest, found.lossy)

    def _paths(self) -> Iterator[tuple[list[BlockInfo], list[BlockInfo]]]:
        """Yield each longest run of full blocks from the root, and the tails at its end."""
        store, size = self._engine.store, self._engine.block_size
        open_ends: list[tuple[bytes, list[BlockInfo]]] = [(self._engine.root, [])]
        while open_ends:
            parent, path = open_ends.pop()
            children = store.children(parent, any_codec=True)
            full = [info for info in children if info.n_tokens == size]
            tails = [info for info in children if info.n_tokens < size]
            if path and (tails or not full):
                yield path, tails
            elif tails:
                yield [], tails
            open_ends += [(info.key, [*path, info]) for info in full]

    def _ids_of(self, path: list[BlockInfo]) -> TokenIds | None:
        parts = [self._engine.store.token_ids(info.key) for info in path]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return np.concatenate([np.empty(0, dtype="<i4"), *known]).astype("<i4")

    # --- comparing -------------------------------------------------------------------------------------

    def _limit(self, codec: str) -> float:
        limit = error_limit(self._engine.model)
        return limit if codec == LOSSLESS else max(limit, _LOSSY_LIMITS.get(codec, math.inf))

    def _compare(
        self, sequence: LiveSequence, ids: TokenIds, info: BlockInfo, n: int, found: _Findings, *, skip: bool = False
    ) -> None:
        """Go on with a computation up to the end of a block, and compare it."""
        self._engine.prefill(sequence, ids, upto=info.start + n)
        if not skip:
            self._note(info, self._drift(sequence, info, n), found)
        for layer in hf.layers_of(sequence.cache):
            layer.captured = len(sequence.ids)  # rows outside a window may go now

    def _drift(self, sequence: LiveSequence, info: BlockInfo, n: int) -> float | None:
        """Return the largest difference of a stored block from the rows of a cache; None when it is gone."""
        source = self._engine.store.open(info.key, any_codec=True)
        if source is None:
            return None
        largest = 0.0
        try:
            for number, layer in enumerate(hf.layers_of(sequence.cache)):
                for k, rows in enumerate(layer.rows(info.start, info.start + n)):
                    heads, width = rows.shape[1], rows.shape[3] * rows.element_size()
                    data = np.empty((heads, n, width), dtype=np.uint8)
                    source.read_into(2 * number + k, [data])
                    largest = max(largest, _difference(rows[0].cpu(), torch.from_numpy(data).view(rows.dtype)))
        except Exception as error:  # bytes that cannot be read are wrong as well
            self._engine.store.discard(info.key, f"{type(error).__name__}: {error}")
            return None
        finally:
            source.close()
        return largest

    def _compare_state(self, sequence: LiveSequence, snapshot: StoredBlock, found: _Findings) -> None:
        source = self._engine.store.open(snapshot.info.key)
        if source is None:
            return
        try:
            stored = decode_states(source)
        finally:
            source.close()
        drift = 0.0
        for number, attributes in stored.items():
            computed = hf.state_tensors(sequence.cache.layers[number])
            pairs = zip(hf.tensors_in(attributes), computed, strict=True)
            drift = max([drift, *(_difference(a.cpu(), b.cpu()) for a, b in pairs)])
        self._note(snapshot.info, drift, found)

    def _note(self, info: BlockInfo, drift: float | None, found: _Findings) -> None:
        if drift is None:
            return
        found.checked += 1
        found.lossy += info.codec != LOSSLESS
        if drift <= self._limit(info.codec):
            found.largest = max(found.largest, drift)
        else:
            found.bad[info.key] = drift

    def _discard(self, found: _Findings) -> None:
        for key, drift in found.bad.items():
            self._engine.store.discard(key, f"differs from what the model computes now by {drift:.2g}")


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    drift = relative_error(a.double(), b.double())
    return drift if drift == drift else float("inf")  # NaN compares with nothing
