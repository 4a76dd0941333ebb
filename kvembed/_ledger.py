"""`Ledger`: what the store counts for ever: bytes written a day, hits by tier, saved seconds, and who asked for what.

Sums are kept by day in the catalog, so all processes and days share them. The log of calls holds the first eight
bytes of block keys, which are hashes of hashes; it is bounded, and what is forgotten is cut out of it.
"""

from __future__ import annotations

import collections
import itertools
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvembed._codec import Codec
from kvembed._files import disk_usage

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from kvembed._catalog import Catalog

__all__ = ["Call", "DIGEST_BYTES", "Ledger", "today"]

DIGEST_BYTES = 8
_LOG_BYTES = 1 << 20
_LOG_CALLS = 5000
_CALL_KEYS = 4096  # of the longest prompts only the beginning is logged: 1 M tokens
_DAYS = 400
_RECENT = 120
_PAIR = struct.Struct("<II")
_FEW = 50  # keys looked for one by one, which the database does a thousand times faster than Python


@dataclass(frozen=True)
class Call:
    """One call of the log.

    Args:
        time: Unix time.
        keys: Digests of the whole blocks it used or made, first to last.
        block_bytes: What one of them takes on disk.
    """

    time: float
    keys: tuple[bytes, ...]
    block_bytes: int


def today() -> str:
    """Return the local date: ``"2026-11-24"``."""
    return time.strftime("%Y-%m-%d")


class Ledger:
    """Counts, and the log of calls.

    Args:
        catalog: Where they are kept; without one, or with one that is read-only, for this store alone.
    """

    def __init__(self, catalog: Catalog | None) -> None:
        self._catalog = catalog
        self._codec = Codec() if catalog is None else catalog.codec
        self._writable = catalog is not None and not catalog.read_only
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, str], float] = {}
        self._calls: list[tuple[float, bytes, int, bytes]] = []
        self._recent: collections.deque[tuple[int, int]] = collections.deque(maxlen=_RECENT)

    def after_fork(self) -> None:
        """Make the ledger usable in a forked child; what waits to be written is the parent's."""
        self._reset()

    def digest_of(self, key: bytes) -> bytes:
        """Return what the log keeps of a key."""
        return self._codec.key(key)[:DIGEST_BYTES]

    # -- sums ----------------------------------------------------------------------------------------

    def add_later(self, **values: float) -> None:
        """Add to sums of today's and of all days'; `flush` writes them."""
        day = today()
        with self._lock:
            for name, value in values.items():
                for slot in ((day, name), ("", name)):
                    self._sums[slot] = self._sums.get(slot, 0.0) + value

    def take(self, name: str, value: float, limit: float | None) -> bool:
        """Add to a sum at once, unless today's would be more than ``limit`` then; as one step among all processes.

        Args:
            name: Of the sum.
            value: What to add; less than 0 gives back.
            limit: Most for a day; None for no limit.
        """
        catalog, day = self._catalog, today()
        if catalog is None or not self._writable:
            return False
        with catalog.transaction() as db:
            row = db.execute("SELECT value FROM days WHERE day = ? AND name = ?", (day, name)).fetchone()
            if limit is not None and value > 0 and (row[0] if row else 0.0) + value > limit:
                return False
            self._write(db, {(day, name): value, ("", name): value})
        return True

    @staticmethod
    def _write(db: sqlite3.Connection, sums: dict[tuple[str, str], float]) -> None:
        sql = (
            "INSERT INTO days VALUES (?, ?, ?) "
            "ON CONFLICT (day, name) DO UPDATE SET value = max(0.0, value + excluded.value)"
        )
        db.executemany(sql, [(*slot, value) for slot, value in sums.items()])

    def sums(self, day: str = "") -> dict[str, float]:
        """Return the sums of a day, or of all days, by name; what waits to be written included."""
        found: dict[str, float] = {}
        if self._catalog is not None:
            found = dict(self._catalog.select("SELECT name, value FROM days WHERE day = ?", (day,)))
        with self._lock:
            for (when, name), value in self._sums.items():
                if when == day:
                    found[name] = found.get(name, 0.0) + value
        return found

    def days(self, name: str, count: int = 30) -> dict[str, float]:
        """Return one sum of the latest days that have it, oldest first."""
        if self._catalog is None:
            return {}
        self.flush()
        sql = "SELECT day, value FROM days WHERE name = ? AND day != '' ORDER BY day DESC LIMIT ?"
        return dict(self._catalog.select(sql, (name, count))[::-1])

    # -- the latest calls --------------------------------------------------------------------------

    def note_call(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Remember how much of a prompt was reused; `flush` writes it."""
        most = (1 << 32) - 1
        with self._lock:
            self._recent.append((min(prompt_tokens, most), min(cached_tokens, most)))

    def recent(self) -> list[tuple[int, int]]:
        """Return prompt and reused tokens of the latest calls of all processes, oldest first."""
        with self._lock:
            waiting = list(self._recent)
        known: list[tuple[int, int]] = []
        if self._catalog is not None:
            for (packed,) in self._catalog.select("SELECT value FROM meta WHERE name = 'recent_calls'"):
                known = _pairs(packed)
        return [*known, *waiting][-_RECENT:]

    # -- the log of calls ----------------------------------------------------------------------------

    def log_later(self, keys: Sequence[bytes], block_bytes: int = 0) -> None:
        """Remember which whole blocks a call used or made; `flush` writes it.

        Args:
            keys: The blocks, all of one size, first to last.
            block_bytes: Size of one; 0 has it looked up.
        """
        if not keys or not self._writable:
            return
        written = self._codec.keys(keys[:_CALL_KEYS])
        packed = b"".join(key[:DIGEST_BYTES] for key in written)
        with self._lock:
            self._calls.append((time.time(), packed, block_bytes, written[0]))

    def calls(self) -> list[Call]:
        """Return the log, oldest first."""
        if self._catalog is None:
            return []
        self.flush()
        rows = self._catalog.select("SELECT time, keys, block_bytes FROM calls ORDER BY id")
        return [Call(when, _unpack(packed), nbytes) for when, packed, nbytes in rows]

    def forget(self, keys: Iterable[bytes] | None) -> None:
        """Cut keys out of the log, with those after them in the same call, which followed them; None empties it."""
        catalog = self._catalog
        if catalog is None or not self._writable:
            return
        self.flush()
        if keys is None:
            catalog.select("DELETE FROM calls")
            return
        gone = {written[:DIGEST_BYTES] for written in self._codec.keys(keys)}
        with catalog.transaction() as db:
            if len(gone) <= _FEW:
                sql = "SELECT id, keys FROM calls WHERE instr(keys, ?)"
                found = {number: packed for digest in gone for number, packed in db.execute(sql, (digest,))}
            else:
                found = dict(db.execute("SELECT id, keys FROM calls"))
            for number, packed in found.items():
                digests = _unpack(packed)
                kept = b"".join(itertools.takewhile(lambda digest: digest not in gone, digests))
                if len(kept) == len(packed):
                    continue
                # Not UPDATE: the sizes are counted when rows come and go.
                row = db.execute("SELECT * FROM calls WHERE id = ?", (number,)).fetchone()
                db.execute("DELETE FROM calls WHERE id = ?", (number,))
                if kept:
                    db.execute("INSERT INTO calls VALUES (?, ?, ?, ?)", (number, row[1], kept, row[3]))

    # -- writing -------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what waits."""
        catalog = self._catalog
        if catalog is None or not self._writable:
            return
        with self._lock:
            sums, calls, recent = self._sums, self._calls, list(self._recent)
            if not sums and not calls and not recent:
                return
            self._sums, self._calls = {}, []
            self._recent.clear()
        with catalog.transaction() as db:
            self._write(db, sums)
            if recent:
                # One value and not a table: the oldest go as new ones come, and none is ever looked for.
                row = db.execute("SELECT value FROM meta WHERE name = 'recent_calls'").fetchone()
                pairs = [*(_pairs(row[0]) if row else ()), *recent][-_RECENT:]
                packed = b"".join(_PAIR.pack(*pair) for pair in pairs)
                db.execute("INSERT OR REPLACE INTO meta VALUES ('recent_calls', ?)", (packed,))
            for when, packed, nbytes, first in calls:
                size = disk_usage(nbytes) if nbytes else 0
                for (known,) in db.execute("SELECT file_bytes FROM blocks WHERE key = ?", (first,)):
                    size = known
                # Without a size the block is nowhere any more, and could not be placed on the curve.
                if size:
                    db.execute("INSERT INTO calls (time, keys, block_bytes) VALUES (?, ?, ?)", (when, packed, size))
            counts = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('log_bytes', 'log_calls')"))
            if counts["log_bytes"] > _LOG_BYTES or counts["log_calls"] > _LOG_CALLS:
                # A fifth at a time: the oldest calls say least.
                sql = "DELETE FROM calls WHERE id IN (SELECT id FROM calls ORDER BY id LIMIT ?)"
                db.execute(sql, (max(1, int(counts["log_calls"]) // 5),))
            if any(day for day, _ in sums):
                last = "(SELECT DISTINCT day FROM days WHERE day != '' ORDER BY day DESC LIMIT 1 OFFSET ?)"
                db.execute(f"DELETE FROM days WHERE day != '' AND day < {last}", (_DAYS - 1,))


def _pairs(packed: object) -> list[tuple[int, int]]:
    if not isinstance(packed, bytes) or len(packed) % _PAIR.size:
        return []
    return [(prompt, cached) for prompt, cached in _PAIR.iter_unpack(packed)]


def _unpack(packed: bytes) -> tuple[bytes, ...]:
    return tuple(packed[at : at + DIGEST_BYTES] for at in range(0, len(packed), DIGEST_BYTES))
