"""`Usage`: what one call cost, where its prompt came from, and why no more of it was reused."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from kvembed._html import bar_html, escape, mimebundle, ordered_tiers, panel, table_html, text_html
from kvembed._spans import Spans, as_spans
from kvembed._units import format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvembed._prompt_view import PromptView

__all__ = ["reply_bundle", "Usage"]

_TITLE_CHARACTERS = 400


@dataclass(frozen=True, repr=False)
class Usage:
    """What one call cost.

    Times are wall-clock seconds. ``ttft_s`` runs from the call to the first new token and contains lookup, restore
    and prefill: a time to first token without the work that reuse costs would say nothing.

    Args:
        prompt_tokens: Tokens of the prompt, cached ones included.
        completion_tokens: New tokens.
        cached_tokens_by_tier: Prompt tokens whose KV was not computed, by the tier they came from: ``live`` (the
            cache of a recent sequence still resident), ``gpu``, ``cpu``, ``disk``, ``remote``. Kept in this order
            and without zeros.
        lookup_s: Seconds of hashing and of finding the longest stored prefix.
        restore_s: Seconds of reading stored KV that the call had to wait for.
        prefill_s: Seconds of computing the rest of the prompt, up to the first token.
        decode_s: Seconds from the first new token to the last.
        ttft_s: Seconds from the call to the first new token.
        total_s: Seconds of the whole call.
        prefill_tokens_per_second: Prefill speed of this call, or None when too little was computed to tell.
        saved_s: Estimate of the seconds that reuse saved; None until a cold prefill was measured on this machine.
        miss_reason: Why less was reused than could have been, in words.
        bypass_reason: Why the call went to transformers untouched, in words.
        deterministic: True when reuse was held to what makes the call bit-identical to a cold one.
        stored_tokens: Tokens whose KV this call handed to the store.
        audited: True when stored KV that this call uses was computed again and compared.
        spans: ``(tier, tokens)`` of each part of the prompt, in its order; the tier of what had to be computed is
            ``computed``. Empty for a batch, and for a call that went to transformers untouched.
        lossy: Name of the least faithful codec that the reused KV has been through (`kvembed.KVStore`); None when it
            has been through none, and so the call is exact, or equal to rounding.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens_by_tier: dict[str, int] = field(default_factory=dict)
    lookup_s: float = 0.0
    restore_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    prefill_tokens_per_second: float | None = None
    saved_s: float | None = None
    miss_reason: str | None = None
    bypass_reason: str | None = None
    deterministic: bool = False
    stored_tokens: int = 0
    audited: bool = False
    spans: Spans = ()
    lossy: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cached_tokens_by_tier", ordered_tiers(self.cached_tokens_by_tier))
        object.__setattr__(self, "spans", as_spans(self.spans))

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV came from some tier; part of ``prompt_tokens``, as OpenAI counts."""
        return sum(self.cached_tokens_by_tier.values())

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that had to be computed."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens a second after the first one; None for fewer than two."""
        # The first token belongs to the prefill: counting it here would flatter short answers.
        if self.completion_tokens < 2 or self.decode_s <= 0:
            return None
        return (self.completion_tokens - 1) / self.decode_s

    def to_openai(self) -> dict[str, Any]:
        """Return the ``usage`` object of an OpenAI chat completion."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return every field and derived figure as JSON types."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **known,
            "cached_tokens_by_tier": dict(self.cached_tokens_by_tier),
            "spans": [list(span) for span in self.spans],
            "cached_tokens": self.cached_tokens,
            "computed_tokens": self.computed_tokens,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }

    def __str__(self) -> str:
        return "\n".join([self._summary(), *self._notes()])

    def __repr__(self) -> str:
        return f"<Usage: {' · '.join([self._summary(), *self._notes()])}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        return mimebundle(str(self), self._html(), include, exclude)

    def _summary(self) -> str:
        tiers = [f"{name} {format_count(n)}" for name, n in self.cached_tokens_by_tier.items()]
        where = " · ".join([*tiers, f"computed {format_count(self.computed_tokens)}"])
        parts = [f"{format_count(self.prompt_tokens)} prompt ({where})"]
        if self.ttft_s:
            parts.append(f"TTFT {format_seconds(self.ttft_s)}")
        out = f"{format_count(self.completion_tokens)} out"
        speed = self.decode_tokens_per_second
        parts.append(f"{out} at {speed:.1f} tok/s" if speed is not None else out)
        if self.saved_s is not None and self.cached_tokens:
            parts.append(f"saved ≈ {format_seconds(max(0.0, self.saved_s))}")
        return " · ".join(parts)

    def _notes(self) -> list[str]:
        notes: list[str] = []
        if self.bypass_reason:
            notes.append(f"bypassed: {self.bypass_reason}")
        if self.miss_reason:
            notes.append(f"not reused: {self.miss_reason}")
        if self.lossy:
            notes.append(f"lossy: reused KV has been stored as {self.lossy}")
        return notes

    def _html(self) -> str:
        share = f" · {100 * self.cached_tokens / self.prompt_tokens:.1f} % cached" if self.prompt_tokens else ""
        speeds = {"prefill": self.prefill_tokens_per_second, "decode": self.decode_tokens_per_second}
        rows: list[tuple[str, object]] = [("completion tokens", self.completion_tokens)]
        for name in ("ttft", "lookup", "restore", "prefill", "decode", "total"):
            label = "TTFT" if name == "ttft" else name
            speed = speeds.get(name)
            seconds = getattr(self, f"{name}_s")
            if not seconds and name != "total":
                continue  # nothing was generated, or nothing read
            text = format_seconds(seconds)
            rows.append((label, text if speed is None else f"{text} at {speed:.1f} tok/s"))
        if self.saved_s is not None and self.cached_tokens:
            rows.append(("saved", f"≈ {format_seconds(max(0.0, self.saved_s))}"))
        if self.deterministic:
            rows.append(("deterministic", "yes"))
        if self.audited:
            rows.append(("audited", "yes"))
        if self.stored_tokens:
            rows.append(("stored tokens", self.stored_tokens))
        notes = "".join(f'<div style="opacity:.8">{escape(note)}</div>' for note in self._notes())
        return panel(
            f"{format_count(self.prompt_tokens)} prompt tokens{share}",
            bar_html(self.cached_tokens_by_tier, self.computed_tokens),
            table_html(rows),
            notes,
        )


def reply_bundle(
    title: str,
    text: str,
    usage: Usage,
    prompt: PromptView | None,
    include: Collection[str] | None,
    exclude: Collection[str] | None,
) -> dict[str, str]:
    """Return the ``_repr_mimebundle_`` of something a model said: its text, what it cost, and its prompt, folded."""
    title = title if len(title) <= _TITLE_CHARACTERS else f"{title[:_TITLE_CHARACTERS]} …"
    folded = prompt.folded_html() if prompt is not None else ""
    markup = panel(title, text_html(text, "margin:.4em 0"), usage._repr_mimebundle_()["text/html"], folded)
    return mimebundle(f"{text}\n[{usage}]", markup, include, exclude)
