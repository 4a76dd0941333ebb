"""The simulator against the restore itself, which runs on a clock that only moves when all its threads sleep."""

from __future__ import annotations

import heapq
import threading
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from kvembed import _restore
from kvembed._restore import Piece, Restore
from kvembed._testing import random_block
from kvembed._tiers.cpu import MemorySource
from kvembed._transfer.simulate import Span, simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._tiers._base import BlockSource


class Clock:
    """Virtual time for some threads: it moves on when each of them sleeps or waits.

    Args:
        threads: How many take part.
    """

    def __init__(self, threads: int) -> None:
        self._changed = threading.Condition()
        self._running = threads
        self._sleeping: list[float] = []
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        """Return when the time has come."""
        with self._changed:
            until = self.now + seconds
            heapq.heappush(self._sleeping, until)
            self._running -= 1
            self._move_on()
            while self.now < until:
                assert self._changed.wait(30)

    def leave(self) -> None:
        """Say that the calling thread takes no part any more."""
        with self._changed:
            self._running -= 1
            self._move_on()

    def event(self) -> Event:
        """Return an event whose waiters do not hold up time."""
        return Event(self)

    def _move_on(self) -> None:
        if self._running == 0 and self._sleeping:
            self.now = self._sleeping[0]
            while self._sleeping and self._sleeping[0] <= self.now:
                heapq.heappop(self._sleeping)
                self._running += 1
            self._changed.notify_all()


class Event:
    """As `threading.Event`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._is_set = False
        self._waiting = 0

    def set(self) -> None:
        """Let the waiters go on."""
        with self._clock._changed:
            self._is_set = True
            # They run from this moment on, not from when the system wakes them.
            self._clock._running += self._waiting
            self._waiting = 0
            self._clock._changed.notify_all()

    def wait(self) -> None:
        """Wait until it is set."""
        with self._clock._changed:
            if self._is_set:
                return
            self._waiting += 1
            self._clock._running -= 1
            self._clock._move_on()
            while not self._is_set:
                assert self._clock._changed.wait(30)


class Layer:
    """What a restore needs of a layer; its rows take their time."""

    def __init__(self, index: int, clock: Clock, seconds: float) -> None:
        import torch

        self.index, self._clock, self._seconds = index, clock, seconds
        self.device = torch.device("cpu")
        self.capacity = 1000
        self.read = Span(-1.0, -1.0)

    def begin_restore(self, length: int, whole_from: int) -> int:
        return 0

    def hold(self, gate: object) -> None:
        pass

    def load_rows(self, source: BlockSource, spec_index: int, start: int, end: int, skip: int) -> None:
        began = self._clock.now
        self._clock.sleep(self._seconds)
        self.read = Span(began, self._clock.now)


def really(
    monkeypatch: pytest.MonkeyPatch, compute_s: Sequence[float], read_s: Sequence[float], readers: int
) -> tuple[list[Span], list[Span]]:
    """Run the restore on virtual time; return when layers were read, and when they computed."""
    clock = Clock(readers + 1)
    layers = [Layer(i, clock, seconds) for i, seconds in enumerate(read_s)]
    with monkeypatch.context() as patch:
        patch.setattr(_restore, "_READERS", readers)
        patch.setattr(_restore, "_INLINE_BYTES", 0)
        patch.setattr(_restore.hf, "layers_of", lambda cache: layers)
        patch.setattr(_restore.threading, "Event", clock.event)
        read_layers = Restore._read_layers

        def reader(self: Restore) -> None:
            read_layers(self)
            clock.leave()

        patch.setattr(Restore, "_read_layers", reader)
        restore = Restore(cast("Any", None), [Piece(MemorySource(random_block()), 16)], 16)
    started = [threading.Thread(target=reader, args=(restore,)) for _ in range(readers)]
    for thread in started:
        thread.start()
    computes: list[Span] = []
    for i, seconds in enumerate(compute_s):
        restore.wait(i)
        began = clock.now
        clock.sleep(seconds)
        computes.append(Span(began, clock.now))
    clock.leave()
    for thread in started:
        thread.join()
    assert restore.complete
    return [layer.read for layer in layers], computes


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_the_restore_keeps_the_timeline(monkeypatch: pytest.MonkeyPatch, readers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    compute_s, read_s = (rng.uniform(0.01, scale, n).tolist() for scale in (1.0, rng.choice([0.1, 1.0, 4.0])))
    expected = simulate(compute_s, read_s, readers=readers)
    reads, computes = really(monkeypatch, compute_s, read_s, readers)
    assert np.allclose(reads, expected.reads, rtol=0, atol=1e-9)
    assert np.allclose(computes, expected.computes, rtol=0, atol=1e-9)


def test_stages_follow_one_another() -> None:
    found = simulate([1.0, 1.0], [2.0, 2.0], [0.5, 3.0], readers=1)
    assert found.reads == (Span(0.0, 2.0), Span(2.0, 4.0))
    assert found.copies == (Span(2.0, 2.5), Span(4.0, 7.0))
    assert found.computes == (Span(2.5, 3.5), Span(7.0, 8.0))
    assert (found.total_s, found.compute_s, found.load_s) == (8.0, 2.0, 7.0)
    assert found.hidden == pytest.approx(1 / 7)


def test_what_is_hidden() -> None:
    # Compute is long: all but the first layer's loading is hidden. It is short: all but the last layer's compute.
    assert simulate([10.0] * 10, [1.0] * 10, readers=1).hidden == pytest.approx(0.9)
    found = simulate([1.0] * 10, [10.0] * 10, readers=1)
    assert found.total_s == pytest.approx(101.0)
    assert found.hidden == pytest.approx(0.09)
    assert simulate([1.0], [0.0]).hidden == 1.0


def test_the_text() -> None:
    assert simulate([1.0, 1.0], [1.0, 1.0], readers=1).text(6).splitlines() == [
        "    read ████··",
        " compute ··████",
        "3.00 s in all: 2.00 s of loading, 2.00 s of compute, 50% of the loading hidden",
    ]
    assert "copy" in simulate([1.0], [1.0], [1.0]).text()


def test_times_for_other_layers_are_refused() -> None:
    for arguments in (([], []), ([1.0], [1.0, 2.0]), ([1.0], [1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="each layer"):
            simulate(*arguments)
