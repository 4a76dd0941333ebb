"""`DocumentDB`: which documents were prepared under a name, and the token ids that open them again.

The words are not here as words, but the ids are the words to whoever has the tokenizer. So the file lies in the user's
data folder with mode 0600, and an encrypted store's documents are encrypted in it too. Nothing here imports torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvembed._errors import ConfigError
from kvembed._paths import documents_file
from kvembed._residue import Needles
from kvembed._userfile import UserFile, kinds_in_file, parts_of, scrub

if TYPE_CHECKING:
    import os

__all__ = ["DocumentDB", "Row"]

_V1 = """
CREATE TABLE documents (
    id INTEGER PRIMARY KEY,
    scope TEXT NOT NULL,
    name TEXT NOT NULL,
    model TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,
    content TEXT NOT NULL,
    created REAL NOT NULL,
    used REAL NOT NULL,
    UNIQUE (scope, name)
);
"""
_COLUMNS = "name, model, fingerprint, tokens, nbytes, content, created, used"
_SHORTEST = 8


@dataclass(frozen=True)
class Row:
    """One document, as it is written: name and content may be encrypted.

    Args:
        name: What it is called.
        model: The model's name.
        fingerprint: Hex digest of the model that computed it.
        tokens: Its length.
        nbytes: Bytes its KV takes.
        content: Ids and where they came from.
        created: When it was prepared.
        used: When it was prepared or opened last.
    """

    name: str | bytes
    model: str
    fingerprint: str
    tokens: int
    nbytes: int
    content: str | bytes
    created: float = 0.0
    used: float = 0.0


class DocumentDB(UserFile):
    """The file of all named documents; any number of threads and processes may have it open.

    Args:
        path: The file; by default ``documents.db`` in the user's data folder.

    Raises:
        StoreError: It is not a file of documents, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(documents_file() if path is None else path, (_V1,), "documents")

    def put(self, scope: str, row: Row) -> bool:
        """Write a document down, in the place of one of the same name; False when it stood there already."""
        now = time.time()
        with self._transaction() as db:
            where = "WHERE scope = ? AND name = ?"
            known = db.execute(f"SELECT content FROM documents {where}", (scope, row.name)).fetchone()
            if known is not None and known[0] == row.content:
                db.execute(f"UPDATE documents SET used = ? {where}", (now, scope, row.name))
                return False
            db.execute(f"DELETE FROM documents {where}", (scope, row.name))
            values = (scope, row.name, row.model, row.fingerprint, row.tokens, row.nbytes, row.content, now, now)
            db.execute(f"INSERT INTO documents (scope, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        return True

    def rows(self, scope: str) -> list[Row]:
        """Return all documents of a scope, the one used last first."""
        sql = f"SELECT {_COLUMNS} FROM documents WHERE scope = ? ORDER BY used DESC, id DESC"
        with self._reading() as db:
            return [Row(*row) for row in db.execute(sql, (scope,)).fetchall()]

    def row(self, scope: str, name: str | bytes) -> Row | None:
        """Return one document, or None."""
        with self._reading() as db:
            sql = f"SELECT {_COLUMNS} FROM documents WHERE scope = ? AND name = ?"
            row = db.execute(sql, (scope, name)).fetchone()
        return None if row is None else Row(*row)

    def rename(self, scope: str, name: str | bytes, new: str | bytes) -> bool:
        """Call a document something else; False when the new name is taken."""
        with self._transaction() as db:
            sql = "SELECT 1 FROM documents WHERE scope = ? AND name = ?"
            if db.execute(sql, (scope, new)).fetchone() is not None:
                return False
            db.execute("UPDATE documents SET name = ? WHERE scope = ? AND name = ?", (new, scope, name))
        return True

    def remove(self, scope: str, name: str | bytes) -> tuple[int, tuple[str, ...]]:
        """Erase a document, and look for what is left of it in every byte of the file and its log.

        Returns:
            How many files were looked into, and one line for each in which something was found.

        Raises:
            ConfigError: There is none of this name.
        """
        needles = Needles()
        with self._transaction() as db:
            sql = "SELECT name, content FROM documents WHERE scope = ? AND name = ?"
            found = db.execute(sql, (scope, name)).fetchone()
            if found is None:
                raise ConfigError("no such document in the library")
            db.execute("DELETE FROM documents WHERE scope = ? AND name = ?", (scope, name))
        for part in parts_of(_bytes(found[1])):
            if len(part) >= _SHORTEST and len(set(part)) > 3:
                needles.add_string(part, "token ids")
        if len(_bytes(found[0])) >= _SHORTEST:
            needles.add_string(_bytes(found[0])[:256], "name")
        with self._reading() as db:
            scrub(db)
            # What other documents have too is no trace.
            for values in db.execute(f"SELECT scope, {_COLUMNS} FROM documents"):
                needles.discard(needles.strings_in(b"\0".join(_bytes(value) for value in values)))
            for (value,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"):
                needles.discard(needles.strings_in(value.encode()))
            scanned, traces = 0, list[str]()
            for file, kinds in kinds_in_file(self.path, needles):
                scanned += 1
                if kinds:
                    traces.append(f"{file.name}: {', '.join(sorted(kinds))}")
        return scanned, tuple(traces)


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
