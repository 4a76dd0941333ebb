"""Erasing words from the file of sessions: what no session has any more, and the proof that none of it is left.

The proof reads the bytes of the file and of its log, and looks for parts of every text that was removed. A part that
a session which stays has too is no trace.
"""

from __future__ import annotations

import re
import struct
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvembed._residue import Needles
from kvembed._sessions.messages import line_of
from kvembed._userfile import kinds_in_file, parts_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Erased", "Erasure", "sweep"]

_SHORTEST = 8
_ROW = 192
_WORDS = re.compile(rf"\w{{{_SHORTEST},60}}")


@dataclass(frozen=True)
class Erased:
    """What was erased from the file of sessions, and what a scan of its bytes found afterwards.

    Args:
        messages: Messages and documents erased.
        kept: Those of the session that stay, because other sessions have them too.
        sharers: The sessions that have them, hidden ones too.
        scanned: Files that were scanned.
        traces: What was found, one line for each file.
    """

    messages: int
    kept: int
    sharers: tuple[str, ...]
    scanned: int
    traces: tuple[str, ...]


def sweep(db: sqlite3.Connection) -> list[int]:
    """Delete the messages that no session has any more; return their numbers."""
    gone = _unheld(db)
    # Children have higher numbers than their parents, and go first.
    db.executemany("DELETE FROM messages WHERE id = ?", [(number,) for number in gone])
    db.execute("INSERT INTO found(found) VALUES ('rebuild')")  # an index keeps words it was told to delete
    return gone


def _unheld(db: sqlite3.Connection) -> list[int]:
    """Return the numbers of the messages that no branch of any session has, the last first."""
    heads = [row[0] for row in db.execute("SELECT head FROM sessions UNION SELECT head FROM moves")]
    held = {number for head in heads for number in line_of(db, head)}
    return [row[0] for row in db.execute("SELECT id FROM messages ORDER BY id DESC") if row[0] not in held]


class Erasure:
    """Erases one session, and remembers its words until `report` has looked for them."""

    def __init__(self) -> None:
        self._needles = Needles()
        self._messages = 0
        self._kept = 0
        self._sharers: tuple[str, ...] = ()

    def session(self, db: sqlite3.Connection, name: str, heads: list[int]) -> None:
        """Delete a session that is listed, in a transaction.

        Args:
            db: The file.
            name: What it is called.
            heads: The ends of its branches.
        """
        sql = "SELECT id, name, system FROM sessions WHERE name = ? AND hidden IS NULL"
        number, *texts = db.execute(sql, (name,)).fetchone()
        texts += [row[0] for row in db.execute("SELECT system FROM moves WHERE session = ?", (number,))]
        for text in texts:
            self._add_text(text or "")
        mine = {message for head in heads for message in line_of(db, head)}
        db.execute("DELETE FROM sessions WHERE id = ?", (number,))
        for message in _unheld(db):
            self._add_row(db.execute(f"SELECT {_COLUMNS} FROM messages WHERE id = ?", (message,)).fetchone())
        kept = mine - set(gone := sweep(db))
        self._messages, self._kept = len(gone), len(kept)
        if kept:
            sql = (
                "SELECT name, head FROM sessions UNION SELECT s.name, m.head FROM moves m "
                "JOIN sessions s ON s.id = m.session"
            )
            rows = db.execute(sql).fetchall()
            self._sharers = tuple(sorted({who for who, head in rows if not kept.isdisjoint(line_of(db, head))}))

    def _add_row(self, row: tuple[str, str, str, float, bytes | None, str, bytes | None]) -> None:
        role, content, meta, created, token_ids, text_rest, ids_rest = row
        # In a row these lie side by side, so that also a text too short to be looked for by itself is found.
        start = (role + content + meta).encode()
        self._add((start + struct.pack(">d", created))[:_ROW])
        for text in (content, meta, text_rest):
            self._add_text(text)
        for ids in (token_ids, ids_rest):
            for part in parts_of(ids or b""):
                self._add(part, "token ids")
        for word in _words(content):  # as the index has them
            self._add(word.encode())

    def _add_text(self, text: str) -> None:
        for part in parts_of(text.encode()):
            self._add(part)

    def _add(self, part: bytes, kind: str = "words") -> None:
        # A few different bytes: what was wiped is zeros, and so is much else.
        if len(part) >= _SHORTEST and len(set(part)) > 3:
            self._needles.add_string(part, kind)

    def report(self, db: sqlite3.Connection, path: Path) -> Erased:
        """Look for what was erased in every byte of the file and of its log."""
        for data in _stored(db):
            self._needles.discard(self._needles.strings_in(data))
        scanned, traces = 0, list[str]()
        for file, kinds in kinds_in_file(path, self._needles):
            scanned += 1
            if kinds:
                traces.append(f"{file.name}: {', '.join(sorted(kinds))}")
        return Erased(self._messages, self._kept, self._sharers, scanned, tuple(traces))


_COLUMNS = "role, content, meta, created, token_ids, text_rest, ids_rest"


def _words(text: str) -> set[str]:
    """Return long words of a text as the full-text index spells them: lower case, without accents."""
    plain = "".join(char for char in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(char))
    return set(_WORDS.findall(plain))


def _stored(db: sqlite3.Connection) -> Iterator[bytes]:
    """Yield everything that is in the tables, and that the bytes of the file may hold therefore."""
    queries = (
        f"SELECT {_COLUMNS} FROM messages",
        "SELECT name, system, settings, template, date FROM sessions",
        "SELECT system, date FROM moves",
        "SELECT type, name, tbl_name, sql FROM sqlite_master",
    )
    for query in queries:
        for row in db.execute(query):
            text = "".join(value for value in row if isinstance(value, str))
            # Every value ends before the next begins, or a string could be found across two of them.
            blobs = [value for value in row if isinstance(value, bytes)]
            yield b"\0".join([text.encode(), " ".join(_words(text)).encode(), *blobs])
