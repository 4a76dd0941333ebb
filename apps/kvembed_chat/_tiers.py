"""How tiers look: a glyph and a colour for each, bars made of them, and figures beside the bars.

The glyph carries the meaning, the colour only helps: all of this has to be readable with NO_COLOR. ``live`` caches (of
the last few conversations, still resident) look like the fastest tier of their device, since both cost no read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.content import Content

from kvembed._html import COMPUTED, TIER_GLYPHS, bar_segments
from kvembed._units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvembed._stats import TierStats

__all__ = ["FREE", "Gauge", "gauges_of", "legend", "sparkline", "tier_bar", "tier_mark", "tier_style", "wrapped"]

FREE = "·"
"""Fills the part of a gauge that is free; ``░`` would mean computed."""

_STYLES = {
    "live": "$text-success",
    "gpu": "$text-success",
    "cpu": "$text-primary",
    "disk": "$text-warning",
    "remote": "$text-secondary",
    COMPUTED: "$text-muted",
}
_BARS = "▁▂▃▄▅▆▇█"


def tier_style(tier: str) -> str:
    """Return the colour of a tier, by the name it has in every theme."""
    return _STYLES.get(tier, "")


def tier_mark(tier: str, words: str = "") -> Content:
    """Return a tier's glyph, and words after it."""
    mark = Content.styled(TIER_GLYPHS.get(tier, "▚"), tier_style(tier))
    return Content.assemble(mark, f" {words}") if words else mark


def tier_bar(tokens_by_tier: Mapping[str, int], computed: int, width: int) -> Content:
    """Return a bar of ``width`` cells in proportion to tokens; every part that has some has a cell."""
    parts = bar_segments(tokens_by_tier, computed, width)
    return Content.assemble(*((glyph * cells, tier_style(name)) for name, glyph, cells in parts))


def wrapped(parts: Iterable[Content], width: int, separator: str = " · ") -> list[Content]:
    """Join parts into as few lines as fit, breaking between parts only."""
    lines: list[Content] = []
    for part in parts:
        if lines and lines[-1].cell_length + len(separator) + part.cell_length <= width:
            lines[-1] = Content.assemble(lines[-1], (separator, "$text-muted"), part)
        else:
            lines.append(part)
    return lines


class Gauge:
    """What one device holds of one budget.

    Args:
        label: For the eye: ``"Memory"``, ``"GPU"``, ``"Disk"``.
        parts: Bytes in use by tier, fastest first.
        budget: Most bytes; 0 when nobody said.
    """

    def __init__(self, label: str, parts: dict[str, int], budget: int) -> None:
        self.label = label
        self.parts = {tier: nbytes for tier, nbytes in parts.items() if nbytes > 0}
        self.budget = budget

    @property
    def used(self) -> int:
        """Bytes in use."""
        return sum(self.parts.values())

    def bar(self, width: int) -> Content:
        """Return the bar: parts in use, then what is free; full when there is more than the budget."""
        whole = max(self.budget, self.used, 1)
        named = {**self.parts, COMPUTED: whole - self.used}
        cells = bar_segments({tier: n for tier, n in named.items() if tier != COMPUTED}, named[COMPUTED], width)
        return Content.assemble(
            *(
                (FREE * n, "$text-muted") if tier == COMPUTED else (glyph * n, tier_style(tier))
                for tier, glyph, n in cells
            )
        )

    def lines(self, width: int) -> list[Content]:
        """Return two lines: label and figures, the bar and how full it is."""
        figures = format_bytes(self.used) if not self.budget else _of(self.used, self.budget)
        gap = max(1, width - len(self.label) - len(figures))
        head = Content.assemble((self.label, "bold"), " " * gap, (figures, "$text-muted"))
        share = f" {_percent(self.used, self.budget)}" if self.budget else ""
        return [head, Content.assemble(self.bar(max(4, width - len(share))), share)]


def gauges_of(tiers: Sequence[TierStats]) -> list[Gauge]:
    """Return one gauge for each device that has a tier; live caches on the CPU are a part of its memory."""
    found = {tier.name: tier for tier in tiers}
    gauges: list[Gauge] = []
    gpu, cpu, live = found.get("gpu"), found.get("cpu"), found.get("live")
    if gpu is not None:
        gauges.append(Gauge("GPU", {"gpu": gpu.nbytes}, gpu.max_bytes))
    if cpu is not None:
        mine = min(live.nbytes, cpu.nbytes) if live is not None else 0
        gauges.append(Gauge("Memory", {"live": mine, "cpu": cpu.nbytes - mine}, cpu.max_bytes))
    elif live is not None:
        gauges.append(Gauge("Memory", {"live": live.nbytes}, live.max_bytes))
    for name, label in (("disk", "Disk"), ("remote", "Remote")):
        tier = found.get(name)
        if tier is not None:
            gauges.append(Gauge(label, {name: tier.nbytes}, tier.max_bytes))
    return gauges


def legend(tiers: Iterable[str]) -> Content:
    """Return what the glyphs of some tiers mean, in one line."""
    parts = [tier_mark(tier, tier) for tier in dict.fromkeys(tiers)]
    return Content("  ").join(parts)


def sparkline(rates: Sequence[float], width: int) -> str:
    """Return the latest rates as one glyph each; full height is 1, and only nothing at all is the lowest."""
    latest = rates[-width:] if width > 0 else []
    top = len(_BARS) - 1
    return "".join(_BARS[0 if rate <= 0 else min(top, max(1, round(rate * top)))] for rate in latest)


def _of(used: int, budget: int) -> str:
    """Return ``"2.1 / 3.0 GiB"``, with the unit once where it is the same."""
    small, large = format_bytes(used), format_bytes(budget)
    if small.split()[1:] == large.split()[1:]:
        small = small.split()[0]
    return f"{small} / {large}"


def _percent(used: int, budget: int) -> str:
    share = 100 * used / budget
    return f"{'<1' if 0 < share < 1 else f'{share:.0f}':>3} %"
