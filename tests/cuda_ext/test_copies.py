"""All strided copies of a block in one call: the bytes, each form of the driver's interface, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from kvembed_cuda import STRIP, CudaError, Direction, Stream, strips

from ._mock import Kit, MockDriver

FORMS = {"12.4": 12040, "12.8": 12080, "13.0": 13000}


class Block:
    """Rows ``[begin, end)`` of a cache of some layers, and its strips to and from one contiguous buffer."""

    def __init__(self, seed: int, layers: int = 3, heads: int = 4, tokens: int = 24, row_nbytes: int = 34) -> None:
        random = np.random.default_rng(seed)
        shape = (2 * layers, heads, tokens, row_nbytes)
        self.cache = random.integers(0, 256, shape, dtype=np.uint8)
        self.begin, self.end = 5, 5 + int(random.integers(1, tokens - 4))
        self.packed = np.zeros((2 * layers, heads, self.end - self.begin, row_nbytes), np.uint8)

    @property
    def rows(self) -> np.ndarray:
        return self.cache[:, :, self.begin : self.end]

    def strips(self, direction: Direction) -> np.ndarray:
        row = self.packed.shape[2] * self.packed.shape[3]
        pitch = self.cache.shape[2] * self.cache.shape[3]
        made = []
        for cache, packed in zip(self.rows, self.packed, strict=True):
            device, host = cache.__array_interface__["data"][0], packed.__array_interface__["data"][0]
            if direction is Direction.TO_HOST:
                made.append((host, device, row, pitch, row, len(cache)))
            else:
                made.append((device, host, pitch, row, row, len(cache)))
        return strips(made)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [False, True], ids=["2d", "batch"])
def test_a_block_out_and_in_again_bit_for_bit(kit: Kit, form: str, batch: bool) -> None:
    with kit.open(FORMS[form]) as driver:
        stream, batched = Stream(driver, 0), batch and form != "12.4"
        for seed in range(30):
            driver.seed(seed)
            block = Block(seed)
            want, around = block.rows.copy(), block.cache.copy()
            out = driver.copy(0, block.strips(Direction.TO_HOST), stream.handle, Direction.TO_HOST, batch=batch)
            stream.synchronize()
            assert (block.packed == want).all()
            block.rows[...] = 0
            driver.copy(
                0, block.strips(Direction.TO_DEVICE), stream.handle, Direction.TO_DEVICE, batch=batch, source_ready=True
            )
            stream.synchronize()
            assert (block.cache == around).all()  # the rows, and nothing beside them
            assert out == (1 if batched else 6, 24 if batched else 0, 0)
        assert driver.calls("cuMemcpy2DAsync") == (0 if batched else 30 * 12)
        assert driver.violations == []


def test_copies_return_before_they_have_run(driver: MockDriver) -> None:
    waiting = 0
    stream = Stream(driver, 0)
    for seed in range(20):
        driver.seed(seed)
        block = Block(seed)
        driver.copy(0, block.strips(Direction.TO_HOST), stream.handle, Direction.TO_HOST)
        waiting += driver.pending > 0
        stream.synchronize()
        assert driver.pending == 0
    assert waiting > 5


def test_a_batch_is_split_at_its_most_rows(driver: MockDriver) -> None:
    stream, block = Stream(driver, 0), Block(1)
    for most, calls in ((512, 1), (24, 1), (23, 2), (7, 4), (1, 24)):
        block.packed[...] = 0
        issued = driver.copy(
            0, block.strips(Direction.TO_HOST), stream.handle, Direction.TO_HOST, batch=True, batch_rows=most
        )
        stream.synchronize()
        assert issued == (calls, 24, 0)
        assert (block.packed == block.rows).all()
    wide = Block(2, layers=40, heads=40, row_nbytes=2)
    issued = driver.copy(
        0, wide.strips(Direction.TO_HOST), stream.handle, Direction.TO_HOST, batch=True, batch_rows=10**6
    )
    assert issued == (4, 3200, 0)  # 1,024 at most, whatever is asked for
    stream.synchronize()
    assert (wide.packed == wide.rows).all()


@pytest.mark.parametrize("code", [1, 801])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_refused_batch_becomes_2d_copies_for_good(driver: MockDriver, code: int, after: int) -> None:
    stream, block = Stream(driver, 0), Block(3)
    driver.fail("cuMemcpyBatchAsync", code, after)
    issued = driver.copy(0, block.strips(Direction.TO_HOST), stream.handle, Direction.TO_HOST, batch=True, batch_rows=6)
    assert issued.batch_error == code
    stream.synchronize()
    assert (block.packed == block.rows).all()
    assert driver.batch_refused(0) == {1: "CUDA_ERROR_INVALID_VALUE", 801: "CUDA_ERROR_NOT_SUPPORTED"}[code]
    before = driver.calls("cuMemcpyBatchAsync")
    again = driver.copy(0, block.strips(Direction.TO_HOST), stream.handle, Direction.TO_HOST, batch=True)
    stream.synchronize()
    assert again == (6, 0, 0)
    assert driver.calls("cuMemcpyBatchAsync") == before


def test_another_error_of_a_batch_is_one(driver: MockDriver) -> None:
    stream, block = Stream(driver, 0), Block(3)
    driver.fail("cuMemcpyBatchAsync", 2)
    with pytest.raises(CudaError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        driver.copy(0, block.strips(Direction.TO_HOST), stream.handle, Direction.TO_HOST, batch=True)
    assert driver.batch_refused(0) is None


@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("batch", [False, True])
def test_the_legacy_stream_is_refused(driver: MockDriver, stream: int, batch: bool) -> None:
    block = Block(4)
    with pytest.raises(CudaError, match="KVC_LEGACY_STREAM.*stream of their own"):
        driver.copy(0, block.strips(Direction.TO_HOST), stream, Direction.TO_HOST, batch=batch)
    assert driver.pending == 0
    assert driver.calls("cuMemcpy2DAsync") == driver.calls("cuMemcpyBatchAsync") == 0


def test_the_threads_own_default_stream_will_do(driver: MockDriver) -> None:
    block = Block(4)
    driver.copy(0, block.strips(Direction.TO_HOST), 2, Direction.TO_HOST, batch=True)
    driver.stream_synchronize(0, 2)
    assert (block.packed == block.rows).all()


def test_what_is_read_out_of_order(kit: Kit) -> None:
    """Out of the device in stream order always; into it early only where the caller says the bytes are complete."""
    wrong = {(False, False): 0, (True, False): 0, (True, True): 0}
    with kit.open() as driver:
        stream = Stream(driver, 0)
        for seed in range(60):
            for to_device, ready in wrong:
                driver.seed(seed)
                source, target = np.zeros(256, np.uint8), np.zeros(256, np.uint8)
                ones = np.ones(256, np.uint8)
                ends = [array.__array_interface__["data"][0] for array in (target, source, ones)]
                # Something on the same stream makes the bytes that are copied next.
                driver.compute(stream.handle, ends[1], ends[2], 256, key=0)
                direction = Direction.TO_DEVICE if to_device else Direction.TO_HOST
                rows = strips([(ends[0], ends[1], 64, 64, 32, 4)])
                driver.copy(0, rows, stream.handle, direction, batch=True, source_ready=ready)
                stream.synchronize()
                wrong[to_device, ready] += not all(target.reshape(4, 64)[:, :32].ravel() == 1)
    assert wrong[False, False] == wrong[True, False] == 0
    assert wrong[True, True] > 4  # the promise was broken, and the mock shows what comes of that


def test_source_ready_never_counts_for_the_device(kit: Kit) -> None:
    with kit.open() as driver:
        stream = Stream(driver, 0)
        for seed in range(40):
            driver.seed(seed)
            source, target, ones = np.zeros(64, np.uint8), np.zeros(64, np.uint8), np.ones(64, np.uint8)
            ends = [array.__array_interface__["data"][0] for array in (target, source, ones)]
            driver.compute(stream.handle, ends[1], ends[2], 64, key=0)
            rows = strips([(ends[0], ends[1], 64, 64, 64, 1)])
            direction = (Direction.TO_HOST, Direction.ON_DEVICE)[seed % 2]
            driver.copy(0, rows, stream.handle, direction, batch=True, source_ready=True)
            stream.synchronize()
            assert target.all()


@pytest.mark.parametrize(
    "change",
    [
        {"dst": 0},
        {"src": 0},
        {"row_bytes": 0},
        {"rows": 0},
        {"dst_pitch": 33},
        {"src_pitch": 33},
        {"rows": 2**63},
        {"src_pitch": 2**63},
        {"dst": 2**64 - 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [False, True])
def test_a_strip_that_cannot_be_right(driver: MockDriver, change: dict[str, int], batch: bool) -> None:
    stream, block = Stream(driver, 0), Block(5)
    rows = block.strips(Direction.TO_HOST)
    for name, value in change.items():
        rows[4][name] = value
    with pytest.raises(CudaError, match=r"KVC_BAD_ARGUMENT.*strip 4 of 6; 0 are queued"):
        driver.copy(0, rows, stream.handle, Direction.TO_HOST, batch=batch)
    assert driver.pending == 0  # those before it neither


def test_arrays_that_are_not_strips(driver: MockDriver) -> None:
    good = Block(5).strips(Direction.TO_HOST)
    for bad in (good[::2], good.reshape(2, 3), good.view("<u8"), np.zeros(3)):
        with pytest.raises(TypeError, match="contiguous one-dimensional array"):
            driver.copy(0, bad, 2, Direction.TO_HOST)
    with pytest.raises(CudaError, match="KVC_BAD_ARGUMENT"):
        driver.copy(0, good, 2, 4)  # type: ignore[arg-type]
    assert driver.copy(0, np.zeros(0, STRIP), 2, Direction.TO_HOST, batch=True) == (0, 0, 0)


def test_the_driver_fails_midway(driver: MockDriver) -> None:
    stream, block = Stream(driver, 0), Block(6)
    driver.fail("cuMemcpy2DAsync", 2, after=4)
    with pytest.raises(
        CudaError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(2\): out of memory \(strip 4 of 6; 4 are queued\)"
    ):
        driver.copy(0, block.strips(Direction.TO_HOST), stream.handle, Direction.TO_HOST)
    stream.synchronize()
    assert (block.packed[:4] == block.rows[:4]).all()
    assert not block.packed[4:].any()


def test_rows_that_touch_are_one_copy(driver: MockDriver) -> None:
    stream, source, target = Stream(driver, 0), np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
    ends = [array.__array_interface__["data"][0] for array in (target, source)]
    rows = strips([(ends[0], ends[1], 32, 32, 32, 8)])
    for direction, name in (
        (Direction.TO_HOST, "cuMemcpyDtoHAsync"),
        (Direction.TO_DEVICE, "cuMemcpyHtoDAsync"),
        (Direction.ON_DEVICE, "cuMemcpyDtoDAsync"),
    ):
        target[...] = 0
        assert driver.copy(0, rows, stream.handle, direction) == (1, 0, 0)
        assert driver.copy(0, rows, stream.handle, direction, batch=True) == (1, 1, 0)
        stream.synchronize()
        assert (source == target).all()
        assert driver.calls(name) == 1


def test_pitches_over_the_devices_limit_go_row_by_row(kit: Kit) -> None:
    with kit.open() as driver:
        driver.mock.mock_max_pitch(500)
        stream, block = Stream(driver, 0), Block(7)
        assert block.cache.strides[1] > 500
        issued = driver.copy(0, block.strips(Direction.TO_HOST), stream.handle, Direction.TO_HOST)
        stream.synchronize()
        assert issued == (24, 0, 0)
        assert (block.packed == block.rows).all()
        assert driver.calls("cuMemcpy2DAsync") == 0


def test_between_two_places_of_a_device(driver: MockDriver) -> None:
    stream, block = Stream(driver, 0), Block(8)
    driver.copy(0, block.strips(Direction.TO_HOST), stream.handle, Direction.ON_DEVICE)
    stream.synchronize()
    assert (block.packed == block.rows).all()
    assert driver.calls("cuMemcpy2DAsync") == 6
