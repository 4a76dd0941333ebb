"""`Catalog`: which blocks lie on disk, in SQLite, shared by every process that opened the folder.

The files are the truth and describe themselves; the catalog only makes finding fast, and can be made again
from them (`kvembed._rebuild`). It holds no token ids and no text: the probe that finds tails is a hash.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvembed._block import BlockInfo
from kvembed._catalog_base import CatalogBase
from kvembed._codecs.names import fidelity
from kvembed._eviction import worth

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["BlockRow", "Catalog", "Counters"]

_CHUNK = 500  # keys in one statement; SQLite before 3.32 allows 999 variables
_TOMBSTONES = 20_000
_TRIM_EVERY = 200  # finding the oldest one to keep steps over all the others
# What `kvembed._eviction` says, with what the catalog knows of the model.
_PRIORITY = (
    "(SELECT value FROM meta WHERE name = 'age') + worth * "
    "(SELECT seconds_per_token FROM namespaces WHERE id = namespace)"
)
_INFO = "key, parent, namespace, start, n_tokens, exact, nbytes, codec"


@dataclass(frozen=True)
class BlockRow:
    """A block of the catalog with what only the catalog knows."""

    info: BlockInfo
    file_bytes: int
    created: float
    last_used: float
    hits: int
    children: int
    pins: int


@dataclass(frozen=True)
class Counters:
    """Totals, kept by triggers so that reading them does not depend on the size of the store."""

    blocks: int
    nbytes: int
    file_bytes: int
    hits: int
    hit_tokens: int


class Catalog(CatalogBase):
    """The table of blocks on disk.

    One connection for each thread and process: SQLite connections must not cross a fork, and threads that
    share one would wait for each other.

    Args:
        path: The database file.
        create: Create it when it is missing; see `kvembed._rebuild.open_or_rebuild`.
        read_only: Open without writing anything.
        sync: Wait for the device at every commit.
        codec: The store's: keys, models and pinned names are written as it has them.

    Raises:
        sqlite3.OperationalError: It is missing, locked, or may not be opened.
        sqlite3.DatabaseError: The file is not a database, or that of a store with another key or none.
        StoreFormatError: It was written by a newer version.
        StoreKeyError: It is that of an encrypted store, and there is no key.
    """

    _deleted = _TRIM_EVERY

    def _info(self, row: Sequence[Any]) -> BlockInfo:
        key, parent = self.codec.original(row[0]), self.codec.original(row[1])
        return BlockInfo(key, parent, self._digest(row[2]), row[3], row[4], row[5] == 1, row[6], row[7])

    # -- blocks ------------------------------------------------------------------------------------

    def get(self, keys: Sequence[bytes]) -> dict[bytes, BlockInfo]:
        """Return what is known of those of ``keys`` that are here."""
        found: dict[bytes, BlockInfo] = {}
        for at in range(0, len(keys), _CHUNK):
            part = self.codec.keys(keys[at : at + _CHUNK])
            marks = ",".join("?" * len(part))
            for row in self._query(f"SELECT {_INFO} FROM blocks WHERE key IN ({marks})", part):
                info = self._info(row)
                found[info.key] = info
        return found

    def row(self, key: bytes) -> BlockRow | None:
        """Return the whole row of a block, or None."""
        return next(iter(self.rows("WHERE key = ?", (self.codec.key(key),))), None)

    def rows(self, tail: str = "", values: Sequence[Any] = ()) -> Iterator[BlockRow]:
        """Return the rows chosen by ``tail``: SQL after ``SELECT ... FROM blocks``, with keys as the codec has them."""
        sql = f"SELECT {_INFO}, file_bytes, created, last_used, hits, children, pins FROM blocks {tail}"
        return (BlockRow(self._info(row), *row[8:]) for row in self._query(sql, values))

    def children(self, parent: bytes, limit: int = 1000) -> list[BlockInfo]:
        """Return the blocks that follow ``parent``, latest first, at most ``limit`` (-1 for all)."""
        sql = f"SELECT {_INFO} FROM blocks WHERE parent = ? ORDER BY last_used DESC LIMIT ?"
        return [self._info(row) for row in self._query(sql, (self.codec.key(parent), limit))]

    def chain(self, key: bytes) -> list[BlockInfo]:
        """Return a block and those that lead to it, as far as they are here, starting with the block."""
        names = ", ".join(f"b.{name}" for name in _INFO.split(", "))
        sql = (
            f"WITH RECURSIVE chain AS (SELECT {_INFO}, 0 AS depth FROM blocks WHERE key = ? UNION ALL "
            f"SELECT {names}, depth + 1 FROM chain JOIN blocks b ON b.key = chain.parent) "
            f"SELECT {_INFO} FROM chain ORDER BY depth"
        )
        return [self._info(row) for row in self._query(sql, (self.codec.key(key),))]

    def subtree(self, keys: Iterable[bytes]) -> list[BlockInfo]:
        """Return blocks and everything that follows them, as far as they are here, ends first."""
        found: dict[bytes, BlockInfo] = {}
        names = ", ".join(f"b.{name}" for name in _INFO.split(", "))
        for key in keys:
            if key not in found:
                sql = (
                    "WITH RECURSIVE down AS (SELECT key FROM blocks WHERE key = ? UNION "
                    "SELECT b.key FROM down JOIN blocks b ON b.parent = down.key) "
                    f"SELECT {names} FROM down JOIN blocks b ON b.key = down.key"
                )
                found |= {info.key: info for info in map(self._info, self._query(sql, (self.codec.key(key),)))}
        return sorted(found.values(), key=lambda info: -info.start)

    def leaves_named(self, digits: str) -> list[bytes]:
        """Return the keys of blocks that none follows and whose hexadecimal form begins with ``digits``."""
        if self.codec.encrypted:
            leaves = (self.codec.original(row[0]) for row in self._query("SELECT key FROM blocks WHERE children = 0"))
            return [key for key in leaves if key.hex().startswith(digits)]
        low, high = (bytes.fromhex(digits.ljust(64, fill)) for fill in "0f")
        sql = "SELECT key FROM blocks WHERE key BETWEEN ? AND ? AND children = 0 LIMIT 100"
        return [row[0] for row in self._query(sql, (low, high))]

    def tails(self, parent: bytes, probe: bytes, limit: int = 64) -> list[BlockInfo]:
        """Return the children of ``parent`` that begin with the tokens of ``probe``, latest first, -1 for all."""
        sql = f"SELECT {_INFO} FROM blocks WHERE parent = ? AND probe = ? ORDER BY last_used DESC LIMIT ?"
        values = (self.codec.key(parent), self.codec.probe(probe), limit)
        return [self._info(row) for row in self._query(sql, values)]

    def insert(self, blocks: Iterable[tuple[BlockInfo, bytes, int, float]]) -> None:
        """Add or replace rows, in one transaction.

        Args:
            blocks: Info, probe, bytes of the file on disk, and time of creation of each.
        """
        with self.transaction() as db:
            for info, probe, file_bytes, created in blocks:
                now = max(created, self._touched.get(info.key, 0.0))
                key, parent = self.codec.key(info.key), self.codec.key(info.parent)
                values = (self.add_namespace(info.namespace), info.start, info.n_tokens)
                values += (self.codec.probe(probe), int(info.exact), info.codec)
                values += (info.nbytes, file_bytes, created, worth(info, file_bytes), now)
                # Not INSERT OR REPLACE: it would lose hits and pins, and run no delete trigger.
                sql = (
                    "UPDATE blocks SET namespace = ?, start = ?, n_tokens = ?, probe = ?, exact = ?, codec = ?, "
                    "nbytes = ?, file_bytes = ?, created = ?, worth = ?, last_used = max(last_used, ?) WHERE key = ?"
                )
                if db.execute(sql, (*values, key)).rowcount == 0:
                    sql = (
                        "INSERT INTO blocks (namespace, start, n_tokens, probe, exact, codec, nbytes, file_bytes, "
                        "created, worth, last_used, key, parent) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                    )
                    db.execute(sql, (*values, key, parent))
                db.execute(f"UPDATE blocks SET priority = {_PRIORITY} WHERE key = ?", (key,))

    def delete(self, keys: Iterable[bytes], reason: str | None = None) -> list[bytes]:
        """Delete rows and return the keys that were here.

        Args:
            keys: Blocks to forget.
            reason: ``"evicted"``, ``"quarantined"`` or ``"removed"`` to be remembered, or None.
        """
        gone: list[bytes] = []
        with self.transaction() as db:
            for original in keys:
                key = self.codec.key(original)
                if reason == "evicted":
                    sql = "SELECT COALESCE((SELECT priority FROM blocks WHERE key = ?), 0.0)"
                    db.execute(f"UPDATE meta SET value = max(value, ({sql})) WHERE name = 'age'", (key,))
                if db.execute("DELETE FROM blocks WHERE key = ?", (key,)).rowcount:
                    gone.append(original)
                    if reason is not None:
                        db.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?)", (key, reason, time.time()))
            self._deleted += len(gone)
            if reason is not None and self._deleted >= _TRIM_EVERY:
                self._deleted = 0
                sql = (
                    "DELETE FROM tombstones WHERE time < "
                    "(SELECT time FROM tombstones ORDER BY time DESC LIMIT 1 OFFSET ?)"
                )
                db.execute(sql, (_TOMBSTONES - 1,))
        return gone

    def why_missing(self, key: bytes) -> str | None:
        """Return why a block that was here is gone, or None."""
        rows = self._query("SELECT reason FROM tombstones WHERE key = ?", (self.codec.key(key),))
        return rows[0][0] if rows else None

    def to_evict(self, count: int, spare: bytes = b"", namespace: bytes | None = None) -> list[BlockRow]:
        """Return the blocks to evict next: unpinned leaves, least worth keeping first (`kvembed._eviction`).

        Args:
            count: At most so many.
            spare: A key to pass over.
            namespace: Only those of this model.
        """
        spare = self.codec.key(spare)
        where = "children = 0 AND pins = 0 AND key != ?"
        order = "ORDER BY priority, last_used, start DESC LIMIT ?"
        if namespace is None:
            return list(self.rows(f"WHERE {where} {order}", (spare, count)))
        number = self.add_namespace(namespace)
        return list(self.rows(f"WHERE {where} AND namespace = ? {order}", (spare, number, count)))

    def to_expire(self, before: float, count: int) -> list[bytes]:
        """Return keys of unpinned leaves last used before a Unix time, at most ``count``."""
        sql = "SELECT key FROM blocks WHERE children = 0 AND pins = 0 AND last_used < ? ORDER BY last_used LIMIT ?"
        return [self.codec.original(row[0]) for row in self._query(sql, (before, count))]

    def is_pinned(self, key: bytes) -> bool:
        """Return True when a key is pinned, whether its block is here or not."""
        return bool(self._query("SELECT 1 FROM pins WHERE key = ? LIMIT 1", (self.codec.key(key),)))

    @property
    def nbytes(self) -> int:
        """Bytes of the database and its log on disk."""
        total = 0
        for suffix in ("", "-wal"):
            with contextlib.suppress(OSError):
                total += self.path.with_name(f"{self.path.name}{suffix}").stat().st_size
        return total

    def counters(self) -> Counters:
        """Return the totals."""
        names = "'blocks', 'nbytes', 'file_bytes', 'hits', 'hit_tokens'"
        rows = self._query(f"SELECT name, value FROM meta WHERE name IN ({names})")
        return Counters(**{name: int(value) for name, value in rows})

    def codecs(self) -> dict[str, int]:
        """Return the number of blocks by codec, the most faithful first."""
        found = dict(self._query("SELECT codec, count(*) FROM blocks GROUP BY codec"))
        return dict(sorted(found.items(), key=lambda item: -fidelity(item[0])))

    def claim(self, task: str, every_s: float) -> bool:
        """Return True when a task is due, and then not again, in any process, before ``every_s`` have passed."""
        now = time.time()
        with self.transaction() as db:
            row = db.execute("SELECT value FROM meta WHERE name = ?", (task,)).fetchone()
            # A clock set back must not put the task off for years.
            if row is not None and now - every_s < row[0] <= now:
                return False
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (task, now))
        return True

    # -- use ---------------------------------------------------------------------------------------

    def touch_later(self, keys: Iterable[bytes], now: float | None = None) -> None:
        """Remember that ``keys`` were used; `flush_touches` writes it. Costs the caller no disk access."""
        touched = dict.fromkeys(keys, time.time() if now is None else now)
        with self._touch_lock:
            self._touched.update(touched)

    def hit_later(self, key: bytes) -> None:
        """Remember that a block was read, and so is in use; `flush_touches` writes it."""
        with self._touch_lock:
            self._hits[key] = self._hits.get(key, 0) + 1
            self._touched[key] = time.time()

    @property
    def has_touches(self) -> bool:
        """True when `flush_touches` has something to write."""
        return bool(self._touched or self._hits)

    def flush_touches(self) -> None:
        """Write what `touch_later` and `hit_later` remembered."""
        if self.read_only or not self.has_touches:
            return
        with self._touch_lock:
            touched, self._touched = self._touched, {}
            hits, self._hits = self._hits, {}
        with self.transaction() as db:
            sql = f"UPDATE blocks SET last_used = ?, priority = {_PRIORITY} WHERE key = ? AND last_used < ?"
            values = zip(touched.values(), self.codec.keys(touched), touched.values(), strict=True)
            db.executemany(sql, list(values))
            sql = "UPDATE blocks SET hits = hits + ? WHERE key = ?"
            db.executemany(sql, list(zip(hits.values(), self.codec.keys(hits), strict=True)))

    # -- pins --------------------------------------------------------------------------------------

    def pin(self, name: str, keys: Iterable[bytes]) -> None:
        """Keep ``keys`` from eviction under ``name``; keys may be written later."""
        written = self.codec.text(name, b"pin")
        with self.transaction() as db:
            first = db.execute("SELECT count(*) FROM pins WHERE name = ?", (written,)).fetchone()[0]
            rows = [(written, key, position) for position, key in enumerate(self.codec.keys(keys), first)]
            db.executemany("INSERT OR IGNORE INTO pins (name, key, position) VALUES (?, ?, ?)", rows)

    def unpin(self, name: str) -> int:
        """Drop a name; return how many blocks it held."""
        with self.transaction() as db:
            return db.execute("DELETE FROM pins WHERE name = ?", (self.codec.text(name, b"pin"),)).rowcount

    def pins(self) -> dict[str, list[bytes]]:
        """Return the keys kept under every name, in the order in which they were pinned."""
        result: dict[str, list[bytes]] = {}
        for name, key in self._query("SELECT name, key FROM pins ORDER BY name, position"):
            result.setdefault(self._text(name, b"pin"), []).append(self.codec.original(key))
        return dict(sorted(result.items()))
