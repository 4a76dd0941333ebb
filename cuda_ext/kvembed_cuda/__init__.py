"""Asynchronous copies and kernels for kvembed on NVIDIA GPUs, through the CUDA driver alone.

Needs neither torch nor the CUDA runtime: addresses, streams and events are numbers. The driver is looked for when a
`Driver` is made, so importing this works on any machine. `status` says what can be used and why not.
"""

from __future__ import annotations

from kvembed_cuda._driver import Device, Driver, Event, Issued, Stream
from kvembed_cuda._errors import CudaError, CudaUnavailableError
from kvembed_cuda._kernels import Kernels
from kvembed_cuda._layouts import QUANT, SEGMENT, STRIP, Code, Direction, Group, Type, strips
from kvembed_cuda._pcie import Link
from kvembed_cuda._status import Status, status
from kvembed_cuda._version import __version__

__all__ = [
    "Code",
    "CudaError",
    "CudaUnavailableError",
    "Device",
    "Direction",
    "Driver",
    "Event",
    "Group",
    "Issued",
    "Kernels",
    "Link",
    "QUANT",
    "SEGMENT",
    "STRIP",
    "Status",
    "Stream",
    "Type",
    "__version__",
    "status",
    "strips",
]
