"""The few calls of torch's streams that transfers need: one set for every device that has streams."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kvembed._memory import host_buffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

__all__ = ["Streams", "TorchStreams", "has_streams", "note_use"]


_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def note_use(tensor: torch.Tensor) -> None:
    """Say that the calling thread's stream uses a tensor that may be dropped before it gets there."""
    if has_streams(tensor.device):
        tensor.record_stream(torch.get_device_module(tensor.device).current_stream(tensor.device))


class Streams(Protocol):
    """Streams and events of one device. ``kvembed._transfer.fake`` has some that run late and out of order."""

    def new_stream(self) -> Any:
        """Return a stream beside the one that computes."""
        ...

    def current_stream(self) -> Any:
        """Return the stream the calling thread computes on."""
        ...

    def record(self, stream: Any) -> Any:
        """Return an event after all that was queued on ``stream``."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Have what is queued on ``stream`` from now on wait for ``event``."""
        ...

    def query(self, event: Any) -> bool:
        """True when an event has happened."""
        ...

    def synchronize(self, event: Any) -> None:
        """Return when an event has happened."""
        ...

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Any, *, to_device: bool) -> None:
        """Queue copies on ``stream``.

        Args:
            pairs: Targets and sources, ``[heads, tokens, width]``, the last two axes contiguous.
            stream: Where.
            to_device: The sources are in host memory and complete; else the targets are in host memory.
        """
        ...

    def allocate(self, nbytes: int) -> np.ndarray:
        """Return host memory that copies go through at full speed, pinned where that can be had."""
        ...


def has_streams(device: torch.device) -> bool:
    """True when torch can copy on streams beside the one that computes: cuda (ROCm too), xpu; not cpu, not mps."""
    if device.type in ("cpu", "mps", "meta"):
        return False
    module = torch.get_device_module(device)
    return all(hasattr(module, name) for name in ("Stream", "Event", "current_stream", "stream"))


class TorchStreams:
    """Streams through torch's module of a device: ``torch.cuda``, ``torch.xpu`` and those made like them.

    Args:
        device: The device, with its number.
        module: Its module; found by torch when None.
    """

    def __init__(self, device: torch.device, module: Any | None = None) -> None:
        self._device = device
        self._module = module if module is not None else torch.get_device_module(device)

    def new_stream(self) -> Any:
        """See `Streams`."""
        return self._module.Stream(device=self._device)

    def current_stream(self) -> Any:
        """See `Streams`."""
        return self._module.current_stream(self._device)

    def record(self, stream: Any) -> Any:
        """See `Streams`."""
        event = self._module.Event()
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """See `Streams`."""
        stream.wait_event(event)

    def query(self, event: Any) -> bool:
        """See `Streams`."""
        return bool(event.query())

    def synchronize(self, event: Any) -> None:
        """See `Streams`."""
        event.synchronize()

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Any, *, to_device: bool) -> None:
        """See `Streams`. Where heads lie apart torch goes through one contiguous tensor on the device."""
        with self._module.stream(stream), torch.no_grad():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def allocate(self, nbytes: int) -> np.ndarray:
        """See `Streams`. Our own pages, registered with the driver: torch rounds pinned memory up to powers of two."""
        if self._device.type == "cuda":
            registered = _registered(nbytes)
            if registered is not None:
                return registered
        with contextlib.suppress(RuntimeError):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return host_buffer(nbytes)  # slower, and right


def _registered(nbytes: int) -> np.ndarray | None:
    array = host_buffer(nbytes)
    runtime: Any = torch.cuda.cudart()
    address = array.ctypes.data
    with contextlib.suppress(RuntimeError):
        if int(runtime.cudaHostRegister(address, nbytes, _PORTABLE)) == 0:
            # `memory` keeps the pages until they are not registered any more.
            memory = array.base
            weakref.finalize(array, _unregister, runtime, address, memory).atexit = False
            return array
    return None


def _unregister(runtime: Any, address: int, memory: Any) -> None:
    with contextlib.suppress(RuntimeError):
        runtime.cudaHostUnregister(address)
    del memory
