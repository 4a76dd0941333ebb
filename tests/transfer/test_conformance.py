"""What every transfer engine must keep, held against each of them, bit for bit."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kvembed._rows import Rows
from kvembed._transfer import Strip

from ._rigs import DRIVERS, PARAMETERS, RIGS, SLOT, STAGING, extension, fake, gpu_extension

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._rigs import Rig

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=PARAMETERS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    if request.param in DRIVERS:
        version, batch = DRIVERS[request.param]
        rig = extension(request.getfixturevalue("cuda_kit"), version, batch=batch)
    elif request.param == "cuda-extension":
        rig = gpu_extension(request.getfixturevalue("cuda_kit"))
    else:
        rig = RIGS[request.param]()
    yield rig
    rig.engine.close()
    assert rig.violations() == []


def noise(heads: int, n: int, row_nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (heads, n, row_nbytes), dtype=np.uint8)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_arrive_bit_for_bit_and_leave_their_neighbours_alone(rig: Rig, dtype: torch.dtype) -> None:
    rows = rig.rows(3, 40, 8, dtype)
    host = noise(3, 10, 8 * dtype.itemsize)
    rig.fill(host, rows[:, 20:30], rig.engine.mark()).wait_compute()
    found = as_bytes(rig.read(rows))
    assert np.array_equal(found[:, 20:30], host)
    assert not found[:, :20].any()
    assert not found[:, 30:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_leave_bit_for_bit(rig: Rig, dtype: torch.dtype) -> None:
    rows = rig.rows(3, 40, 8, dtype)
    made = noise(3, 40, 8 * dtype.itemsize)
    values = torch.from_numpy(made).view(dtype).to(rig.device)
    rig.compute(lambda: rows.copy_(values))
    out = np.zeros((3, 50, 8 * dtype.itemsize), np.uint8)
    rig.engine.to_host([Strip(out[:, 5:17], rows[:, 20:32])], rig.engine.mark()).wait_host()
    assert np.array_equal(out[:, 5:17], made[:, 20:32])
    assert not out[:, :5].any()
    assert not out[:, 17:].any()


def test_several_strips_in_one_call(rig: Rig) -> None:
    rows = [rig.rows(2, 20, width) for width in (4, 8, 16)]
    hosts = [noise(2, 20, 4 * width, seed=width) for width in (4, 8, 16)]
    ticket = rig.engine.to_device([Strip(h, r) for h, r in zip(hosts, rows, strict=True)], rig.engine.mark())
    ticket.wait_compute()
    back = [np.zeros_like(host) for host in hosts]
    ticket = rig.engine.to_host([Strip(b, r) for b, r in zip(back, rows, strict=True)], rig.engine.mark())
    ticket.wait_host()
    assert ticket.done
    assert all(np.array_equal(a, b) for a, b in zip(hosts, back, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_many_buffers_in_one_piece(rig: Rig, dtype: torch.dtype) -> None:
    made = [noise(heads, capacity, 8 * dtype.itemsize, heads) for heads, capacity in ((3, 40), (1, 40), (2, 9), (2, 5))]
    cut = [(20, 32), (0, 40), (8, 9), (5, 5)]
    layers = []
    for k, v in zip(made[::2], made[1::2], strict=True):
        buffers = [torch.zeros((1, *x.shape[:2], 8), dtype=dtype, device=rig.device) for x in (k, v)]
        layers.append(Rows())
        layers[-1]._init_rows(0, *buffers)
        for buffer, x in zip(buffers, (k, v), strict=True):
            values = torch.from_numpy(x).view(dtype).to(rig.device)
            rig.compute(lambda buffer=buffer, values=values: buffer[0].copy_(values))
    spans = [span for layer in layers for span in layer.spans(0, 0)]
    spans = [span._replace(start=a, end=b) for span, (a, b) in zip(spans, cut, strict=True)]
    expected = np.concatenate([x[:, a:b].ravel() for x, (a, b) in zip(made, cut, strict=True)])
    out = np.zeros(expected.nbytes + 7, np.uint8)
    ticket = rig.engine.pack(out[: expected.nbytes], spans, rig.engine.mark())
    ticket.wait_compute()
    for span in spans:
        rig.compute(lambda buffer=span.buffer: buffer.fill_(1.0))
    rig.settle()
    ticket.wait_host()
    assert np.array_equal(out[: expected.nbytes], expected)
    assert not out[expected.nbytes :].any()


def test_a_copy_in_comes_after_earlier_uses_of_the_memory(rig: Rig) -> None:
    # A new cache's memory may be what a queued kernel still reads.
    rows, kept = rig.rows(2, 16, 4), rig.rows(2, 16, 4)
    rig.compute(lambda: rows.fill_(7.0))
    rig.compute(lambda: kept.copy_(rows))
    ticket = rig.fill(noise(2, 16, 16), rows, rig.engine.mark())
    ticket.wait_host()
    assert bool((rig.read(kept) == 7.0).all())


def test_a_copy_out_comes_before_what_overwrites_the_rows(rig: Rig) -> None:
    rows = rig.rows(2, 16, 4)
    rig.compute(lambda: rows.fill_(7.0))
    out = np.zeros((2, 16, 16), np.uint8)
    ticket = rig.engine.to_host([Strip(out, rows)], rig.engine.mark())
    ticket.wait_compute()
    rig.compute(lambda: rows.fill_(8.0))
    rig.settle()
    ticket.wait_host()
    assert bool((torch.from_numpy(out).view(torch.float32) == 7.0).all())


def test_waiting_twice_is_harmless(rig: Rig) -> None:
    rows, host = rig.rows(1, 4, 4), noise(1, 4, 16)
    ticket = rig.fill(host, rows)
    for _ in range(2):
        ticket.wait_compute()
        ticket.wait_host()
    assert ticket.done
    assert np.array_equal(as_bytes(rig.read(rows)), host)


def test_staging_is_reused_and_bounded(rig: Rig) -> None:
    rig.engine.prepare(SLOT)
    n = SLOT // 2 // 64
    rows = [rig.rows(2, n, 16) for _ in range(50)]
    for seed, target in enumerate(rows):
        rig.fill(noise(2, n, 64, seed), target).wait_compute()
    for seed, target in enumerate(rows):
        assert np.array_equal(as_bytes(rig.read(target)), noise(2, n, 64, seed))
    if rig.allocated is not None:
        assert rig.allocated() == STAGING
    assert rig.engine.is_pinned(rig.engine.staging(10).array)


def test_staging_grows_when_more_is_asked_for(rig: Rig) -> None:
    rig.engine.prepare(100)
    n = 3 * STAGING // 64
    rows, host = rig.rows(1, n, 16), noise(1, n, 64)
    rig.fill(host, rows).wait_compute()
    assert np.array_equal(as_bytes(rig.read(rows)), host)


def test_staging_that_is_not_used_goes_back(rig: Rig) -> None:
    for _ in range(200):
        staging = rig.engine.staging(64)
        staging.release()
        staging.release()
    rig.fill(noise(1, 4, 16), rig.rows(1, 4, 4)).wait_host()


def test_closing_waits_and_can_be_repeated(rig: Rig) -> None:
    rows, host = rig.rows(2, 16, 4), noise(2, 16, 16)
    out = np.zeros_like(host)
    rig.fill(host, rows).wait_compute()
    ticket = rig.engine.to_host([Strip(out, rows)], rig.engine.mark())
    rig.engine.close()
    assert ticket.done
    assert np.array_equal(out, host)
    rig.engine.close()


def test_threads_transfer_at_once(rig: Rig) -> None:
    rig.engine.prepare(SLOT)
    rows = [[rig.rows(2, 30, 8) for _ in range(20)] for _ in range(4)]
    tickets: list[list[object]] = [[] for _ in range(4)]
    errors: list[BaseException] = []

    def work(which: int) -> None:
        try:
            for i, target in enumerate(rows[which]):
                tickets[which].append(rig.fill(noise(2, 30, 32, seed=100 * which + i), target))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for which in range(4):
        for i, (target, ticket) in enumerate(zip(rows[which], tickets[which], strict=True)):
            ticket.wait_compute()  # pyright: ignore[reportAttributeAccessIssue]
            assert np.array_equal(as_bytes(rig.read(target)), noise(2, 30, 32, seed=100 * which + i))


# ------------------------------------------------------------------ what the fake device is good for


def test_the_fake_shows_a_read_that_does_not_wait() -> None:
    rig = fake("late")
    rows, host = rig.rows(2, 16, 4), noise(2, 16, 16)
    rig.fill(host, rows)  # and no wait_compute
    assert not np.array_equal(as_bytes(rig.read(rows)), host)


def test_the_fake_shows_rows_that_are_overwritten_too_soon() -> None:
    rig = fake("late")
    rows, out = rig.rows(2, 16, 4), np.zeros((2, 16, 16), np.uint8)
    ticket = rig.engine.to_host([Strip(out, rows)], rig.engine.mark())
    rig.compute(lambda: rows.fill_(8.0))
    rig.settle()
    ticket.wait_host()
    assert out.any()


def test_the_fake_shows_a_copy_without_a_mark() -> None:
    rig = fake("early")
    rows, out = rig.rows(2, 16, 4), np.zeros((2, 16, 16), np.uint8)
    rig.compute(lambda: rows.fill_(7.0))
    rig.engine.to_host([Strip(out, rows)], None).wait_host()
    assert not out.any()


def test_the_fake_shows_staging_that_is_reused_too_soon() -> None:
    rig = fake("late")
    rows = rig.rows(2, 16, 4)
    staging = rig.engine.staging(128)
    array = staging.array.reshape(2, 16, 4 * 1)
    array[:] = 1
    target = rows.view(torch.uint8)[:, :, :4]
    ticket = rig.engine.to_device([Strip(array, target)], None)  # not handed over with the copy
    array[:] = 2
    ticket.wait_compute()
    assert int(rig.read(target).max()) == 2


def test_the_fake_shows_memory_that_is_given_up_too_soon() -> None:
    rig = fake("late")
    streams = rig.engine._streams  # pyright: ignore[reportAttributeAccessIssue]
    streams.copy([(torch.zeros(4), torch.ones(4))], streams.new_stream())
    with pytest.raises(RuntimeError, match="given up"):
        streams.run_all()


@pytest.mark.parametrize("order", ["late", "early", "random"])
def test_random_schedules(order: str) -> None:
    # Against a model of what the rows must hold, with all the waits a caller owes and none more.
    for seed in range(60):
        check_random_schedule(fake(order, seed), np.random.default_rng(seed))


def check_random_schedule(rig: Rig, rng: np.random.Generator) -> None:
    rows = [rig.rows(2, 8, 4) for _ in range(3)]
    truth = [np.zeros((2, 8, 16), np.uint8) for _ in rows]
    outs: list[tuple[object, np.ndarray, np.ndarray]] = []
    busy: list[object | None] = [None] * len(rows)
    for step in range(30):
        which = int(rng.integers(len(rows)))
        ticket = busy[which]
        kind = rng.choice(["in", "out", "compute", "read"])
        if kind == "in":
            host = noise(2, 8, 16, int(rng.integers(1 << 30)))
            if ticket is not None:  # it may still be read by a copy out, or filled by another copy in
                ticket.wait_compute()  # pyright: ignore[reportAttributeAccessIssue]
            busy[which] = rig.fill(host, rows[which], rig.engine.mark())
            truth[which] = host
            continue
        if ticket is not None:
            ticket.wait_compute()  # pyright: ignore[reportAttributeAccessIssue]
            busy[which] = None
        if kind == "out":
            out = np.zeros((2, 8, 16), np.uint8)
            busy[which] = rig.engine.to_host([Strip(out, rows[which])], rig.engine.mark())
            outs.append((busy[which], out, truth[which].copy()))
        elif kind == "compute":
            value = float(step + 1)
            rig.compute(lambda target=rows[which], value=value: target.fill_(value))
            truth[which] = np.full((2, 8, 4), value, np.float32).view(np.uint8)
        else:
            assert np.array_equal(as_bytes(rig.read(rows[which])), truth[which])
    for ticket, out, expected in outs:
        ticket.wait_host()  # pyright: ignore[reportAttributeAccessIssue]
        assert np.array_equal(out, expected)
    rig.engine.close()
