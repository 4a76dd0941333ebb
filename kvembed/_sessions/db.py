"""`SessionDB`: conversations in SQLite, as a tree of messages that never change.

A session is a name and a *head*: the last message of its current branch. Every verb only adds messages and moves the
head, so undo is a list of earlier heads, and forks share what they have in common. Nothing here imports torch.
"""

from __future__ import annotations

import json
import sqlite3
import time
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError
from kvembed._paths import sessions_file
from kvembed._sessions.erasing import Erasure, sweep
from kvembed._sessions.messages import LINE, MESSAGE_COLUMNS, SESSION_COLUMNS, line_of, message_of, session_of
from kvembed._sessions.schema import MIGRATIONS
from kvembed._userfile import UserFile, scrub

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from kvembed._sessions.erasing import Erased
    from kvembed._sessions.messages import Message, SessionInfo

__all__ = ["SessionDB"]

_INFO = f"SELECT {SESSION_COLUMNS} FROM sessions"


class SessionDB(UserFile):
    """The file of all sessions; any number of threads and processes may have it open.

    It lists, searches, renames and deletes them without a model, and without loading torch. `CachedModel.session`
    goes on with one.

    Args:
        path: The file; by default ``sessions.db`` in the user's data folder.

    Raises:
        StoreError: It is not a file of sessions, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(sessions_file() if path is None else path, MIGRATIONS, "sessions")

    # --- sessions --------------------------------------------------------------------------------------

    def open(
        self,
        name: str,
        system: str | None = None,
        settings: dict[str, Any] | None = None,
        template: dict[str, Any] | None = None,
    ) -> SessionInfo:
        """Return a session, made when it is new.

        Args:
            name: What it is called.
            system: System message of a new one.
            settings: Arguments of ``generate()`` of a new one.
            template: Arguments of the chat template; they replace those it has.

        Raises:
            ConfigError: It exists with another system message: its whole KV hangs on that.
        """
        _check_name(name)
        with self._transaction() as db:
            known = self._info(db, name)
            if known is None:
                now = time.time()
                values = (name, system, _json(settings or {}), _json(template or {}), now, now)
                columns = "name, system, settings, template, created, updated"
                db.execute(f"INSERT INTO sessions ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
            elif system is not None and system != known.system:
                raise ConfigError(
                    f"session {name!r} has another system message: open it without system=, change it with "
                    "set_system(), or give another name"
                )
            elif template is not None and template != known.template:
                values = (_json(template), name)
                db.execute("UPDATE sessions SET template = ? WHERE name = ? AND hidden IS NULL", values)
            return self._known(db, name)

    @staticmethod
    def _info(db: sqlite3.Connection, name: str) -> SessionInfo | None:
        row = db.execute(f"{_INFO} WHERE name = ? AND hidden IS NULL", (name,)).fetchone()
        return None if row is None else session_of(row)

    def _known(self, db: sqlite3.Connection, name: str) -> SessionInfo:
        found = self._info(db, name)
        if found is None:
            raise ConfigError(f"no session {name!r}")
        return found

    def info(self, name: str) -> SessionInfo:
        """Return what is known of a session.

        Raises:
            ConfigError: There is none of this name.
        """
        with self._reading() as db:
            return self._known(db, name)

    def sessions(self) -> list[SessionInfo]:
        """Return all sessions that are not hidden, the latest first."""
        with self._reading() as db:
            rows = db.execute(f"{_INFO} WHERE hidden IS NULL ORDER BY updated DESC, id DESC").fetchall()
        return [session_of(row) for row in rows]

    def search(self, words: str) -> list[tuple[str, str]]:
        """Return (session, excerpt) for sessions whose current branch, or name, has all of the words."""
        quoted = " ".join('"' + word.replace('"', '""') + '"' for word in words.split())
        if not quoted:
            return []
        with self._reading() as db:
            sql = "SELECT rowid, snippet(found, 0, '', '', '…', 12) FROM found WHERE found MATCH ?"
            hits = dict(db.execute(sql, (quoted,)).fetchall())
            sql = "SELECT name, head FROM sessions WHERE hidden IS NULL ORDER BY updated DESC"
            found: list[tuple[str, str]] = []
            for name, head in db.execute(sql).fetchall():
                at = next((i for i in line_of(db, head) if i in hits), None)
                if at is not None:
                    found.append((name, hits[at]))
                elif all(word.lower() in name.lower() for word in words.split()):
                    found.append((name, ""))
        return found

    def fork(self, name: str, new: str) -> SessionInfo:
        """Make a session that goes on from where another one is.

        Raises:
            ConfigError: There is none of this name, or one of the new name.
        """
        _check_name(new)
        with self._transaction() as db:
            self._known(db, name)
            if self._info(db, new) is not None:
                raise ConfigError(f"there is a session {new!r} already")
            now = time.time()
            same = "system, settings, template, date, head"
            db.execute(
                f"INSERT INTO sessions (name, {same}, created, updated) "
                f"SELECT ?, {same}, ?, ? FROM sessions WHERE name = ? AND hidden IS NULL",
                (new, now, now, name),
            )
            return self._known(db, new)

    def rename(self, name: str, new: str) -> None:
        """Call a session something else.

        Raises:
            ConfigError: There is none of this name, or one of the new name.
        """
        _check_name(new)
        try:
            with self._transaction() as db:
                self._known(db, name)
                db.execute("UPDATE sessions SET name = ? WHERE name = ? AND hidden IS NULL", (new, name))
        except sqlite3.IntegrityError:
            raise ConfigError(f"there is a session {new!r} already") from None

    def set_settings(self, name: str, settings: dict[str, Any]) -> None:
        """Keep arguments of ``generate()`` with a session.

        Raises:
            ConfigError: They are not numbers, words, and lists of them; or there is no such session.
        """
        with self._transaction() as db:
            self._known(db, name)
            sql = "UPDATE sessions SET settings = ? WHERE name = ? AND hidden IS NULL"
            db.execute(sql, (_json(settings), name))

    # --- hiding and removing ---------------------------------------------------------------------------

    def hide(self, name: str) -> None:
        """Delete a session so that it can be brought back: it is neither listed nor found, and its name is free.

        Raises:
            ConfigError: There is none of this name.
        """
        with self._transaction() as db:
            self._known(db, name)
            db.execute("UPDATE sessions SET hidden = ? WHERE name = ? AND hidden IS NULL", (time.time(), name))

    def unhide(self, name: str) -> SessionInfo:
        """Bring a hidden session back; of several of one name, the one hidden last.

        Returns:
            The session. It has another name where its own was taken meanwhile: "trip (2)" for "trip".

        Raises:
            ConfigError: None of this name is hidden.
        """
        with self._transaction() as db:
            sql = "SELECT id FROM sessions WHERE name = ? AND hidden IS NOT NULL ORDER BY hidden DESC, id DESC"
            row = db.execute(sql, (name,)).fetchone()
            if row is None:
                raise ConfigError(f"no hidden session {name!r}")
            free, number = name, 1
            while self._info(db, free) is not None:
                number += 1
                free = f"{name} ({number})"
            db.execute("UPDATE sessions SET name = ?, hidden = NULL WHERE id = ?", (free, row[0]))
            return self._known(db, free)

    def hidden(self) -> list[SessionInfo]:
        """Return the hidden sessions, the last hidden first."""
        with self._reading() as db:
            rows = db.execute(f"{_INFO} WHERE hidden IS NOT NULL ORDER BY hidden DESC, id DESC").fetchall()
        return [session_of(row) for row in rows]

    def purge(self, name: str | None = None) -> int:
        """Erase hidden sessions for good: all of them, or those of one name; return how many messages went."""
        with self._transaction() as db:
            where, values = ("", ()) if name is None else (" AND name = ?", (name,))
            db.execute(f"DELETE FROM sessions WHERE hidden IS NOT NULL{where}", values)
            gone = sweep(db)
        with self._reading() as db:
            scrub(db)
        return len(gone)

    def remove(self, name: str) -> int:
        """Erase a session, and the messages no other session has, for good; return how many messages went.

        Raises:
            ConfigError: There is none of this name.
        """
        with self._transaction() as db:
            self._known(db, name)
            db.execute("DELETE FROM sessions WHERE name = ? AND hidden IS NULL", (name,))
            gone = sweep(db)
        with self._reading() as db:
            scrub(db)
        return len(gone)

    def forget(self, name: str) -> Erased:
        """Erase a session as `remove` does, and look for what is left of it in every byte of the file and its log.

        Raises:
            ConfigError: There is none of this name.
        """
        erasure = Erasure()
        with self._transaction() as db:
            self._known(db, name)
            erasure.session(db, name, self.heads(name))
        with self._reading() as db:
            scrub(db)
            return erasure.report(db, self.path)

    def heads(self, name: str) -> list[int]:
        """Return the ends of all branches a session is or was on."""
        sql = (
            "SELECT head FROM sessions WHERE name = ?1 AND hidden IS NULL UNION SELECT m.head FROM moves m "
            "JOIN sessions s ON s.id = m.session WHERE s.name = ?1 AND s.hidden IS NULL"
        )
        with self._reading() as db:
            rows = db.execute(sql, (name,)).fetchall()
        return [row[0] for row in rows if row[0] is not None]

    # --- messages --------------------------------------------------------------------------------------

    def branch(self, head: int | None) -> list[Message]:
        """Return the messages from the first to ``head``."""
        if head is None:
            return []
        with self._reading() as db:
            # A parent is always older than its children, so that numbers are in order.
            where = "WHERE id IN (SELECT id FROM line) ORDER BY id"
            rows = db.execute(f"{LINE} SELECT {MESSAGE_COLUMNS} FROM messages {where}", (head,)).fetchall()
        return [message_of(row) for row in rows]

    def add(self, name: str, messages: Sequence[Message], parent: int | None, date: str | None = None) -> int | None:
        """Add messages one after another below ``parent``, move the session there, and return the new head.

        Numbers and parents of the messages given are ignored. ``date`` becomes the session's if it has none.
        """
        with self._transaction() as db:
            head = parent
            for message in messages:
                cursor = db.execute(
                    "INSERT INTO messages (parent, role, content, meta, created, token_ids, text_kept, text_rest, "
                    "ids_kept, ids_rest, tokenizer) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
                        message.tokenizer,
                    ),
                )
                head = cursor.lastrowid
            known = self._known(db, name)
            self._move(db, known, head, known.system, known.date or date)
        return head

    def move(self, name: str, head: int | None) -> None:
        """Make a message the last one of a session's current branch."""
        with self._transaction() as db:
            known = self._known(db, name)
            self._move(db, known, head, known.system, known.date)

    def set_beginning(self, name: str, *, system: str | None, date: str | None) -> None:
        """Change what a conversation begins with; `undo` brings it back."""
        with self._transaction() as db:
            known = self._known(db, name)
            self._move(db, known, known.head, system, date)

    @staticmethod
    def _move(
        db: sqlite3.Connection, known: SessionInfo, head: int | None, system: str | None, date: str | None
    ) -> None:
        db.execute(
            "INSERT INTO moves (session, head, system, date) SELECT id, head, system, date FROM sessions "
            "WHERE name = ? AND hidden IS NULL",
            (known.name,),
        )
        db.execute(
            "UPDATE sessions SET head = ?, system = ?, date = ?, updated = ? WHERE name = ? AND hidden IS NULL",
            (head, system, date, time.time(), known.name),
        )

    def undo(self, name: str) -> bool:
        """Take the last move of a session back; False when there is none left."""
        with self._transaction() as db:
            sql = (
                "SELECT m.id, s.id, m.head, m.system, m.date FROM moves m JOIN sessions s ON s.id = m.session "
                "WHERE s.name = ? AND s.hidden IS NULL ORDER BY m.id DESC LIMIT 1"
            )
            row = db.execute(sql, (name,)).fetchone()
            if row is None:
                return False
            sql = "UPDATE sessions SET head = ?, system = ?, date = ?, updated = ? WHERE id = ?"
            db.execute(sql, (*row[2:], time.time(), row[1]))
            db.execute("DELETE FROM moves WHERE id = ?", (row[0],))
            return True


def _check_name(name: str) -> None:
    if not name.strip():
        raise ConfigError("a session needs a name")


def _json(values: dict[str, Any]) -> str:
    try:
        return json.dumps(values)
    except TypeError as error:
        raise ConfigError(f"settings are numbers, words and lists of them: {error}") from None
