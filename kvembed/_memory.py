"""Host memory for KV: anonymous, private, in huge pages where the system grants them, reused when it can be.

First touch of fresh 4 KiB pages ran at 1.5 GB/s where memcpy to touched memory ran at 12 and huge pages at 10, and on
virtual machines whose host takes free memory back, the first touch of any page can cost ten times that. So a
restore into fresh memory is bound by page faults. Neither ``torch.empty`` nor NumPy can ask for huge pages or touch
memory ahead of time, hence mappings of our own, and a pool that keeps those of dropped caches.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
import weakref

import numpy as np

__all__ = ["HostPool", "host_buffer"]

_HUGE = 2 << 20
_TOUCH_STEP = 4 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14: faults pages in without changing what they hold


def _mapping(nbytes: int) -> mmap.mmap:
    # Private, not the shared mapping Python makes by default: only private memory gets huge pages.
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without transparent huge pages refuses: ordinary pages do too, only slower.
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _has_mappings(nbytes: int) -> bool:
    return sys.platform == "linux" and nbytes >= _HUGE


def host_buffer(nbytes: int) -> np.ndarray:
    """Return an uninitialised writable uint8 array of ``nbytes`` bytes; freed with its last view."""
    if not _has_mappings(nbytes):
        return np.empty(nbytes, dtype=np.uint8)
    return np.frombuffer(_mapping(nbytes), dtype=np.uint8)


class HostPool:
    """Buffers that go back to a free list when their last view dies.

    A buffer is never handed out while anything still refers to it: each use is an array of its own over the
    mapping, and only the end of that array puts the mapping back.

    Args:
        max_free_bytes: Most bytes kept for reuse; more is returned to the system.
    """

    def __init__(self, max_free_bytes: int) -> None:
        self._max_free = max_free_bytes
        self._free: list[mmap.mmap] = []
        # Re-entrant: the end of an array, and so `_give_back`, can come at any allocation, also inside `take`.
        self._lock = threading.RLock()

    @property
    def free_bytes(self) -> int:
        """Bytes kept for reuse."""
        with self._lock:
            return sum(len(m) for m in self._free)

    def limit(self, max_free_bytes: int) -> None:
        """Set how many bytes may be kept, and return what is over that to the system."""
        with self._lock:
            self._max_free = max(0, max_free_bytes)
            while self._free and sum(len(m) for m in self._free) > self._max_free:
                self._free.pop(0)

    def take(self, nbytes: int) -> np.ndarray:
        """Return a writable uint8 array of ``nbytes`` bytes with any content."""
        if not _has_mappings(nbytes):
            return np.empty(nbytes, dtype=np.uint8)
        with self._lock:
            # The smallest that is large enough, but not one that would waste more than it holds.
            fitting = [m for m in self._free if nbytes <= len(m) <= 2 * nbytes + _HUGE]
            mapping = min(fitting, key=len, default=None)
            if mapping is not None:
                self._free.remove(mapping)
        if mapping is None:
            mapping = _mapping(nbytes)
        array = np.frombuffer(mapping, dtype=np.uint8)
        weakref.finalize(array, self._give_back, mapping).atexit = False
        return array[:nbytes]

    def _give_back(self, mapping: mmap.mmap) -> None:
        with self._lock:
            if self._max_free:
                self._free.append(mapping)
                self.limit(self._max_free)

    def prepare(self, nbytes: int) -> None:
        """Touch memory for ``nbytes`` in the background, so that the next `take` need not wait for page faults."""
        nbytes = min(nbytes, self._max_free)
        if not _has_mappings(nbytes) or self.free_bytes >= nbytes:
            return
        mapping = _mapping(nbytes)
        with self._lock:
            self._free.append(mapping)
        threading.Thread(target=self._touch, args=(mapping,), name="kvembed-memory", daemon=True).start()

    def _touch(self, mapping: mmap.mmap) -> None:
        size = len(mapping)
        for start in range(0, size, _TOUCH_STEP):
            with self._lock:
                if not any(m is mapping for m in self._free):
                    return  # in use: its reader touches the rest
            try:
                mapping.madvise(_POPULATE_WRITE, start, min(_TOUCH_STEP, size - start))
            except (OSError, ValueError):
                return  # an older kernel: memory is touched when it is used
