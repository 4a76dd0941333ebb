"""Looking for what is left of erased blocks: keys, token ids and KV, in every file of a store's folder."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvembed._blockfile import open_block
from kvembed._errors import BlockFormatError
from kvembed._files import is_temp_name, open_regular, shown
from kvembed._keys import PROBE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvembed._block import BlockInfo
    from kvembed._codec import Codec
    from kvembed._keys import TokenIds

__all__ = ["database_bytes", "Found", "Needles", "scan_folder"]

_WORD = 8
_IDS = 32
_KV_BYTES = 64
_YOUNG_S = 60.0  # an unfinished file may be one that another process is writing
_PART = 8 << 20
_OVERLAP = 256  # more than the longest string that is looked for


@dataclass(frozen=True)
class Found:
    """Result of a scan.

    Args:
        scanned: Files looked into.
        traces: One line for each file that holds something of an erased block.
        elsewhere: Block files of other blocks with the same tokens.
    """

    scanned: int
    traces: tuple[str, ...]
    elsewhere: int


class Needles:
    """What to look for: byte strings of at least 8 bytes, found by one word of each."""

    def __init__(self) -> None:
        self._strings: dict[bytes, str] = {}
        self._keys: set[str] = set()
        self._ids: list[TokenIds] = []
        self._index: tuple[np.ndarray, dict[int, list[tuple[int, bytes]]]] | None = None

    def add_keys(self, keys: set[bytes]) -> None:
        """Look for keys: as bytes, as hexadecimal text, and in names of files."""
        self._index = None
        for key in keys:
            self._keys.add(key.hex())
            # By its words: what moving a row leaves behind may be a part of it.
            for at in range(0, len(key), _WORD):
                self._strings[key[at : at + _WORD]] = "key"
                self._strings[key[at : at + _WORD].hex().encode()] = "key"

    def add_block(self, info: BlockInfo, ids: TokenIds | None, kv: bytes) -> None:
        """Look for a block's key, token ids and KV.

        Args:
            info: The block.
            ids: Its token ids, if they are known.
            kv: The beginning of its KV as the file holds it, if there is one.
        """
        self.add_keys({info.key})
        if ids is not None and len(ids) >= PROBE_TOKENS:
            self._ids.append(ids)
            self._strings[ids[:_IDS].tobytes()] = "token ids"
            self._strings[ids[-_IDS:].tobytes()] = "token ids"
        for at in range(0, min(info.nbytes, len(kv)) - _KV_BYTES, _KV_BYTES):
            part = kv[at : at + _KV_BYTES]
            if len(set(part)) > _KV_BYTES // 4:  # not zeros: those are everywhere
                self._strings[part] = "KV"
                break

    def _indexed(self) -> tuple[np.ndarray, dict[int, list[tuple[int, bytes]]]]:
        """Return the sorted words to look for, and for each where in which string it is."""
        if self._index is None:
            words: dict[int, list[tuple[int, bytes]]] = {}
            for string in self._strings:
                # The word with the most different bytes: a word of zeros would be found everywhere.
                at = max(range(len(string) - _WORD + 1), key=lambda i: len(set(string[i : i + _WORD])))
                words.setdefault(int.from_bytes(string[at : at + _WORD], "little"), []).append((at, string))
            self._index = np.sort(np.fromiter(words, dtype="<u8", count=len(words))), words
        return self._index

    def add_string(self, string: bytes, kind: str) -> None:
        """Look for a string of 8 to 256 bytes."""
        self._index = None
        self._strings[string] = kind

    def discard(self, strings: Iterable[bytes]) -> None:
        """Look for these no more."""
        self._index = None
        for string in strings:
            self._strings.pop(string, None)

    def kinds_in(self, data: bytes) -> set[str]:
        """Return which kinds of what is looked for are in ``data``."""
        return {self._strings[string] for string in self.strings_in(data)}

    def strings_in(self, data: bytes) -> set[bytes]:
        """Return which of the strings that are looked for are in ``data``."""
        wanted, words = self._indexed()
        found: set[bytes] = set()
        if not len(wanted):
            return found
        for shift in range(min(_WORD, max(0, len(data) - _WORD + 1))):
            here = np.frombuffer(data, "<u8", count=(len(data) - shift) // _WORD, offset=shift)
            place = np.minimum(np.searchsorted(wanted, here), len(wanted) - 1)
            for at in np.flatnonzero(wanted[place] == here):
                start = shift + int(at) * _WORD
                for offset, string in words[int(here[at])]:
                    if data[max(0, start - offset) : start - offset + len(string)] == string:
                        found.add(string)
        return found

    def named(self, name: str) -> bool:
        """True when a file's name contains an erased key."""
        return any(name[at : at + 64] in self._keys for at in range(len(name) - 63))

    def same_tokens(self, ids: TokenIds) -> bool:
        """True when a block holds all tokens of an erased block."""
        raw = ids.tobytes()
        return any(own.tobytes() in raw for own in self._ids)


def scan_folder(
    root: Path, needles: Needles, mend: Callable[[Path], object] | None = None, codec: Codec | None = None
) -> Found:
    """Look into every file below ``root``.

    Of sound block files the header and the token ids are read: what their KV is follows from these. Of all other
    files (catalog, log, quarantine, unfinished files) every byte is.

    Args:
        root: Folder of the store.
        needles: What to look for.
        mend: Called for each file with a trace that is neither a sound block nor part of the catalog; it is looked
            at again afterwards.
        codec: The store's.
    """
    scanned = elsewhere = 0
    traces: list[str] = []
    for folder, _, names in os.walk(root):
        for name in sorted(names):
            path = Path(folder) / name
            try:
                same, kinds = _look(path, needles, codec)
                if kinds and mend is not None and _is_left_over(path, kinds):
                    mend(path)
                    same, kinds = _look(path, needles, codec)
            except FileNotFoundError:
                continue
            except (OSError, BlockFormatError) as error:
                traces.append(f"{shown(name)}: cannot be read ({error})")
                continue
            scanned += 1
            elsewhere += same
            if kinds and not same:
                traces.append(f"{shown(name)}: {', '.join(sorted(kinds))}")
    return Found(scanned, tuple(traces), elsewhere)


def _is_left_over(path: Path, kinds: set[str]) -> bool:
    """True for a file that can go: an unfinished one, or one in quarantine."""
    if path.parent.name == "quarantine" or "name" in kinds:
        return True
    return is_temp_name(path.name) and abs(time.time() - path.lstat().st_mtime) > _YOUNG_S


def _look(path: Path, needles: Needles, codec: Codec | None) -> tuple[bool, set[str]]:
    """Return whether a file is another block with the same tokens, and what it holds of erased blocks."""
    kinds = {"name"} if needles.named(path.name) else set[str]()
    if path.name.endswith(".safetensors") and path.parent.parent.name == "blocks" and not kinds:
        try:
            source = open_block(path, codec)
        except BlockFormatError:
            pass
        else:
            source.close()
            return needles.same_tokens(source.token_ids), kinds
    if path.suffix == ".db" and stat.S_ISREG(path.lstat().st_mode):
        with contextlib.suppress(sqlite3.DatabaseError):  # not a database, whatever its name says
            data, whole = database_bytes(path)
            unused = set[str]() if whole else {"pages that are not in use any more"}
            return False, kinds | unused | needles.kinds_in(data)
    fd, _ = open_regular(path)
    with os.fdopen(fd, "rb", buffering=0) as file:
        tail = b""
        while part := file.read(_PART):
            kinds |= needles.kinds_in(tail + part)
            tail = part[-_OVERLAP:]
    return False, kinds


def database_bytes(path: Path) -> tuple[bytes, bool]:
    """Read a SQLite file past its log; it may be open.

    Through SQLite, which shares the descriptors of one file in a process: were it opened and closed beside SQLite,
    POSIX would drop the locks that all connections of this process have on it.

    Returns:
        Its bytes, and whether these are all: not while a shorter file waits in the log to take its place.

    Raises:
        sqlite3.DatabaseError: It is not a database.
    """
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)) as raw:
        data = raw.serialize()
    return data, len(data) == path.stat().st_size
