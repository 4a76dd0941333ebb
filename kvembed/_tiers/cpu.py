"""`CpuTier`: blocks in host memory; leaves go first, those that cost least to get back before others."""

from __future__ import annotations

import heapq
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvembed._errors import ConfigError
from kvembed._eviction import SECONDS_PER_TOKEN, worth
from kvembed._keys import probe_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from kvembed._block import Block, BlockInfo, Layout
    from kvembed._keys import TokenIds
    from kvembed._tiers._base import BlockSource

__all__ = ["CpuTier", "MemorySource"]

_READ_SECONDS_PER_BYTE = 1e-9  # what is on disk too is read back at about 1 GB/s


class MemorySource:
    """A block in host memory opened for reading: `kvembed._tiers._base.BlockSource`.

    It holds the block itself, so eviction meanwhile does not touch its bytes.

    Args:
        block: The block.
        tier: Name of the tier it came from.
    """

    def __init__(self, block: Block, tier: str = "cpu") -> None:
        self.info: BlockInfo = block.info
        self.token_ids: TokenIds = block.token_ids
        self.layout: Layout = block.layout
        self.tier = tier
        self._block = block

    def read_into(self, index: int, rows: Sequence[np.ndarray], skip: int = 0) -> None:
        """Copy tensors; see `kvembed._tiers._base.BlockSource.read_into`."""
        for number, target in enumerate(rows, start=index):
            tensor = self._block.tensor(number)
            n = target.shape[1]
            if target.shape != (tensor.shape[0], n, tensor.shape[2]) or not 0 <= skip <= tensor.shape[1] - n:
                raise ConfigError(
                    f"rows {target.shape} do not fit tensor {number} of a block of {tensor.shape[1]} tokens"
                )
            np.copyto(target, tensor[:, skip : skip + n], casting="no")

    def view(self, index: int, n: int, skip: int) -> np.ndarray:
        """Return ``n`` tokens of a tensor without a copy, uint8 ``[heads, n, row_nbytes]``."""
        return self._block.tensor(index)[:, skip : skip + n]

    def read(self, index: int, count: int) -> list[np.ndarray]:
        """Return tensors without a copy; see `kvembed._tiers._base.BlockSource.read`."""
        return [self._block.tensor(number) for number in range(index, index + count)]

    def close(self) -> None:
        """Do nothing: memory goes with the last reference."""


@dataclass
class _Entry:
    block: Block
    probe: bytes
    used: int
    dirty: bool
    on_disk: bool = False
    covered: bool = False
    priority: float = 0.0


class CpuTier:
    """Blocks in host memory.

    The budget covers the blocks and what is `reserve`d for live caches. Only clean leaves are evicted: a
    block whose children are here stays, since they could not be reached without it, and so does a block
    that still waits to be written to disk.

    Which of them goes is decided as on disk (`kvembed._eviction`). A block that is on disk too costs a read; one
    that is only here would have to be computed again.

    Args:
        max_bytes: Budget.
        seconds_per_token: Of a prefill, by a model's digest.
    """

    name = "cpu"

    def __init__(
        self, max_bytes: int, seconds_per_token: Callable[[bytes], float | None] = lambda digest: None
    ) -> None:
        self.max_bytes = max_bytes
        self._seconds_per_token = seconds_per_token
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._entries: dict[bytes, _Entry] = {}
        self._children: dict[bytes, set[bytes]] = {}
        self._reserved: dict[str, int] = {}
        self._pinned: frozenset[bytes] = frozenset()
        self._nbytes = 0
        self._clock = 0
        self._age = 0.0
        # Leaves by priority, then last use. Entries are not removed when a leaf is used again or gets a child: what is
        # popped is checked instead. A linked list in order of use would have to be searched for leaves.
        self._heap: list[tuple[float, int, int, bytes]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks held, without reservations."""
        return self._nbytes

    @property
    def reserved(self) -> int:
        """Bytes reserved for live caches."""
        return sum(self._reserved.values())

    @property
    def dirty_nbytes(self) -> int:
        """Bytes of blocks that still wait to be written to disk."""
        with self._lock:
            return sum(e.block.info.nbytes for e in self._entries.values() if e.dirty)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._entries)

    def contains(self, keys: Sequence[bytes]) -> list[BlockInfo | None]:
        """Return, for each key, what is known of the block, or None when it is not here."""
        with self._lock:
            found = [self._entries.get(key) for key in keys]
        return [None if entry is None else entry.block.info for entry in found]

    def get(self, key: bytes) -> Block | None:
        """Return a block itself, or None."""
        entry = self._entries.get(key)
        return None if entry is None else entry.block

    def tails(self, parent: bytes, probe: bytes) -> list[BlockInfo]:
        """Return children of ``parent`` whose first tokens hash to ``probe``, latest first, at most 64."""
        with self._lock:
            entries = [self._entries[key] for key in self._children.get(parent, ())]
        entries = sorted((e for e in entries if e.probe == probe), key=lambda e: -e.used)
        return [entry.block.info for entry in entries[:64]]

    def children(self, parent: bytes) -> list[BlockInfo]:
        """Return every child of ``parent``."""
        with self._lock:
            return [self._entries[key].block.info for key in self._children.get(parent, ())]

    def infos(self) -> list[BlockInfo]:
        """Return what is known of every block."""
        with self._lock:
            return [entry.block.info for entry in self._entries.values()]

    def put(self, block: Block, *, dirty: bool = False, on_disk: bool = False) -> bool:
        """Keep ``block``; see `kvembed._tiers._base.Tier.put`.

        A block whose parent is missing never evicts another: it could not be reached. So the first
        blocks of a prompt longer than the budget stay, not its last ones.

        Args:
            block: What to keep.
            dirty: It is not on disk yet; it is not evicted until `mark_clean`.
            on_disk: It is on disk too.
        """
        info = block.info
        with self._lock:
            old = self._entries.get(info.key)
            if old is not None and old.block.info.rank >= info.rank:
                self._use(info.key, old)
                return True
            freed = old.block.info.nbytes if old is not None else 0
            if not self._make_room(info.nbytes - freed, info):
                return False
            block = self._taken_in(block)
            if old is not None:
                self._drop(info.key)
            self._drop_covered_tails(block)
            entry = _Entry(block, probe_of(info.parent, block.token_ids), 0, dirty, on_disk)
            self._entries[info.key] = entry
            self._children.setdefault(info.parent, set()).add(info.key)
            self._nbytes += info.nbytes
            self._use(info.key, entry)
            return True

    def _taken_in(self, block: Block) -> Block:
        """Return a block as this tier keeps it."""
        return block

    def _leaves(self, block: Block) -> None:
        """Be told of a block that is about to be evicted."""

    def _drop_covered_tails(self, block: Block) -> None:
        n = block.info.n_tokens
        for key in list(self._children.get(block.info.parent, ())):
            entry = self._entries[key]
            short = entry.block.info.n_tokens
            if short >= n or key in self._children or key in self._pinned or entry.block.info.rank > block.info.rank:
                continue
            if np.array_equal(entry.block.token_ids, block.token_ids[:short]):
                # Still to be written: it may be pinned on disk, which only the disk tier knows.
                entry.covered = True
                if not entry.dirty:
                    self._drop(key)

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        parent = entry.block.info.parent
        self._nbytes -= entry.block.info.nbytes
        siblings = self._children[parent]
        siblings.discard(key)
        if not siblings:
            del self._children[parent]
            self._offer(parent)

    def _use(self, key: bytes, entry: _Entry) -> None:
        self._clock += 1
        entry.used = self._clock
        self._weigh(entry)
        self._offer(key)

    def _weigh(self, entry: _Entry) -> None:
        if entry.on_disk:
            entry.priority = self._age + _READ_SECONDS_PER_BYTE
        else:
            info = entry.block.info
            seconds = self._seconds_per_token(info.namespace) or SECONDS_PER_TOKEN
            entry.priority = self._age + seconds * worth(info, info.nbytes)

    def _offer(self, key: bytes) -> None:
        """Enter a block into the order of eviction, if it may be evicted."""
        entry = self._entries.get(key)
        if entry is not None and not entry.dirty and key not in self._children:
            heapq.heappush(self._heap, (entry.priority, entry.used, -entry.block.info.start, key))
            if len(self._heap) > 4 * len(self._entries) + 64:
                self._rebuild_heap()

    def _rebuild_heap(self) -> None:
        leaves = ((k, e) for k, e in self._entries.items() if not e.dirty and k not in self._children)
        self._heap = [(e.priority, e.used, -e.block.info.start, k) for k, e in leaves]
        heapq.heapify(self._heap)

    def _make_room(self, need: int, info: BlockInfo | None = None) -> bool:
        """Evict until ``need`` more bytes fit; ``info`` is the block they are for."""
        limit = self.max_bytes - self.reserved - need
        if self._nbytes <= limit:
            return True
        if info is not None:
            orphan = info.start > 0 and info.parent not in self._entries
            stuck = sum(e.block.info.nbytes for e in self._entries.values() if e.dirty)
            if orphan or limit < stuck:
                return False  # without evicting others first for nothing
        spared: list[tuple[float, int, int, bytes]] = []
        while self._nbytes > limit and self._heap:
            item = heapq.heappop(self._heap)
            priority, used, _, key = item
            entry = self._entries.get(key)
            if entry is None or (entry.priority, entry.used) != (priority, used) or entry.dirty:
                continue
            if key in self._children:
                continue
            if key in self._pinned or (info is not None and key in (info.parent, info.key)):
                spared.append(item)
                continue
            self._age = max(self._age, priority)
            self._leaves(entry.block)
            self._drop(key)
        for item in spared:
            heapq.heappush(self._heap, item)
        return self._nbytes <= limit

    def reserve(self, owner: str, nbytes: int) -> None:
        """Count ``nbytes`` of a live cache against the budget; 0 gives them back.

        Blocks are evicted to make room. What cannot be made room for is counted all the same, so the
        tier is over its budget by no more than is reserved.

        Args:
            owner: Any name; a second call with it replaces the first.
            nbytes: Bytes the owner holds.
        """
        with self._lock:
            self._reserved.pop(owner, None)
            if nbytes > 0:
                self._reserved[owner] = nbytes
            self._make_room(0)

    def take_for_disk(self, key: bytes) -> Block | None:
        """Return a block that is only here, and have it wait for the disk as one `put` with ``dirty``; or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.dirty or entry.on_disk:
                return None
            entry.dirty = True
            return entry.block

    def mark_clean(self, block: Block, *, on_disk: bool = False) -> None:
        """Say that a block need not wait for the disk any more; another one with its key still does.

        Args:
            block: The block.
            on_disk: It was written.
        """
        with self._lock:
            entry = self._entries.get(block.key)
            if entry is None or entry.block is not block or not entry.dirty:
                return
            entry.dirty, entry.on_disk = False, on_disk
            self._weigh(entry)
            if entry.covered and block.key not in self._children:
                self._drop(block.key)
            else:
                self._offer(block.key)

    def is_dirty(self, block: Block) -> bool:
        """Return True when this very block is here and still waits for the disk."""
        entry = self._entries.get(block.key)
        return entry is not None and entry.block is block and entry.dirty

    def set_pinned(self, keys: Iterable[bytes]) -> None:
        """Spare ``keys`` from eviction; replaces what was pinned before."""
        with self._lock:
            self._pinned = frozenset(keys)

    def open(self, key: bytes) -> BlockSource | None:
        """Open a block for reading, or None when it is not here."""
        block = self.get(key)
        return None if block is None else MemorySource(block)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Mark a prefix (root side first) as used now."""
        with self._lock:
            # Leaf first, so that the root is the newest of all.
            for key in reversed(list(keys)):
                entry = self._entries.get(key)
                if entry is not None:
                    self._use(key, entry)

    def remove(self, keys: Iterable[bytes]) -> int:
        """Delete blocks; return how many were here."""
        with self._lock:
            here = [key for key in keys if key in self._entries]
            for key in here:
                self._drop(key)
            return len(here)

    def subtree(self, keys: Iterable[bytes]) -> list[BlockInfo]:
        """Return blocks and everything that follows them, as far as it is here, ends first."""
        with self._lock:
            order = list(dict.fromkeys(keys))
            seen = set(order)
            for key in order:
                for child in self._children.get(key, ()):
                    if child not in seen:
                        seen.add(child)
                        order.append(child)
            found = [self._entries[key].block.info for key in order if key in self._entries]
        return sorted(found, key=lambda info: -info.start)

    def evict(self, keys: Iterable[bytes], spare: Collection[bytes] = ()) -> list[bytes]:
        """Drop those of ``keys`` (ends first) that no block follows and that do not wait for the disk; return them.

        Args:
            keys: What to drop.
            spare: Keys to pass over, with what is pinned here.
        """
        gone: list[bytes] = []
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                if entry is None or entry.dirty or key in self._children or key in spare or key in self._pinned:
                    continue
                self._drop(key)
                gone.append(key)
        return gone

    def left_disk(self, keys: Iterable[bytes]) -> None:
        """Say that blocks are not on disk any more: to get them back would mean to compute them."""
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                if entry is not None and entry.on_disk:
                    entry.on_disk = False
                    self._weigh(entry)
                    self._offer(key)

    def clear(self) -> int:
        """Delete every block; return how many there were."""
        with self._lock:
            n = len(self._entries)
            self._entries.clear()
            self._children.clear()
            self._heap.clear()
            self._nbytes = 0
            return n

    def after_fork(self) -> None:
        """Make the tier usable in a forked child.

        The lock may be held by a thread that does not exist here; then what it was changing is unknown,
        and the child starts empty. Writing dirty blocks is the parent's work.
        """
        if self._lock.acquire(blocking=False):
            self._lock = threading.RLock()
            self._reserved.clear()
            for key, entry in self._entries.items():
                if entry.dirty:
                    entry.dirty = False
                    self._offer(key)
        else:
            self._reset()
