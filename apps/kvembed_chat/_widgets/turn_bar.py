"""What a reply cost: one bar of where its prompt came from, and the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.content import Content
from textual.widget import Widget

from kvembed._html import COMPUTED
from kvembed._units import format_count, format_seconds
from kvembed_chat._tiers import tier_bar, tier_mark, wrapped

if TYPE_CHECKING:
    from textual.app import RenderResult
    from textual.geometry import Size

    from kvembed import Usage

__all__ = ["cached_share", "NARROW", "reason_of", "TurnBar", "turn_lines"]

NARROW = 80
"""Under so many columns of the terminal a turn's cost is one line without a bar."""

_WIDEST_BAR = 64


def cached_share(usage: Usage) -> str:
    """Return which part of the prompt was not computed: never 100 % (a token always is), nor 0 % of something."""
    share = 100 * usage.cached_tokens / usage.prompt_tokens if usage.prompt_tokens else 0.0
    if not usage.cached_tokens:
        return "0 %"
    if share < 0.1:
        return "<0.1 %"
    return f"{min(share, 99.9) if usage.computed_tokens else share:.1f} %"


def reason_of(usage: Usage) -> str | None:
    """Return why less was reused than could be, in words; None when only what is new was computed."""
    if usage.bypass_reason:
        return f"bypassed: {usage.bypass_reason}"
    if usage.miss_reason and not usage.miss_reason.startswith("new text"):
        return usage.miss_reason
    return None


def turn_lines(usage: Usage, width: int, *, narrow: bool = False) -> list[Content]:
    """Return what a reply cost as lines of at most ``width`` cells.

    Args:
        usage: The cost.
        width: Cells of a line.
        narrow: One line, without the bar.
    """
    reason = reason_of(usage)
    if narrow:
        return [_narrow_line(usage, reason).truncate(width, ellipsis=True)] if usage.prompt_tokens else []
    lines: list[Content] = []
    if usage.prompt_tokens:
        share = f" {cached_share(usage)} cached"
        bar = tier_bar(usage.cached_tokens_by_tier, usage.computed_tokens, max(4, min(_WIDEST_BAR, width - len(share))))
        lines.append(Content.assemble(bar, (share, "bold")))
    parts = _figures(usage)
    if reason is not None:
        parts.append(Content.styled(reason, "$text-warning"))
    lines += wrapped(parts, width)
    return [line.truncate(width, ellipsis=True) for line in lines]


def _figures(usage: Usage) -> list[Content]:
    parts: list[Content] = []
    if usage.prompt_tokens:
        parts.append(Content(f"{format_count(usage.prompt_tokens)} prompt"))
        parts += [tier_mark(tier, f"{tier} {format_count(n)}") for tier, n in usage.cached_tokens_by_tier.items()]
        parts.append(tier_mark(COMPUTED, f"computed {format_count(usage.computed_tokens)}"))
    if usage.ttft_s:
        parts.append(Content.styled(f"TTFT {format_seconds(usage.ttft_s)}", "bold"))
    if usage.saved_s is not None and usage.cached_tokens:
        saved = max(0.0, usage.saved_s)
        # An estimate: not with more digits than it has.
        words = f"{saved:.1f} s" if 1 <= saved < 10 else format_seconds(saved)
        parts.append(Content.styled(f"saved ≈ {words}", "$text-success"))
    speed = usage.decode_tokens_per_second
    if speed is not None:
        parts.append(Content(f"{speed:.1f} tok/s"))
    if usage.completion_tokens:
        parts.append(Content(f"{format_count(usage.completion_tokens)} out"))
    return parts


def _narrow_line(usage: Usage, reason: str | None) -> Content:
    where = f" ({'+'.join(usage.cached_tokens_by_tier)})" if usage.cached_tokens else ""
    words = [f"{cached_share(usage)} cached{where}"]
    if usage.ttft_s:
        words.append(f"TTFT {format_seconds(usage.ttft_s)}")
    if reason is not None:
        words.append(reason)
    return Content(" · ".join(words))


class TurnBar(Widget):
    """The cost of one reply; nothing while it is not known.

    Args:
        usage: The cost.
    """

    DEFAULT_CSS = "TurnBar { height: auto; text-wrap: nowrap; }"

    def __init__(self, usage: Usage | None = None, *, classes: str | None = None) -> None:
        super().__init__(classes=classes)
        self._usage = usage
        self.display = usage is not None

    @property
    def usage(self) -> Usage | None:
        """The cost that is shown."""
        return self._usage

    def show(self, usage: Usage | None) -> None:
        """Show another cost."""
        self._usage = usage
        self.display = usage is not None
        self.refresh(layout=True)

    def _lines(self, width: int) -> list[Content]:
        if self._usage is None:
            return []
        return turn_lines(self._usage, width, narrow=self.app.size.width < NARROW)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the number of lines."""
        return len(self._lines(width))

    def render(self) -> RenderResult:
        """Draw the lines."""
        return Content("\n").join(self._lines(self.content_size.width))
