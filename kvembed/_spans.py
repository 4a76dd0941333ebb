"""Which part of a prompt came from where: runs of tokens, in the order of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from kvembed._html import COMPUTED

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["as_spans", "Spans", "tiers_of"]

Spans: TypeAlias = tuple[tuple[str, int], ...]
"""``(tier, tokens)`` of each run, first to last; the tier is ``"computed"`` where no tier had it."""


def as_spans(runs: Iterable[Iterable[object]], total: int = 0) -> Spans:
    """Return runs with neighbours of one tier made one, and without empty ones.

    Args:
        runs: ``(tier, tokens)`` of each.
        total: Tokens of the prompt; those after the last run were computed.
    """
    found: list[tuple[str, int]] = []

    def add(tier: str, tokens: int) -> None:
        if tokens <= 0:
            return
        if found and found[-1][0] == tier:
            tokens += found.pop()[1]
        found.append((tier, tokens))

    for tier, tokens in runs:
        add(str(tier), int(str(tokens)))
    add(COMPUTED, total - sum(tokens for _, tokens in found))
    return tuple(found)


def tiers_of(spans: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the tokens of each tier; what was computed is none."""
    tiers: dict[str, int] = {}
    for tier, tokens in spans:
        if tier != COMPUTED:
            tiers[tier] = tiers.get(tier, 0) + tokens
    return tiers
