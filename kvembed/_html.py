"""Bars, tables and mime bundles shared by everything that shows itself in a notebook.

Styles are inline and use ``currentColor`` and transparent colours only, so that output looks right on dark and
light pages, and there is no script: notebook viewers strip scripts and style sheets.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

__all__ = [
    "COMPUTED",
    "TIER_GLYPHS",
    "TIER_ORDER",
    "bar_html",
    "bar_segments",
    "bar_text",
    "colour",
    "escape",
    "mimebundle",
    "ordered_tiers",
    "panel",
    "rgba",
    "table_html",
    "text_html",
]

TIER_ORDER = ("live", "gpu", "cpu", "disk", "remote")
"""Tiers from fastest to slowest; ``live`` is the cache of a recent sequence that is still resident."""

COMPUTED = "computed"
"""Name of the part of a prompt that no tier had."""

# Glyphs carry the meaning and colours only help: the bar must be readable without colour. Live memory and GPU
# share one glyph, since both cost no read.
TIER_GLYPHS = {"live": "█", "gpu": "█", "cpu": "▓", "disk": "▒", "remote": "▞", COMPUTED: "░"}

_COLOURS = {
    "live": (46, 160, 67),
    "gpu": (46, 160, 67),
    "cpu": (56, 139, 253),
    "disk": (210, 153, 34),
    "remote": (163, 113, 247),
    COMPUTED: (128, 128, 128),
}


def ordered_tiers(tokens: Mapping[str, int]) -> dict[str, int]:
    """Return the non-zero entries, fastest tier first; tiers of unknown name come last."""
    names = [*TIER_ORDER, *(name for name in tokens if name not in TIER_ORDER)]
    return {name: int(tokens[name]) for name in names if tokens.get(name)}


def bar_segments(tokens_by_tier: Mapping[str, int], computed: int, width: int = 40) -> list[tuple[str, str, int]]:
    """Divide a bar of ``width`` cells in proportion to tokens.

    Args:
        tokens_by_tier: Cached tokens of each tier.
        computed: Tokens that were (or would be) computed.
        width: Cells of the bar.

    Returns:
        ``(name, glyph, cells)`` for every part that has tokens; cells add up to ``width`` (when there are no
        more parts than cells), and no part is shown with none.
    """
    parts = {**ordered_tiers(tokens_by_tier), COMPUTED: max(0, computed)}
    parts = {name: n for name, n in parts.items() if n > 0}
    total = sum(parts.values())
    if not total:
        return []
    cells = {name: max(1, n * width // total) for name, n in parts.items()}
    # What rounding down left over goes to the parts that lost most by it; what the minimum of one cell took too
    # much comes off the widest part.
    by_loss = sorted(parts, key=lambda name: parts[name] * width / total - cells[name], reverse=True)
    for name in by_loss[: max(0, width - sum(cells.values()))]:
        cells[name] += 1
    while sum(cells.values()) > max(width, len(cells)):
        cells[max(cells, key=cells.__getitem__)] -= 1
    return [(name, TIER_GLYPHS.get(name, "▚"), cells[name]) for name in parts]


def bar_text(tokens_by_tier: Mapping[str, int], computed: int, width: int = 40) -> str:
    """Return the bar as glyphs: ``▒▒▒▒▒▒▒▒░``."""
    return "".join(glyph * cells for _, glyph, cells in bar_segments(tokens_by_tier, computed, width))


def escape(text: object) -> str:
    """Return ``text`` with everything HTML gives a meaning to replaced."""
    return html.escape(str(text), quote=True)


def bar_html(tokens_by_tier: Mapping[str, int], computed: int, width: int = 40) -> str:
    """Return the bar and its legend as HTML."""
    segments = bar_segments(tokens_by_tier, computed, width)
    bar = "".join(f'<span style="color:{colour(name)}">{glyph * cells}</span>' for name, glyph, cells in segments)
    legend = " ".join(
        f'<span style="white-space:nowrap;margin-right:.8em"><span style="color:{colour(name)}">{glyph}</span> '
        f"{escape(name)} {tokens_by_tier.get(name, computed):,}</span>"
        for name, glyph, _ in segments
    )
    return (
        f'<div style="font-family:monospace;line-height:1.2;white-space:pre">{bar}</div>'
        f'<div style="font-size:90%">{legend}</div>'
    )


def colour(name: str, alpha: float = 0.9) -> str:
    """Return the colour of a tier, which is seen on light and on dark pages."""
    red, green, blue = _COLOURS.get(name, (200, 90, 120))
    return f"rgba({red},{green},{blue},{alpha:g})"


def rgba(name: str, alpha: float) -> tuple[float, float, float, float]:
    """Return the same colour as matplotlib takes it."""
    red, green, blue = _COLOURS.get(name, (200, 90, 120))
    return red / 255, green / 255, blue / 255, alpha


def table_html(rows: Iterable[Sequence[object]], header: Sequence[object] = (), *, right: bool = False) -> str:
    """Return a plain table; every cell is escaped, and numbers are set to the right.

    Args:
        rows: Its cells.
        header: Cells of the first line.
        right: Set all columns but the first to the right.
    """
    # Each tag says what the style sheets of front ends would decide: stripes, borders, sizes.
    line = "border:0;border-bottom:1px solid rgba(128,128,128,.3);padding:.15em .7em;background:transparent;"
    row = '<tr style="background:transparent">'

    def cell(tag: str, value: object, column: int) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        side = "right" if number or (right and column) else "left"
        text = f"{value:,}" if number else value
        return f'<{tag} style="{line}text-align:{side};overflow-wrap:anywhere">{escape(text)}</{tag}>'

    def cells(tag: str, values: Sequence[object]) -> str:
        return f"{row}{''.join(cell(tag, value, column) for column, value in enumerate(values))}</tr>"

    head = cells("th", header) if header else ""
    style = "border-collapse:collapse;color:currentColor;background:transparent;margin:.2em 0"
    return f'<table style="{style}">{head}{"".join(cells("td", values) for values in rows)}</table>'


def panel(title: object, *parts: str) -> str:
    """Return a titled box around HTML ``parts``; only the title is escaped."""
    box = "border-left:3px solid rgba(128,128,128,.5);padding:.2em .8em;color:currentColor;max-width:60em"
    return f'<div style="{box}">{text_html(title, "font-weight:600")}{"".join(parts)}</div>'


def text_html(text: object, style: str = "") -> str:
    """Return lines of text in their own direction, broken where they are too long."""
    # What runs from right to left must not turn round what stands beside it.
    own = "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;text-align:start"
    return f'<div style="{own};{style}">{escape(text)}</div>'


def mimebundle(
    text: str, markup: str, include: Collection[str] | None = None, exclude: Collection[str] | None = None
) -> dict[str, str]:
    """Return what ``_repr_mimebundle_`` has to: plain text and HTML, less what the caller leaves out."""
    bundle = {"text/plain": text, "text/html": markup}
    return {kind: v for kind, v in bundle.items() if (not include or kind in include) and kind not in (exclude or ())}
