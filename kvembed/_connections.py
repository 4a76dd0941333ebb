"""SQLite connections: one for each thread and process, opened when first needed."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from typing import TYPE_CHECKING

from kvembed._errors import StoreClosedError
from kvembed._schema import migrate

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Connections"]

_BUSY_S = 5.0


class _Connection:
    """Closes its connection with the thread it belongs to, but never in a forked child."""

    def __init__(self, db: sqlite3.Connection, kept: list[sqlite3.Connection]) -> None:
        self.db = db
        self.pid = os.getpid()
        self._kept = kept

    def close(self) -> None:
        if self.pid == os.getpid():
            self.db.close()
        else:
            # SQLite forbids even closing a connection that came through fork(); keep it referenced.
            self._kept.append(self.db)

    __del__ = close


def _use_wal(db: sqlite3.Connection) -> None:
    # While another process makes the same change SQLite answers "locked" at once, busy timeout or not.
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class Connections:
    """Gives every thread of every process its own connection to one database.

    SQLite connections must not cross a fork, and threads that share one would wait for each other.

    Args:
        path: The database file.
        read_only: Open without writing anything.
        sync: Wait for the device at every commit.
    """

    def __init__(self, path: Path, *, read_only: bool, sync: bool = False) -> None:
        self._path = path
        self._read_only = read_only
        self._sync = sync
        self._lock = threading.Lock()
        self._local = threading.local()
        self._kept: list[sqlite3.Connection] = []
        self._all: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._closed = False
        self._immutable = False

    def get(self) -> sqlite3.Connection:
        """Return this thread's connection.

        Raises:
            StoreClosedError: After `close`.
            sqlite3.DatabaseError: It cannot be opened, or is no database.
            StoreFormatError: It was written by a newer version.
        """
        if self._closed:
            raise StoreClosedError("this store is closed; open it again with KVStore(path)")
        held: _Connection | None = getattr(self._local, "held", None)
        if held is None or held.pid != os.getpid():
            held = self._local.held = _Connection(self._connect(), self._kept)
            with self._lock:
                self._all.add(held)
        return held.db

    def _connect(self) -> sqlite3.Connection:
        if not self._read_only:
            db = self._open("?mode=rw")
            try:
                migrate(db, str(self._path))
            except BaseException:
                db.close()
                raise
            return db
        if not self._immutable:
            try:
                return self._check(self._open("?mode=ro"))
            except sqlite3.OperationalError:
                # A folder that cannot be written, without the -shm file that WAL readers share.
                self._immutable = True
        return self._check(self._open("?mode=ro&immutable=1"))

    def _check(self, db: sqlite3.Connection) -> sqlite3.Connection:
        try:
            db.execute("SELECT count(*) FROM meta").fetchone()
            migrate(db, str(self._path))
        except BaseException:
            db.close()
            raise
        return db

    def _open(self, options: str) -> sqlite3.Connection:
        uri = self._path.absolute().as_uri() + options
        db = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            if not self._read_only:
                _use_wal(db)
                # NORMAL: a power cut may lose the last commits, never the database; lost rows are found
                # again by the clean-up, since the files are the truth.
                db.execute(f"PRAGMA synchronous = {'FULL' if self._sync else 'NORMAL'}")
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Close the connections of every thread; harmless when repeated."""
        self._closed = True
        with self._lock:
            everyone = list(self._all)
        for held in everyone:
            held.close()

    def after_fork(self) -> None:
        """Make the object usable in a forked child."""
        self._lock = threading.Lock()
