"""Forgetting: a text is erased from every tier, from the catalog and from what lies around it, and looked for after.

What goes: the blocks of the text itself, end first, up to the first that something else needs; every block that goes
on from its end; states; unfinished and quarantined files; and what catalog and log still say of all these, down to
SQLite's free pages and write-ahead log. Then the folder is scanned for what was erased: that is the proof.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed._files import unlink_quietly
from kvembed._keys import PROBE_TOKENS, SNAPSHOT_IDS, block_key, chain_keys, common_prefix, probe_of, snapshot_key
from kvembed._residue import Needles, scan_folder
from kvembed._units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kvembed._block import BlockInfo
    from kvembed._keys import TokenIds
    from kvembed._store_admin import StoreAdmin

__all__ = ["Eraser", "ForgetReport"]


@dataclass(frozen=True)
class ForgetReport:
    """What was erased, and what a scan of the folder found of it afterwards.

    Args:
        blocks: Blocks erased, from all tiers.
        nbytes: Bytes of their KV.
        kept: Blocks of the text that stay, because other texts begin with them or a name pins them.
        scanned: Files that were scanned.
        traces: What the scan found of the erased blocks, one line each; empty when nothing is left.
        elsewhere: Files of other blocks with the same tokens: of another model, another salt, or as the middle of
            another text. They were left alone.
        messages: Messages and documents of a session erased.
        messages_kept: Those of the session that stay, because other sessions have them too.
        sharers: Names of these other sessions, or of other documents with the same words.
    """

    blocks: int = 0
    nbytes: int = 0
    kept: int = 0
    scanned: int = 0
    traces: tuple[str, ...] = ()
    elsewhere: int = 0
    messages: int = 0
    messages_kept: int = 0
    sharers: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when nothing of what was erased was found again."""
        return not self.traces

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        names = ("blocks", "nbytes", "kept", "scanned", "elsewhere", "messages", "messages_kept", "ok")
        lists = {"traces": list(self.traces), "sharers": list(self.sharers)}
        return {**{name: getattr(self, name) for name in names}, **lists}

    def __str__(self) -> str:
        """Return a summary and the traces."""
        parts = [f"erased {format_count(self.blocks)} blocks, {format_bytes(self.nbytes)}"]
        if self.kept:
            parts.append(f"{format_count(self.kept)} kept for others")
        if self.elsewhere:
            parts.append(f"{format_count(self.elsewhere)} files elsewhere hold the same tokens")
        if self.messages:
            parts.append(f"{format_count(self.messages)} messages erased")
        if self.messages_kept:
            have = "has" if len(self.sharers) == 1 else "have"
            kept = f"{format_count(self.messages_kept)} messages kept"
            parts.append(f"{kept}, which {', '.join(self.sharers)} {have} too")
        elif self.sharers:
            parts.append(f"{', '.join(self.sharers)} {'has' if len(self.sharers) == 1 else 'have'} its words too")
        found = "nothing of it is left" if self.ok else f"{len(self.traces)} traces are left"
        parts.append(f"{format_count(self.scanned)} files scanned: {found}")
        return "\n".join(["; ".join(parts), *self.traces])


class Eraser:
    """Erases blocks of one store, and remembers what they were until `report` has looked for them.

    Args:
        store: The store, ready for a change.
    """

    def __init__(self, store: StoreAdmin) -> None:
        self._store = store
        self._names: set[bytes] = set()
        self._needles = Needles()
        self.blocks = 0
        self.nbytes = 0
        self.kept = 0

    # -- what to erase -----------------------------------------------------------------------------

    def text(self, root: bytes, ids: TokenIds, size: int) -> None:
        """Erase every stored sequence that begins with ``ids``, and the blocks of ``ids`` that nothing else needs.

        Args:
            root: Root of the key chain: which model, which salt.
            ids: The text's token ids, at least one.
            size: Tokens of a full block.
        """
        keys = chain_keys(root, ids, size)
        parents = [root, *keys]
        rest = ids[len(keys) * size :]
        for info in self._children(parents[-1]):
            own = SNAPSHOT_IDS if info.key == snapshot_key(parents[-1]) else self._ids(info.key)
            if own is not None and np.array_equal(own[: len(rest)], rest):
                self.subtree(info.key)
        for level in range(len(keys), -1, -1):
            part = np.ascontiguousarray(ids[level * size : (level + 1) * size])
            if level < len(keys) and self._needed(keys[level]):
                self.kept += level + 1
                return
            self._level(parents[level], part)

    def _level(self, parent: bytes, part: TokenIds) -> None:
        """Erase the children of ``parent`` that hold a beginning of ``part``, or all of it, and their states."""
        names = [block_key(parent, part[:n]) for n in range(1, len(part) + 1)]
        states = [snapshot_key(name) for name in names]
        stored = self._held([*names, *states])
        self._names.update(names, states)
        if not stored:
            return
        others = [info.key for info in self._children(parent) if info.key not in stored and info.n_tokens > 1]
        shared = max((self._shared(key, part) for key in others), default=0)
        for n in range(len(part), 0, -1):
            name, state = names[n - 1], states[n - 1]
            if name not in stored and state not in stored:
                continue
            # The beginning of another text is that text's too.
            if (n <= shared and n < len(part)) or self._needed(name):
                self.kept += (name in stored) + (state in stored)
                continue
            self.erase([state, name])

    def chain(self, keys: list[bytes]) -> None:
        """Erase a chain, given root side first, from its end to the first block that something else needs."""
        self._names.update(keys)
        for at in range(len(keys) - 1, -1, -1):
            if not self._held([keys[at]]):
                continue
            if self._needed(keys[at]):
                self.kept += len(self._held(keys[: at + 1]))
                return
            self.erase([snapshot_key(keys[at]), keys[at]])

    def sequence(self, keys: list[bytes]) -> None:
        """Erase a text by its keys, root side first, with what goes on from its end."""
        # A block that goes on after the same beginning holds the text too: a question about a document
        # is stored together with the end of the document, and so is what came after it.
        for sibling in self._same_start(keys[-1]):
            self.subtree(sibling)
        for key in keys:
            if not self._held([key]):
                for child in self._children(key):
                    self.subtree(child.key)
        self.chain(keys)

    def subtree(self, key: bytes) -> None:
        """Erase a block and everything after it, but for what is pinned and what leads there."""
        order = [key]
        for parent in order:
            order.extend(info.key for info in self._children(parent))
        for each in reversed(order):
            if self._held([each]) and not self._pinned(each) and not self._children(each):
                self.erase([each])

    def erase(self, keys: Iterable[bytes]) -> None:
        """Erase blocks, whatever needs them."""
        keys = list(keys)
        for info in self._held(keys).values():
            self.nbytes += info.nbytes
            self._needles.add_block(info, self._store._token_ids(info.key), self._sample(info))
        self._names.update(keys)
        self.blocks += self._store._erase(keys)

    # -- what is there -----------------------------------------------------------------------------

    def _held(self, keys: list[bytes]) -> dict[bytes, BlockInfo]:
        catalog = self._store._catalog
        found = dict(catalog.get(keys)) if catalog is not None else {}
        for tier in self._store._memory:
            found |= {info.key: info for info in tier.contains(keys) if info is not None}
        return found

    def _children(self, parent: bytes) -> list[BlockInfo]:
        catalog = self._store._catalog
        found: dict[bytes, BlockInfo] = {}
        if catalog is not None:
            found = {info.key: info for info in catalog.children(parent, limit=-1)}
        for tier in self._store._memory:
            found |= {info.key: info for info in tier.children(parent)}
        return list(found.values())

    def _ids(self, key: bytes) -> TokenIds | None:
        return self._store._token_ids(key)

    def _shared(self, key: bytes, ids: TokenIds) -> int:
        """Return how many leading tokens a block shares with ``ids``; none when it is gone."""
        own = self._ids(key)
        return 0 if own is None else common_prefix(own, ids)

    def _pinned(self, key: bytes) -> bool:
        row = self._store._catalog.row(key) if self._store._catalog is not None else None
        return bool(row is not None and row.pins) or any(key in keys for keys in self._store._memory_pins.values())

    def _needed(self, key: bytes) -> bool:
        state = snapshot_key(key)
        return self._pinned(key) or any(info.key != state or self._pinned(state) for info in self._children(key))

    def _same_start(self, key: bytes) -> list[bytes]:
        info, ids = self._held([key]).get(key), self._ids(key)
        if info is None or ids is None or len(ids) < PROBE_TOKENS:
            return [key]
        catalog = self._store._catalog
        probe = probe_of(info.parent, ids)
        found = {tail.key for tier in self._store._memory for tail in tier.tails(info.parent, probe)}
        if catalog is not None:
            found |= {tail.key for tail in catalog.tails(info.parent, probe, limit=-1)}
        return [other for other in found if self._shared(other, ids) == len(ids)]

    def _sample(self, info: BlockInfo) -> bytes:
        """Return some bytes of a block's KV on disk, to look for them afterwards."""
        disk = self._store._disk
        if disk is None:
            return b""
        source = None
        with contextlib.suppress(OSError):
            path = disk.path(info.key)
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    source = file.read(1 << 16)
        if source is None or len(source) < 8:
            return b""
        # Encrypted KV is other bytes in every file: what is looked for then is a copy of this one.
        start = 64 if disk.codec.encrypted else 8 + int.from_bytes(source[:8], "little")
        return source[start:]

    # -- afterwards --------------------------------------------------------------------------------

    def report(self) -> ForgetReport:
        """Clear away what is left besides blocks, scan the folder, and say what was found."""
        store = self._store
        with store._lock:
            for key in self._names:
                store._ids.pop(key, None)
        disk, catalog = store._disk, store._catalog
        if disk is None or catalog is None or not self._names:
            return ForgetReport(self.blocks, self.nbytes, self.kept)
        left = set(catalog.get(list(self._names)))
        gone = self._names - left
        self._needles.add_keys({*gone, *disk.codec.keys(gone)})
        self._forget_in_catalog(gone)
        disk.empty_quarantine(gone)
        for key in gone:
            # Files without a row: of a process that was killed between the two, or in the middle of writing.
            path = disk.path(key)
            if path.parent.is_dir():
                for other in path.parent.glob(f"*{path.stem}*"):
                    _delete(other)
        found = scan_folder(disk.root, self._needles, mend=_delete, codec=disk.codec)
        return ForgetReport(self.blocks, self.nbytes, self.kept, found.scanned, found.traces, found.elsewhere)

    def _forget_in_catalog(self, gone: set[bytes]) -> None:
        catalog = self._store._catalog
        assert catalog is not None
        # Blocks that were evicted before are in the log of calls, though nowhere else.
        self._store._ledger.forget(gone)
        if self._store._admission is not None:
            self._store._admission.forget(gone)
        with catalog.transaction() as db:
            # All of them: blocks that went on from the text and were evicted before cannot be told from others.
            db.execute("DELETE FROM tombstones")
        # Deleted rows are zeroed, but where SQLite moved cells between pages their old bytes stay; and rows deleted
        # before are not known. Others may be reading or writing: then the scan says what is left.
        with contextlib.suppress(sqlite3.OperationalError), catalog.connection() as db:
            db.execute("VACUUM")
        self._checkpoint()

    def _checkpoint(self) -> None:
        catalog = self._store._catalog
        assert catalog is not None
        # Pages as they were before lie in the write-ahead log until it is emptied.
        with contextlib.suppress(sqlite3.OperationalError), catalog.connection() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _delete(path: Path) -> None:
    unlink_quietly(path)
    if path.parent.name == "quarantine":
        unlink_quietly(path.with_name(f"{path.name}.reason.txt"))
    if path.parent.parent.name == "blocks":
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # fails while it has other files
