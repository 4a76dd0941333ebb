"""Which transfer engine a device gets."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvembed._transfer.pinned import TorchTransfer
from kvembed._transfer.plain import PlainTransfer
from kvembed._transfer.streams import has_streams

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kvembed._transfer._base import TransferEngine

__all__ = ["Transfers", "engine_for"]


def engine_for(device: torch.device) -> TransferEngine:
    """Return the best engine there is for a device."""
    if has_streams(device):
        return TorchTransfer(device)
    return PlainTransfer(device)


class Transfers:
    """The engines of the devices one model computes on, made as they are needed.

    Args:
        make: Makes one.
    """

    def __init__(self, make: Callable[[torch.device], TransferEngine] = engine_for) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._engines: dict[torch.device, TransferEngine] = {}

    def of(self, device: torch.device) -> TransferEngine:
        """Return the engine of a device."""
        with self._lock:
            engine = self._engines.get(device)
            if engine is None:
                engine = self._engines[device] = self._make(device)
            return engine

    def close(self) -> None:
        """Close them all; a later `of` makes new ones."""
        with self._lock:
            engines, self._engines = list(self._engines.values()), {}
        for engine in engines:
            engine.close()
