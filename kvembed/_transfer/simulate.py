"""What a restore that is pipelined by layer should take: times of its stages in, a timeline out.

The same rules as `kvembed._restore.Restore` and the engines follow, without any thread or device: readers take layers
in order; the copies of a layer begin when it was read and the copies before it are done; a layer computes when its
rows are there and the layer before it has computed. A test runs the real restore on a clock of its own and compares.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvembed._units import format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Span", "Timeline", "simulate"]


class Span(NamedTuple):
    """When one stage works on one layer, in seconds from the start."""

    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated restore and the forward above it.

    Args:
        reads: For each layer, when it is read.
        copies: When it is copied on to the device.
        computes: When it computes.
        load_s: What reading and copying take by themselves.
    """

    reads: tuple[Span, ...]
    copies: tuple[Span, ...]
    computes: tuple[Span, ...]
    load_s: float

    @property
    def total_s(self) -> float:
        """Seconds until the last layer has computed."""
        return self.computes[-1].end

    @property
    def compute_s(self) -> float:
        """Seconds the forward takes by itself."""
        return sum(span.end - span.start for span in self.computes)

    @property
    def hidden(self) -> float:
        """Part of the loading that nobody waits for, 0 to 1."""
        if self.load_s <= 0.0:
            return 1.0
        return min(1.0, max(0.0, (self.load_s + self.compute_s - self.total_s) / self.load_s))

    def text(self, width: int = 60) -> str:
        """Return the stages as bars over time, ``width`` cells wide, with what came of it."""
        scale = width / self.total_s if self.total_s > 0 else 0.0
        rows = [("read", self.reads), ("copy", self.copies), ("compute", self.computes)]
        lines = [
            f"{name:>8} {_bar(spans, scale, width)}" for name, spans in rows if any(s.end > s.start for s in spans)
        ]
        total, load, compute = (format_seconds(s) for s in (self.total_s, self.load_s, self.compute_s))
        lines.append(
            f"{total} in all: {load} of loading, {compute} of compute, {self.hidden:.0%} of the loading hidden"
        )
        return "\n".join(lines)


def _bar(spans: Sequence[Span], scale: float, width: int) -> str:
    cells = []
    for cell in range(width):
        left, right = cell / scale, (cell + 1) / scale
        busy = sum(max(0.0, min(right, span.end) - max(left, span.start)) for span in spans) / (right - left)
        cells.append("█" if busy > 0.75 else "▒" if busy > 0.05 else "·")
    return "".join(cells)


def simulate(
    compute_s: Sequence[float],
    read_s: Sequence[float],
    copy_s: Sequence[float] | None = None,
    *,
    readers: int = 2,
) -> Timeline:
    """Work out a restore.

    Args:
        compute_s: Seconds each layer computes.
        read_s: Seconds a reader needs for each layer while the other readers read too.
        copy_s: Seconds its copies to the device take; None where rows are read into where they are.
        readers: Threads that read.
    """
    if not compute_s or len(read_s) != len(compute_s) or len(copy_s or compute_s) != len(compute_s):
        raise ValueError("one time for each layer of every stage")
    free = [0.0] * max(1, readers)
    reads: list[Span] = []
    copies: list[Span] = []
    computes: list[Span] = []
    copied = computed = 0.0
    for i, seconds in enumerate(compute_s):
        start = heapq.heappop(free)
        reads.append(Span(start, start + read_s[i]))
        heapq.heappush(free, reads[-1].end)
        copies.append(Span(reads[-1].end, reads[-1].end))
        if copy_s is not None:
            begin = max(copied, reads[-1].end)
            copied = begin + copy_s[i]
            copies[-1] = Span(begin, copied)
        begin = max(computed, copies[-1].end)
        computed = begin + seconds
        computes.append(Span(begin, computed))
    return Timeline(tuple(reads), tuple(copies), tuple(computes), max(span.end for span in copies))
