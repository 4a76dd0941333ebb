"""The extension on a real GPU: ``pytest -m cuda tests/cuda_ext``. Needs a C compiler, and nvcc for the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import native_build
import numpy as np
import pytest
import torch
from kvembed_cuda import (
    QUANT,
    SEGMENT,
    Code,
    CudaError,
    Direction,
    Driver,
    Event,
    Group,
    Kernels,
    Stream,
    Type,
    status,
    strips,
)

from kvembed._codecs.blocks import SPAN
from kvembed._codecs.quantise import FP8, INT8, quantise

if TYPE_CHECKING:
    from pathlib import Path

    from ._mock import Kit

pytestmark = pytest.mark.cuda
DTYPES = {Type.FLOAT32: torch.float32, Type.FLOAT16: torch.float16, Type.BFLOAT16: torch.bfloat16}


@pytest.fixture
def real(kit: Kit) -> Driver:
    """The driver of this machine, after torch has taken it up."""
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    return Driver(kit.library)


def test_it_sees_what_torch_sees(real: Driver, kit: Kit) -> None:
    found = status(library=kit.library)
    assert found.usable, found.reason
    assert len(found.devices) == real.device_count
    assert real.device_count == torch.cuda.device_count()
    for number in range(real.device_count):
        device = real.device(number)
        assert device.name == torch.cuda.get_device_name(number)
        assert device.compute == torch.cuda.get_device_capability(number)


@pytest.mark.parametrize("batch", [False, True], ids=["2d", "batch"])
def test_a_block_goes_out_and_comes_in(real: Driver, batch: bool) -> None:
    stream, event = Stream(real, 0), Event(real, 0)
    cache = torch.randint(0, 256, (60, 8, 512, 128), dtype=torch.uint8, device="cuda")
    memory = torch.zeros((60, 8, 200, 128), dtype=torch.uint8, pin_memory=True)
    row, pitch = 200 * 128, 512 * 128
    for rounds in range(20):
        cache.add_(1)  # on torch's stream; the copies come after it
        event.record(torch.cuda.current_stream().cuda_stream)
        stream.wait(event)
        out = strips(
            [(m.data_ptr(), c[:, 300].data_ptr(), row, pitch, row, 8) for m, c in zip(memory, cache, strict=True)]
        )
        issued = real.copy(0, out, stream.handle, Direction.TO_HOST, batch=batch)
        assert issued.batched == (60 * 8 if batch and real.batch_form and not real.batch_refused(0) else 0)
        stream.synchronize()
        assert torch.equal(memory, cache[:, :, 300:500].cpu()), rounds
    memory.fill_(7)
    into = strips(
        [(c[:, 300].data_ptr(), m.data_ptr(), pitch, row, row, 8) for m, c in zip(memory, cache, strict=True)]
    )
    want = cache.clone()
    want[:, :, 300:500] = 7
    torch.cuda.synchronize()
    real.copy(0, into, stream.handle, Direction.TO_DEVICE, batch=batch, source_ready=True)
    stream.synchronize()
    assert torch.equal(cache, want)


def test_pages_of_ours_are_pinned(real: Driver) -> None:
    pages = np.zeros(1 << 20, np.uint8)
    address = pages.__array_interface__["data"][0]
    real.host_register(0, address, pages.nbytes)
    with pytest.raises(CudaError, match="CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"):
        real.host_register(0, address, pages.nbytes)
    real.host_unregister(0, address)


@pytest.fixture(scope="module")
def fatbin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = native_build.build_kernels(tmp_path_factory.mktemp("kernels"))
    if made is None:
        pytest.skip("no nvcc")
    return made


@pytest.mark.parametrize("kind", Type, ids=lambda kind: kind.name)
def test_kernels_quantise_as_the_codecs_do(real: Driver, fatbin: Path, kind: Type) -> None:
    kernels, stream = Kernels(real, 0, fatbin), Stream(real, 0)
    cache = torch.randn((70, 4, 300, 64), device="cuda").mul_(8).to(DTYPES[kind])
    size = cache.element_size()
    part = cache[:, :, 11:211]
    for code, dtype in ((Code.INT8, INT8), (Code.FP8_E4M3, FP8)):
        codes = torch.zeros((70, 4, 200, 64), dtype=torch.uint8, device="cuda")
        scales = [torch.zeros((4, 2, 64) if i % 2 else (4, 200, 1), device="cuda") for i in range(70)]
        table = np.zeros(70, QUANT)
        for i in range(70):
            group = Group.CHANNEL if i % 2 else Group.TOKEN
            ends = part[i].data_ptr(), codes[i].data_ptr(), scales[i].data_ptr()
            table[i] = (*ends, 300 * 64 * size, 64 * size, 4, 200, 64, SPAN, kind, code, group, 0)
        torch.cuda.synchronize()
        kernels.quantise(table, stream.handle)
        stream.synchronize()
        for i in range(70):
            want, want_scales = quantise(part[i].cpu(), dtype, "channel" if i % 2 else "token", SPAN if i % 2 else 1)
            assert torch.equal(codes[i].cpu(), want.view(torch.uint8))
            assert torch.equal(scales[i].cpu(), want_scales)


def test_kernels_gather_and_scatter(real: Driver, fatbin: Path) -> None:
    kernels, stream = Kernels(real, 0, fatbin), Stream(real, 0)
    for row in (1, 6, 24, 80, 4096):
        pages = torch.randint(0, 256, (70, 40, row), dtype=torch.uint8, device="cuda")
        index = torch.stack([torch.randperm(40)[:16] for _ in range(70)]).cuda()
        flat = torch.zeros((70, 16, row), dtype=torch.uint8, device="cuda")
        table = np.zeros(70, SEGMENT)
        for i in range(70):
            table[i] = (pages[i].data_ptr(), flat[i].data_ptr(), row, row, 16, index[i].data_ptr())
        torch.cuda.synchronize()
        kernels.gather(table, stream.handle)
        stream.synchronize()
        every = index[:, :, None].expand(-1, -1, row)
        assert torch.equal(flat, pages.gather(1, every))
        again = pages.clone()
        pages.scatter_(1, every, torch.zeros_like(flat))
        torch.cuda.synchronize()
        kernels.scatter(table, stream.handle)
        stream.synchronize()
        assert torch.equal(pages, again)
