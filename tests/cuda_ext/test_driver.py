"""The library and the Python class over a driver: contexts, events, memory, errors."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path

import kvembed_cuda
import numpy as np
import pytest
from kvembed_cuda import CudaError, CudaUnavailableError, Direction, Driver, Event, Kernels, Stream, status, strips
from kvembed_cuda._pcie import Link, link_of

from ._mock import Kit, MockDriver


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def a_copy(driver: Driver, stream: int, device: int = 0) -> tuple[np.ndarray, np.ndarray]:
    source, target = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
    driver.copy(device, strips([(address(target), address(source), 64, 64, 64, 1)]), stream, Direction.TO_HOST)
    return source, target


# -- without a driver, or with one that will not do ---------------------------------------------------


def test_no_driver_is_a_clean_error(kit: Kit, tmp_path: Path) -> None:
    missing = tmp_path / "libcuda.so.1"
    with pytest.raises(CudaUnavailableError, match=r"libcuda\.so\.1: cannot open shared object file"):
        Driver(kit.library, missing)
    found = status(library=kit.library, driver=missing)
    assert not found.usable
    assert "libcuda.so.1" in found.reason


def test_a_library_that_is_no_driver(kit: Kit) -> None:
    with pytest.raises(CudaUnavailableError, match="no CUDA driver"):
        Driver(kit.library, kit.library)


def test_the_library_is_missing_or_foreign(kit: Kit, tmp_path: Path) -> None:
    assert "was not built" in status(library=tmp_path / "none.so").reason
    assert "cannot be used" in status(library=kit.mock).reason


@pytest.mark.parametrize(("version", "text"), [(11080, "CUDA 11.8"), (10020, "CUDA 10.2")])
def test_an_old_driver(kit: Kit, version: int, text: str) -> None:
    with pytest.raises(CudaUnavailableError, match=f"{text}; 12.0 or later"):
        kit.open(version)


@pytest.mark.parametrize(
    ("version", "form"),
    [(12000, None), (12040, None), (12080, "12.8"), (12090, "12.8"), (13000, "13.0"), (13020, "13.0")],
)
def test_the_form_of_batched_copies_follows_the_version(kit: Kit, version: int, form: str | None) -> None:
    with kit.open(version) as driver:
        assert driver.version == (version // 1000, version % 1000 // 10)
        assert driver.batch_form == form


def test_cuinit_fails(kit: Kit) -> None:
    kit.functions.mock_reset(13000, 1, 0)
    kit.functions.mock_fail(b"cuInit", 100, 0)
    found = status(library=kit.library, driver=kit.mock)
    assert found.reason == "no usable CUDA driver: CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected"


def test_status_says_what_can_be_used(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvembed_cuda._library._FOLDER", tmp_path)
    kit.functions.mock_reset(12080, 2, 0)
    found = status(library=kit.library, driver=kit.mock)
    assert (found.usable, found.reason, found.cuda) == (True, "CUDA 12.8, 2 GPUs", "12.8")
    assert [(device.number, device.name, device.compute) for device in found.devices] == [
        (0, "Mock GPU 0", (9, 0)),
        (1, "Mock GPU 1", (9, 0)),
    ]
    assert found.batch == "cuMemcpyBatchAsync of CUDA 12.8, on request"
    assert (found.kernels, found.kernels_reason) == (False, "this package was built without nvcc")
    assert kit.functions.mock_calls(b"cuDevicePrimaryCtxRetain") == 0  # looking makes no context

    (tmp_path / "bad").write_bytes(b"no kernels")
    bad = status(library=kit.library, driver=kit.mock, kernels=tmp_path / "bad", load_kernels=True)
    assert not bad.kernels
    assert "CUDA_ERROR_INVALID_IMAGE" in bad.kernels_reason
    (tmp_path / "good").write_bytes(b"MOCK")
    good = status(library=kit.library, driver=kit.mock, kernels=tmp_path / "good", load_kernels=True)
    assert good.kernels
    assert kit.functions.mock_contexts(0) == kit.functions.mock_contexts(1) == 0  # given back

    kit.functions.mock_reset(12080, 0, 0)
    assert status(library=kit.library, driver=kit.mock).reason == "the CUDA driver sees no GPU"


def test_importing_it_loads_nothing(kit: Kit) -> None:
    assert "torch" not in {name.partition(".")[0] for name in vars(kvembed_cuda)}
    assert sys.modules["kvembed_cuda._library"].load(kit.library)  # needs no driver


# -- contexts -----------------------------------------------------------------------------------------


def test_primary_contexts_are_kept_once_and_given_back(kit: Kit) -> None:
    with kit.open(devices=3) as driver:
        for device in (0, 2, 0, 2):
            Stream(driver, device).close()
        assert [driver.mock.mock_contexts(i) for i in range(3)] == [1, 0, 1]
        assert driver.mock.mock_depth() == 0
    assert [kit.functions.mock_contexts(i) for i in range(3)] == [0, 0, 0]


def test_a_device_that_is_not_there(driver: MockDriver) -> None:
    for number in (-1, 1, 99):
        with pytest.raises(CudaError, match="KVC_NO_SUCH_DEVICE"):
            Stream(driver, number)
        with pytest.raises(CudaError, match="no CUDA device of this number"):
            driver.device(number)


def test_each_device_has_its_own_streams(kit: Kit) -> None:
    with kit.open(devices=2) as driver:
        first, second = Stream(driver, 0), Stream(driver, 1)
        with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_HANDLE"):
            a_copy(driver, first.handle, device=1)
        event = Event(driver, 0)
        with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_HANDLE"):
            event.record(second.handle)
        source, target = a_copy(driver, first.handle)
        event.record(first.handle)
        second.wait(event)  # across devices
        second.synchronize()
        assert (source == target).all()
        assert driver.mock.mock_depth() == 0


# -- events and memory --------------------------------------------------------------------------------


def test_events(driver: MockDriver) -> None:
    stream, event = Stream(driver, 0), Event(driver, 0)
    assert event.done  # never recorded
    event.synchronize()
    gate = Event(driver, 0)
    gate.record(stream.handle)
    source, target = a_copy(driver, stream.handle)
    event.record(stream.handle)
    event.synchronize()
    assert event.done
    assert (source == target).all()
    with pytest.raises(CudaError, match="INVALID_HANDLE"):
        event.elapsed(gate)  # made without timing
    start, end = Event(driver, 0, timing=True), Event(driver, 0, timing=True)
    start.record(stream.handle)
    end.record(stream.handle)
    end.synchronize()
    assert end.elapsed(start) == pytest.approx(0.002)


def test_an_event_that_has_not_happened(driver: MockDriver) -> None:
    seen = set()
    stream = Stream(driver, 0)
    for seed in range(40):
        driver.seed(seed)
        a_copy(driver, stream.handle)
        event = Event(driver, 0)
        event.record(stream.handle)
        seen.add(event.done)
        event.synchronize()
        assert event.done
    assert seen == {True, False}


def test_an_event_may_go_before_it_has_happened(driver: MockDriver) -> None:
    first, second = Stream(driver, 0), Stream(driver, 0)
    source, target = a_copy(driver, first.handle)
    event = Event(driver, 0)
    event.record(first.handle)
    second.wait(event)
    event.close()
    event.close()
    second.synchronize()
    assert (source == target).all()


def test_pinned_pages_and_device_memory(driver: MockDriver) -> None:
    pages = np.zeros(8192, np.uint8)
    driver.host_register(0, address(pages), pages.nbytes)
    with pytest.raises(CudaError, match="CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"):
        driver.host_register(0, address(pages), 64)
    driver.host_unregister(0, address(pages))
    with pytest.raises(CudaError, match="CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"):
        driver.host_unregister(0, address(pages))
    free, total = driver.memory_info(0)
    memory = driver.allocate(0, 4096)
    assert driver.memory_info(0) == (free - 4096, total)
    driver.free(0, memory)
    assert driver.memory_info(0) == (free, total)


def test_memory_given_back_too_early_is_seen(kit: Kit) -> None:
    """That the mock sees it is what makes its silence elsewhere mean something."""
    with kit.open() as driver:
        stream, pages = Stream(driver, 0), np.zeros(64, np.uint8)
        for seed in range(20):
            driver.seed(seed)
            memory = driver.allocate(0, 64)
            driver.host_register(0, address(pages), 64)
            driver.copy(0, strips([(address(pages), memory, 64, 64, 64, 1)]), stream.handle, Direction.TO_HOST)
            driver.host_unregister(0, address(pages))
            driver.copy(0, strips([(address(pages), memory, 64, 64, 64, 1)]), stream.handle, Direction.TO_HOST)
            driver.free(0, memory)
            driver.mock.mock_run()
        assert set(driver.violations) == {
            "host memory unpinned while a copy needs it",
            "device memory freed while a copy needs it",
        }


def test_handles_close_themselves_and_survive_their_driver(kit: Kit) -> None:
    driver = kit.open()
    event, stream = Event(driver, 0), Stream(driver, 0)
    assert driver.mock.mock_alive() == 1
    del event
    assert driver.mock.mock_alive() == 0
    driver.close()
    driver.close()
    stream.close()  # nothing to do any more
    with pytest.raises(CudaUnavailableError, match="closed"):
        Stream(driver, 0)


# -- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "code", "name"),
    [
        ("cuStreamCreate", 2, "CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuCtxPushCurrent", 201, "CUDA_ERROR_INVALID_CONTEXT"),
        ("cuDevicePrimaryCtxRetain", 2, "CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_the_driver_fails(kit: Kit, function: str, code: int, name: str) -> None:
    with kit.open() as driver:
        driver.fail(function, code)
        with pytest.raises(CudaError) as caught:
            Stream(driver, 0)
        assert (caught.value.call, caught.value.code, caught.value.name) == ("kvc_stream_create", code, name)
        assert caught.value.is_out_of_memory == (code == 2)
        assert not caught.value.is_lost
        assert driver.mock.mock_depth() == 0
        Stream(driver, 0).synchronize()  # and goes on


def test_an_error_without_a_name(driver: MockDriver) -> None:
    driver.fail("cuStreamCreate", 12345)
    with pytest.raises(CudaError, match=r"CUDA error 12345 \(12345\): the driver has no text for it"):
        Stream(driver, 0)


def test_every_function_fails_cleanly(driver: MockDriver, tmp_path: Path) -> None:
    (tmp_path / "kernels").write_bytes(b"MOCK")
    stream, event, pages = Stream(driver, 0), Event(driver, 0), np.zeros(64, np.uint8)
    for function, use in {
        "cuMemGetInfo": lambda: driver.memory_info(0),
        "cuMemAlloc": lambda: driver.allocate(0, 64),
        "cuMemFree": lambda: driver.free(0, 4096),
        "cuMemHostRegister": lambda: driver.host_register(0, address(pages), 64),
        "cuMemHostUnregister": lambda: driver.host_unregister(0, address(pages)),
        "cuMemcpyDtoHAsync": lambda: a_copy(driver, stream.handle),
        "cuStreamSynchronize": stream.synchronize,
        "cuStreamWaitEvent": lambda: stream.wait(event),
        "cuEventCreate": lambda: Event(driver, 0),
        "cuEventRecord": lambda: event.record(stream.handle),
        "cuEventQuery": lambda: event.done,
        "cuEventSynchronize": event.synchronize,
        "cuEventElapsedTime": lambda: event.elapsed(event),
        "cuModuleLoadData": lambda: Kernels(driver, 0, tmp_path / "kernels"),
        "cuModuleGetFunction": lambda: Kernels(driver, 0, tmp_path / "kernels"),
    }.items():
        driver.fail(function, 719)
        with pytest.raises(CudaError, match=r"CUDA_ERROR_LAUNCH_FAILED \(719\): unspecified launch failure"):
            use()
        assert driver.mock.mock_depth() == 0, function
    assert driver.calls("cuModuleUnload") == 1


def test_a_lost_device(kit: Kit) -> None:
    with kit.open() as driver:
        stream, event = Stream(driver, 0), Event(driver, 0)
        number = stream.handle
        driver.lose()
        for use in (stream.synchronize, event.synchronize, lambda: a_copy(driver, number)):
            with pytest.raises(CudaError, match="CUDA_ERROR_LAUNCH_FAILED") as caught:
                use()
            assert caught.value.is_lost
        del stream, event  # quietly


# -- threads ------------------------------------------------------------------------------------------


def test_many_threads_on_two_devices(kit: Kit) -> None:
    with kit.open(devices=2) as driver:
        failures: list[str] = []

        def work(number: int) -> None:
            device = number % 2
            stream, event = Stream(driver, device), Event(driver, device)
            for _ in range(50):
                source, target = a_copy(driver, stream.handle, device)
                event.record(stream.handle)
                event.synchronize()
                if not (source == target).all():
                    failures.append(f"thread {number}")
            if driver.mock.mock_depth():
                failures.append(f"thread {number} has a context left")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert [driver.mock.mock_contexts(i) for i in range(2)] == [1, 1]
        assert driver.violations == []


def test_calls_run_without_the_interpreters_lock(kit: Kit) -> None:
    from kvembed_cuda._library import load

    library = load(kit.library)
    assert isinstance(library, ctypes.CDLL)
    assert not isinstance(library, ctypes.PyDLL)


# -- the PCIe link ------------------------------------------------------------------------------------


def test_the_link_is_the_slower_end(tmp_path: Path) -> None:
    device = tmp_path / "bridge" / "0000:0a:00.0"
    device.mkdir(parents=True)
    assert link_of("0000:0A:00.0", tmp_path / "bridge") is None
    (device / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (device / "max_link_width").write_text("16\n")
    assert link_of("0000:0A:00.0", tmp_path / "bridge") == Link(5, 16)
    (device.parent / "max_link_speed").write_text("16.0 GT/s PCIe\n")
    (device.parent / "max_link_width").write_text("8\n")
    assert link_of("0000:0A:00.0", tmp_path / "bridge") == Link(4, 8)
    (device / "max_link_speed").write_text("Unknown\n")
    assert link_of("0000:0A:00.0", tmp_path / "bridge") == Link(4, 8)


def test_what_a_link_carries() -> None:
    assert Link(3, 16).bytes_per_second == pytest.approx(15.75e9, rel=1e-3)
    assert Link(4, 16).bytes_per_second == pytest.approx(31.5e9, rel=1e-3)
    assert Link(5, 16).bytes_per_second == pytest.approx(63.0e9, rel=1e-3)
