"""Copies in pure PyTorch: pinned staging, a stream for each direction, events."""

from __future__ import annotations

import collections
import threading
import weakref
from typing import TYPE_CHECKING, Any

from kvembed._transfer._base import packed
from kvembed._transfer.plain import host_tensor
from kvembed._transfer.staging import Staging, StagingPool, lies_in
from kvembed._transfer.streams import TorchStreams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import torch

    from kvembed._rows import Span
    from kvembed._transfer._base import Mark, Strip
    from kvembed._transfer.streams import Streams

__all__ = ["StreamTicket", "TorchTransfer"]

_STAGING_BYTES = 64 << 20


class StreamTicket:
    """A transfer that ends at an event: `kvembed._transfer._base.Ticket`.

    Args:
        streams: Of its device.
        event: After its last copy.
        held: What must live until then. torch's allocator knows nothing of the stream that copies, so memory that was
            freed meanwhile would be given to others; held until the event, it is not.
    """

    def __init__(self, streams: Streams, event: Any, held: object) -> None:
        self._streams = streams
        self._event = event
        self._held = held

    @property
    def done(self) -> bool:
        """True when everything has arrived."""
        return self._held is None or self._streams.query(self._event)

    def wait_compute(self) -> None:
        """Have the calling thread's stream wait."""
        # Also when it has happened: the other stream must still see what this one wrote.
        self._streams.wait(self._streams.current_stream(), self._event)

    def wait_host(self) -> None:
        """Wait in the calling thread."""
        if self._held is not None:
            self._streams.synchronize(self._event)
            self._held = None


class TorchTransfer:
    """Copies on two streams beside the one that computes: one in, one out.

    Args:
        device: The device.
        streams: Its streams.
        max_staging_bytes: Most pinned memory for staging.
    """

    name = "PyTorch streams"
    direct = False

    def __init__(
        self, device: torch.device, streams: Streams | None = None, max_staging_bytes: int = _STAGING_BYTES
    ) -> None:
        self.device = device
        self._streams: Streams = TorchStreams(device) if streams is None else streams
        self._in, self._out = self._streams.new_stream(), self._streams.new_stream()
        self._pool = StagingPool(self._streams.allocate, max_staging_bytes)
        self._pinned: list[weakref.ref[np.ndarray]] = []
        self._lock = threading.Lock()
        self._under_way: collections.deque[StreamTicket] = collections.deque()

    def prepare(self, slot_nbytes: int) -> None:
        """See `TransferEngine`."""
        self._pool.prepare(slot_nbytes)

    def staging(self, nbytes: int) -> Staging:
        """See `TransferEngine`."""
        return self._pool.take(nbytes)

    def is_pinned(self, host: np.ndarray) -> bool:
        """True in the staging memory, and in what `pinned` has returned."""
        return self._pool.contains(host) or any(array is not None and lies_in(host, array) for array in self._arrays())

    def _arrays(self) -> list[np.ndarray | None]:
        return [reference() for reference in self._pinned]

    def pinned(self, nbytes: int) -> np.ndarray:
        """See `TransferEngine`."""
        array = self._streams.allocate(nbytes)
        self._pinned = [*(reference for reference in self._pinned if reference() is not None), weakref.ref(array)]
        return array

    def mark(self) -> Mark | None:
        """See `TransferEngine`."""
        return self._streams.record(self._streams.current_stream())

    def to_device(self, strips: Sequence[Strip], after: Mark | None, staging: Staging | None = None) -> StreamTicket:
        """See `TransferEngine`."""
        pairs = [(device, host_tensor(host, device)) for host, device in strips]
        ticket = self._issue(self._in, lambda: self._streams.copy(pairs, self._in, to_device=True), pairs, after)
        if staging is not None:
            staging.hand_over(ticket)
        return ticket

    def to_host(self, strips: Sequence[Strip], after: Mark | None) -> StreamTicket:
        """See `TransferEngine`."""
        pairs = [(host_tensor(host, device), device) for host, device in strips]
        return self._issue(self._out, lambda: self._streams.copy(pairs, self._out, to_device=False), pairs, after)

    def pack(self, host: np.ndarray, spans: Sequence[Span], after: Mark | None) -> StreamTicket:
        """See `TransferEngine`."""
        return self.to_host(packed(host, spans), after)

    def _issue(self, stream: Any, copy: Callable[[], object], held: object, after: Mark | None) -> StreamTicket:
        # One thread at a time: an event must come after this caller's copies, and the wait before them.
        with self._lock:
            if after is not None:
                self._streams.wait(stream, after)
            copy()
            ticket = StreamTicket(self._streams, self._streams.record(stream), held)
            self._under_way.append(ticket)
            ended = []
            while self._under_way and self._under_way[0].done:
                ended.append(self._under_way.popleft())
        for old in ended:
            old.wait_host()  # lets go of what it held
        return ticket

    def close(self) -> None:
        """See `TransferEngine`."""
        with self._lock:
            left = list(self._under_way)
            self._under_way.clear()
        for ticket in left:
            ticket.wait_host()
        self._pool.close()
