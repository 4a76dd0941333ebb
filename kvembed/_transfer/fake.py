"""A device that does everything as late, as early or as oddly as streams allow; for tests on machines without a GPU.

Its memory is host memory, so that results can be looked at, and its streams are queues: a copy or a computation is
queued and runs only when something that was waited for needs it (``"late"``), as soon as it may (``"early"``), or when
a random number says so. A wait that is missing then shows as wrong bytes, on any machine and every time.
"""

from __future__ import annotations

import collections
import random
import threading
import weakref
from typing import TYPE_CHECKING, Any

from kvembed._memory import host_buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import torch

__all__ = ["FakeEvent", "FakeStream", "FakeStreams"]


class FakeEvent:
    """Happens when its stream gets there."""

    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.happened = False


class FakeStream:
    """A queue of steps, each a function or an event to wait for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: collections.deque[Callable[[], object] | FakeEvent] = collections.deque()


class FakeStreams:
    """`kvembed._transfer.streams.Streams` of the device.

    Args:
        order: ``"late"``, ``"early"`` or ``"random"``.
        seed: Of the random order.
        eager: Compute runs at once, as PyTorch on the CPU does; what it waits for is done by then. False queues it:
            see `compute`.
        log: Called with (what, name of the stream) as steps are issued and run.
    """

    def __init__(
        self,
        order: str = "late",
        seed: int = 0,
        *,
        eager: bool = False,
        log: Callable[[str, str], object] | None = None,
    ) -> None:
        if order not in ("late", "early", "random"):
            raise ValueError(order)
        self._order = order
        self._random = random.Random(seed)
        self._eager = eager
        self._log = log or (lambda what, name: None)
        self._lock = threading.RLock()
        self._compute = FakeStream("compute")
        self._streams = [self._compute]
        self.allocated = 0
        """Bytes of host memory handed out."""
        self.copies = 0
        """Copies run."""

    def new_stream(self) -> FakeStream:
        """See `Streams`."""
        with self._lock:
            stream = FakeStream(f"copy {len(self._streams)}")
            self._streams.append(stream)
            return stream

    def current_stream(self) -> FakeStream:
        """See `Streams`; all threads compute on one."""
        return self._compute

    def record(self, stream: FakeStream) -> FakeEvent:
        """See `Streams`."""
        event = FakeEvent(stream)

        def happen() -> None:
            event.happened = True

        self._queue(stream, happen)
        return event

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        """See `Streams`."""
        self._queue(stream, event)

    def query(self, event: FakeEvent) -> bool:
        """See `Streams`."""
        with self._lock:
            self._go_on()
            return event.happened

    def synchronize(self, event: FakeEvent) -> None:
        """See `Streams`."""
        with self._lock:
            self._until(event)

    def copy(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: FakeStream, *, to_device: bool = True
    ) -> None:
        """See `Streams`."""
        for target, source in pairs:
            self._copy(target, source, stream)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, stream: FakeStream) -> None:
        # Held as weakly as a device holds memory: who issued the copy has to keep it.
        to, of = weakref.ref(target), weakref.ref(source)

        def run() -> None:
            there, here = to(), of()
            if there is None or here is None:
                raise RuntimeError("memory was given up before a copy from or to it ran")
            there.copy_(here)
            self.copies += 1

        self._queue(stream, run)

    def allocate(self, nbytes: int) -> np.ndarray:
        """See `Streams`."""
        self.allocated += nbytes
        return host_buffer(nbytes)

    def compute(self, function: Callable[[], object]) -> None:
        """Queue a computation, as a kernel would be."""
        self._queue(self._compute, function)

    def run_all(self) -> None:
        """Run whatever is left."""
        with self._lock:
            while any(self._step(stream) for stream in self._streams):
                pass

    # -- the scheduler -----------------------------------------------------------------------------

    def _queue(self, stream: FakeStream, step: Callable[[], object] | FakeEvent) -> None:
        with self._lock:
            stream.steps.append(step)
            if stream is self._compute and self._eager:
                while stream.steps:
                    if not self._step(stream):
                        step = stream.steps[0]
                        assert isinstance(step, FakeEvent)
                        self._until(step)
            self._go_on()

    def _go_on(self) -> None:
        """Run as much as the order has it."""
        if self._order == "early":
            copies = [stream for stream in self._streams if stream is not self._compute]
            while any(self._step(stream) for stream in copies):
                pass
        elif self._order == "random":
            for _ in range(self._random.randrange(4)):
                self._step(self._random.choice(self._streams))

    def _step(self, stream: FakeStream) -> bool:
        """Run the next step of a stream; False when there is none, or it waits."""
        if not stream.steps:
            return False
        step = stream.steps[0]
        if isinstance(step, FakeEvent):
            if not step.happened:
                return False
            stream.steps.popleft()
        else:
            stream.steps.popleft()
            self._log("run", stream.name)
            step()
        return True

    def _until(self, event: FakeEvent) -> None:
        """Run what ``event`` needs, and no more."""
        while not event.happened:
            if self._step(event.stream):
                continue
            if not event.stream.steps:
                raise RuntimeError("a wait for an event that nothing leads to")
            blocker: Any = event.stream.steps[0]
            self._until(blocker)
