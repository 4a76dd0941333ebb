"""What the inspector knows of the cache: a source of prefixes. Nothing here imports torch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvembed import StoreReadOnlyError
from kvembed._units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvembed import CachedModel, KVStore, SessionDB
    from kvembed._stats import TierStats
    from kvembed._tree import PrefixRow, PrefixTree

__all__ = ["PrefixSource", "StorePrefixes"]

_WORDS_TOKENS = 64


class PrefixSource(Protocol):
    """The stored prefixes, and what can be done with them.

    Every method may block and is called in a thread of its own. Those that change something return what they did, in
    words; errors are exceptions whose text says what to do.
    """

    def tree(self) -> PrefixTree:
        """Return what is stored and live."""
        ...

    def tiers(self) -> Sequence[TierStats]:
        """Return how full every tier is, fastest first."""
        ...

    def hit_rates(self) -> list[float]:
        """Return which part of its prompt each of the latest calls did not compute."""
        ...

    def now(self) -> float:
        """Return the Unix time."""
        ...

    def words(self, row: PrefixRow) -> str | None:
        """Return the first words of a row, or None when there is nothing to read them with."""
        ...

    def pin(self, tree: PrefixTree, row: PrefixRow) -> str:
        """Keep a row, and what comes before it, from eviction."""
        ...

    def unpin(self, row: PrefixRow) -> str:
        """Drop the names a row is pinned under."""
        ...

    def evict(self, row: PrefixRow, where: str) -> str:
        """Drop a row and what follows from ``"memory"``, from ``"disk"``, or from ``"everywhere"``."""
        ...

    def verify(self, row: PrefixRow) -> str:
        """Read a row's files to their end; what is damaged is set aside."""
        ...

    def forget(self, tree: PrefixTree, row: PrefixRow) -> str:
        """Erase a row, what follows it, and what only led to it."""
        ...


class StorePrefixes:
    """The prefixes of a store.

    Args:
        store: Returns the store.
        model: Returns the model that is loaded, or None.
        sessions: Returns the file of sessions.
    """

    def __init__(
        self,
        store: Callable[[], KVStore],
        model: Callable[[], CachedModel | None],
        sessions: Callable[[], SessionDB],
    ) -> None:
        self._store = store
        self._model = model
        self._sessions = sessions

    def tree(self) -> PrefixTree:
        """Return what is stored and live."""
        from kvembed._sessions.streams import known_texts

        model = self._model()
        if model is not None:
            return model.prefixes(self._sessions())
        return self._store().prefixes(known_texts(self._sessions()))

    def tiers(self) -> Sequence[TierStats]:
        """Return how full every tier is."""
        model = self._model()
        return model.tiers() if model is not None else self._store().stats().tiers

    def hit_rates(self) -> list[float]:
        """Return which part of its prompt each of the latest calls did not compute."""
        return self._store().recent_hit_rates()

    def now(self) -> float:
        """Return the Unix time."""
        return time.time()

    def words(self, row: PrefixRow) -> str | None:
        """Read the first token ids of a row from its file, and decode them."""
        model = self._model()
        if model is None or model.tokenizer is None:
            return None
        ids = self._store().token_ids(row.keys[0])
        if ids is None:
            return None
        # Content ids, which stand for pictures, are below zero.
        known: Any = ids[:_WORDS_TOKENS][np.asarray(ids[:_WORDS_TOKENS]) >= 0].tolist()
        return " ".join(model.tokenizer.decode(known, skip_special_tokens=True).split())

    def pin(self, tree: PrefixTree, row: PrefixRow) -> str:
        """Pin a row under its digits."""
        keys = tree.chain(row)
        name = self._store().pin(keys, row.id)
        return f"pinned {_blocks(len(keys))} as {name}"

    def unpin(self, row: PrefixRow) -> str:
        """Drop all names of a row."""
        for name in row.names:
            self._store().unpin(name)
        return f"unpinned {', '.join(row.names)}"

    def evict(self, row: PrefixRow, where: str) -> str:
        """Drop a row and what follows it."""
        if where != "disk":
            self._drop_live()
        tier = {"memory": "cpu", "disk": "disk"}.get(where)
        return str(self._store().evict(row.keys, tier))

    def _drop_live(self) -> None:
        # Waits for a reply that is being written: it would put back what it has.
        model = self._model()
        if model is not None:
            model.drop_live(release=True)

    def verify(self, row: PrefixRow) -> str:
        """Check a row's files."""
        store = self._store()
        try:
            report = store.verify(fix=True, keys=row.keys)
        except StoreReadOnlyError:
            report = store.verify(keys=row.keys)
        head = f"{_blocks(report.blocks)}, {format_bytes(report.nbytes)}: "
        if not report.problems:
            return head + ("all good" if report.blocks else "nothing on disk to check")
        return f"{head}{len(report.problems)} damaged, set aside"

    def forget(self, tree: PrefixTree, row: PrefixRow) -> str:
        """Erase a row, whatever names pin it."""
        store = self._store()
        self._drop_live()
        keys = tree.chain(row)
        if row.names:
            self.unpin(row)
        return str(store._forget(keys))


def _blocks(n: int) -> str:
    return "1 block" if n == 1 else f"{format_count(n)} blocks"
