"""`SessionFile`: the SQLite file that sessions are kept in, for any number of threads and forked processes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kvembed._errors import StoreError
from kvembed._files import create_private
from kvembed._paths import make_private_dir, sessions_file
from kvembed._sessions.schema import connect, migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SessionFile"]


class SessionFile:
    """The file, open; `SessionDB` knows what is in it.

    The file holds what people wrote, so it lies in the user's data folder (not in the cache, which may be thrown
    away), with mode 0600.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path).expanduser() if path is not None else sessions_file()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        try:
            make_private_dir(self.path.parent)
            # Made here with its mode: SQLite would use the umask. Only when it is missing: closing any descriptor of
            # an open database drops its locks on POSIX.
            with contextlib.suppress(FileExistsError):
                os.close(create_private(self.path))
            self._db = connect(self.path)
            migrate(self._db, self.path)
            self._db.execute("PRAGMA foreign_keys = ON")
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self.path} cannot be used for sessions: {error}") from error
        self._finalizer = weakref.finalize(self, self._db.close)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._pid != os.getpid():  # a fork: SQLite's connections do not survive one
                self._pid, self._db = os.getpid(), connect(self.path)
                self._db.execute("PRAGMA foreign_keys = ON")
            yield self._db

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._finalizer.detach()
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
