"""How full the tiers are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.content import Content
from textual.widget import Widget

from kvembed_chat._tiers import gauges_of, legend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from textual.app import RenderResult
    from textual.geometry import Size

    from kvembed._stats import TierStats

__all__ = ["gauge_lines", "TierGauges"]


def gauge_lines(tiers: Sequence[TierStats], width: int) -> list[Content]:
    """Return a gauge of two lines for each device that has a tier, and what the glyphs mean."""
    gauges = gauges_of(tiers)
    lines = [line for gauge in gauges for line in gauge.lines(width)]
    shown = [tier for gauge in gauges for tier in gauge.parts]
    if shown:
        lines.append(legend(shown).truncate(width, ellipsis=True))
    return lines


class TierGauges(Widget):
    """Bytes in use and budget of each tier; hidden until they are known."""

    DEFAULT_CSS = "TierGauges { height: auto; padding: 0 1; text-wrap: nowrap; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._tiers: tuple[TierStats, ...] = ()
        self.display = False

    def show(self, tiers: Sequence[TierStats]) -> None:
        """Show these tiers."""
        if tuple(tiers) == self._tiers:
            return
        self._tiers = tuple(tiers)
        self.display = bool(tiers)
        self.refresh(layout=True)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the number of lines."""
        return len(gauge_lines(self._tiers, width))

    def render(self) -> RenderResult:
        """Draw the gauges."""
        return Content("\n").join(gauge_lines(self._tiers, self.content_size.width))
