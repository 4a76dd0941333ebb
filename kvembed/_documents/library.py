"""`Library`: the documents that were prepared under a name, to be opened in another process without their files."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from kvembed._documents.db import DocumentDB, Row
from kvembed._errors import BlockFormatError, ConfigError
from kvembed._html import mimebundle, panel, table_html
from kvembed._keys import as_token_ids
from kvembed._paths import is_disabled
from kvembed._sessions.marks import marks_of
from kvembed._units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from kvembed._documents.document import Document
    from kvembed._forget import ForgetReport
    from kvembed._keys import TokenIds
    from kvembed._model import CachedModel
    from kvembed._progress import Progress

__all__ = ["Library", "LibraryEntry"]


@dataclass(frozen=True)
class LibraryEntry:
    """One document of a library.

    Args:
        name: What it is called.
        source: The file it was read from, or empty.
        tokens: Its length.
        nbytes: Bytes its KV takes.
        cached_tokens_by_tier: How much of it this model would not have to compute now, and where that is.
        model: Name of the model it was prepared with.
        same_model: Whether that is this very model: otherwise it is computed anew when it is asked.
        created: When it was prepared, in seconds since 1970.
        used: When it was prepared or opened last.
    """

    name: str
    source: str
    tokens: int
    nbytes: int
    cached_tokens_by_tier: Mapping[str, int]
    model: str
    same_model: bool
    created: float
    used: float

    @property
    def cached_tokens(self) -> int:
        """Tokens that need not be computed."""
        return sum(self.cached_tokens_by_tier.values())

    def __str__(self) -> str:
        """Return one line."""
        tiers = " · ".join(f"{tier} {format_count(n)}" for tier, n in self.cached_tokens_by_tier.items())
        parts = [
            f"{format_count(self.tokens)} tokens",
            format_bytes(self.nbytes),
            tiers or "nothing cached",
            _day(self.used),
        ]
        return f"{self.name}: {' · '.join(parts)}"


@dataclass(frozen=True)
class _Known:
    """A row as this model reads it."""

    row: Row
    name: str
    ids: TokenIds
    around: tuple[str, str]
    source: str


class Library:
    """The named documents of one model: those with its tokenizer, under its ``cache_salt``.

    ``model.library`` is one. Documents get into it by ``model.document(..., name=...)``. What is kept is their names,
    where they came from and their token ids, in ``documents.db`` in the user's data folder (mode 0600; encrypted where
    the store is). Their KV is in the store, as long as that has room.

    Args:
        model: Whose documents.
        db: Where they are kept; by default one file in the user's data folder.
    """

    def __init__(self, model: CachedModel, db: DocumentDB | None = None) -> None:
        self._model = model
        self._given = db
        self._db: DocumentDB | None = db
        self._lock = threading.Lock()

    # --- what is there -----------------------------------------------------------------------------------

    def entries(self) -> list[LibraryEntry]:
        """Return all documents, the one used last first."""
        model = self._model
        digest = self._fingerprint
        found: list[LibraryEntry] = []
        for known in self._all():
            row = known.row
            tiers: Mapping[str, int] = {}
            if model.support is None and not model.store.closed:
                tiers = model.lookup(as_token_ids(np.append(known.ids, 0))).tokens_by_tier
            found.append(
                LibraryEntry(
                    known.name,
                    known.source,
                    row.tokens,
                    row.tokens * model.kv_bytes_per_token or row.nbytes,
                    tiers,
                    row.model,
                    row.fingerprint == digest,
                    row.created,
                    row.used,
                )
            )
        return found

    def names(self) -> list[str]:
        """Return the names, the one used last first."""
        return [known.name for known in self._all()]

    def __iter__(self) -> Iterator[LibraryEntry]:
        return iter(self.entries())

    def __len__(self) -> int:
        return len(self._all())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._found(name) is not None

    # --- verbs -------------------------------------------------------------------------------------------

    def open(self, name: str, *, prefill: bool = True, progress: Progress | None = None) -> Document:
        """Return a document by its name, without its file; what the store has lost of it is computed again.

        Args:
            name: What it is called.
            prefill: Compute what is missing now; False leaves that to the first question.
            progress: See `CachedModel`.

        Raises:
            ConfigError: There is none of this name.
        """
        from kvembed._documents.document import Document

        known = self._known(name)
        return Document.restored(
            self._model, name, known.ids, known.around, known.source, prefill=prefill, progress=progress
        )

    __getitem__ = open

    def rename(self, name: str, new: str) -> None:
        """Call a document something else.

        Raises:
            ConfigError: There is none of this name, or one of the new name.
        """
        if not new.strip():
            raise ConfigError("a document needs a name")
        self._known(name)
        if not self._file().rename(self._scope, self._written(name), self._written(new)):
            raise ConfigError(f"there is a document {new!r} already")
        pins = self._model.store.pins()
        if name in pins:
            self._model.store.unpin(name)
            self._model.store.pin(pins[name], new)

    def remove(self, name: str) -> None:
        """Take a document out of the library. Its KV stays in the store like any other; `forget` erases that too.

        Raises:
            ConfigError: There is none of this name.
        """
        self._known(name)
        self._file().remove(self._scope, self._written(name))

    def forget(self, name: str) -> ForgetReport:
        """Erase a document: its KV, what was asked about it, and its entry; see `CachedModel.forget`.

        Raises:
            ConfigError: There is none of this name.
        """
        return self.open(name, prefill=False).forget()

    # --- for documents -----------------------------------------------------------------------------------

    @property
    def keeps(self) -> bool:
        """Whether documents are written down: not where nothing is written to disk."""
        return self._model.store.path is not None and not is_disabled()

    def record(self, document: Document) -> None:
        """Write a document down under its name."""
        if not self.keeps:
            return
        model = self._model
        content = {
            "ids": base64.b64encode(document.prefix_ids.astype("<i4").tobytes()).decode(),
            "around": document.around,
            "source": document.source,
        }
        row = Row(
            self._written(document.name),
            str(model.fingerprint.get("name", "")) or type(model.hf_model).__name__,
            self._fingerprint,
            document.tokens,
            document.tokens * model.kv_bytes_per_token,
            self._written(json.dumps(content)),
        )
        self._file().put(self._scope, row)

    def forget_text(self, ids: TokenIds, name: str | None, report: ForgetReport) -> ForgetReport:
        """Erase the entries of a text, after its KV; those that go on from it stay, and are named in the report.

        Args:
            ids: The text.
            name: Erase only this one of those of exactly this text; None for all.
            report: On the KV.
        """
        if not self._exists():
            return report
        scanned, traces, sharers = report.scanned, report.traces, list(report.sharers)
        for known in self._all():
            if not np.array_equal(known.ids[: len(ids)], ids):
                continue
            if len(known.ids) == len(ids) and name in (None, known.name):
                files, found = self._file().remove(self._scope, known.row.name)
                scanned, traces = scanned + files, (*traces, *found)
            else:
                sharers.append(known.name)
        return replace(report, scanned=scanned, traces=traces, sharers=tuple(sharers))

    # --- reading the file ----------------------------------------------------------------------------------

    def _exists(self) -> bool:
        from kvembed._paths import documents_file

        return self._db is not None or (self.keeps and documents_file().exists())

    def _file(self) -> DocumentDB:
        if not self.keeps and self._given is None:
            raise ConfigError("a store in memory keeps no library: give KVStore a folder")
        with self._lock:
            if self._db is None:
                self._db = DocumentDB()
            return self._db

    @property
    def _scope(self) -> str:
        tokenizer = marks_of(self._model).digest
        return blake3(f"{tokenizer}/{self._model._engine.salt}".encode("utf-8", "surrogatepass")).hexdigest(16)

    @property
    def _fingerprint(self) -> str:
        found = self._model._engine.wrapped.fingerprint
        return found.digest.hex() if found is not None else ""

    def _written(self, text: str) -> str | bytes:
        disk = self._model.store._disk
        return text if disk is None else disk.codec.text(text, b"library")

    def _read(self, written: str | bytes) -> str:
        disk = self._model.store._disk
        if disk is None:
            raise BlockFormatError("no store on disk")
        return disk.codec.original_text(written, b"library")

    def _decoded(self, row: Row) -> _Known | None:
        try:
            name, content = self._read(row.name), json.loads(self._read(row.content))
            ids = as_token_ids(np.frombuffer(base64.b64decode(content["ids"]), dtype="<i4"))
            before, after = content["around"]
            return _Known(row, name, ids, (before, after), content["source"])
        except (BlockFormatError, ValueError, KeyError, TypeError):
            return None  # of a store with another key

    def _all(self) -> list[_Known]:
        if not self._exists():
            return []
        decoded = (self._decoded(row) for row in self._file().rows(self._scope))
        return [known for known in decoded if known is not None]

    def _found(self, name: str) -> _Known | None:
        row = self._file().row(self._scope, self._written(name)) if self._exists() else None
        return self._decoded(row) if row is not None else None

    def _known(self, name: str) -> _Known:
        known = self._found(name)
        if known is None:
            others = ", ".join(map(repr, self.names()[:8]))
            there = f"it has {others}" if others else "it is empty: model.document(..., name=...) adds to it"
            raise ConfigError(f"no document {name!r} in the library; {there}")
        return known

    def close(self) -> None:
        """Close the file, if this library opened it."""
        with self._lock:
            if self._db is not None and self._given is None:
                self._db.close()
                self._db = None

    def __repr__(self) -> str:
        entries = self.entries()
        total = format_bytes(sum(entry.nbytes for entry in entries))
        head = f"<{_title(entries)}, {total} of KV>"
        return "\n".join([head, *(f"  {entry}" for entry in entries)])

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        entries = self.entries()
        table: list[list[Any]] = []
        for entry in entries:
            tiers = ", ".join(f"{tier} {format_count(n)}" for tier, n in entry.cached_tokens_by_tier.items())
            source = entry.source.rpartition("/")[2]
            size = format_bytes(entry.nbytes)
            table.append([entry.name, entry.tokens, size, tiers or "nothing", _day(entry.used), source])
        markup = table_html(table, header=("name", "tokens", "KV", "cached", "used", "from"))
        return mimebundle(repr(self), panel(_title(entries), markup), include, exclude)


def _title(entries: list[LibraryEntry]) -> str:
    return f"Library: {format_count(len(entries))} document{'' if len(entries) == 1 else 's'}"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
