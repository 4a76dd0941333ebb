"""A restore, compute, offload and overwrite, as a model does them, under thousands of schedules of the device.

With every wait in place the bytes are right in all of them. With any one of them left out they are wrong in some, which
is what makes the first statement worth something.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from kvembed_cuda import Stream

from kvembed._rows import Place, Span
from kvembed._transfer import Strip
from kvembed._transfer.extension import CudaStreams, ExtensionTransfer

from ._mock import Kit, MockDriver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvembed._transfer import Mark

LAYERS, HEADS, TOKENS, ROW = 2, 2, 6, 8
SHAPE = (LAYERS, HEADS, TOKENS, ROW)
BLOCK = slice(2, 2 + TOKENS)
SCHEDULES = 10_000


class Missing(Enum):
    """A wait that a caller owes, or the engine."""

    NONE = auto()
    MARK_BEFORE_RESTORE = auto()
    WAIT_BEFORE_COMPUTE = auto()
    MARK_BEFORE_OFFLOAD = auto()
    WAIT_BEFORE_OVERWRITING = auto()
    WAIT_BEFORE_READING = auto()
    STAGING_HANDED_OVER = auto()


class Pipeline:
    """One engine on one mock device, and a cache of two layers that it fills and empties."""

    def __init__(self, driver: MockDriver, *, batch: bool) -> None:
        self.driver = driver
        self.computes = Stream(driver, 0)  # torch's
        streams = CudaStreams(driver, 0, lambda: self.computes.handle, batch=batch)
        self.engine = ExtensionTransfer(torch.device("cpu"), streams=streams, max_staging_bytes=8192)
        self.engine.prepare(4096)  # two buffers, which is one less than there are layers and rounds
        self.cache = torch.zeros((LAYERS, HEADS, TOKENS + 3, ROW), dtype=torch.uint8)
        self.rows = self.cache[:, :, BLOCK]
        places = [Place(layer.data_ptr(), HEADS, (TOKENS + 3) * ROW, ROW) for layer in self.cache]
        self.spans = [Span(layer[None], place, 2, 2 + TOKENS) for layer, place in zip(self.cache, places, strict=True)]
        self.scratch = torch.zeros((2, *self.cache.shape), dtype=torch.uint8)
        self.out = np.zeros(SHAPE, np.uint8)
        self.random = np.random.default_rng(0)

    def kernel(self, target: torch.Tensor, source: torch.Tensor, key: int) -> None:
        """Queue ``target = source ^ key`` over one layer or all."""
        self.driver.compute(self.computes.handle, target.data_ptr(), source.data_ptr(), source.numel(), key)

    def mark(self, missing: bool) -> Mark | None:
        return None if missing else self.engine.mark()

    def run(self, seed: int, missing: Missing = Missing.NONE) -> bool:
        """Run it once; True when all bytes were right."""
        self.driver.seed(seed)
        stored, old = self.random.integers(0, 256, (2, *self.cache.shape), dtype=np.uint8)
        self.cache.copy_(torch.from_numpy(old))
        self.out[...] = 0
        before, after = self.scratch
        # What the memory held before is still being read: the restore has to come after that.
        self.kernel(before, self.cache, key=0)
        ready = self.mark(missing is Missing.MARK_BEFORE_RESTORE)
        tickets = []
        for layer in range(LAYERS):
            staging = self.engine.staging(self.out[layer].nbytes)
            host = staging.array.reshape(SHAPE[1:])
            host[...] = stored[layer, :, BLOCK]
            strip = Strip(host, self.rows[layer])
            if missing is Missing.STAGING_HANDED_OVER:
                tickets.append(self.engine.to_device([strip], ready))
                staging.release()  # the next layer may get it while it is still read
            else:
                tickets.append(self.engine.to_device([strip], ready, staging))
        for layer, ticket in enumerate(tickets):
            if missing is not Missing.WAIT_BEFORE_COMPUTE:
                ticket.wait_compute()
            self.kernel(self.cache[layer], self.cache[layer], key=17 + layer)
        # As a block leaves; the other way to say it has to be as good.
        mark = self.mark(missing is Missing.MARK_BEFORE_OFFLOAD)
        if seed % 2:
            leaving = self.engine.pack(self.out.reshape(-1), self.spans, mark)
        else:
            strips = [Strip(self.out[layer], self.rows[layer]) for layer in range(LAYERS)]
            leaving = self.engine.to_host(strips, mark)
        if missing is not Missing.WAIT_BEFORE_OVERWRITING:
            leaving.wait_compute()
        self.kernel(self.cache, self.cache, key=255)
        self.kernel(after, self.cache, key=0)
        if missing is not Missing.WAIT_BEFORE_READING:
            leaving.wait_host()
        want = old.copy()
        want[:, :, BLOCK] = stored[:, :, BLOCK]
        for layer in range(LAYERS):
            want[layer] ^= 17 + layer
        right = np.array_equal(self.out, want[:, :, BLOCK])
        self.computes.synchronize()
        for ticket in (*tickets, leaving):
            ticket.wait_host()
        assert self.driver.run() == 0
        return right and np.array_equal(before.numpy(), old) and np.array_equal(after.numpy(), want ^ 255)


@pytest.fixture(params=[(12040, False), (13000, True)], ids=["2d", "batch"])
def pipeline(request: pytest.FixtureRequest, kit: Kit) -> Iterator[Pipeline]:
    version, batch = request.param
    with kit.open(version) as driver:
        made = Pipeline(driver, batch=batch)
        yield made
        made.engine.close()
        assert driver.violations == []


def test_no_schedule_gives_wrong_bytes(pipeline: Pipeline) -> None:
    wrong = [seed for seed in range(SCHEDULES // 2) if not pipeline.run(seed)]
    assert wrong == []
    mock = pipeline.driver
    assert (mock.calls("cuMemcpyBatchAsync") > SCHEDULES) == (mock.batch_form is not None)


@pytest.mark.parametrize("missing", [one for one in Missing if one is not Missing.NONE], ids=lambda one: one.name)
def test_each_wait_is_missed(pipeline: Pipeline, missing: Missing) -> None:
    wrong = sum(not pipeline.run(seed, missing) for seed in range(200))
    assert wrong > 5
    assert pipeline.run(0)  # and it was nothing else
