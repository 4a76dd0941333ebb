"""How `KVStore` finds and opens blocks: by key, by parent and by their first tokens, in memory before the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from kvembed._codecs.names import changed_dtypes, fidelity, worst
from kvembed._keys import PROBE_TOKENS, probe_of, snapshot_key
from kvembed._store_admin import StoreAdmin
from kvembed._store_types import StoredBlock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._block import BlockInfo, Layout
    from kvembed._blockfile import BlockFileSource
    from kvembed._keys import TokenIds
    from kvembed._tiers._base import BlockSource

__all__ = ["StoreFinder"]

_IDS_KEPT = 4096  # token ids of blocks on disk kept in memory: 1 KB each


class StoreFinder(StoreAdmin):
    """Base of `KVStore`, apart only to keep each file short enough to be read at once."""

    # -- codecs ------------------------------------------------------------------------------------

    def reads(self, info: BlockInfo) -> bool:
        """True for a block that is at least as faithful as what this store's codec makes."""
        return fidelity(info.codec) >= fidelity(self._codec)

    def rank_of(self, info: BlockInfo, layout: Layout) -> tuple[int, bool]:
        """Return the rank that a block (not in a codec yet) would have here, as far as its layout tells."""
        if any(spec.dtype in changed_dtypes(self._codec) for spec in layout.tensors if spec.name in ("k", "v")):
            return fidelity(worst(info.codec, self._codec)), False
        return info.rank

    def codec_of(self, key: bytes) -> str | None:
        """Return the least faithful codec that a stored block has been through, whether it is read here or not."""
        self._enter()
        infos = [tier.contains([key])[0] for tier in self._memory]
        if self._disk is not None:
            with self._quiet("codec_of"):
                infos += self._disk.contains([key])
        return max((info.codec for info in infos if info is not None), key=fidelity, default=None)

    # -- finding -----------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes], *, exact_only: bool = False) -> list[StoredBlock]:
        """Return the longest run of stored blocks from the first of ``keys`` on.

        Args:
            keys: Chained keys of a prompt's blocks, first to last.
            exact_only: Stop at the first block that is not bit for bit what a cold prefill makes.
        """
        self._enter()
        keys = list(keys)
        result: list[StoredBlock] = []
        here = self._here(keys, exact_only=exact_only)
        on_disk: dict[bytes, BlockInfo] = {}
        if self._disk is not None and None in here:
            with self._quiet("lookup"):
                wanted = [key for key, stored in zip(keys, here, strict=True) if stored is None]
                on_disk = {info.key: info for info in self._disk.contains(wanted) if info is not None}
        for key, stored in zip(keys, here, strict=True):
            if stored is not None:
                result.append(stored)
                continue
            found = on_disk.get(key)
            if found is None or (exact_only and not found.exact) or not self.reads(found):
                break
            result.append(StoredBlock(found, "disk"))
        return result

    def _here(self, keys: Sequence[bytes], *, exact_only: bool = False) -> list[StoredBlock | None]:
        """Return what memory has of each key, on a device or on the host."""
        result: list[StoredBlock | None] = [None] * len(keys)
        for tier in self._memory:
            for i, info in enumerate(tier.contains(keys)):
                if result[i] is None and info is not None and (info.exact or not exact_only) and self.reads(info):
                    result[i] = StoredBlock(info, tier.name)
        return result

    def known(self, keys: Sequence[bytes]) -> list[StoredBlock | None]:
        """Return, for each key, the stored block, or None when there is none."""
        self._enter()
        keys = list(keys)
        result = self._here(keys)
        missing = [i for i, stored in enumerate(result) if stored is None]
        if self._disk is not None and missing:
            with self._quiet("lookup"):
                for i, info in zip(missing, self._disk.contains([keys[i] for i in missing]), strict=True):
                    result[i] = None if info is None or not self.reads(info) else StoredBlock(info, "disk")
        return result

    def find_tail(self, parent: bytes, ids: TokenIds) -> tuple[StoredBlock, int] | None:
        """Return the block after ``parent`` that shares the most leading tokens with ``ids``.

        Args:
            parent: Key of the last block that matched whole, or the root.
            ids: The tokens that follow; may be longer than a block.

        Returns:
            The block and how many tokens it shares, at least `PROBE_TOKENS`; None when there is none.
        """
        self._enter()
        if len(ids) < PROBE_TOKENS:
            return None
        probe = probe_of(parent, ids)
        candidates: dict[bytes, StoredBlock] = {}
        if self._disk is not None:
            with self._quiet("find_tail"):
                candidates = {info.key: StoredBlock(info, "disk") for info in self._disk.tails(parent, probe)}
        for tier in reversed(self._memory):
            candidates |= {info.key: StoredBlock(info, tier.name) for info in tier.tails(parent, probe)}
        best: tuple[StoredBlock, int] | None = None
        best_rank: tuple[int, tuple[int, bool], bool, int] | None = None
        for stored in candidates.values():
            if not self.reads(stored.info):
                continue
            own = self._token_ids(stored.info.key)
            if own is None:
                continue
            n = min(len(own), len(ids))
            differs = np.flatnonzero(own[:n] != ids[:n])
            shared = int(differs[0]) if len(differs) else n
            # Among equals the better one, then the faster one, then the shorter: less to read.
            rank = (shared, stored.info.rank, stored.tier != "disk", -stored.info.n_tokens)
            if shared >= PROBE_TOKENS and (best_rank is None or rank > best_rank):
                best, best_rank = (stored, shared), rank
        return best

    def token_ids(self, key: bytes) -> TokenIds | None:
        """Return the token ids of a stored block, or None when it is not here."""
        self._enter()
        return self._token_ids(key)

    def _token_ids(self, key: bytes) -> TokenIds | None:
        for tier in self._memory:
            block = tier.get(key)
            if block is not None:
                return block.token_ids
        with self._lock:
            ids = self._ids.get(key)
            if ids is not None:
                self._ids.move_to_end(key)
                return ids
        if self._disk is None:
            return None
        ids = self._disk.read_ids(key)
        if ids is not None:
            # Kept without asking whether the block still is here: a key stands for its ids for ever.
            with self._lock:
                self._ids[key] = ids
                while len(self._ids) > _IDS_KEPT:
                    self._ids.popitem(last=False)
        return ids

    def children(self, parent: bytes, *, any_codec: bool = False) -> list[BlockInfo]:
        """Return what is known of every stored block of tokens that follows ``parent``.

        Args:
            parent: Key of a block, or a root.
            any_codec: Those that this store does not read as well: to look at, not to be used.
        """
        self._enter()
        found: dict[bytes, BlockInfo] = {}
        if self._disk is not None:
            with self._quiet("children"):
                found = {info.key: info for info in self._disk.children(parent)}
        for tier in self._memory:
            found |= {info.key: info for info in tier.children(parent)}
        found.pop(snapshot_key(parent), None)
        return [info for info in found.values() if any_codec or self.reads(info)]

    def why_missing(self, key: bytes) -> str | None:
        """Return ``"evicted"``, ``"quarantined"`` or ``"removed"`` for a block that was here once, or None."""
        self._enter()
        reason = None
        if self._catalog is not None:
            with self._quiet("why_missing"):
                reason = self._catalog.why_missing(key)
        return reason

    # -- reading and writing -----------------------------------------------------------------------

    def open(self, key: bytes, *, exact_only: bool = False, any_codec: bool = False) -> BlockSource | None:
        """Open a block in the fastest tier that has it, or None when it is gone; one in a codec is decoded.

        Args:
            key: The block.
            exact_only: Pass over a copy that is not exact.
            any_codec: Also one that this store does not read: to look at, not to be used.
        """
        self._enter()
        for tier in (self._gpu, self._cpu, self._disk):
            source: BlockSource | None = tier.open(key) if tier is not None else None
            if source is None:
                continue
            if (exact_only and not source.info.exact) or not (any_codec or self.reads(source.info)):
                if self._disk is not None and source.tier == "disk":
                    # Looked for because its row says that it is good: the catalog is another's, or damaged.
                    with self._quiet("open"):
                        self._disk.correct(cast("BlockFileSource", source))
                source.close()
                continue
            info, counts = source.info, self._tier_hits[source.tier]
            for i, n in enumerate((1, info.n_tokens, info.nbytes)):
                counts[i] += n
            names = (f"{source.tier}_hits", f"{source.tier}_hit_tokens", f"{source.tier}_hit_bytes")
            self._ledger.add_later(**dict(zip(names, (1, info.n_tokens, info.nbytes), strict=True)))
            if source.tier == "disk" and self._catalog is not None:
                self._catalog.hit_later(key)
            return source if source.layout.dtype is None else self._decoding(source)
        return None

    @staticmethod
    def _decoding(source: BlockSource) -> BlockSource:
        from kvembed._codecs.blocks import DecodingSource

        return DecodingSource(source)
