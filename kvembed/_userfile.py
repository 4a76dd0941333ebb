"""`UserFile`: a SQLite file of what people wrote, for any number of threads and forked processes.

It lies in the user's data folder (not in the cache, which may be thrown away), with mode 0600.
"""

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
from kvembed._paths import make_private_dir
from kvembed._residue import database_bytes
from kvembed._schema import statements

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvembed._residue import Needles

__all__ = ["kinds_in_file", "parts_of", "scrub", "UserFile"]

_PART = 64
_STEP = 512
"""So many bytes in each so many are looked for. SQLite cuts long texts at the ends of pages, which are longer."""


class UserFile:
    """The file, open.

    Args:
        path: The file.
        migrations: Scripts that make its tables, one for each version; a released one is never edited.
        what: What it holds, for errors.

    Raises:
        StoreError: It cannot be opened, or a newer kvembed has changed it.
    """

    def __init__(self, path: str | os.PathLike[str], migrations: Sequence[str], what: str) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        try:
            make_private_dir(self.path.parent)
            # Made here with its mode: SQLite would use the umask. Only when it is missing: closing any descriptor of
            # an open database drops its locks on POSIX.
            with contextlib.suppress(FileExistsError):
                os.close(create_private(self.path))
            self._db = _connect(self.path)
            _migrate(self._db, self.path, migrations)
            self._db.execute("PRAGMA foreign_keys = ON")
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self.path} cannot be used for {what}: {error}") from error
        self._finalizer = weakref.finalize(self, self._db.close)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._pid != os.getpid():  # a fork: SQLite's connections do not survive one
                self._pid, self._db = os.getpid(), _connect(self.path)
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


def scrub(db: sqlite3.Connection) -> None:
    """Leave no bytes of what was deleted in the file, where no other process is reading it."""
    # Deleted rows are zeroed, but pages that SQLite moved them from, and the log, may still have them.
    for statement in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute(statement).fetchall()


def parts_of(data: bytes) -> Iterator[bytes]:
    """Yield the parts of a long text that are looked for after it was erased."""
    for at in range(0, max(1, len(data) - _PART), _STEP):
        yield data[at : at + _PART]
    yield data[-_PART:]


def kinds_in_file(path: Path, needles: Needles) -> Iterator[tuple[Path, set[str]]]:
    """Yield the file, and its log if it has one, with the kinds of what is found in their bytes."""
    data, whole = database_bytes(path)
    yield path, needles.kinds_in(data) | (set() if whole else {"pages that are not in use any more"})
    log = path.with_name(f"{path.name}-wal")  # SQLite locks none of its bytes
    with contextlib.suppress(FileNotFoundError):
        yield log, needles.kinds_in(log.read_bytes())


def _connect(path: Path) -> sqlite3.Connection:
    """Open the file, in autocommit mode."""
    db = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA secure_delete = ON")  # what is deleted is gone from the file too
    db.execute("PRAGMA journal_mode = WAL")
    return db


def _migrate(db: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Bring the tables to the newest version."""
    # Tables are built anew, and what refers to them must not be deleted with the old ones.
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("BEGIN IMMEDIATE")
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > len(migrations):
            raise StoreError(f"{path} was written by a newer kvembed (format {version}): upgrade kvembed")
        for script in migrations[version:]:
            for statement in statements(script):
                db.execute(statement)
        if version < len(migrations):
            db.execute(f"PRAGMA user_version = {len(migrations)}")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
