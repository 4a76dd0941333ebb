"""`status`: what of this package can be used on this machine, and why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvembed_cuda._driver import Device, Driver
from kvembed_cuda._errors import CudaError, CudaUnavailableError
from kvembed_cuda._kernels import Kernels
from kvembed_cuda._library import kernels_path
from kvembed_cuda._version import __version__

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Status", "status"]


@dataclass(frozen=True)
class Status:
    """What can be used.

    Args:
        usable: True when copies can be made.
        reason: In words: what is used, or why nothing can be.
        version: Of this package.
        cuda: CUDA version of the driver, as ``"12.8"``; None without one.
        batch: In words: whether cuMemcpyBatchAsync can be asked for.
        kernels: True when the kernels can be loaded on each GPU; only looked at when asked.
        kernels_reason: In words.
        devices: The GPUs.
    """

    usable: bool
    reason: str
    version: str = __version__
    cuda: str | None = None
    batch: str = ""
    kernels: bool = False
    kernels_reason: str = ""
    devices: tuple[Device, ...] = field(default=())


def status(
    *, load_kernels: bool = False, library: Path | None = None, driver: Path | None = None, kernels: Path | None = None
) -> Status:
    """Return what can be used here; never raises for what is missing.

    Args:
        load_kernels: Also load the kernels on each GPU. That makes a context there, which takes some hundred MB until
            the process ends; without it only their file is looked for.
        library: See `Driver`.
        driver: See `Driver`.
        kernels: See `Kernels`.
    """
    try:
        opened = Driver(library, driver)
    except CudaUnavailableError as error:
        return Status(usable=False, reason=str(error))
    with opened:
        cuda = "{}.{}".format(*opened.version)
        try:
            devices = tuple(opened.device(i) for i in range(opened.device_count))
        except CudaError as error:
            return Status(usable=False, reason=str(error), cuda=cuda)
        if not devices:
            return Status(usable=False, reason="the CUDA driver sees no GPU", cuda=cuda)
        form = opened.batch_form
        batch = f"cuMemcpyBatchAsync of CUDA {form}, on request" if form else f"not in CUDA {cuda}, only from 12.8 on"
        have, why = _look_at_kernels(opened, devices, load_kernels, kernels)
        return Status(
            usable=True,
            reason=f"CUDA {cuda}, {len(devices)} GPU{'s' if len(devices) > 1 else ''}",
            cuda=cuda,
            batch=batch,
            kernels=have,
            kernels_reason=why,
            devices=devices,
        )


def _look_at_kernels(driver: Driver, devices: tuple[Device, ...], load: bool, path: Path | None) -> tuple[bool, str]:
    path = path or kernels_path()
    if path is None:
        return False, "this package was built without nvcc"
    if not load:
        return False, "not loaded yet"
    try:
        for device in devices:
            Kernels(driver, device.number, path).close()
    except CudaError as error:
        return False, str(error)
    return True, "loaded on every GPU"
