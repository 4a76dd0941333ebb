"""`PromptView`: the text of a prompt, each part coloured by the tier it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvembed._html import COMPUTED, TIER_GLYPHS, colour, escape, mimebundle, panel
from kvembed._units import format_count

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from kvembed._keys import TokenIds
    from kvembed._spans import Spans

__all__ = ["PromptPart", "PromptView", "prompt_view"]

_HEAD, _TAIL = 120, 80
"""Tokens shown of the start and of the end of a part; what is between is counted."""

_MOST_PARTS = 24
_MOST_CHARACTERS = 4000  # of one excerpt: a token can be a long run of spaces

# Told apart without colour too: each tier has its own line under the text, and the parts begin with its glyph.
_LINES = {"live": "solid", "gpu": "solid", "cpu": "double", "disk": "dashed", "remote": "dotted"}


@dataclass(frozen=True)
class PromptPart:
    """A run of tokens that came from one tier.

    Args:
        tier: Its name, or ``"computed"``.
        start: Index of the first token.
        tokens: How many.
        head: Text of the first tokens, or of all when they are few.
        tail: Text of the last ones; empty when ``head`` is all.
        left_out: Tokens between both.
    """

    tier: str
    start: int
    tokens: int
    head: str
    tail: str = ""
    left_out: int = 0


@dataclass(frozen=True, repr=False)
class PromptView:
    """Where each part of a prompt came from, with its text, shortened.

    Made by `CachedModel.show_prompt`, and part of every `Answer` and `Reply`. It shows itself as text, and in
    notebooks as HTML.

    Args:
        parts: In the order of the prompt.
        tokens: Tokens of the prompt.
    """

    parts: tuple[PromptPart, ...]
    tokens: int

    def __str__(self) -> str:
        lines: list[str] = []
        for part in self.parts:
            lines.append(f"{_glyph(part.tier)} {part.tier}: {format_count(part.tokens)} tokens from {part.start:,}")
            body = part.head + (f"\n{_gap(part)}\n{part.tail}" if part.left_out else "")
            lines += [f"  {line}" for line in _printable(body).splitlines()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        where = " · ".join(f"{part.tier} {format_count(part.tokens)}" for part in self.parts)
        return f"<PromptView of {format_count(self.tokens)} tokens: {where}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        markup = panel(f"{format_count(self.tokens)} prompt tokens, by where their KV came from", self.body_html())
        return mimebundle(str(self), markup, include, exclude)

    def body_html(self) -> str:
        """Return the legend and the coloured text, without a title."""
        legend = " ".join(
            f'<span style="white-space:nowrap;margin-right:1em">'
            f'<span style="{_style(tier)}">{_glyph(tier)} {escape(tier)}</span></span>'
            for tier in dict.fromkeys(part.tier for part in self.parts)
        )
        # What runs from right to left, or switches the direction, must not move the parts about it.
        text = "".join(
            f'<span style="unicode-bidi:isolate;{_style(part.tier)}">{_glyph(part.tier)}'
            f"{escape(_printable(part.head))}{_left_out_html(part)}{escape(_printable(part.tail))}</span>"
            for part in self.parts
        )
        box = (
            "font-family:monospace;font-size:90%;line-height:1.7;white-space:pre-wrap;overflow-wrap:anywhere;"
            "max-height:28em;overflow:auto;margin-top:.4em"
        )
        return f'<div style="font-size:90%">{legend}</div><div style="{box}">{text}</div>'

    def folded_html(self) -> str:
        """Return the same behind a line that unfolds it."""
        summary = '<summary style="cursor:pointer;opacity:.8">Prompt, by where its KV came from</summary>'
        return f'<details style="margin-top:.4em">{summary}{self.body_html()}</details>'


def _glyph(tier: str) -> str:
    return TIER_GLYPHS.get(tier, "▚")


def _style(tier: str) -> str:
    if tier == COMPUTED:
        return "background:rgba(128,128,128,.12)"
    tint, line = colour(tier, 0.16), colour(tier, 0.9)
    underline = f"text-decoration:underline {_LINES.get(tier, 'wavy')} {line};text-underline-offset:3px"
    return f"background:{tint};{underline}"


def _gap(part: PromptPart) -> str:
    return f"… {format_count(part.left_out)} tokens …"


def _left_out_html(part: PromptPart) -> str:
    if not part.left_out:
        return ""
    return f'<span style="display:block;opacity:.65;font-style:italic;text-decoration:none">{_gap(part)}</span>'


def _printable(text: str) -> str:
    # Control characters would reach the terminal as commands.
    return "".join(c if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) else "·" for c in text)


def prompt_view(ids: TokenIds | Sequence[int], spans: Spans, decode: Callable[[list[int]], str]) -> PromptView | None:
    """Return a view of a prompt, or None where nobody knows what came from where.

    Only what is shown is decoded, so it costs the same for any length.

    Args:
        ids: The prompt.
        spans: Its parts; see `Usage.spans`.
        decode: Turns ids into text.
    """
    if not spans or sum(tokens for _, tokens in spans) != len(ids):
        return None
    if len(spans) > _MOST_PARTS:  # blocks in memory and on disk by turns
        kept = list(spans[: _MOST_PARTS - 1])
        spans = (*kept, ("mixed", len(ids) - sum(tokens for _, tokens in kept)))
    parts: list[PromptPart] = []
    start = 0
    for tier, tokens in spans:
        own = [int(token) for token in ids[start : start + tokens]]
        left_out = max(0, tokens - _HEAD - _TAIL)
        if left_out:
            head, tail = decode(own[:_HEAD]), decode(own[-_TAIL:])
        else:
            head, tail = decode(own), ""
        parts.append(PromptPart(tier, start, tokens, head[:_MOST_CHARACTERS], tail[-_MOST_CHARACTERS:], left_out))
        start += tokens
    return PromptView(tuple(parts), len(ids))
