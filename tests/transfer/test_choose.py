"""Which engine a device gets and why, and how ``kvembed doctor`` puts it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import kvembed_cuda
import pytest
import torch

from kvembed._cli import _transfers
from kvembed._errors import KVEmbedWarning
from kvembed._transfer import choose as module
from kvembed._transfer.choose import choose, engine_for
from kvembed._transfer.extension import CudaStreams, ExtensionTransfer
from kvembed._transfer.measure import measure
from kvembed._transfer.plain import PlainTransfer

from ._rigs import CPU, RIGS, extension

if TYPE_CHECKING:
    from tests.cuda_ext._mock import Kit

CUDA, XPU = torch.device("cuda", 0), torch.device("xpu", 0)
USABLE = kvembed_cuda.Status(usable=True, reason="CUDA 12.8, 1 GPU", batch="on request", kernels_reason="loaded")


@pytest.fixture(autouse=True)
def _devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch with CUDA and xpu."""
    monkeypatch.delenv("KVEMBED_TRANSFER", raising=False)
    monkeypatch.setattr(module, "has_streams", lambda device: device.type in ("cuda", "xpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def set_status(monkeypatch: pytest.MonkeyPatch, status: kvembed_cuda.Status | None) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if status else None)
    monkeypatch.setattr(kvembed_cuda, "status", lambda **_: status)


def test_a_gpu_with_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    set_status(monkeypatch, USABLE)
    assert choose(CUDA) == ("extension", f"kvembed-cuda {kvembed_cuda.__version__} on CUDA 12.8, 1 GPU", None, None)


@pytest.mark.parametrize(
    ("status", "text"),
    [(None, "pip install kvembed-cuda"), (kvembed_cuda.Status(usable=False, reason="CUDA 11.8"), "CUDA 11.8")],
)
def test_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch, status: kvembed_cuda.Status | None, text: str) -> None:
    set_status(monkeypatch, status)
    choice = choose(CUDA)
    assert choice.kind == "torch"
    assert text in str(choice.extension)


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    set_status(monkeypatch, USABLE)
    assert choose(XPU) == ("torch", "it needs nothing but PyTorch", "it is for NVIDIA GPUs", None)
    assert choose(torch.device("mps"))[:2] == ("plain", "PyTorch has no streams for mps")
    assert choose(CPU).kind == "plain"
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm calls its devices cuda
    assert choose(CUDA).extension == "it is for NVIDIA GPUs"


@pytest.mark.parametrize(
    ("wish", "kind"), [("torch", "torch"), (" Plain", "plain"), ("extension", "extension"), ("", "extension")]
)
def test_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, wish: str, kind: str) -> None:
    set_status(monkeypatch, USABLE)
    monkeypatch.setenv("KVEMBED_TRANSFER", wish)
    assert choose(CUDA).kind == kind
    assert choose(CPU).kind == "plain"


def test_a_word_that_is_none_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    set_status(monkeypatch, USABLE)
    monkeypatch.setenv("KVEMBED_TRANSFER", "dma")
    assert choose(CUDA).kind == "extension"
    assert choose(CUDA).ignored == "dma"
    assert isinstance(engine_for(CPU), PlainTransfer)


def test_an_extension_that_fails_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kvembed_cuda.CudaError("kvc_stream_create", 2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")

    set_status(monkeypatch, USABLE)
    monkeypatch.setattr("kvembed._transfer.extension.open_driver", fail)
    monkeypatch.setattr(module, "TorchTransfer", lambda device: SimpleNamespace(device=device))
    with pytest.warns(KVEmbedWarning, match="CUDA_ERROR_OUT_OF_MEMORY"):
        assert engine_for(CUDA).device == CUDA


# -- what doctor says ---------------------------------------------------------------------------------


def test_doctor_on_a_cpu() -> None:
    facts = _transfers.inspect_transfer(CPU, quick=True)
    assert _transfers.describe(facts) == "plain copies: the CPU computes in host memory"
    facts.update(to_device=9.84e9, to_host=10e9)
    assert _transfers.describe(facts).endswith("\nin 9.8 GB/s, out 10.0 GB/s")


def test_doctor_on_a_gpu_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    set_status(monkeypatch, None)
    facts = _transfers.inspect_transfer(CUDA, quick=True)
    assert _transfers.describe(facts).splitlines() == [
        "PyTorch streams: it needs nothing but PyTorch",
        "CUDA extension: not installed: pip install kvembed-cuda",
    ]


def test_doctor_on_a_gpu_with_the_extension(monkeypatch: pytest.MonkeyPatch, cuda_kit: Kit) -> None:
    driver = cuda_kit.open(12080)
    device = driver.device(0)
    linked = kvembed_cuda.Device(**{**vars(device), "link": kvembed_cuda.Link(4, 16)})
    set_status(monkeypatch, kvembed_cuda.Status(**{**vars(USABLE), "devices": (linked,)}))
    rig = extension(cuda_kit, 12080)
    monkeypatch.setattr(module, "engine_for", lambda device: rig.engine)
    monkeypatch.setattr(_transfers, "_MEASURED_BYTES", 4096)
    facts = _transfers.inspect_transfer(CUDA)
    assert facts["to_device"] > 0
    assert facts["to_host"] > 0
    facts.update(to_device=25.2e9, to_host=26.8e9)
    assert _transfers.describe(facts).splitlines() == [
        f"CUDA extension: kvembed-cuda {kvembed_cuda.__version__} on CUDA 12.8, 1 GPU",
        "in 25.2 GB/s (80%), out 26.8 GB/s (85%) of PCIe 4 x16",
        "batched copies: on request; kernels: loaded",
    ]


def test_doctor_when_the_device_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(module, "engine_for", fail)
    facts = _transfers.inspect_transfer(CPU)
    assert facts["error"] == "no memory left"
    assert _transfers.describe(facts).endswith("not measured: no memory left")


@pytest.mark.parametrize("name", ["plain", "late"])
def test_what_is_measured_is_what_was_copied(name: str) -> None:
    engine = RIGS[name]().engine
    rates = measure(engine, 2048, seconds=0)
    assert min(rates) > 0
    engine.staging(2048).release()  # went back to the pool
    engine.close()


# -- the extension's own ------------------------------------------------------------------------------


def test_a_copy_that_fails_midway_is_waited_for(cuda_kit: Kit) -> None:
    driver = cuda_kit.open()
    streams = CudaStreams(driver, 0, lambda: 2)
    stream = streams.new_stream()
    pairs = [(torch.zeros(2, 3, 4), torch.ones(2, 5, 4)[:, :3]) for _ in range(3)]
    driver.fail("cuMemcpy2DAsync", 2, after=2)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        streams.copy(pairs, stream, to_device=False)
    assert driver.pending == 0  # the caller lets go of its tensors now
    assert [bool(target.all()) for target, _ in pairs] == [True, True, False]


def test_strips_that_cannot_be_copied(cuda_kit: Kit) -> None:
    streams = CudaStreams(cuda_kit.open(), 0, lambda: 2)
    stream = streams.new_stream()
    for bad in (torch.zeros(2, 4, 3).transpose(1, 2), torch.zeros(2, 3, 8)[:, :, :4]):
        with pytest.raises(ValueError, match="last two axes"):
            streams.copy([(torch.zeros(2, 3, 4), bad)], stream, to_device=True)
    streams.copy([(torch.zeros(2, 0, 4), torch.zeros(2, 0, 4))], stream, to_device=True)


def test_pages_are_pinned_once_and_unpinned_with_their_last_view(cuda_kit: Kit) -> None:
    driver = cuda_kit.open()
    streams = CudaStreams(driver, 0, lambda: 2)
    arrays = [streams.allocate(n) for n in (1, 4096, 5000, 3 << 20)]
    assert [array.nbytes for array in arrays] == [1, 4096, 5000, 3 << 20]
    assert all(array.__array_interface__["data"][0] % 4096 == 0 for array in arrays)
    assert driver.mock.mock_registered() == 4096 * (1 + 1 + 2 + 768)
    view = arrays.pop()[100:]
    arrays.clear()
    assert driver.mock.mock_registered() == 3 << 20
    view[:] = 1
    del view
    assert driver.mock.mock_registered() == 0
    driver.fail("cuMemHostRegister", 2)
    plain = streams.allocate(100)  # not pinned: slower, and right
    plain[:] = 1
    assert driver.mock.mock_registered() == 0
    later = streams.allocate(100)
    driver.close()
    del later


def test_without_a_driver_the_extension_says_so(monkeypatch: pytest.MonkeyPatch, cuda_kit: Kit) -> None:
    monkeypatch.setattr("kvembed_cuda._library.library_path", lambda: cuda_kit.library)
    if kvembed_cuda.status().usable:
        pytest.skip("there is one")
    with pytest.raises(kvembed_cuda.CudaUnavailableError, match="libcuda"):
        ExtensionTransfer(CUDA)
