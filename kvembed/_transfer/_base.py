"""What moves KV between host memory and the device a layer computes on; ``tests/transfer`` holds each engine to it.

A transfer is issued and goes on by itself. Three things keep it right, and every caller has a part in them:

* **After what?** `TransferEngine.mark` says what the calling thread has queued on the device so far. A copy out of rows
  comes after the forward that made them; a copy into rows comes after whatever used that memory before. So each copy
  is given a mark, made by the thread that computes.
* **Before what?** A `Ticket` stands for what was issued. Compute that reads restored rows, or that is about to
  overwrite rows which are being copied out, calls `Ticket.wait_compute`: the device waits, the thread does not. Host
  code that reads what was copied out calls `Ticket.wait_host`.
* **From where?** Host memory that a copy reads or writes belongs to it until its ticket is done. Staging buffers are
  handed over with the copy and come back by themselves; tickets hold on to tensors and arrays.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch

    from kvembed._rows import Span
    from kvembed._transfer.staging import Staging

__all__ = ["Mark", "Strip", "Ticket", "TransferEngine", "packed"]


class Strip(NamedTuple):
    """One tensor of one layer of a block, on both sides.

    Args:
        host: uint8 ``[heads, tokens, row_nbytes]``; the last two axes are contiguous, heads may lie apart.
        device: ``[heads, tokens, width]`` of any type with rows of as many bytes; likewise.
    """

    host: np.ndarray
    device: torch.Tensor


class Mark(Protocol):
    """A point in what one thread has queued on a device. Made by `TransferEngine.mark`, only passed on."""


class Ticket(Protocol):
    """A transfer under way."""

    @property
    def done(self) -> bool:
        """True when everything has arrived; does not wait."""
        ...

    def wait_compute(self) -> None:
        """Have what the calling thread queues on the device from now on wait for this; the thread goes on."""
        ...

    def wait_host(self) -> None:
        """Return when everything has arrived, and let go of buffers and tensors; harmless when repeated.

        Raises:
            RuntimeError: The device failed (torch's errors come out as they are).
        """
        ...


class TransferEngine(Protocol):
    """Moves strips to and from one device. All methods may be called from several threads.

    Copies in one direction are done in the order in which they were issued: who waits for the last waits for all.

    Attributes:
        name: What `kvembed doctor` calls it.
        device: The device.
        direct: True where host code may read and write the device's memory itself (it is host memory). Then callers
            need neither staging nor copies, though both work.
    """

    name: str
    device: torch.device
    direct: bool

    def prepare(self, slot_nbytes: int) -> None:
        """Allocate the staging memory now, not at the first transfer.

        Args:
            slot_nbytes: Most bytes that `staging` will be asked for; a later call with more allocates anew.
        """
        ...

    def staging(self, nbytes: int) -> Staging:
        """Return a buffer in host memory that the device reaches at full speed; waits until one is free.

        A thread that holds one must hand it over or release it before it takes another.
        """
        ...

    def is_pinned(self, host: np.ndarray) -> bool:
        """True when copies from and to this array need no staging."""
        ...

    def pinned(self, nbytes: int) -> np.ndarray:
        """Allocate host memory that `is_pinned`, for good: freed with its last view. Not on the hot path."""
        ...

    def mark(self) -> Mark | None:
        """Return a mark after all that the calling thread has queued on the device."""
        ...

    def to_device(self, strips: Sequence[Strip], after: Mark | None, staging: Staging | None = None) -> Ticket:
        """Start to copy from host to device.

        Args:
            strips: What. Host arrays that are not `is_pinned` may hold the calling thread up.
            after: The copies wait for this point; None for memory that nothing was queued on.
            staging: Where the host arrays lie, if there: it goes back to the pool once they are read.
        """
        ...

    def to_host(self, strips: Sequence[Strip], after: Mark | None) -> Ticket:
        """Start to copy from device to host.

        Args:
            strips: What. The host arrays may be read after `Ticket.wait_host`, the device's rows be overwritten by
                what is queued after `Ticket.wait_compute`.
            after: The copies wait for this point.
        """
        ...

    def pack(self, host: np.ndarray, spans: Sequence[Span], after: Mark | None) -> Ticket:
        """Start to copy rows of many buffers into one piece of host memory, as a block has them; see `to_host`.

        Args:
            host: uint8 ``[nbytes]``; the spans come one after another, each as ``[heads, rows, row_nbytes]``.
            spans: What.
            after: The copies wait for this point.
        """
        ...

    def close(self) -> None:
        """Wait for all that was issued, and give the staging memory back; harmless when repeated."""
        ...


def packed(host: np.ndarray, spans: Sequence[Span]) -> list[Strip]:
    """Return the strips that `TransferEngine.pack` copies."""
    strips: list[Strip] = []
    at = 0
    for buffer, place, start, end in spans:
        shape = place.heads, end - start, place.row_nbytes
        nbytes = math.prod(shape)
        strips.append(Strip(host[at : at + nbytes].reshape(shape), buffer[0, :, start:end]))
        at += nbytes
    return strips
