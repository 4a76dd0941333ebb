"""How fast an engine moves KV."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvembed._transfer._base import Strip

if TYPE_CHECKING:
    from kvembed._transfer._base import TransferEngine

__all__ = ["Rates", "measure"]

_HEADS, _WIDTH = 8, 128


class Rates(NamedTuple):
    """Bytes a second, one way at a time.

    Args:
        to_device: From host memory to the device.
        to_host: From the device to host memory.
    """

    to_device: float
    to_host: float


def measure(engine: TransferEngine, nbytes: int = 64 << 20, seconds: float = 0.2) -> Rates:
    """Copy rows of a cache to and fro through staging memory, and return the best rates.

    Args:
        engine: The engine.
        nbytes: Bytes of a copy; more than fits into a processor's caches.
        seconds: How long to try, for each way.
    """
    tokens = max(1, nbytes // (_HEADS * _WIDTH * 2))
    # As in a cache with room: heads lie apart.
    rows = torch.zeros((_HEADS, tokens + 64, _WIDTH), dtype=torch.bfloat16, device=engine.device)[:, :tokens]
    staging = engine.staging(rows.numel() * 2)
    try:
        host = staging.array.reshape(_HEADS, tokens, _WIDTH * 2)
        host[...] = 1  # touched
        strips = [Strip(host, rows)]
        ways = (engine.to_device, engine.to_host)
        best = [float("inf"), float("inf")]
        for i, way in enumerate(ways):
            way(strips, engine.mark()).wait_host()
            until = time.perf_counter() + seconds
            while True:
                mark = engine.mark()
                began = time.perf_counter()
                way(strips, mark).wait_host()
                now = time.perf_counter()
                best[i] = min(best[i], now - began)
                if now >= until:
                    break
        return Rates(*(host.nbytes / took for took in best))
    finally:
        staging.release()
