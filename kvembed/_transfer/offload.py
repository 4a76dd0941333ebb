"""Offload: finished blocks leave the device behind the compute that goes on.

The call that captures a block only issues its copies. The block itself is handed on at once; who looks at its bytes
(the writer, a restore, a checksum) waits for their arrival there, and nobody else does.
"""

from __future__ import annotations

import collections
import itertools
import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np

from kvembed._block import Block
from kvembed._memory import host_buffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._block import BlockInfo, Layout
    from kvembed._keys import TokenIds
    from kvembed._rows import Rows
    from kvembed._transfer._base import Ticket, TransferEngine
    from kvembed._transfer.choose import Transfers

__all__ = ["ArrivingBlock", "Offload", "PinnedPool"]

_PINNED_BYTES = 512 << 20
_MOST_BLOCKS = 64


class ArrivingBlock(Block):
    """A block whose bytes may still be on their way.

    Args:
        info: As of `Block`.
        token_ids: Likewise.
        layout: Likewise.
        arriving: Where the bytes arrive.
        tickets: Their copies.
    """

    _tickets: tuple[Ticket, ...]
    _arriving: np.ndarray

    def __init__(
        self, info: BlockInfo, token_ids: TokenIds, layout: Layout, arriving: np.ndarray, tickets: Sequence[Ticket]
    ) -> None:
        for name, value in (("info", info), ("token_ids", token_ids), ("layout", layout)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_arriving", arriving)
        object.__setattr__(self, "_tickets", tuple(tickets))

    @property
    def data(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bytes, once they are here.

        Raises:
            RuntimeError: The device failed.
        """
        for ticket in self._tickets:
            ticket.wait_host()
        return self._arriving

    @property
    def arrived(self) -> bool:
        """True when `data` would not wait."""
        return all(ticket.done for ticket in self._tickets)

    def move(self) -> None:
        """Put the bytes into ordinary memory; views of the old ones stay good."""
        data = self.data
        moved = host_buffer(data.nbytes)
        np.copyto(moved, data)
        object.__setattr__(self, "_arriving", moved)


class PinnedPool:
    """Pinned buffers of one size in one allocation; each goes back with its last view.

    Args:
        memory: uint8 array to divide.
        slot_nbytes: Bytes of a buffer.
    """

    def __init__(self, memory: np.ndarray, slot_nbytes: int) -> None:
        self._memory = memory
        self.slot_nbytes = slot_nbytes
        self.slots = memory.nbytes // slot_nbytes
        self._free = collections.deque(range(self.slots))

    @property
    def free(self) -> int:
        """Buffers that are free."""
        return len(self._free)

    def take(self, nbytes: int) -> np.ndarray | None:
        """Return a buffer cut to ``nbytes`` bytes, or None when there is none."""
        if nbytes > self.slot_nbytes:
            return None
        try:
            slot = self._free.popleft()
        except IndexError:
            return None
        # An array of its own, whose end says that nothing refers to the buffer any more.
        array = np.frombuffer(self._memory.data, np.uint8, self.slot_nbytes, slot * self.slot_nbytes)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return array[:nbytes]


class Offload:
    """Takes finished blocks off the devices of one model.

    Args:
        transfers: Engines of the devices.
        max_pinned_bytes: Most pinned memory for blocks on their way. They stay in it while there is room, since they
            are restored from there without staging.
    """

    def __init__(self, transfers: Transfers, max_pinned_bytes: int = _PINNED_BYTES) -> None:
        self._transfers = transfers
        self._max_bytes = max_pinned_bytes
        self._pool: PinnedPool | None = None
        self._lock = threading.Lock()
        self._pinned: collections.deque[weakref.ref[ArrivingBlock]] = collections.deque()
        self._mover: threading.Thread | None = None
        self.unpinned = 0
        """Blocks that found no pinned buffer: their copies held the caller up."""

    def prepare(self, engine: TransferEngine, block_nbytes: int) -> None:
        """Allocate pinned memory for blocks of so many bytes, before the first call."""
        slots = min(_MOST_BLOCKS, self._max_bytes // max(1, block_nbytes))
        if slots and (self._pool is None or self._pool.slot_nbytes < block_nbytes):
            self._pool = None
            self._pool = PinnedPool(engine.pinned(slots * block_nbytes), block_nbytes)

    def take(
        self, info: BlockInfo, ids: TokenIds, layout: Layout, layers: Sequence[Rows], start: int, end: int
    ) -> ArrivingBlock:
        """Start to copy tokens ``start..end`` off the device; return the block they will be.

        Called by the thread that computes, between two forwards. The rows may be overwritten at once: the layers have
        the device wait first.
        """
        data = self._pool.take(info.nbytes) if self._pool is not None else None
        is_pinned = data is not None
        if data is None:
            data = host_buffer(info.nbytes)
            self.unpinned += 1
        tickets: list[Ticket] = []
        at = 0
        # Mostly one round: a model over several devices has layers in a row on each.
        for device, together in itertools.groupby(layers, key=lambda layer: layer.device):
            engine, on_device = self._transfers.of(device), list(together)
            spans = [span for layer in on_device for span in layer.spans(start, end)]
            nbytes = sum(place.heads * (b - a) * place.row_nbytes for _, place, a, b in spans)
            ticket = engine.pack(data[at : at + nbytes], spans, engine.mark())
            tickets.append(ticket)
            for layer in on_device:
                layer.protect(ticket)
            at += nbytes
        data[at:] = 0  # a model without rows
        block = ArrivingBlock(info, ids, layout, data, tickets)
        if is_pinned:
            self._pinned.append(weakref.ref(block))
        self._make_room()
        return block

    def _make_room(self) -> None:
        """Have the oldest blocks moved to ordinary memory when pinned buffers run short."""
        pool = self._pool
        if pool is None or 2 * pool.free >= pool.slots:
            return
        with self._lock:
            if self._mover is None or not self._mover.is_alive():
                self._mover = threading.Thread(target=self._move_oldest, name="kvembed-offload", daemon=True)
                self._mover.start()

    def _move_oldest(self) -> None:
        pool = self._pool
        while pool is not None and 2 * pool.free < pool.slots:
            try:
                block = self._pinned.popleft()()
            except IndexError:
                return
            if block is not None:
                try:
                    block.move()
                except RuntimeError:
                    continue  # its bytes never arrived: who reads it is told

    def close(self) -> None:
        """Wait for the thread that moves blocks; those in pinned memory keep it."""
        mover = self._mover
        if mover is not None:
            mover.join()
        self._pool = None
