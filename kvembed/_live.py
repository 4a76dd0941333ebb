"""Live sequences: the caches of the last few calls, kept whole as the fastest tier.

A follow-up turn takes its cache over, cut back to the shared prefix, and copies nothing. A prompt that shares only
a small part of a live sequence gets a copy of that part, so that the longer conversation stays live.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvembed import hf
from kvembed._codecs.names import LOSSLESS, worst
from kvembed._keys import common_prefix

if TYPE_CHECKING:
    from kvembed._keys import TokenIds

__all__ = ["LivePool", "LiveSequence"]


@dataclass(eq=False)
class LiveSequence:
    """A cache of ours and what it stands for.

    Args:
        cache: The `DynamicCache` with our layers.
        root: Root key: model fingerprint and salt.
        ids: Token ids whose KV the cache holds.
        exact: Leading tokens whose KV is bit for bit that of a cold grid prefill; a multiple of the block size.
        captured: Leading tokens that are in stored blocks; a multiple of the block size.
        keys: Keys of its leading full blocks, as far as they were needed.
        has_state: True when some layer holds a state: then it is good at its very end only.
        snapshot_at: Where a snapshot of that state was stored last.
        faithful: Leading tokens whose KV has been through no lossy codec, nor was computed on such; None for all.
        codec: The least faithful codec that the KV after those has been through.
    """

    cache: Any
    root: bytes
    ids: TokenIds
    exact: int = 0
    captured: int = 0
    keys: list[bytes] = field(default_factory=list)
    has_state: bool = False
    snapshot_at: int = 0
    faithful: int | None = None
    codec: str = LOSSLESS

    def mark_lossy(self, start: int, codec: str) -> None:
        """Note that KV from position ``start`` on, and with it all that is computed after it, has been in a codec."""
        if codec != LOSSLESS:
            self.faithful = start if self.faithful is None else min(self.faithful, start)
            self.codec = worst(self.codec, codec)

    def codec_at(self, end: int) -> str:
        """Return the least faithful codec that the KV of the tokens before ``end`` has been through."""
        return LOSSLESS if self.faithful is None or end <= self.faithful else self.codec

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return hf.cache_nbytes(self.cache)

    def cut(self, length: int, block_size: int) -> None:
        """Keep the first ``length`` tokens."""
        hf.truncate(self.cache, length)
        self.ids = self.ids[:length]
        edge = length // block_size * block_size
        self.exact = min(self.exact, edge)
        self.captured = min(self.captured, edge)
        del self.keys[length // block_size :]
        if self.faithful is not None and length <= self.faithful:
            self.faithful, self.codec = None, LOSSLESS

    def can_keep(self, length: int, block_size: int) -> bool:
        """True when every layer still holds what ``length`` tokens need."""
        if self.has_state and length != len(self.ids):
            return False
        whole_from = length // block_size * block_size
        return all(layer.can_keep(length, whole_from) for layer in hf.layers_of(self.cache))


class LivePool:
    """The most recent sequences, newest first.

    Args:
        max_sequences: How many to keep.
        max_bytes: How many bytes to keep.
    """

    def __init__(self, max_sequences: int, max_bytes: int) -> None:
        self.max_sequences = max_sequences
        self.max_bytes = max_bytes
        self._sequences: list[LiveSequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all of them."""
        return sum(s.nbytes for s in self._sequences)

    def best(self, root: bytes, ids: TokenIds, *, exact_only: bool, block_size: int) -> tuple[LiveSequence | None, int]:
        """Return the sequence sharing the longest usable prefix with ``ids``, and its length."""
        found, longest = None, 0
        for sequence in self._sequences:
            if sequence.root != root:
                continue
            n = common_prefix(sequence.ids, ids)
            if exact_only:
                n = min(n // block_size * block_size, sequence.exact)
            if n > longest and sequence.can_keep(n, block_size):
                found, longest = sequence, n
        return found, longest

    def of_root(self, root: bytes) -> list[LiveSequence]:
        """Return the sequences of one model and salt, newest first."""
        return [s for s in self._sequences if s.root == root]

    def take(self, sequence: LiveSequence) -> None:
        """Remove a sequence: a call is about to append to it."""
        self._sequences.remove(sequence)

    def add(self, sequence: LiveSequence) -> list[LiveSequence]:
        """Add a sequence as the newest; the oldest go when there are too many, and are returned."""
        self._sequences.insert(0, sequence)
        gone: list[LiveSequence] = []
        while self._sequences and (len(self._sequences) > self.max_sequences or self.nbytes > self.max_bytes):
            gone.append(self._sequences.pop())
        return gone

    def clear(self) -> None:
        """Forget all of them."""
        self._sequences.clear()
