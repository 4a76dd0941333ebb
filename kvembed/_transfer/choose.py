"""Which transfer engine a device gets, and why."""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvembed._errors import KVEmbedWarning
from kvembed._transfer.pinned import TorchTransfer
from kvembed._transfer.plain import PlainTransfer
from kvembed._transfer.streams import has_streams

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kvembed._transfer._base import TransferEngine

__all__ = ["ENV", "WISHES", "Choice", "Transfers", "choose", "engine_for"]

ENV = "KVEMBED_TRANSFER"
"""The environment variable that asks for one."""

WISHES = ("auto", "extension", "torch", "plain")


class Choice(NamedTuple):
    """Which engine, and why.

    Args:
        kind: The CUDA extension, PyTorch's streams, or plain copies.
        reason: In words.
        extension: What is the matter with the extension, when it could be used on such a device and is not; else None.
        ignored: What `ENV` says, when it is none of the words it may be; else None.
    """

    kind: Literal["extension", "torch", "plain"]
    reason: str
    extension: str | None = None
    ignored: str | None = None


def choose(device: torch.device) -> Choice:
    """Say which engine a device gets. Looks at the driver, and makes nothing on the device."""
    wish = os.environ.get(ENV, "").strip().lower() or "auto"
    if wish not in WISHES:
        return _choose(device, "auto")._replace(ignored=wish)
    return _choose(device, wish)


def _choose(device: torch.device, wish: str) -> Choice:
    if device.type == "cpu":
        return Choice("plain", "the CPU computes in host memory")
    if not has_streams(device):
        return Choice("plain", f"PyTorch has no streams for {device.type}")
    asked = f"{ENV} asks for it"
    if wish == "plain":
        return Choice("plain", asked)
    missing = _why_no_extension(device)
    if missing is None and wish != "torch":
        return Choice("extension", _extension_in_words())
    if wish == "torch":
        return Choice("torch", asked)
    return Choice("torch", "it needs nothing but PyTorch", missing)


def _why_no_extension(device: torch.device) -> str | None:
    import torch

    if device.type != "cuda" or torch.version.cuda is None:
        return "it is for NVIDIA GPUs"
    if importlib.util.find_spec("kvembed_cuda") is None:
        return "not installed: pip install kvembed-cuda"
    from kvembed_cuda import status

    found = status()
    return None if found.usable else found.reason


def _extension_in_words() -> str:
    from kvembed_cuda import status

    found = status()
    return f"kvembed-cuda {found.version} on {found.reason}"


def engine_for(device: torch.device) -> TransferEngine:
    """Return the best engine there is for a device."""
    choice = choose(device)
    if choice.kind == "extension":
        from kvembed._transfer.extension import ExtensionTransfer

        try:
            return ExtensionTransfer(device)
        except RuntimeError as error:  # CUDA's: out of memory for its streams, most likely
            warnings.warn(f"kvembed-cuda cannot be used: {error}", KVEmbedWarning, stacklevel=2)
            return TorchTransfer(device)
    return TorchTransfer(device) if choice.kind == "torch" else PlainTransfer(device)


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
