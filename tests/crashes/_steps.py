"""Counts every call that touches the disk, and stops the process, or fails the call, at one of them.

Nothing in the package knows of this: the functions of `os` and the statements of SQLite are wrapped, in a forked child
that does nothing else. A step is before a call, in the middle of a write, or after a call.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FAILURES", "Steps"]

_CHANGES = (
    "open",
    "write",
    "writev",
    "fsync",
    "close",
    "replace",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "chmod",
    "utime",
)
_READS = ("pread", "preadv", "lstat", "scandir", "fstat")
_SQL_CHANGES = ("INSERT", "UPDATE", "DELETE", "BEGIN", "COMMIT", "ROLLBACK", "CREATE", "PRAGMA USER", "PRAGMA JOURNAL")

FAILURES: dict[str, Callable[[], Exception]] = {
    "ENOSPC": lambda: OSError(28, "No space left on device"),
    "EIO": lambda: OSError(5, "Input/output error"),
    "EMFILE": lambda: OSError(24, "Too many open files"),
    "EACCES": lambda: PermissionError(13, "Permission denied"),
    "EROFS": lambda: OSError(30, "Read-only file system"),
    "ESTALE": lambda: OSError(116, "Stale file handle"),
    "locked": lambda: sqlite3.OperationalError("database is locked"),
    "io": lambda: sqlite3.OperationalError("disk I/O error"),
    "full": lambda: sqlite3.OperationalError("database or disk is full"),
    "malformed": lambda: sqlite3.DatabaseError("database disk image is malformed"),
}


class Steps:
    """Wraps the calls for the rest of this process.

    Args:
        action: Called at the step, with what the step is: it kills, or raises.
        at: Number of the step, from 1; 0 only counts.
        onwards: Also call it at every later step.
        reads: Count calls that only read, too.
    """

    def __init__(self, action: Callable[[str], None], at: int, *, onwards: bool = False, reads: bool = False) -> None:
        self.count = 0
        self.names: list[str] = []
        self._action, self._at, self._onwards, self._reads = action, at, onwards, reads
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._off = False

    @classmethod
    def killing(cls, at: int) -> Steps:
        """Steps that stop the process, as the power button or the OOM killer would, without a last word."""
        return cls(lambda _: os.kill(os.getpid(), signal.SIGKILL), at)

    @classmethod
    def failing(cls, at: int, failure: str, *, onwards: bool) -> Steps:
        """Steps that fail with one of `FAILURES`, if it is of a kind the step can have."""
        make = FAILURES[failure]

        def fail(step: str) -> None:
            error = make()
            if step.startswith("after") or isinstance(error, sqlite3.Error) != step.endswith("sql"):
                return
            raise error

        return cls(fail, at, onwards=onwards, reads=True)

    def stop(self) -> None:
        """Count no more."""
        self._off = True

    def step(self, name: str) -> None:
        """Be at a step."""
        if self._off:
            return
        with self._lock:
            self.count += 1
            number = self.count
            if not self._at:
                self.names.append(name)
        if number == self._at or (self._onwards and self._at and number > self._at):
            self._action(name)

    def install(self) -> None:
        """Wrap the calls."""
        for name in (*_CHANGES, *(_READS if self._reads else ())):
            if hasattr(os, name):
                setattr(os, name, self._wrapped(name, getattr(os, name)))
        self._install_sql()

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._counts(name, args):
                return real(*args, **kwargs)
            self.step(f"before {name}")
            if name in ("write", "writev"):
                self._half(real, name, args)
            result = real(*args, **kwargs)
            try:
                self.step(f"after {name}")
            except OSError:
                if name == "open":
                    os.close(result)
                raise
            return result

        return call

    def _counts(self, name: str, args: tuple[Any, ...]) -> bool:
        # Opening for reading changes nothing: a kill there is one before the next change.
        return name != "open" or self._reads or bool(args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def _half(self, real: Callable[..., Any], name: str, args: tuple[Any, ...]) -> None:
        """Be in the middle of a write: half of the bytes are in the file when a process is killed here."""
        with self._lock:
            due = self.count + 1 == self._at and not self._reads and not self._off
        if due:
            first = args[1][0] if name == "writev" else args[1]
            os_write = real if name == "write" else None
            half = memoryview(first)[: len(first) // 2]
            if os_write is not None:
                os_write(args[0], half)
            else:
                real(args[0], [half])
        self.step(f"after half a {name}")

    def _install_sql(self) -> None:
        steps, reads = self, self._reads

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                return steps._sql(super().execute, sql, *args) if _changes(sql, reads) else super().execute(sql, *args)

            def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
                return steps._sql(super().executemany, sql, *args)

        real = sqlite3.connect

        def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            self.step("before connect sql")
            return real(*args, **kwargs, factory=Connection)

        sqlite3.connect = connect  # type: ignore[assignment]

    def _sql(self, call: Callable[..., sqlite3.Cursor], sql: str, *args: Any) -> sqlite3.Cursor:
        word = sql.split(None, 1)[0]
        self.step(f"before {word} sql")
        result = call(sql, *args)
        self.step(f"after {word} sql")
        return result


def _changes(sql: str, reads: bool) -> bool:
    return reads or sql.lstrip().upper().startswith(_SQL_CHANGES)


def jumping_clock(seed: int) -> Callable[[], float]:
    """Return a ``time.time`` that jumps by up to ten years, back and forth."""
    import time

    real, rng = time.time, random.Random(seed)
    return lambda: real() + (rng.uniform(-3e8, 3e8) if rng.random() < 0.5 else 0.0)
