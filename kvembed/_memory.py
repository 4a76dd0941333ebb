"""Host memory for KV: anonymous, private, in huge pages where the system grants them.

First touch of fresh 4 KiB pages ran at 1.5 GB/s where memcpy to touched memory ran at 12 and huge pages at 10
(``benchmarks/restore.py`` measures it), so a restore into ordinary fresh memory is bound by page faults.
Neither ``torch.empty`` nor NumPy can ask for huge pages, hence a mapping of our own.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import numpy as np

__all__ = ["host_buffer"]

_HUGE = 2 << 20


def host_buffer(nbytes: int) -> np.ndarray:
    """Return an uninitialised writable uint8 array of ``nbytes`` bytes; freed with its last view."""
    if sys.platform != "linux" or nbytes < _HUGE:
        return np.empty(nbytes, dtype=np.uint8)
    # Private, not the shared mapping Python makes by default: only private memory gets huge pages.
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without transparent huge pages refuses: ordinary pages do too, only slower.
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, dtype=np.uint8)
