"""Plain copies: the engine for the CPU, and for devices whose torch has no streams of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvembed._memory import host_buffer
from kvembed._transfer._base import packed
from kvembed._transfer.staging import Staging, StagingPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from kvembed._rows import Span
    from kvembed._transfer._base import Mark, Strip

__all__ = ["DONE", "Done", "PlainTransfer", "host_tensor"]

_STAGING_BYTES = 32 << 20


def host_tensor(host: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor over ``host`` with the type and shape of ``like``."""
    flat = torch.from_numpy(host)
    return flat.view(like.dtype) if like.dtype != torch.uint8 else flat


class Done:
    """The ticket of a transfer that was complete when it was issued."""

    done = True

    def wait_compute(self) -> None:
        """Return at once."""

    def wait_host(self) -> None:
        """Return at once."""


DONE = Done()


class PlainTransfer:
    """Copies in the calling thread, done when the call returns.

    On a device other than the CPU, torch's own blocking copy waits for what the thread has queued, so marks are not
    needed either; a thread other than the one that computes waits for its mark first.

    Args:
        device: The device.
        max_staging_bytes: Most host memory for staging.
    """

    name = "plain copies"

    def __init__(self, device: torch.device, max_staging_bytes: int = _STAGING_BYTES) -> None:
        self.device = device
        self.direct = device.type == "cpu"
        self._pool = StagingPool(host_buffer, max_staging_bytes, slots=8)

    def prepare(self, slot_nbytes: int) -> None:
        """See `TransferEngine`; nothing is allocated where nothing needs staging."""
        if not self.direct:
            self._pool.prepare(slot_nbytes)

    def staging(self, nbytes: int) -> Staging:
        """See `TransferEngine`."""
        return self._pool.take(nbytes)

    def is_pinned(self, host: np.ndarray) -> bool:
        """True on the CPU: any memory will do."""
        return self.direct

    def pinned(self, nbytes: int) -> np.ndarray:
        """Allocate ordinary memory."""
        return host_buffer(nbytes)

    def mark(self) -> Mark | None:
        """Wait until the device has nothing left to do, so that any later copy comes after it."""
        if not self.direct:
            torch.get_device_module(self.device).synchronize()
        return None

    def to_device(self, strips: Sequence[Strip], after: Mark | None, staging: Staging | None = None) -> Done:
        """Copy now."""
        for host, device in strips:
            device.copy_(host_tensor(host, device))
        if staging is not None:
            staging.release()
        return DONE

    def to_host(self, strips: Sequence[Strip], after: Mark | None) -> Done:
        """Copy now."""
        for host, device in strips:
            host_tensor(host, device).copy_(device)
        return DONE

    def pack(self, host: np.ndarray, spans: Sequence[Span], after: Mark | None) -> Done:
        """Copy now."""
        return self.to_host(packed(host, spans), after)

    def close(self) -> None:
        """Give the staging memory back."""
        self._pool.close()
