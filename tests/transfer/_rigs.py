"""Every implementation of the transfer engine, with what a test needs around it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed._transfer import Strip
from kvembed._transfer.choose import engine_for
from kvembed._transfer.fake import FakeStreams
from kvembed._transfer.pinned import TorchTransfer
from kvembed._transfer.plain import PlainTransfer

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from kvembed._transfer import TransferEngine
    from tests.cuda_ext._mock import Kit

CPU = torch.device("cpu")
SLOT = 1 << 14
STAGING = 4 * SLOT


@dataclass
class Rig:
    """An engine, and a device to compute on.

    Args:
        engine: The engine; its staging is small, so that it is used up soon.
        compute: Queues a function on the device, as a forward queues kernels.
        device: Where the device's tensors are made.
        allocated: Says how much host memory was allocated for staging, where that can be told.
        violations: Says what the device was asked that a real one would not forgive.
    """

    engine: TransferEngine
    compute: Callable[[Callable[[], object]], object]
    device: torch.device = CPU
    allocated: Callable[[], int] | None = None
    violations: Callable[[], list[str]] = list

    def rows(self, heads: int, capacity: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return device rows as a cache layer has them, all zero."""
        return torch.zeros((heads, capacity, width), dtype=dtype, device=self.device)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what a computation queued now finds in ``rows``."""
        seen: list[torch.Tensor] = []
        found = torch.empty_like(rows)
        self.compute(lambda: seen.append(found.copy_(rows)))
        self.settle()
        return found.cpu()

    def settle(self) -> None:
        """Wait until the device has computed all that was queued."""
        mark: Any = self.engine.mark()
        if isinstance(self.engine, TorchTransfer):
            self.engine._streams.synchronize(mark)

    def fill(self, host: np.ndarray, rows: torch.Tensor, after: Any = None) -> Any:
        """Copy ``host`` into device rows through staging, as a restore does; return the ticket."""
        staging = self.engine.staging(host.nbytes)
        array = staging.array.reshape(host.shape)
        array[:] = host
        return self.engine.to_device([Strip(array, rows)], after, staging)


def plain() -> Rig:
    return Rig(PlainTransfer(CPU, STAGING), lambda function: function())


def fake(order: str, seed: int = 0) -> Rig:
    streams = FakeStreams(order, seed)
    return Rig(TorchTransfer(CPU, streams, STAGING), streams.compute, allocated=lambda: streams.allocated)


def gpu() -> Rig:
    device = torch.device("cuda", 0)
    return Rig(engine_for(device), lambda function: function(), device)


def extension(kit: Kit, version: int, seed: int = 0, *, batch: bool = False) -> Rig:
    """The CUDA extension, on a driver that does everything in odd orders."""
    from kvembed_cuda import Stream

    from kvembed._transfer.extension import CudaStreams, ExtensionTransfer

    driver = kit.open(version, seed=seed)
    computes = Stream(driver, 0)  # torch's
    streams = CudaStreams(driver, 0, lambda: computes.handle, batch=batch)
    engine = ExtensionTransfer(CPU, streams=streams, max_staging_bytes=STAGING)
    return Rig(
        engine,
        lambda function: driver.queue(computes.handle, function),
        allocated=driver.mock.mock_registered,
        violations=lambda: driver.violations,
    )


def gpu_extension(kit: Kit) -> Rig:
    """The CUDA extension on a real GPU."""
    from kvembed_cuda import Driver

    from kvembed._transfer.extension import CudaStreams, ExtensionTransfer

    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)  # torch has taken up the GPU
    streams = CudaStreams(Driver(kit.library), 0)
    engine = ExtensionTransfer(device, streams=streams, max_staging_bytes=STAGING)
    return Rig(engine, lambda function: function(), device)


RIGS: dict[str, Callable[[], Rig]] = {
    "plain": plain,
    "late": lambda: fake("late"),
    "early": lambda: fake("early"),
    "random": lambda: fake("random"),
    "cuda": gpu,
}

DRIVERS = {"extension": (12040, False), "extension-12.8": (12080, True), "extension-13.0": (13000, True)}
"""Rigs of the CUDA extension: version of the driver, and whether copies are batched."""

PARAMETERS = [
    pytest.param(name, marks=pytest.mark.cuda) if name == "cuda" else name
    for name in [*RIGS, *(DRIVERS if importlib.util.find_spec("native_build") else ())]
]
if importlib.util.find_spec("native_build"):
    PARAMETERS.append(pytest.param("cuda-extension", marks=pytest.mark.cuda))
