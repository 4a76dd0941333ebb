"""When snapshots of recurrent state are stored, and which of them a prompt can start from.

Used for models with layers whose state belongs to a position (see `kvembed._snapshot`). Reuse falls back to the
nearest snapshot: at the end of a turn or a document, at the last block edge of a prefill, and every few
blocks, so that the bytes of snapshots stay about as many as those of KV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed import hf
from kvembed._block import Block, BlockInfo
from kvembed._codecs.names import LOSSLESS, fidelity
from kvembed._keys import SNAPSHOT_IDS, block_key, snapshot_key

if TYPE_CHECKING:
    from kvembed._cachespec import CacheSpec
    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence
    from kvembed._store import KVStore, StoredBlock

__all__ = ["Snapshots"]

_MOST_BLOCKS_BETWEEN = 8
_LEAST_BLOCK_NBYTES = 1 << 20


class Snapshots:
    """Snapshots of one model in one store.

    Args:
        store: Where they are kept.
        spec: Shape of the model's cache.
        namespace: The model's fingerprint digest.
    """

    def __init__(self, store: KVStore, spec: CacheSpec, namespace: bytes) -> None:
        self._store = store
        self._spec = spec
        self._namespace = namespace

    def due(self, sequence: LiveSequence) -> bool:
        """True at a block edge when enough KV was stored since the last snapshot to afford another."""
        size = self._spec.block_size
        gap = (len(sequence.ids) - sequence.snapshot_at) // size
        if gap < 1 or len(sequence.ids) % size:
            return False
        afford = gap * max(size * self._spec.token_nbytes, _LEAST_BLOCK_NBYTES)
        return gap >= _MOST_BLOCKS_BETWEEN or hf.states_nbytes(sequence.cache) <= afford

    def put(self, sequence: LiveSequence, prefix_key: bytes) -> None:
        """Store the state at the end of a sequence.

        Args:
            sequence: Whose cache is not inside a forward.
            prefix_key: Names all of its tokens.
        """
        position = len(sequence.ids)
        sequence.snapshot_at = position
        codec = sequence.codec_at(position)
        exact = position > 0 and sequence.exact == position and codec == LOSSLESS
        key = snapshot_key(prefix_key)
        known = self._store.lookup([key])
        if known and known[0].info.rank >= (fidelity(codec), exact):
            return
        layout, data = hf.capture_states(sequence.cache, self._spec)
        info = BlockInfo(key, prefix_key, self._namespace, position, 1, exact, data.nbytes, codec)
        self._store.put(Block(info, SNAPSHOT_IDS, layout, data))

    def find(
        self, root: bytes, keys: list[bytes], ids: TokenIds, reach: int, *, exact_only: bool
    ) -> tuple[int, StoredBlock] | None:
        """Return the longest prefix of ``ids`` within ``reach`` tokens that has a snapshot.

        Args:
            root: Root key.
            keys: Keys of the full blocks of ``ids``.
            ids: The prompt.
            reach: Tokens whose rows are stored.
            exact_only: Take only snapshots that give a cold call's bits.
        """
        size = self._spec.block_size
        edges = self._known([snapshot_key(key) for key in keys[: reach // size]], exact_only)
        best_edge = max(edges, default=-1)
        floor = (best_edge + 1) * size
        if not exact_only:
            # A turn may have ended anywhere: every position after the best edge is tried, from the last block back.
            for start in range(reach // size * size, floor - 1, -size):
                parent = keys[start // size - 1] if start else root
                inside = [
                    snapshot_key(block_key(parent, ids[start:end]))
                    for end in range(start + 1, min(start + size, reach + 1))
                ]
                found = self._known(inside, exact_only)
                if found:
                    last = max(found)
                    return start + 1 + last, found[last]
        return (floor, edges[best_edge]) if edges else None

    def _known(self, keys: list[bytes], exact_only: bool) -> dict[int, StoredBlock]:
        return {
            i: stored
            for i, stored in enumerate(self._store.known(keys))
            if stored is not None and (stored.info.exact or not exact_only)
        }

    def load(self, cache: Any, stored: StoredBlock) -> bool:
        """Put a snapshot into a new cache; False when it is gone or bad (then the cache must not be used)."""
        source = self._store.open(stored.info.key, exact_only=stored.info.exact)
        if source is None:
            return False
        try:
            if not np.array_equal(source.token_ids, SNAPSHOT_IDS) or source.info.start != stored.info.start:
                raise ValueError("holds another position than its key says")
            hf.load_states(cache, self._spec, source)
        except Exception as error:  # whatever it is, this state must not be used
            self._store.discard(stored.info.key, f"{type(error).__name__}: {error}")
            return False
        finally:
            source.close()
        return True
