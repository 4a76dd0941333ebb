"""`CatalogBase`: the database of a store as such: its connections, whose it is, its models and their notes."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any

from kvembed._codec import MARKER_NAME, Codec
from kvembed._connections import Connections
from kvembed._errors import BlockFormatError, StoreKeyError
from kvembed._files import create_private

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["CatalogBase"]


class CatalogBase:
    """Base of `kvembed._catalog.Catalog`, which has the arguments; apart to keep each file short enough to be read."""

    def __init__(
        self,
        path: Path,
        *,
        create: bool = False,
        read_only: bool = False,
        sync: bool = False,
        codec: Codec | None = None,
    ) -> None:
        self.path = path
        self.codec = codec or Codec()
        self.read_only = read_only
        self._connections = Connections(path, read_only=read_only, sync=sync)
        self._touch_lock = threading.Lock()
        self._touched: dict[bytes, float] = {}
        self._hits: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._ids: dict[bytes, int] = {}
        if create:
            # SQLite would create it with the umask's mode; -wal and -shm take the mode of this file. Only
            # when it is missing: closing any descriptor of an open database drops its locks on POSIX.
            with contextlib.suppress(FileExistsError):
                os.close(create_private(path))
        with self._connections.use() as db:
            self._inode = path.stat().st_ino
            try:
                self._check_codec(db)
            except BaseException:
                self._connections.close()
                raise

    def _check_codec(self, db: sqlite3.Connection) -> None:
        row = db.execute("SELECT value FROM meta WHERE name = 'encrypted'").fetchone()
        found = "" if row is None else row[0]
        if found == self.codec.mark:
            return
        if not self.codec.mark:
            raise StoreKeyError(
                f"{self.path} is that of an encrypted store, whose {MARKER_NAME} is missing; open it with its key, "
                "which makes that file again"
            )
        if found or self.read_only or db.execute("SELECT 1 FROM blocks LIMIT 1").fetchone():
            raise sqlite3.DatabaseError("it is the catalog of another store")
        db.execute("INSERT OR IGNORE INTO meta VALUES ('encrypted', ?)", (self.codec.mark,))

    # -- connections -------------------------------------------------------------------------------

    def connection(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """Give out this thread's connection, for the length of a ``with`` block."""
        return self._connections.use()

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        # All rows at once: a statement left open would hold back checkpoints of the WAL.
        with self._connections.use() as db:
            return db.execute(sql, values).fetchall()

    def select(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return all rows of a query."""
        return self._query(sql, values)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run statements as one; others wait. Nested use joins the outer transaction."""
        with self._connections.use() as db:
            if db.in_transaction:
                yield db
                return
            # IMMEDIATE: a transaction that starts by reading and then writes can fail with "locked" at
            # once, without the busy timeout.
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def after_fork(self) -> None:
        """Make the catalog usable in a forked child; what waits to be written is the parent's."""
        self._touch_lock = threading.Lock()
        self._touched, self._hits = {}, {}

    def note_damage(self, error: BaseException) -> None:
        """Have the catalog made again at the next opening, if ``error`` says that it is damaged."""
        # The subclasses mean something else: locked, disk full, a mistake in the statement.
        if type(error) is sqlite3.DatabaseError and not self.read_only:
            with contextlib.suppress(OSError):
                # Not when another process has put a new one in place already.
                if self.path.stat().st_ino == self._inode:
                    os.close(create_private(self.damage_mark(self.path)))

    @staticmethod
    def damage_mark(path: Path) -> Path:
        """Return the file whose presence says that the catalog at ``path`` is damaged."""
        return path.with_name(f"{path.name}.damaged")

    def close(self) -> None:
        """Close the connections of every thread; harmless when repeated."""
        self._connections.close()

    # -- namespaces and notes ----------------------------------------------------------------------

    def add_namespace(self, digest: bytes, fields: dict[str, Any] | None = None) -> int:
        """Return the row id of a namespace, adding it or its fields when they are new."""
        known = self._ids.get(digest)
        if known is not None and fields is None:
            return known
        with self.transaction() as db:
            name = self.codec.key(digest)
            row = db.execute("SELECT id, fields FROM namespaces WHERE digest = ?", (name,)).fetchone()
            text = self.codec.text(json.dumps(fields or {}, sort_keys=True, default=str), b"fields", digest)
            if row is None:
                values = (name, text, time.time())
                cursor = db.execute("INSERT INTO namespaces (digest, fields, created) VALUES (?, ?, ?)", values)
                number = int(cursor.lastrowid or 0)
            else:
                number = row[0]
                if fields and row[1] != text:
                    db.execute("UPDATE namespaces SET fields = ? WHERE id = ?", (text, number))
        # Known only when committed: an id from a transaction that was rolled back would be reused.
        with self._connections.use() as db:
            if not db.in_transaction:
                self._ids[digest] = number
        return number

    def namespaces(self) -> dict[bytes, dict[str, Any]]:
        """Return the fields of every namespace by digest."""
        rows = self._query("SELECT digest, fields FROM namespaces ORDER BY id")
        found = [(self.codec.original(bytes(name)), fields) for name, fields in rows]
        return {digest: json.loads(self._text(fields, b"fields", digest)) for digest, fields in found}

    def _text(self, written: str | bytes, *about: bytes) -> str:
        try:
            return self.codec.original_text(written, *about)
        except BlockFormatError as error:
            raise sqlite3.DatabaseError(str(error)) from error

    def note(self, digest: bytes, name: str) -> Any | None:
        """Return a value kept beside a namespace, or None."""
        sql = "SELECT value FROM notes WHERE digest = ? AND name = ?"
        rows = self._query(sql, (self.codec.key(digest), name))
        return json.loads(self._text(rows[0][0], b"note", digest, name.encode())) if rows else None

    def set_note(self, digest: bytes, name: str, value: Any) -> None:
        """Keep a JSON value beside a namespace; its prefill speed counts in eviction too."""
        written = self.codec.key(digest)
        text = self.codec.text(json.dumps(value), b"note", digest, name.encode())
        self._query("INSERT OR REPLACE INTO notes VALUES (?, ?, ?)", (written, name, text))
        if name == "prefill_tokens_per_second" and isinstance(value, int | float) and value > 0:
            self._query("UPDATE namespaces SET seconds_per_token = ? WHERE digest = ?", (1.0 / value, written))

    def spaces(self) -> dict[bytes, tuple[int, int]]:
        """Return blocks and bytes on disk of every namespace by digest."""
        rows = self._query("SELECT digest, blocks, file_bytes FROM namespaces ORDER BY id")
        return {self.codec.original(bytes(name)): (blocks, file_bytes) for name, blocks, file_bytes in rows}

    def space_of(self, digest: bytes) -> int:
        """Return the bytes on disk of one namespace."""
        rows = self._query("SELECT file_bytes FROM namespaces WHERE digest = ?", (self.codec.key(digest),))
        return int(rows[0][0]) if rows else 0

    def _digest(self, number: int) -> bytes:
        digest = self._digests.get(number)
        if digest is None:
            for row in self._query("SELECT id, digest FROM namespaces"):
                self._digests[row[0]] = self.codec.original(bytes(row[1]))
            digest = self._digests.get(number, bytes(32))
        return digest
