"""`PrefixMatch` and `Explanation`: how much of a prompt is stored, and why not more of it."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kvembed._html import bar_html, escape, mimebundle, ordered_tiers, panel, table_html
from kvembed._spans import Spans, as_spans
from kvembed._units import format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

__all__ = ["Explanation", "ExplanationKind", "PrefixMatch", "classify", "context", "DATE"]

ExplanationKind: TypeAlias = Literal[
    "hit",
    "never_seen",
    "too_short",
    "other_model",
    "other_salt",
    "evicted",
    "removed",
    "quarantined",
    "date_changed",
    "template_changed",
    "retokenized",
    "diverged",
    "recomputed",
    "lossy",
    "bypassed",
]
"""Why a prompt was not reused further than it was; ``hit`` when all that can be reused is there."""

_TITLES: dict[str, str] = {
    "hit": "reusable",
    "never_seen": "never seen",
    "too_short": "too short to be stored",
    "other_model": "stored under another model",
    "other_salt": "stored under another cache_salt",
    "evicted": "evicted to keep the budget",
    "removed": "removed by hand",
    "quarantined": "stored, but the file was damaged",
    "date_changed": "a date or time changed",
    "template_changed": "text before unchanged text changed",
    "retokenized": "same text, other tokens",
    "diverged": "the text goes on differently",
    "recomputed": "stored, but faster to compute than to load",
    "lossy": "stored in a lossy codec only",
    "bypassed": "not cached for this model",
}


@dataclass(frozen=True, repr=False)
class PrefixMatch:
    """How much of a prompt could be reused; nothing was computed to find it out.

    Args:
        prompt_tokens: Tokens of the prompt.
        num_tokens: Tokens that would be reused, at most ``prompt_tokens - 1``: one is always computed.
        tokens_by_tier: ``num_tokens`` by the tier they lie in, fastest first, without zeros.
        exact_tokens: How many of them are bit for bit what a cold prefill makes; the rest is equal to rounding.
        blocks: Number of blocks that hold them.
        lookup_s: Seconds the search took.
        spans: ``(tier, tokens)`` of each part of the prompt, in its order; ``computed`` for what is not stored.
    """

    prompt_tokens: int
    num_tokens: int = 0
    tokens_by_tier: dict[str, int] = field(default_factory=dict)
    exact_tokens: int = 0
    blocks: int = 0
    lookup_s: float = 0.0
    spans: Spans = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens_by_tier", ordered_tiers(self.tokens_by_tier))
        object.__setattr__(self, "spans", as_spans(self.spans))

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON types."""
        spans = [list(span) for span in self.spans]
        return {**self.__dict__, "tokens_by_tier": dict(self.tokens_by_tier), "spans": spans}

    def __str__(self) -> str:
        where = " · ".join(f"{name} {format_count(n)}" for name, n in self.tokens_by_tier.items())
        parts = [f"{format_count(self.num_tokens)} of {format_count(self.prompt_tokens)} tokens reusable"]
        if where:
            parts[0] += f" ({where})"
        if self.num_tokens:
            parts.append(f"{format_count(self.exact_tokens)} bit-exact")
            parts.append(f"{format_count(self.blocks)} {'block' if self.blocks == 1 else 'blocks'}")
        if self.lookup_s:
            parts.append(f"found in {format_seconds(self.lookup_s)}")
        return " · ".join(parts)

    def __repr__(self) -> str:
        return f"<PrefixMatch: {self}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        rows = [
            ("bit-exact tokens", self.exact_tokens),
            ("blocks", self.blocks),
            ("lookup", format_seconds(self.lookup_s)),
        ]
        markup = panel(
            f"{format_count(self.num_tokens)} of {format_count(self.prompt_tokens)} tokens reusable",
            bar_html(self.tokens_by_tier, self.prompt_tokens - self.num_tokens),
            table_html(rows),
        )
        return mimebundle(str(self), markup, include, exclude)


@dataclass(frozen=True, repr=False)
class Explanation:
    """Where a prompt leaves the nearest stored sequence, and what to do about it.

    Args:
        kind: The class of the difference.
        position: Index of the first token that is not stored at this place.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Tokens of it that would be reused.
        nearest_tokens: Length of the nearest stored sequence; 0 when there is none.
        here: Text of the prompt around ``position``.
        there: Text of the stored sequence around it, or None.
        expected_token: Text of the stored token at ``position``.
        actual_token: Text of the prompt's token at ``position``.
        differences: Fields of the model fingerprint that differ: name -> (stored, now).
        hint: What to do, in words.
        here_offset: Character of ``here`` at which the token starts; by default the first one that differs
            from ``there``.
    """

    kind: ExplanationKind
    position: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    nearest_tokens: int = 0
    here: str = ""
    there: str | None = None
    expected_token: str | None = None
    actual_token: str | None = None
    differences: dict[str, tuple[str, str]] = field(default_factory=dict)
    hint: str = ""
    here_offset: int | None = None

    @property
    def title(self) -> str:
        """``kind`` in words."""
        return _TITLES.get(self.kind, self.kind)

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON types."""
        return {**self.__dict__, "differences": {name: list(pair) for name, pair in self.differences.items()}}

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.here:
            at = self._offset()
            lines.append(f"  prompt: {_visible(self.here)}")
            if self.there is not None:
                lines.append(f"  stored: {_visible(self.there)}")
            lines.append(f"          {' ' * _columns(_visible(self.here[:at]))}^")
        if self.expected_token is not None or self.actual_token is not None:
            stored = "end" if self.expected_token is None else repr(self.expected_token)
            now = "end" if self.actual_token is None else repr(self.actual_token)
            lines.append(f"  token {format_count(self.position)}: stored {stored}, now {now}")
        lines += [f"  {name}: stored {was}, now {now}" for name, (was, now) in self.differences.items()]
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Explanation {self.kind}: {self._headline()}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        return mimebundle(str(self), self._html(), include, exclude)

    def _headline(self) -> str:
        text = f"{self.title}: {format_count(self.cached_tokens)} of {format_count(self.prompt_tokens)} tokens reusable"
        return f"{text}; nearest stored sequence {format_count(self.nearest_tokens)}" if self.nearest_tokens else text

    def _offset(self) -> int:
        if self.here_offset is not None:
            return min(self.here_offset, len(self.here))
        return len(self.here) if self.there is None else _common(self.here, self.there)

    def _html(self) -> str:
        at = self._offset()
        mark = "background:rgba(210,153,34,.35);border-radius:2px;text-decoration:underline;unicode-bidi:isolate"
        pre = (
            "margin:.3em 0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;"
            "color:currentColor;background:transparent"
        )
        parts: list[str] = []
        for label, text in (("prompt", self.here or None), ("stored", self.there)):
            if text is not None:
                parts.append(
                    f'<pre style="{pre}">{label}: {escape(_visible(text[:at]))}'
                    f'<span style="{mark}">{escape(_visible(text[at:]))}</span></pre>'
                )
        if self.differences:
            rows = [(name, was, now) for name, (was, now) in self.differences.items()]
            parts.append(table_html(rows, header=("field", "stored", "now")))
        if self.hint:
            parts.append(f'<div style="opacity:.8">{escape(self.hint)}</div>')
        return panel(self._headline(), *parts)


def _visible(text: str) -> str:
    # One character for one character, so that the marker below stays under its token.
    text = text.replace("\n", "⏎").replace("\t", "→").replace("\r", "␍")
    return "".join("·" if unicodedata.category(c) in {"Cc", "Cf"} else c for c in text)


def _common(a: str, b: str) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _columns(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def context(
    ids: Sequence[int], position: int, decode: Callable[[list[int]], str], *, before: int = 12, after: int = 8
) -> tuple[str, int]:
    """Return the text around a token, and the character at which the token starts.

    Args:
        ids: Token ids of the sequence.
        position: Index of the token.
        decode: Turns ids into text; special tokens should be kept.
        before: Tokens of context before it.
        after: Tokens from it on.
    """
    start = max(0, position - before)
    text = decode([int(t) for t in ids[start : position + after]])
    # Not the sum of two decoded halves: a character may be split over tokens, and some tokenizers drop the space
    # a text starts with. Where the first half is not the start of the whole, their common part is the best guess.
    head = decode([int(t) for t in ids[start:position]]) if position > start else ""
    return text, _common(text, head)


_REALIGN_TOKENS = 24
"""This many equal tokens after a difference mean that the text goes on the same."""

_DATE_REALIGN_TOKENS = 4
"""After a changed date, fewer do: chat templates put only a few tokens between their date and the user's words."""

_WINDOW = 512
"""How many tokens past the difference the text is looked for."""

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec)[a-z]*\.?"
DATE = re.compile(
    r"\b\d{4}-\d{1,2}-\d{1,2}(?:[T ]\d{1,2}:\d{2}(?::\d{2})?(?:\.\d+)?Z?)?"
    r"|\b\d{1,2}[./]\d{1,2}[./]\d{2,4}\b"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\s+{_MONTH},?\s+\d{{4}}\b"
    rf"|\b{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}\b"
    r"|\b\d{1,2}:\d{2}(?::\d{2})?(?:\s?[ap]\.?m\b)?"
    r"|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b",
    re.IGNORECASE,
)
"""A date or a time, as people and chat templates write them."""


def classify(
    prompt_ids: Sequence[int], stored_ids: Sequence[int], position: int, decode: Callable[[list[int]], str]
) -> tuple[ExplanationKind, str]:
    """Say what kind of difference parts a prompt from a stored sequence.

    Rules, in order: nothing differs (one is the start of the other) -> ``hit``; the texts are equal and only their
    tokens differ -> ``retokenized``; a date or time is what differs, and the text goes on the same ->
    ``date_changed``; the text goes on the same after something else -> ``template_changed``; otherwise
    ``diverged``. "Goes on the same" is a run of 24 equal tokens within 512 of the difference on both sides, or of
    4 right after a date.

    Args:
        prompt_ids: Ids of the prompt.
        stored_ids: Ids of the stored sequence; equal to the prompt's before ``position``.
        position: Index of the first difference.
        decode: Turns ids into text.

    Returns:
        The kind, and a hint what to do about it.
    """
    now = [int(t) for t in prompt_ids[position : position + _WINDOW + _REALIGN_TOKENS]]
    was = [int(t) for t in stored_ids[position : position + _WINDOW + _REALIGN_TOKENS]]
    if not now or not was:
        return "hit", ""
    if _same_text(decode(now[:64]), decode(was[:64])):
        return "retokenized", (
            "The text is the same but its tokens are not: reuse the token ids of the earlier reply "
            "(a session does) instead of tokenizing the decoded text again."
        )
    before = [int(t) for t in prompt_ids[max(0, position - _REALIGN_TOKENS) : position]]
    short = _realign(now, was, _DATE_REALIGN_TOKENS, window=64)
    if short and _is_date(before, now, short[0], decode) and _is_date(before, was, short[1], decode):
        return "date_changed", (
            "Everything after a date or time that changes must be computed again: move it behind the long text, "
            "or keep it fixed for the conversation."
        )
    found = _realign(now, was, _REALIGN_TOKENS, window=_WINDOW)
    if found is None:
        return "diverged", "The prompts differ from here on; only what comes before can be shared."
    added, gone = found
    if not added:
        what = f"{format_count(gone)} tokens were left out"
    elif not gone:
        what = f"{format_count(added)} tokens were put in"
    else:
        what = f"{format_count(gone)} tokens were replaced by {format_count(added)}"
    return "template_changed", (
        f"{what}, and the same text follows: keep what comes first (system prompt, template, tools, earlier turns "
        "with their thinking) unchanged, or put what changes last."
    )


def _same_text(now: str, was: str) -> bool:
    # The shorter one must be nearly all of the longer: windows of equally many tokens end at different places.
    # A replacement character at an edge is part of a character cut in two, which says nothing.
    shorter, longer = sorted((now.rstrip("\ufffd"), was.rstrip("\ufffd")), key=len)
    whole = len(shorter) >= 8 and len(shorter) * 2 >= len(longer) and not shorter.startswith("\ufffd")
    return whole and longer.startswith(shorter)


def _realign(now: list[int], was: list[int], run: int, *, window: int) -> tuple[int, int] | None:
    # The nearest equal run on both sides. Not difflib: it is quadratic on long repetitive text, and it looks for the
    # longest match where the nearest is wanted.
    now, was = now[: window + run], was[: window + run]
    places: dict[tuple[int, ...], int] = {}
    for j in range(len(was) - run, -1, -1):
        places[tuple(was[j : j + run])] = j
    best: tuple[int, int] | None = None
    for i in range(len(now) - run + 1):
        if best is not None and i > sum(best):
            break
        j = places.get(tuple(now[i : i + run]))
        if j is not None and (best is None or i + j < sum(best)):
            best = (i, j)
    return best


def _is_date(before: list[int], ids: list[int], changed: int, decode: Callable[[list[int]], str]) -> bool:
    # A date that touches what changed, not one that merely stands near it.
    head, middle = (decode(before) if before else ""), decode(ids[:changed]) if changed else ""
    tail = decode(ids[changed : changed + _REALIGN_TOKENS])
    start, end = len(head), len(head) + len(middle)
    return any(m.start() <= end and m.end() >= start for m in DATE.finditer(head + middle + tail))
