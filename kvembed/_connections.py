"""SQLite connections: one for each thread and process, opened when first needed."""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import threading
import time
import weakref
from typing import TYPE_CHECKING

from kvembed._errors import StoreClosedError
from kvembed._mounts import network_filesystem
from kvembed._schema import SCHEMA_VERSION, migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["Connections"]

_BUSY_S = 5.0
_FORK_WAIT_S = 2.0


class _Connection:
    """Closes its connection with the thread it belongs to."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.pid = os.getpid()
        self.closed = False

    def close(self, getpid: Callable[[], int] = os.getpid) -> None:
        # Not in a child that was forked while SQLite was at work: there even closing could wait for a lock
        # whose owner does not exist. The function comes as a default, since a connection may outlive this module's
        # names when the interpreter ends.
        if self.pid == getpid():
            self.closed = True
            self.db.close()

    __del__ = close


def _set_journal(db: sqlite3.Connection, network: bool) -> None:
    # Readers of a WAL share memory, which two machines do not have: on a network file system SQLite needs its older
    # journal. While another process makes the same change it answers "locked" at once, busy timeout or not.
    mode = "DELETE" if network else "WAL"
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute(f"PRAGMA journal_mode = {mode}")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _at_fork(reference: weakref.ref[Connections], step: str) -> None:
    connections = reference()
    if connections is not None:
        getattr(connections, step)()


class Connections:
    """Gives every thread its own connection to one database.

    Threads that share a connection would wait for each other. And no connection may cross a fork: SQLite
    keeps track of a process's locks in its memory, so a child would believe that it holds what only its
    parent holds, and change the database without a lock. It is not enough that the child opens its own.
    Therefore every connection is closed right before a fork, and opened again when it is next needed.

    Args:
        path: The database file.
        read_only: Open without writing anything.
        sync: Wait for the device at every commit.
    """

    def __init__(self, path: Path, *, read_only: bool, sync: bool = False) -> None:
        self._path = path
        self._read_only = read_only
        self._sync = sync
        self._network = not read_only and network_filesystem(path.parent) is not None
        self._immutable = False
        self._closed = False
        self._inherited: list[sqlite3.Connection] = []
        self._all: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._reset()
        if hasattr(os, "register_at_fork"):
            # There is no way to take these back: they hold a weak reference, and cost nothing without forks.
            reference: weakref.ref[Connections] = weakref.ref(self)
            os.register_at_fork(
                before=functools.partial(_at_fork, reference, "_before_fork"),
                after_in_parent=functools.partial(_at_fork, reference, "_after_fork"),
                after_in_child=functools.partial(_at_fork, reference, "_reset"),
            )

    def _reset(self) -> None:
        # Kept, since dropping the last reference would close them too.
        self._inherited += [held.db for held in self._all if not held.closed]
        # Entered by its lock, never by itself: `Condition.__enter__` is Python code, and a KeyboardInterrupt inside it,
        # after the lock is taken, would leave it taken for ever. The lock's own is not interrupted there.
        self._lock = threading.RLock()
        self._gate = threading.Condition(self._lock)
        self._active = 0
        self._forking = False
        self._local = threading.local()
        self._all: weakref.WeakSet[_Connection] = weakref.WeakSet()

    @contextlib.contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        """Give out this thread's connection for the length of a ``with`` block; may be nested.

        Raises:
            StoreClosedError: After `close`.
            sqlite3.DatabaseError: It cannot be opened, or is no database.
            StoreFormatError: It was written by a newer version.
        """
        depth: int = getattr(self._local, "depth", 0)
        if depth == 0:
            with self._lock:
                while self._forking:
                    self._gate.wait()
                self._active += 1
        self._local.depth = depth + 1
        try:
            yield self._get()
        finally:
            self._local.depth = depth
            if depth == 0:
                with self._lock:
                    self._active = max(0, self._active - 1)
                    self._gate.notify_all()

    def _get(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreClosedError("this store is closed; open it again with KVStore(path)")
        held: _Connection | None = getattr(self._local, "held", None)
        if held is None or held.closed:
            held = self._local.held = _Connection(self._connect())
            with self._lock:
                self._all.add(held)
        return held.db

    def _before_fork(self) -> None:
        self._gate.acquire()  # until after the fork
        self._forking = True
        deadline = time.monotonic() + _FORK_WAIT_S
        while self._active and (left := deadline - time.monotonic()) > 0:
            self._gate.wait(left)
        if not self._active:
            for held in list(self._all):
                held.close()

    def _after_fork(self) -> None:
        self._forking = False
        self._gate.notify_all()
        self._gate.release()

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
            if db.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
                # Its tables are older, and the file may not be changed: they are migrated in memory.
                copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                db.backup(copy)
                db.close()
                db = copy
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
                _set_journal(db, self._network)
                # NORMAL: a power cut may lose the last commits, never the database; lost rows are found
                # again by the clean-up, since the files are the truth.
                # Deleted rows are zeroed, so that nothing of a forgotten text stays in free pages.
                db.execute("PRAGMA secure_delete = ON").fetchall()
                db.execute(f"PRAGMA synchronous = {'FULL' if self._sync else 'NORMAL'}")
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Close the connections of every thread; harmless when repeated."""
        with self._lock:
            self._closed = True
            everyone = list(self._all)
        for held in everyone:
            held.close()
