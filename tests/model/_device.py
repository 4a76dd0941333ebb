"""A device that is none: host memory behind streams that run late and out of order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvembed._transfer import Transfers
from kvembed._transfer.fake import FakeStreams
from kvembed._transfer.pinned import TorchTransfer

if TYPE_CHECKING:
    import pytest
    import torch

__all__ = ["pretend_device"]


def pretend_device(
    monkeypatch: pytest.MonkeyPatch, order: str = "late", *, free: int = 64 << 20
) -> list[TorchTransfer]:
    """Have models that are wrapped from now on compute on such a device; return its engines as they are made.

    Args:
        monkeypatch: Takes it back.
        order: See `FakeStreams`.
        free: Bytes the device says are free.
    """
    engines: list[TorchTransfer] = []

    def make(device: torch.device) -> TorchTransfer:
        engines.append(TorchTransfer(device, FakeStreams(order, eager=True), 1 << 15))
        return engines[-1]

    monkeypatch.setattr("kvembed._devices.Transfers", lambda: Transfers(make))
    monkeypatch.setattr("kvembed._store.free_gpu_memory", lambda devices: free)
    monkeypatch.setattr("kvembed._budgets.has_gpu", lambda: True)
    return engines
