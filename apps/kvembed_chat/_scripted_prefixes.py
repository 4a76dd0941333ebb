"""Prefixes that are written down, for tests and pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvembed._stats import TierStats
from kvembed._tree import PrefixRow, PrefixTree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["row", "ScriptedPrefixes"]

_TOKEN = 23_040
_NOW = 1_800_000_000.0
MIB = 1 << 20


def row(
    number: int,
    start: int,
    end: int,
    tiers: Sequence[str] = ("disk",),
    *,
    ago: float = 60.0,
    names: Sequence[str] = (),
    users: Sequence[str] = (),
    exact: bool = True,
    depth: int = 0,
    parent: int | None = None,
) -> PrefixRow:
    """Return a row with blocks of 256 tokens."""
    blocks = -(-(end - start) // 256)
    keys = tuple(bytes([number, block]) + bytes(30) for block in range(1, blocks + 1))
    return PrefixRow(
        key=keys[-1],
        keys=keys,
        start=start,
        end=end,
        nbytes=dict.fromkeys(tiers, (end - start) * _TOKEN),
        blocks=dict.fromkeys(tiers, blocks),
        states=0,
        last_used=_NOW - ago,
        hits=number,
        names=tuple(names),
        users=tuple(users),
        exact=exact,
        model="SmolLM2-135M-Instruct",
        namespace=b"\x52" * 32,
        depth=depth,
        parent=parent,
    )


_ROWS = (
    row(1, 0, 2048, ("live", "cpu", "disk"), ago=12, names=["q3-report.txt"], users=["Q3 report", "Kernel notes"]),
    row(2, 2048, 2411, ("live", "disk"), ago=12, users=["Q3 report"], exact=False, depth=1, parent=0),
    row(3, 2048, 2250, ago=7_300, users=["Kernel notes"], exact=False, depth=1, parent=0),
    row(4, 0, 512, ("cpu", "disk"), ago=260, users=["Trip plan"]),
    row(5, 0, 4096, ago=172_900),
)
_TIERS = (
    TierStats("live", 1, 56 * MIB, 2048 * MIB, 0, 0),
    TierStats("cpu", 10, 124 * MIB, 4096 * MIB, 0, 0),
    TierStats("disk", 31, 11 << 30, 50 << 30, 0, 0),
)
_RATES = (0.0, 0.2, 0.5, 0.9, 0.97, 0.98, 0.0, 0.6, 0.95, 0.99, 0.986)


class ScriptedPrefixes:
    """A tree that its actions change.

    Args:
        rows: Its rows, each after the one it follows.
        tiers: How full the tiers are.
        rates: Hit rates of the latest calls.

    Attributes:
        calls: Names and arguments of what was done.
        error: Raised by the next action.
    """

    def __init__(
        self,
        rows: Iterable[PrefixRow] = _ROWS,
        tiers: Sequence[TierStats] = _TIERS,
        rates: Sequence[float] = _RATES,
    ) -> None:
        self._tree = PrefixTree(tuple(rows))
        self._tiers = tiers
        self._rates = list(rates)
        self.calls: list[tuple[str, ...]] = []
        self.error: Exception | None = None

    def tree(self) -> PrefixTree:
        """Return the tree as it is now."""
        return self._tree

    def tiers(self) -> Sequence[TierStats]:
        """Return the tiers."""
        return self._tiers

    def hit_rates(self) -> list[float]:
        """Return the rates."""
        return self._rates

    def now(self) -> float:
        """Return the same time always."""
        return _NOW

    def words(self, row: PrefixRow) -> str | None:
        """Return made-up words."""
        self.calls.append(("words", row.id))
        return f"The words of tokens {row.start} to {row.end}, as far as they go."

    def _done(self, *call: str) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    def _change(self, old: PrefixRow, **changes: object) -> None:
        rows = [replace(each, **changes) if each.key == old.key else each for each in self._tree.rows]
        self._tree = PrefixTree(tuple(rows))

    def _remove(self, old: PrefixRow) -> None:
        gone = {old.key, *(each.key for each in self._tree.below(old))}
        kept = [each for each in self._tree.rows if each.key not in gone]
        keys = [each.key for each in kept]
        parents = (None if each.parent is None else keys.index(self._tree.rows[each.parent].key) for each in kept)
        self._tree = PrefixTree(tuple(replace(each, parent=at) for each, at in zip(kept, parents, strict=True)))

    def pin(self, tree: PrefixTree, row: PrefixRow) -> str:
        """Pin a row."""
        self._done("pin", row.id)
        self._change(row, names=(row.id,))
        return f"pinned {row.n_blocks} blocks as {row.id}"

    def unpin(self, row: PrefixRow) -> str:
        """Unpin a row."""
        self._done("unpin", row.id)
        self._change(row, names=())
        return f"unpinned {', '.join(row.names)}"

    def evict(self, row: PrefixRow, where: str) -> str:
        """Drop a row, or take tiers away from it."""
        self._done("evict", row.id, where)
        gone = {"memory": {"live", "gpu", "cpu"}, "disk": {"disk"}}.get(where, set(row.nbytes))
        left = {tier: size for tier, size in row.nbytes.items() if tier not in gone}
        if left:
            self._change(row, nbytes=left)
        else:
            self._remove(row)
        return f"evicted {row.n_blocks} blocks"

    def verify(self, row: PrefixRow) -> str:
        """Find nothing wrong."""
        self._done("verify", row.id)
        return f"{row.n_blocks} blocks: all good"

    def forget(self, tree: PrefixTree, row: PrefixRow) -> str:
        """Remove a row."""
        self._done("forget", row.id)
        self._remove(row)
        return f"erased {row.n_blocks} blocks"
