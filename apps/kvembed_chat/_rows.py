"""Rows of the inspector in words: how they are sorted, searched, measured and named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvembed._units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from textual.content import Content

    from kvembed._tree import PrefixRow, PrefixTree

__all__ = ["ago", "columns_of", "named", "searched", "size_of", "SORTS"]

SORTS: dict[str, Callable[[PrefixRow], float]] = {
    "tree": lambda row: 0,
    "used": lambda row: -(row.last_used or float("inf")),
    "size": lambda row: -size_of(row),
    "tokens": lambda row: -row.n_tokens,
}
"""By what rows can be sorted; the tree's own order comes first."""


def size_of(row: PrefixRow) -> int:
    """Return the bytes of a row's KV, once, however many tiers have it."""
    return max(row.nbytes.values(), default=0)


def columns_of(cells: Sequence[Sequence[Content]], width: int) -> list[tuple[str, int]]:
    """Return label and width of each column: as wide as its cells, but the last two share what is left."""
    labels = ("tokens", "     size", "where", "used", "pinned as", "sessions")
    wanted = [max([len(label), *(line[at].cell_length for line in cells)]) for at, label in enumerate(labels)]
    left = width - 2 * len(labels) - 1 - sum(wanted[:-2])  # a cell of space on both sides, and the scroll bar
    pinned = max(len(labels[-2]), min(wanted[-2], left // 2))
    return list(zip(labels, [*wanted[:-2], pinned, max(len(labels[-1]), left - pinned)], strict=True))


def named(tree: PrefixTree, row: PrefixRow) -> str:
    """Say what an action takes along."""
    below = tree.below(row)
    words = f"tokens {format_count(row.start)}–{format_count(row.end)} ({format_bytes(size_of(row))})"
    if not below:
        return words
    more = "prefix that goes on from it" if len(below) == 1 else "prefixes that go on from it"
    return f"{words} and the {format_count(len(below))} {more} ({format_bytes(sum(map(size_of, below)))})"


def searched(row: PrefixRow) -> str:
    return " ".join([row.id, row.model, *row.names, *row.users, *row.nbytes]).lower()


def ago(row: PrefixRow, now: float) -> str:
    if row.last_used is None:
        return "just now"
    seconds = max(0.0, now - row.last_used)
    if seconds < 1:
        return "just now"
    if seconds < 60:
        return f"{seconds:.0f} s ago"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min ago"
    return f"{seconds / 3600:.0f} h ago" if seconds < 172_800 else f"{seconds / 86_400:.0f} days ago"
