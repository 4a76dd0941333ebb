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
    "escape",
    "mimebundle",
    "ordered_tiers",
    "panel",
    "table_html",
]

TIER_ORDER = ("live", "gpu", "cpu", "disk", "remote")
"""Tiers from fastest to slowest; ``live`` is the cache of a recent sequence that is still resident."""

COMPUTED = "computed"
"""Name of the part of a prompt that no tier had."""

# Glyphs carry the meaning and colours only help: the bar must be readable without colour. Live memory and GPU
# share one glyph, since both cost no read.
TIER_GLYPHS = {"live": "█", "gpu": "█", "cpu": "▓", "disk": "▒", "remote": "▞", COMPUTED: "░"}

_COLOURS = {
    "live": "rgba(46,160,67,.9)",
    "gpu": "rgba(46,160,67,.9)",
    "cpu": "rgba(56,139,253,.9)",
    "disk": "rgba(210,153,34,.9)",
    "remote": "rgba(163,113,247,.9)",
    COMPUTED: "rgba(128,128,128,.7)",
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
    bar = "".join(f'<span style="color:{_colour(name)}">{glyph * cells}</span>' for name, glyph, cells in segments)
    legend = " ".join(
        f'<span style="white-space:nowrap;margin-right:.8em"><span style="color:{_colour(name)}">{glyph}</span> '
        f"{escape(name)} {tokens_by_tier.get(name, computed):,}</span>"
        for name, glyph, _ in segments
    )
    return (
        f'<div style="font-family:monospace;line-height:1.2;white-space:pre">{bar}</div>'
        f'<div style="font-size:90%">{legend}</div>'
    )


def _colour(name: str) -> str:
    return _COLOURS.get(name, "currentColor")


def table_html(rows: Iterable[Sequence[object]], header: Sequence[object] = ()) -> str:
    """Return a plain table; every cell is escaped, numbers are set to the right."""
    line = "border:0;border-bottom:1px solid rgba(128,128,128,.3);padding:.15em .7em;background:transparent;"

    def cell(tag: str, value: object) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = f"{value:,}" if number else value
        return f'<{tag} style="{line}text-align:{"right" if number else "left"}">{escape(text)}</{tag}>'

    head = f"<tr>{''.join(cell('th', v) for v in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(cell('td', v) for v in row)}</tr>" for row in rows)
    return f'<table style="border-collapse:collapse;color:currentColor">{head}{body}</table>'


def panel(title: object, *parts: str) -> str:
    """Return a titled box around HTML ``parts``; only the title is escaped."""
    box = "border-left:3px solid rgba(128,128,128,.5);padding:.2em .8em;color:currentColor;max-width:60em"
    return f'<div style="{box}"><div style="font-weight:600">{escape(title)}</div>{"".join(parts)}</div>'


def mimebundle(
    text: str, markup: str, include: Collection[str] | None = None, exclude: Collection[str] | None = None
) -> dict[str, str]:
    """Return what ``_repr_mimebundle_`` has to: plain text and HTML, less what the caller leaves out."""
    bundle = {"text/plain": text, "text/html": markup}
    return {kind: v for kind, v in bundle.items() if (not include or kind in include) and kind not in (exclude or ())}
