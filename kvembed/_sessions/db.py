"""`SessionDB`: conversations in SQLite, as a tree of messages that never change.

A session is a name and a *head*: the last message of its current branch. Every verb only adds messages and moves the
head, so undo is a list of earlier heads, and forks share what they have in common. Nothing here imports torch.

The file holds what people wrote, so it lies in the user's data folder (not in the cache, which may be thrown away),
with mode 0600.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError, StoreError
from kvembed._paths import make_private_dir, sessions_file
from kvembed._schema import statements

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Message", "SessionDB", "SessionInfo"]

_VERSION = 1
_SCHEMA = """
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    system TEXT,
    settings TEXT NOT NULL DEFAULT '{}',
    head INTEGER REFERENCES messages(id),
    created REAL NOT NULL,
    updated REAL NOT NULL
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    parent INTEGER REFERENCES messages(id),
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    meta TEXT NOT NULL DEFAULT '{}',
    created REAL NOT NULL,
    token_ids BLOB,
    text_kept INTEGER NOT NULL DEFAULT 0,
    text_rest TEXT NOT NULL DEFAULT '',
    ids_kept INTEGER NOT NULL DEFAULT 0,
    ids_rest BLOB
);
CREATE INDEX messages_parent ON messages(parent);
CREATE TABLE moves (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
    head INTEGER
);
CREATE VIRTUAL TABLE found USING fts5(content, content='messages', content_rowid='id');
CREATE TRIGGER messages_added AFTER INSERT ON messages BEGIN
    INSERT INTO found(rowid, content) VALUES (new.id, new.content);
END;
CREATE TRIGGER messages_removed AFTER DELETE ON messages BEGIN
    INSERT INTO found(found, rowid, content) VALUES ('delete', old.id, old.content);
END;
"""
_LINE = (
    "WITH RECURSIVE line(id, parent) AS (SELECT id, parent FROM messages WHERE id = ? UNION ALL "
    "SELECT m.id, m.parent FROM messages m JOIN line ON m.id = line.parent)"
)
"""A message and all before it, the last first."""


@dataclass(frozen=True)
class Message:
    """One message, or an attached document.

    Args:
        id: Its number.
        parent: Number of the message before it, or None.
        role: ``"user"``, ``"assistant"`` or ``"document"``.
        content: Its text, without special tokens.
        meta: What is known beside it: name of a document, cost of a reply.
        created: Seconds since 1970.
        token_ids: int32 bytes of the tokens of a reply, as they were generated.
        text_kept: Of the prompt this reply answered, as rendered: characters shared with the last one before it ...
        text_rest: ... and the characters after them.
        ids_kept: The same in tokens of the whole stream (that prompt and its reply) ...
        ids_rest: ... and the int32 bytes of the ids after them.
    """

    id: int
    parent: int | None
    role: str
    content: str
    meta: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0
    token_ids: bytes = b""
    text_kept: int = 0
    text_rest: str = ""
    ids_kept: int = 0
    ids_rest: bytes = b""


@dataclass(frozen=True)
class SessionInfo:
    """One line of a list of sessions.

    Args:
        name: What it is called.
        system: Its system message.
        settings: Arguments of ``generate()`` it was given.
        head: Number of its last message, or None.
        created: Seconds since 1970.
        updated: Seconds since 1970.
    """

    name: str
    system: str | None
    settings: dict[str, Any]
    head: int | None
    created: float
    updated: float


class SessionDB:
    """The file of all sessions; any number of threads and processes may have it open.

    Args:
        path: The file; by default ``sessions.db`` in the user's data folder.

    Raises:
        StoreError: It is not a file of sessions, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path).expanduser() if path is not None else sessions_file()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        try:
            make_private_dir(self.path.parent)
            # Made here with its mode: SQLite would use the umask.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = self._connect()
            self._migrate()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self.path} cannot be used for sessions: {error}") from error
        self._finalizer = weakref.finalize(self, self._db.close)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=10.0, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA secure_delete = ON")  # what is deleted is gone from the file too
        db.execute("PRAGMA journal_mode = WAL")
        return db

    def _migrate(self) -> None:
        with self._transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise StoreError(f"{self.path} was written by a newer kvembed (format {version}): upgrade kvembed")
            if version == 0:
                for statement in statements(_SCHEMA):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._pid != os.getpid():  # a fork: SQLite's connections do not survive one
                self._pid, self._db = os.getpid(), self._connect()
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._finalizer.detach()
            self._db.close()

    # --- sessions --------------------------------------------------------------------------------------

    def open(self, name: str, system: str | None = None, settings: dict[str, Any] | None = None) -> SessionInfo:
        """Return a session, made when it is new.

        Raises:
            ConfigError: It exists with another system message: its whole KV hangs on that.
        """
        if not name.strip():
            raise ConfigError("a session needs a name")
        with self._transaction() as db:
            known = self._info(db, name)
            if known is not None:
                if system is not None and system != known.system:
                    raise ConfigError(
                        f"session {name!r} has another system message: open it without system=, or give another name"
                    )
                return known
            now = time.time()
            values = (name, system, json.dumps(settings or {}), now, now)
            db.execute("INSERT INTO sessions (name, system, settings, created, updated) VALUES (?, ?, ?, ?, ?)", values)
            return SessionInfo(name, system, dict(settings or {}), None, now, now)

    @staticmethod
    def _info(db: sqlite3.Connection, name: str) -> SessionInfo | None:
        sql = "SELECT name, system, settings, head, created, updated FROM sessions WHERE name = ?"
        row = db.execute(sql, (name,)).fetchone()
        return None if row is None else SessionInfo(row[0], row[1], json.loads(row[2]), *row[3:])

    def info(self, name: str) -> SessionInfo:
        """Return what is known of a session.

        Raises:
            ConfigError: There is none of this name.
        """
        with self._transaction() as db:
            found = self._info(db, name)
        if found is None:
            raise ConfigError(f"no session {name!r}")
        return found

    def sessions(self) -> list[SessionInfo]:
        """Return all sessions, the latest first."""
        with self._transaction() as db:
            sql = "SELECT name, system, settings, head, created, updated FROM sessions ORDER BY updated DESC, id DESC"
            rows = db.execute(sql).fetchall()
        return [SessionInfo(row[0], row[1], json.loads(row[2]), *row[3:]) for row in rows]

    def search(self, words: str) -> list[tuple[str, str]]:
        """Return (session, excerpt) for sessions whose current branch, or name, has all of the words."""
        quoted = " ".join('"' + word.replace('"', '""') + '"' for word in words.split())
        if not quoted:
            return []
        with self._transaction() as db:
            sql = "SELECT rowid, snippet(found, 0, '', '', '…', 12) FROM found WHERE found MATCH ?"
            hits = dict(db.execute(sql, (quoted,)).fetchall())
            heads = db.execute("SELECT name, head FROM sessions ORDER BY updated DESC").fetchall()
            found: list[tuple[str, str]] = []
            for name, head in heads:
                at = next((i for i in self._line(db, head) if i in hits), None)
                if at is not None:
                    found.append((name, hits[at]))
                elif all(word.lower() in name.lower() for word in words.split()):
                    found.append((name, ""))
        return found

    @staticmethod
    def _line(db: sqlite3.Connection, head: int | None) -> list[int]:
        return [row[0] for row in db.execute(f"{_LINE} SELECT id FROM line", (head,))]

    def fork(self, name: str, new: str) -> SessionInfo:
        """Make a session that goes on from where another one is.

        Raises:
            ConfigError: There is none of this name, or one of the new name.
        """
        known = self.info(name)
        if not new.strip():
            raise ConfigError("a session needs a name")
        with self._transaction() as db:
            if self._info(db, new) is not None:
                raise ConfigError(f"there is a session {new!r} already")
            now = time.time()
            columns = "name, system, settings, head, created, updated"
            values = (new, known.system, json.dumps(known.settings), known.head, now, now)
            db.execute(f"INSERT INTO sessions ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
        return self.info(new)

    def rename(self, name: str, new: str) -> None:
        """Call a session something else.

        Raises:
            ConfigError: There is none of this name, or one of the new name.
        """
        self.info(name)
        if not new.strip():
            raise ConfigError("a session needs a name")
        try:
            with self._transaction() as db:
                db.execute("UPDATE sessions SET name = ? WHERE name = ?", (new, name))
        except sqlite3.IntegrityError:
            raise ConfigError(f"there is a session {new!r} already") from None

    def set_settings(self, name: str, settings: dict[str, Any]) -> None:
        """Keep arguments of ``generate()`` with a session."""
        with self._transaction() as db:
            db.execute("UPDATE sessions SET settings = ? WHERE name = ?", (json.dumps(settings), name))

    def remove(self, name: str) -> int:
        """Delete a session and the messages no other session has; return how many messages went."""
        self.info(name)
        with self._transaction() as db:
            db.execute("DELETE FROM sessions WHERE name = ?", (name,))
            heads = [row[0] for row in db.execute("SELECT head FROM sessions UNION SELECT head FROM moves")]
            kept = {number for head in heads for number in self._line(db, head)}
            all_of_them = [row[0] for row in db.execute("SELECT id FROM messages ORDER BY id DESC")]
            gone = [number for number in all_of_them if number not in kept]
            # Children have higher numbers than their parents, and go first.
            db.executemany("DELETE FROM messages WHERE id = ?", [(number,) for number in gone])
            db.execute("INSERT INTO found(found) VALUES ('rebuild')")  # an index keeps words it was told to delete
        with self._lock, contextlib.suppress(sqlite3.OperationalError):  # another process is reading
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return len(gone)

    def heads(self, name: str) -> list[int]:
        """Return the ends of all branches a session is or was on."""
        sql = "SELECT head FROM sessions WHERE name = ?1 UNION SELECT m.head FROM moves m JOIN sessions s "
        with self._transaction() as db:
            rows = db.execute(sql + "ON s.id = m.session WHERE s.name = ?1", (name,)).fetchall()
        return [row[0] for row in rows if row[0] is not None]

    # --- messages --------------------------------------------------------------------------------------

    def branch(self, head: int | None) -> list[Message]:
        """Return the messages from the first to ``head``."""
        if head is None:
            return []
        columns = "id, parent, role, content, meta, created, token_ids, text_kept, text_rest, ids_kept, ids_rest"
        with self._transaction() as db:
            # A parent is always older than its children, so that numbers are in order.
            where = "WHERE id IN (SELECT id FROM line) ORDER BY id"
            rows = db.execute(f"{_LINE} SELECT {columns} FROM messages {where}", (head,)).fetchall()
        return [_message(row) for row in rows]

    def add(self, name: str, messages: Sequence[Message], parent: int | None) -> int | None:
        """Add messages one after another below ``parent``, move the session there, and return the new head.

        Numbers and parents of the messages given are ignored.
        """
        with self._transaction() as db:
            head = parent
            for message in messages:
                cursor = db.execute(
                    "INSERT INTO messages (parent, role, content, meta, created, token_ids, text_kept, text_rest, "
                    "ids_kept, ids_rest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        head,
                        message.role,
                        message.content,
                        json.dumps(message.meta),
                        message.created or time.time(),
                        message.token_ids or None,
                        message.text_kept,
                        message.text_rest,
                        message.ids_kept,
                        message.ids_rest or None,
                    ),
                )
                head = cursor.lastrowid
            self._move(db, name, head)
        return head

    def move(self, name: str, head: int | None) -> None:
        """Make a message the last one of a session's current branch."""
        with self._transaction() as db:
            self._move(db, name, head)

    @staticmethod
    def _move(db: sqlite3.Connection, name: str, head: int | None) -> None:
        db.execute("INSERT INTO moves (session, head) SELECT id, head FROM sessions WHERE name = ?", (name,))
        db.execute("UPDATE sessions SET head = ?, updated = ? WHERE name = ?", (head, time.time(), name))

    def undo(self, name: str) -> bool:
        """Take the last move of a session back; False when there is none left."""
        with self._transaction() as db:
            sql = (
                "SELECT moves.id, moves.head FROM moves JOIN sessions ON sessions.id = moves.session "
                "WHERE sessions.name = ? ORDER BY moves.id DESC LIMIT 1"
            )
            row = db.execute(sql, (name,)).fetchone()
            if row is None:
                return False
            db.execute("UPDATE sessions SET head = ?, updated = ? WHERE name = ?", (row[1], time.time(), name))
            db.execute("DELETE FROM moves WHERE id = ?", (row[0],))
            return True


def _message(row: Sequence[Any]) -> Message:
    kept = (row[5], row[6] or b"", row[7], row[8], row[9], row[10] or b"")
    return Message(row[0], row[1], row[2], row[3], json.loads(row[4]), *kept)
