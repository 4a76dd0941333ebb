"""`Driver`: the CUDA driver of this machine; `Stream` and `Event` on it."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from kvembed_cuda._errors import CudaError, CudaUnavailableError
from kvembed_cuda._layouts import STRIP, Direction, check
from kvembed_cuda._library import DeviceRecord, IssuedRecord, load
from kvembed_cuda._pcie import Link, link_of

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    import numpy as np

__all__ = ["Device", "Driver", "Event", "Issued", "Stream"]

_BATCH, _SOURCE_READY = 1, 2
_NOTHING = 2**64 - 1


@dataclass(frozen=True)
class Device:
    """A GPU.

    Args:
        number: As torch counts them.
        name: The maker's.
        compute: Compute capability, as ``(9, 0)``.
        total_bytes: Of memory.
        copy_engines: How many copies run at once; 2 let one go in while another comes out.
        multiprocessors: How many.
        host_register: True where pages of ours can be pinned.
        integrated: True where its memory is host memory.
        link: Its PCIe link; None where the system does not say.
    """

    number: int
    name: str
    compute: tuple[int, int]
    total_bytes: int
    copy_engines: int
    multiprocessors: int
    host_register: bool
    integrated: bool
    link: Link | None


class Issued(NamedTuple):
    """What one `Driver.copy` queued.

    Args:
        calls: Calls of the driver.
        batched: Rows that went through cuMemcpyBatchAsync.
        batch_error: The driver's answer when it refused a batch, and 2-D copies took its place; else 0.
    """

    calls: int
    batched: int
    batch_error: int


class Driver:
    """The CUDA driver, loaded at run time. All methods may be called from any thread, and none needs torch.

    A call makes the primary context of its device current while it runs, as torch does. Streams and events are
    addresses: ``torch.cuda.Stream().cuda_stream`` and ``torch.cuda.Event().cuda_event`` will do.

    Args:
        library: The C library; that of the installed package when None.
        driver: The driver's library; the system's when None.

    Raises:
        CudaUnavailableError: Something is missing; the message says what.
    """

    def __init__(self, library: Path | None = None, driver: Path | None = None) -> None:
        self._handle: int | None = None
        self._library: Any = load(library)
        handle, text = ctypes.c_void_p(), ctypes.create_string_buffer(512)
        path = None if driver is None else str(driver).encode()
        code = self._library.kvc_open(path, ctypes.byref(handle), text, len(text))
        if code:
            why = text.value.decode(errors="replace")
            raise CudaUnavailableError(f"no usable CUDA driver: {why or self._error('kvc_open', code)}")
        self._handle = handle.value

    @property
    def version(self) -> tuple[int, int]:
        """The CUDA version the driver has, as ``(12, 8)``."""
        number = self._library.kvc_version(self.handle)
        return number // 1000, number % 1000 // 10

    @property
    def batch_form(self) -> str | None:
        """In which form cuMemcpyBatchAsync is there: ``"12.8"``, ``"13.0"``, or None."""
        return {9: "12.8", 8: "13.0"}.get(self._library.kvc_batch_form(self.handle))

    def batch_refused(self, device: int) -> str | None:
        """Return the name of the error by which the driver refused a batch on ``device``; None when it never did."""
        code = self._library.kvc_batch_refused(self.handle, device)
        return self._error("cuMemcpyBatchAsync", code).name if code else None

    @property
    def device_count(self) -> int:
        """How many GPUs there are."""
        return self._library.kvc_device_count(self.handle)

    def device(self, number: int) -> Device:
        """Return what the driver says of a GPU; makes no context on it."""
        record = DeviceRecord()
        self.call("kvc_device", number, ctypes.byref(record))
        return Device(
            number=number,
            name=record.name.decode(errors="replace"),
            compute=(record.compute_major, record.compute_minor),
            total_bytes=record.total_bytes,
            copy_engines=record.copy_engines,
            multiprocessors=record.multiprocessors,
            host_register=bool(record.host_register),
            integrated=bool(record.integrated),
            link=link_of(record.pci_bus_id.decode(errors="replace")),
        )

    def memory_info(self, device: int) -> tuple[int, int]:
        """Return free and total bytes of a GPU's memory."""
        free, total = ctypes.c_uint64(), ctypes.c_uint64()
        self.call("kvc_memory_info", device, ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # -- copies -------------------------------------------------------------------------------------

    def copy(
        self,
        device: int,
        strips: np.ndarray,
        stream: int,
        direction: Direction,
        *,
        batch: bool = False,
        source_ready: bool = False,
        batch_rows: int = 512,
    ) -> Issued:
        """Queue all strips on a stream, in one call; returns before they have run.

        The array may go at once, the memory it names only when an event after the copies has happened.

        Args:
            device: Whose stream it is.
            strips: Array of `STRIP`.
            stream: Any but the legacy default stream (0 or 1), which would wait for all others.
            direction: What the addresses are.
            batch: Use cuMemcpyBatchAsync where there is one. Should the driver refuse it, 2-D copies are made, then
                and from then on.
            source_ready: What is copied to the device is complete now and stays so, and nothing queued on the stream
                writes it. A batch may then read it before its turn.
            batch_rows: Most rows in one batch, at most 1,024; drivers have crashed on tens of thousands.

        Raises:
            CudaError: A strip cannot be right (then nothing was queued), or the driver failed (then those before are
                queued, and their memory has to stay until the stream is synchronised).
        """
        address = check(strips, STRIP, "strips")
        record = IssuedRecord()
        flags = (_BATCH if batch else 0) | (_SOURCE_READY if source_ready else 0)
        code = self._library.kvc_copy(
            self.handle, device, address, len(strips), direction, flags, batch_rows, stream, ctypes.byref(record)
        )
        if code:
            refused, queued = record.refused, record.strips
            more = f" (strip {refused} of {len(strips)}; {queued} are queued)" if refused != _NOTHING else ""
            raise self._error("kvc_copy", code, more)
        return Issued(record.calls, record.batched, record.batch_error)

    # -- streams and events -------------------------------------------------------------------------

    def stream_wait(self, device: int, stream: int, event: int) -> None:
        """Have what is queued on ``stream`` from now on wait for ``event``."""
        self.call("kvc_stream_wait", device, stream, event)

    def stream_synchronize(self, device: int, stream: int) -> None:
        """Return when all that is queued on ``stream`` has run."""
        self.call("kvc_stream_synchronize", device, stream)

    # -- memory -------------------------------------------------------------------------------------

    def host_register(self, device: int, address: int, nbytes: int) -> None:
        """Pin pages of host memory, so that all devices reach them at full speed and copies are asynchronous."""
        self.call("kvc_host_register", device, address, nbytes)

    def host_unregister(self, device: int, address: int) -> None:
        """Undo `host_register`; no copy from or to the pages may be under way."""
        self.call("kvc_host_unregister", device, address)

    def allocate(self, device: int, nbytes: int) -> int:
        """Return the address of new memory on a GPU."""
        address = ctypes.c_uint64()
        self.call("kvc_memory_allocate", device, nbytes, ctypes.byref(address))
        return address.value

    def free(self, device: int, address: int) -> None:
        """Give memory of `allocate` back; nothing may be using it."""
        self.call("kvc_memory_free", device, address)

    # -- the library --------------------------------------------------------------------------------

    @property
    def handle(self) -> int:
        """The library's handle of the driver."""
        if self._handle is None:
            raise CudaUnavailableError("this Driver was closed; make a new one")
        return self._handle

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._handle is None

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the library.

        Raises:
            CudaError: It failed.
        """
        code = getattr(self._library, function)(self.handle, *arguments)
        if code:
            raise self._error(function, code)

    def _error(self, call: str, code: int, more: str = "") -> CudaError:
        name, text = ctypes.create_string_buffer(64), ctypes.create_string_buffer(512)
        self._library.kvc_error_text(self._handle, code, name, len(name), text, len(text))
        return CudaError(call, code, name.value.decode(), text.value.decode(errors="replace"), more)

    def close(self) -> None:
        """Give the devices' contexts back; nothing made through this object may be used afterwards."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.kvc_close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Handle:
    """Something of the driver's that has to be destroyed."""

    _destroy = ""

    def __init__(self, driver: Driver, device: int, handle: int) -> None:
        self._driver = driver
        self.device = device
        self.handle = handle
        """Its address."""

    def close(self) -> None:
        """Destroy it; what was queued runs all the same. Harmless when repeated, or after `Driver.close`."""
        handle, self.handle = getattr(self, "handle", 0), 0
        if handle and not self._driver.closed:
            self._driver.call(self._destroy, self.device, handle)

    def __del__(self) -> None:
        with contextlib.suppress(CudaError):  # of a device that is lost: nobody is there to be told
            self.close()


class Stream(_Handle):
    """A queue of work beside those of torch; does not wait for the default stream.

    Args:
        driver: The driver.
        device: On which GPU.
    """

    _destroy = "kvc_stream_destroy"

    def __init__(self, driver: Driver, device: int) -> None:
        handle = ctypes.c_void_p()
        driver.call("kvc_stream_create", device, ctypes.byref(handle))
        super().__init__(driver, device, handle.value or 0)

    def wait(self, event: Event) -> None:
        """Have what is queued from now on wait for ``event``."""
        self._driver.stream_wait(self.device, self.handle, event.handle)

    def synchronize(self) -> None:
        """Return when all that is queued has run."""
        self._driver.stream_synchronize(self.device, self.handle)


class Event(_Handle):
    """A point in what is queued on a stream.

    Args:
        driver: The driver.
        device: On which GPU.
        timing: Also note when it happened, for `elapsed`.
    """

    _destroy = "kvc_event_destroy"

    def __init__(self, driver: Driver, device: int, *, timing: bool = False) -> None:
        handle = ctypes.c_void_p()
        driver.call("kvc_event_create", device, int(timing), ctypes.byref(handle))
        super().__init__(driver, device, handle.value or 0)

    def record(self, stream: int) -> None:
        """Mark the end of what is queued on ``stream`` now."""
        self._driver.call("kvc_event_record", self.device, self.handle, stream)

    @property
    def done(self) -> bool:
        """True when it has happened, or was never recorded; does not wait."""
        done = ctypes.c_int()
        self._driver.call("kvc_event_query", self.device, self.handle, ctypes.byref(done))
        return bool(done.value)

    def synchronize(self) -> None:
        """Return when it has happened; the thread sleeps."""
        self._driver.call("kvc_event_synchronize", self.device, self.handle)

    def elapsed(self, since: Event) -> float:
        """Return the seconds between ``since`` and this event; both with ``timing``."""
        milliseconds = ctypes.c_float()
        self._driver.call("kvc_event_elapsed", self.device, since.handle, self.handle, ctypes.byref(milliseconds))
        return milliseconds.value / 1000
