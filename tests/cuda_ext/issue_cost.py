"""Prints what it costs the calling thread to issue a block's copies, over a driver that only queues them.

    PYTHONPATH=.:cuda_ext python -m tests.cuda_ext.issue_cost

A real driver adds its own time, 2 to 3 µs a call on current ones. No test: it would depend on the machine's mood.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kvembed_cuda import Direction, Stream, strips

from kvembed._rows import Rows
from kvembed._transfer.extension import CudaStreams, ExtensionTransfer
from kvembed._transfer.pinned import StreamTicket

from ._mock import build_kit

if TYPE_CHECKING:
    from collections.abc import Callable

_LAYERS, _HEADS, _TOKENS, _WIDTH = 30, 3, 256, 64  # SmolLM2: 60 strips


def _microseconds(function: Callable[[], Any], stream: Stream, times: int = 2000) -> tuple[float, float]:
    took = []
    for _ in range(times):
        began = time.perf_counter()
        ticket = function()
        took.append(time.perf_counter() - began)
        stream.synchronize()
        if isinstance(ticket, StreamTicket):
            ticket.wait_host()
    took.sort()
    return 1e6 * statistics.median(took), 1e6 * took[int(0.99 * len(took))]


def _layer(k: torch.Tensor, v: torch.Tensor) -> Rows:
    rows = Rows()
    rows._init_rows(0, k[None], v[None])
    return rows


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        kit = build_kit(Path(folder))
        cache = torch.zeros((2 * _LAYERS, _HEADS, 2 * _TOKENS, _WIDTH), dtype=torch.bfloat16)
        host = torch.zeros((2 * _LAYERS, _HEADS, _TOKENS, _WIDTH), dtype=torch.bfloat16)
        pairs = [(h, c[:, :_TOKENS]) for h, c in zip(host, cache, strict=True)]
        row = _TOKENS * _WIDTH * 2
        table = strips([(h.data_ptr(), c.data_ptr(), row, 2 * row, row, _HEADS) for h, c in pairs])
        spans = [span for k, v in zip(cache[::2], cache[1::2], strict=True) for span in _layer(k, v).spans(0, _TOKENS)]
        packed = host.view(torch.uint8).numpy().reshape(-1)
        for version, batch in ((12040, False), (13000, True)):
            with kit.open(version) as driver:
                driver.mock.mock_still(1)
                stream = Stream(driver, 0)
                streams = CudaStreams(driver, 0, lambda s=stream: s.handle, batch=batch)
                engine = ExtensionTransfer(torch.device("cpu"), streams=streams)
                ways: dict[str, Callable[[], object]] = {
                    "from a prepared array": lambda d=driver, s=stream, b=batch: d.copy(
                        0, table, s.handle, Direction.TO_HOST, batch=b
                    ),
                    "from tensors": lambda s=stream, a=streams: a.copy(pairs, s, to_device=False),
                    "by the engine, as a block leaves": lambda e=engine: e.pack(packed, spans, e.mark()),
                }
                for name, way in ways.items():
                    median, late = _microseconds(way, stream)
                    kind = "one batch" if batch else "2-D copies"
                    print(f"{len(table)} strips, {kind}, {name}: {median:.0f} µs (99 %: {late:.0f} µs)")
        assert np.array_equal(host.view(torch.uint8).numpy(), cache[:, :, :_TOKENS].view(torch.uint8).numpy())


if __name__ == "__main__":
    main()
