"""Staging: a bounded pool of equal host buffers, allocated ahead of time and reused in a ring."""

from __future__ import annotations

import collections
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from kvembed._transfer._base import Ticket

__all__ = ["Staging", "StagingPool", "lies_in"]

_ALIGN = 4096


def lies_in(array: np.ndarray, memory: np.ndarray) -> bool:
    """True when the memory of ``array`` is within that of the contiguous ``memory``."""
    first = memory.__array_interface__["data"][0]
    return bool(array.size) and first <= array.__array_interface__["data"][0] < first + memory.nbytes


class Staging:
    """A buffer on loan from a `StagingPool`.

    Attributes:
        array: uint8 array with as many bytes as were asked for.
    """

    def __init__(self, pool: StagingPool, slot: np.ndarray, nbytes: int) -> None:
        self._pool = pool
        self._slot: np.ndarray | None = slot
        self.array = slot[:nbytes]

    def release(self) -> None:
        """Give the buffer back unused; harmless when repeated, or after it was handed over."""
        slot, self._slot = self._slot, None
        if slot is not None:
            self._pool._give_back(slot)

    def hand_over(self, ticket: Ticket) -> None:
        """Give the buffer back once ``ticket`` is done."""
        slot, self._slot = self._slot, None
        if slot is not None:
            self._pool._give_back_after(slot, ticket)


class StagingPool:
    """Buffers of one size in one allocation.

    Args:
        allocate: Makes a uint8 array of so many bytes: pinned where the device wants that.
        max_bytes: Most bytes in all; at least two buffers are made, so that one fills while the other drains.
        slots: How many buffers, at most.
    """

    def __init__(self, allocate: Callable[[int], np.ndarray], max_bytes: int, slots: int = 64) -> None:
        self._allocate = allocate
        self._max_bytes = max_bytes
        self._most = slots
        self._lock = threading.RLock()  # what the condition is entered by: see `kvembed._connections`
        self._changed = threading.Condition(self._lock)
        self._arena: np.ndarray | None = None
        self._slot_nbytes = 0
        self._slots = 0
        self._free: list[np.ndarray] = []
        self._draining: collections.deque[tuple[np.ndarray, Ticket]] = collections.deque()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._slots * self._slot_nbytes

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one buffer."""
        return self._slot_nbytes

    @property
    def slots(self) -> int:
        """Number of buffers."""
        return self._slots

    def prepare(self, slot_nbytes: int) -> None:
        """Allocate; nothing to do when the buffers are large enough. Waits until none is in use."""
        while True:
            self.drain()
            with self._lock:
                if slot_nbytes <= self._slot_nbytes:
                    return
                if len(self._free) == self._slots:
                    self._allocate_slots(slot_nbytes)
                    return
                self._changed.wait(1.0)

    def _allocate_slots(self, slot_nbytes: int) -> None:
        size = -(-max(1, slot_nbytes) // _ALIGN) * _ALIGN
        slots = max(2, min(self._most, self._max_bytes // size))
        # The old ones go first, so that both never exist at once.
        self._arena, self._free = None, []
        self._arena = arena = self._allocate(size * slots)
        self._free = [arena[i * size : (i + 1) * size] for i in range(slots)]
        self._slot_nbytes, self._slots = size, slots
        self._changed.notify_all()

    def take(self, nbytes: int) -> Staging:
        """Return a buffer of ``nbytes`` bytes; waits for the oldest transfer when none is free."""
        if nbytes > self._slot_nbytes:
            self.prepare(nbytes)
        while True:
            with self._lock:
                if self._free:
                    return Staging(self, self._free.pop(), nbytes)
                if not self._draining:
                    self._changed.wait(1.0)
                    continue
                slot, ticket = self._draining.popleft()
            try:
                ticket.wait_host()
            finally:
                self._give_back(slot)

    def contains(self, array: np.ndarray) -> bool:
        """True when an array lies in the pool's memory."""
        arena = self._arena
        return arena is not None and lies_in(array, arena)

    def drain(self) -> None:
        """Wait for all transfers from the buffers that were handed over."""
        while True:
            with self._lock:
                if not self._draining:
                    return
                slot, ticket = self._draining.popleft()
            try:
                ticket.wait_host()
            finally:
                self._give_back(slot)

    def close(self) -> None:
        """Give the memory back once nothing uses it; a later `take` allocates anew."""
        self.drain()
        with self._lock:
            self._arena, self._free = None, []
            self._slot_nbytes = self._slots = 0
            self._changed.notify_all()

    def _give_back(self, slot: np.ndarray) -> None:
        with self._lock:
            # Not of an arena that was given up meanwhile.
            if self._arena is not None and self.contains(slot):
                self._free.append(slot)
                self._changed.notify()

    def _give_back_after(self, slot: np.ndarray, ticket: Ticket) -> None:
        with self._lock:
            self._draining.append((slot, ticket))
            self._changed.notify()
