"""`HitCurve`: what budget would have given what hit rate, by replaying the log of calls."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed._units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._ledger import Call

__all__ = ["HitCurve", "hit_curve"]

_STEPS = 12
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class HitCurve:
    """Hit rates that a store of other sizes would have had over the logged calls.

    Of whole blocks, for a store that evicts the longest unused; the one that is used weighs costs too.

    Args:
        budgets: Bytes on disk, ascending.
        hit_rates: For each, the share of blocks that a call would have found, its longest prefix only.
        calls: Calls in the log.
        blocks: Blocks they used or made.
        working_set: Bytes of all different blocks: with more than that nothing would ever be evicted.
        span_s: Seconds from the first call to the last.
        budget: Bytes that the store has now, or None.
        hit_rate: Share with that budget.
    """

    budgets: tuple[int, ...]
    hit_rates: tuple[float, ...]
    calls: int
    blocks: int
    working_set: int
    span_s: float
    budget: int | None = None
    hit_rate: float | None = None

    @property
    def best(self) -> float:
        """Hit rate of a store without a limit."""
        return self.hit_rates[-1] if self.hit_rates else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    def sparkline(self) -> str:
        """Return the curve as one glyph for each budget; the full height is a hit rate of 1."""
        return "".join(_BARS[min(len(_BARS) - 1, int(rate * len(_BARS)))] for rate in self.hit_rates)

    def __str__(self) -> str:
        """Return the curve as a few lines of text."""
        if not self.calls:
            return "No calls logged yet: there is no curve of hit rates."
        head = (
            f"Hit rate by disk budget, replayed from {format_count(self.calls)} calls in "
            f"{format_seconds(self.span_s)} (whole blocks, longest unused evicted first):"
        )
        sizes = [format_bytes(budget) for budget in self.budgets]
        width = max(len(size) for size in sizes)
        lines = [head, f"  {self.sparkline()}  working set {format_bytes(self.working_set)}"]
        for size, rate in zip(sizes, self.hit_rates, strict=True):
            lines.append(f"  {size.rjust(width)}  {100 * rate:5.1f} %  {'█' * round(30 * rate)}")
        if self.budget is not None and self.hit_rate is not None:
            lines.append(f"  now {format_bytes(self.budget)}: {100 * self.hit_rate:.1f} %")
        return "\n".join(lines)


def _distances(calls: Sequence[Call]) -> tuple[np.ndarray, int]:
    """Return, for each block of each call, the smallest store that would have had it, and the bytes of all blocks.

    The stack distance of R. L. Mattson et al., Evaluation techniques for storage hierarchies (IBM Systems Journal
    9(2), 1970): under LRU a store of ``c`` bytes holds the ``c`` bytes used last, so one pass over the log answers
    for every ``c``. A call uses its blocks together, the beginning of the prompt last of all; hence the stack is
    kept by call, newest first, and within a call by position. Blocks never seen before are at infinity.
    """
    last: dict[bytes, int] = {}
    sizes: dict[bytes, int] = {}
    by_call = np.zeros(len(calls))  # bytes of the blocks whose last use was this call
    result: list[float] = []
    for number, call in enumerate(calls):
        # newer[c]: bytes used after call c.
        newer = np.concatenate([np.cumsum(by_call[:number][::-1])[::-1], [0.0]])
        within: dict[int, float] = {}
        reach = 0.0
        for key in dict.fromkeys(call.keys):
            then = last.get(key)
            if then is not None and reach != np.inf:
                # Of the call that used it last, the blocks before this one that are still its own.
                within[then] = within.get(then, 0.0) + sizes[key]
                # The prefix is found only as far as all of it is there.
                reach = max(reach, float(newer[then + 1]) + within[then])
            else:
                reach = np.inf
            result.append(reach)
            if then is not None:
                by_call[then] -= sizes[key]
            last[key], sizes[key] = number, call.block_bytes
            by_call[number] += call.block_bytes
    return np.array(result), int(sum(sizes.values()))


def hit_curve(calls: Sequence[Call], budget: int | None = None) -> HitCurve:
    """Return the curve of a log.

    Args:
        calls: The log, oldest first.
        budget: What the store has now, to be placed on the curve.
    """
    if not calls:
        return HitCurve((), (), 0, 0, 0, 0.0, budget)
    distances, working_set = _distances(calls)
    steps = np.geomspace(working_set / 2 ** (_STEPS / 2), working_set, _STEPS)
    budgets = sorted({int(np.ceil(step)) for step in steps})
    ordered = np.sort(distances)

    def rate(nbytes: int) -> float:
        return float(np.searchsorted(ordered, nbytes, side="right") / len(ordered))

    return HitCurve(
        budgets=tuple(budgets),
        hit_rates=tuple(rate(nbytes) for nbytes in budgets),
        calls=len(calls),
        blocks=len(distances),
        working_set=working_set,
        span_s=max(0.0, calls[-1].time - calls[0].time),
        budget=budget,
        hit_rate=None if budget is None else rate(budget),
    )
