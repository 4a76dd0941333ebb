"""Copies through kvembed-cuda: those of a whole block in one call, which runs without the interpreter's lock.

Everything else (staging, tickets, what waits for what) is that of `kvembed._transfer.pinned`; only the calls of the
driver are others. ``kvembed_cuda`` is a package of its own and imported here alone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kvembed_cuda import STRIP, CudaError, CudaUnavailableError, Direction, Driver, Event, Stream, strips

from kvembed._memory import host_buffer
from kvembed._transfer.pinned import TorchTransfer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvembed._rows import Span
    from kvembed._transfer._base import Mark
    from kvembed._transfer.pinned import StreamTicket

__all__ = ["CudaStreams", "ExtensionTransfer", "open_driver"]

_PAGE = mmap.PAGESIZE


def open_driver() -> Driver:
    """Return the CUDA driver of this machine.

    Raises:
        CudaUnavailableError: It cannot be used; the message says why.
    """
    driver = Driver()
    if not driver.device_count:
        raise CudaUnavailableError("the CUDA driver sees no GPU")
    return driver


class CudaStreams:
    """`kvembed._transfer.streams.Streams` of a GPU, through kvembed-cuda.

    Args:
        driver: The driver.
        index: Number of the GPU.
        current: Returns the handle of the stream that the calling thread computes on; asks torch when None.
        batch: Ask for batched copies (CUDA 12.8 and later); by default where ``KVEMBED_CUDA_BATCH`` is 1. They are
            not the default: drivers have refused and even crashed on them, and 2-D copies of rows as long as KV has
            (64 KB for 256 tokens) are as fast.
    """

    def __init__(
        self, driver: Driver, index: int, current: Callable[[], int] | None = None, *, batch: bool | None = None
    ) -> None:
        self._driver = driver
        self._index = index
        self._current = current or (lambda: torch.cuda.current_stream(index).cuda_stream)
        self._batch = os.environ.get("KVEMBED_CUDA_BATCH") == "1" if batch is None else batch

    def new_stream(self) -> Stream:
        """See `Streams`."""
        return Stream(self._driver, self._index)

    def current_stream(self) -> int:
        """See `Streams`; torch's own, by its handle."""
        return self._current()

    def record(self, stream: Stream | int) -> Event:
        """See `Streams`."""
        event = Event(self._driver, self._index)
        event.record(_handle(stream))
        return event

    def wait(self, stream: Stream | int, event: Event) -> None:
        """See `Streams`."""
        self._driver.stream_wait(self._index, _handle(stream), event.handle)

    def query(self, event: Event) -> bool:
        """See `Streams`."""
        return event.done

    def synchronize(self, event: Event) -> None:
        """See `Streams`."""
        event.synchronize()

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Stream, *, to_device: bool) -> None:
        """See `Streams`. Strided rows are copied as they lie, without a contiguous tensor between."""
        self.copy_strips(strips([row for pair in pairs for row in _rows(*pair)]), stream, to_device=to_device)

    def copy_strips(self, table: np.ndarray, stream: Stream, *, to_device: bool) -> None:
        """Queue copies that are described by addresses."""
        direction = Direction.TO_DEVICE if to_device else Direction.TO_HOST
        try:
            # Host memory to copy from is complete, and nothing on a stream writes it: see `Streams.copy`.
            self._driver.copy(self._index, table, stream.handle, direction, batch=self._batch, source_ready=to_device)
        except CudaError:
            # Some may be under way, and the caller is about to let go of their memory.
            with contextlib.suppress(CudaError):
                stream.synchronize()
            raise

    def allocate(self, nbytes: int) -> np.ndarray:
        """See `Streams`. Our own pages, pinned as they are."""
        # Whole pages: the driver pins no page twice.
        whole = -(-nbytes // _PAGE) * _PAGE
        memory = host_buffer(whole + _PAGE)
        start = -memory.__array_interface__["data"][0] % _PAGE
        pages = memory[start : start + whole]
        address = pages.__array_interface__["data"][0]
        try:
            self._driver.host_register(self._index, address, whole)
        except CudaError:
            return pages[:nbytes]  # copies are slower, and right
        pinned = np.frombuffer(pages.data, np.uint8)
        weakref.finalize(pinned, _unregister, self._driver, self._index, address, memory).atexit = False
        return pinned[:nbytes]


def _unregister(driver: Driver, index: int, address: int, memory: np.ndarray) -> None:
    # `memory` has kept the pages until now.
    if not driver.closed:
        with contextlib.suppress(CudaError):
            driver.host_unregister(index, address)
    del memory


def _handle(stream: Stream | int) -> int:
    return stream if isinstance(stream, int) else stream.handle


def _rows(target: torch.Tensor, source: torch.Tensor) -> list[tuple[int, int, int, int, int, int]]:
    """Strips of one tensor: heads a pitch apart, their tokens in one piece."""
    heads, tokens, width = target.shape
    size = target.element_size()
    if not target.numel():
        return []
    for tensor in (target, source):
        if tensor.stride(2) != 1 or (tokens > 1 and tensor.stride(1) != width):
            raise ValueError("the last two axes of a strip must be contiguous")
    row = tokens * width * size
    # One head has no pitch to speak of; a view's may be anything, also less than a row.
    to, of = (tensor.stride(0) * size if heads > 1 else row for tensor in (target, source))
    return [(target.data_ptr(), source.data_ptr(), to, of, row, heads)]


def _packed(address: int, spans: Sequence[Span]) -> np.ndarray:
    """Strips from the spans' rows to places one after another."""
    flat = array("Q")
    for _, (source, heads, pitch, row_nbytes), start, end in spans:
        nbytes = (end - start) * row_nbytes
        if nbytes:
            flat.extend((address, source + start * row_nbytes, nbytes, pitch, nbytes, heads))
            address += heads * nbytes
    return np.frombuffer(flat, STRIP)


class ExtensionTransfer(TorchTransfer):
    """Copies on two streams of the extension's, beside torch's.

    Args:
        device: The GPU.
        driver: The driver; that of this machine when None.
        streams: Its streams; made from ``driver`` when None.
        max_staging_bytes: Most pinned memory for staging.

    Raises:
        CudaUnavailableError: There is no usable driver.
    """

    name = "CUDA extension"

    def __init__(
        self,
        device: torch.device,
        driver: Driver | None = None,
        streams: CudaStreams | None = None,
        **options: Any,
    ) -> None:
        if streams is None:
            index = torch.cuda.current_device() if device.index is None else device.index
            streams = CudaStreams(driver or open_driver(), index)
        super().__init__(device, streams, **options)
        self._cuda = streams

    def pack(self, host: np.ndarray, spans: Sequence[Span], after: Mark | None) -> StreamTicket:
        """See `TransferEngine`. No tensor is asked or made: the thread that computes does this for each block."""
        table = _packed(host.__array_interface__["data"][0], spans)
        held = host, [span.buffer for span in spans]
        return self._issue(self._out, lambda: self._cuda.copy_strips(table, self._out, to_device=False), held, after)
