"""`DiskTier`: one safetensors file for each block, found through the catalog."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from typing import TYPE_CHECKING

import numpy as np

from kvembed._blockfile import BlockFileSource, EncodedBlock, open_block, read_ids
from kvembed._codec import marker_stamp
from kvembed._errors import BlockFormatError, EncryptedBlockError
from kvembed._files import disk_usage, unlink_quietly, write_file
from kvembed._keys import probe_of
from kvembed._paths import make_private_dir
from kvembed._units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from kvembed._admission import Admission
    from kvembed._block import Block, BlockInfo
    from kvembed._budgets import DiskBudget
    from kvembed._catalog import Catalog
    from kvembed._keys import TokenIds

__all__ = ["DiskTier"]

_FOLDERS = 256
_QUARANTINE_FILES = 8
_BELIEVABLE = 1 << 30  # a file up to so many bytes is looked at whatever the budget is: budgets are made smaller


def _ignore(kind: str, message: str) -> None:
    """Drop a problem nobody listens to."""


class DiskTier:
    """Blocks on disk, shared with every process that opened the folder.

    Order matters at a crash: a file is complete before its row commits, and a row is gone before its file
    is deleted. What a crash leaves is a file without a row, which the clean-up adopts; never a row whose
    file is half written.

    Args:
        root: Folder of the store.
        catalog: The catalog of ``root``.
        max_bytes: Budget for the block files as `du` counts them, folders included.
        durability: ``"fast"`` leaves flushing to the system, ``"safe"`` waits for the device.
        report: Called with a kind and a message when something is wrong.
        writer: Name and version recorded in the files.
        admission: What may be written, and models' quotas; None for no limits but ``max_bytes``.
        budget: Works ``max_bytes`` out again before each write.
    """

    name = "disk"

    def __init__(
        self,
        root: Path,
        catalog: Catalog,
        max_bytes: int,
        *,
        durability: str = "fast",
        report: Callable[[str, str], None] = _ignore,
        writer: str = "kvembed",
        admission: Admission | None = None,
        budget: DiskBudget | None = None,
    ) -> None:
        self.root = root
        self.catalog = catalog
        self.codec = catalog.codec
        self.max_bytes = max_bytes
        self._sync = durability == "safe"
        self.largest_file = max(max_bytes, _BELIEVABLE)
        """A larger file is not believed to be a block."""
        self._report = report
        self._writer = writer
        self._admission = admission
        self._budget = budget
        # Found bad, but the catalog could not be told (it is read-only, or locked).
        self._bad: set[bytes] = set()

    # -- what is here ------------------------------------------------------------------------------

    def path(self, key: bytes) -> Path:
        """Return where the file of a block lies."""
        name = self.codec.key(key).hex()
        return self.root / "blocks" / name[:2] / f"{name}.safetensors"

    @property
    def nbytes(self) -> int:
        """Bytes in use, counted like `du`: whole pages, folders included."""
        counters = self.catalog.counters()
        return counters.file_bytes + self._folder_bytes(counters.blocks)

    @staticmethod
    def _folder_bytes(blocks: int) -> int:
        # Empty folders are removed with their last file, so there are at most as many as blocks. A folder
        # outgrows its first page at about 40 files.
        return 4096 * (1 + min(blocks, _FOLDERS)) + 160 * max(0, blocks - 24 * _FOLDERS) if blocks else 0

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self.catalog.counters().blocks

    def contains(self, keys: Sequence[bytes]) -> list[BlockInfo | None]:
        """Return, for each key, what is known of the block, or None when it is not here."""
        found = self.catalog.get(keys)
        return [None if key in self._bad else found.get(key) for key in keys]

    def tails(self, parent: bytes, probe: bytes) -> list[BlockInfo]:
        """Return children of ``parent`` whose first tokens hash to ``probe``, latest first, at most 64."""
        return self._sound(self.catalog.tails(parent, probe))

    def children(self, parent: bytes) -> list[BlockInfo]:
        """Return every child of ``parent``, latest first."""
        return self._sound(self.catalog.children(parent))

    def _sound(self, infos: list[BlockInfo]) -> list[BlockInfo]:
        return [info for info in infos if info.key not in self._bad] if self._bad else infos

    # -- writing -----------------------------------------------------------------------------------

    def put(self, block: Block) -> bool:
        """Write ``block``; see `kvembed._tiers._base.Tier.put`.

        A block whose parent is missing never evicts another: it could not be reached.

        Raises:
            OSError: The disk is full, read-only or broken; nothing is left behind.
            sqlite3.Error: The catalog cannot be written.
        """
        info = block.info
        if self._is_stale():
            return False
        old = self.catalog.row(info.key)
        path = self.path(info.key)
        if old is not None and old.info.rank >= info.rank and path.exists():
            self.touch([info.key])
            return True
        encoded = EncodedBlock(block, self._writer, codec=self.codec)
        whole, admission = encoded.disk_nbytes, self._admission
        if admission is not None and not admission.take(info, whole):
            return False
        written = False
        try:
            if not self._make_room(whole - (old.file_bytes if old else 0), info, whole):
                return False
            began = time.perf_counter()
            encoded.write(path, sync=self._sync)
            written = True
            if admission is not None:
                admission.written(whole, time.perf_counter() - began)
        finally:
            if not written and admission is not None:
                admission.give_back(whole)
        probe = probe_of(info.parent, block.token_ids)
        try:
            self.catalog.insert([(info, probe, whole, encoded.created)])
        except BaseException:
            if old is None:
                self._unlink(info.key)
            raise
        self._bad.discard(info.key)
        self._drop_covered_tails(block, probe)
        return True

    def _make_room(self, need: int, info: BlockInfo, whole: int) -> bool:
        if self._budget is not None:
            self.max_bytes = self._budget.now(lambda: self.nbytes)
        quota = self._admission.quota(info.namespace, self.max_bytes) if self._admission is not None else None
        least = whole + self._folder_bytes(1)
        if least > self.max_bytes:
            self._report(
                "budget",
                f"the disk budget of {format_bytes(self.max_bytes)} is too small for one block "
                f"(needs {format_bytes(least)}); raise max_disk_bytes",
            )
            return False

        def excess() -> int:
            return self._used_with_one_more() + need - self.max_bytes

        def excess_of_model() -> int:
            return 0 if quota is None else self.catalog.space_of(info.namespace) + need - quota

        if excess() <= 0 and excess_of_model() <= 0:
            return True
        if info.start > 0 and self.catalog.row(info.parent) is None:
            return False
        self.catalog.flush_touches()
        # A model beyond its quota gives up blocks of its own, and what others have stays.
        if not self._evict(excess_of_model, info, info.namespace):
            self._report(
                f"quota:{info.namespace.hex()}",
                f"the quota of {format_bytes(quota or 0)} for this model has no room for one more block: raise "
                "max_namespace_bytes, or unpin",
            )
            return False
        if not self._evict(excess, info, None):
            self._report(
                "budget",
                f"the disk budget of {format_bytes(self.max_bytes)} has no room for {format_bytes(excess())} more: "
                "what is there is pinned or the start of the same prompt; raise max_disk_bytes or unpin",
            )
            return False
        return True

    def _evict(self, excess: Callable[[], int], info: BlockInfo, namespace: bytes | None) -> bool:
        """Evict until there is no excess; False when there is and nothing may go."""
        while excess() > 0:
            # In one transaction with the deletion, so that two processes do not evict for the same need. One
            # at a time: until its file is deleted, a block is on the disk without being counted.
            with self.catalog.transaction():
                rows = self.catalog.to_evict(2, spare=info.parent, namespace=namespace)
                keys = [row.info.key for row in rows if row.info.key != info.key]
                gone = self.catalog.delete(keys[:1], "evicted")
            for key in gone:
                self._unlink(key)
            if not gone:
                return excess() <= 0  # another process may have made room since it was asked
        return True

    def _used_with_one_more(self) -> int:
        counters = self.catalog.counters()
        return counters.file_bytes + self._folder_bytes(counters.blocks + 1)

    def _drop_covered_tails(self, block: Block, probe: bytes) -> None:
        for tail in self.catalog.tails(block.info.parent, probe):
            if tail.n_tokens >= block.info.n_tokens or tail.rank > block.info.rank:
                continue
            row = self.catalog.row(tail.key)
            if row is None or row.children or row.pins:
                continue
            ids = self.read_ids(tail.key)
            if ids is not None and np.array_equal(ids, block.token_ids[: tail.n_tokens]):
                self.remove([tail.key], reason=None)

    def _unlink(self, key: bytes) -> None:
        path = self.path(key)
        unlink_quietly(path)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # fails while it has other files, which is the usual case

    # -- reading -----------------------------------------------------------------------------------

    def open(self, key: bytes) -> BlockFileSource | None:
        """Open a block for reading, or None when it is not here or cannot be trusted."""
        if key in self._bad:
            return None
        try:
            source = open_block(self.path(key), self.codec, max_bytes=self.largest_file)
            if source.info.key == key:
                return source
            source.close()
            raise BlockFormatError("it holds another block")
        except FileNotFoundError:
            self._forget(key, None)
        except BlockFormatError as error:
            self.refuse(key, error)
        except OSError as error:
            self._report(f"read:{error.errno}", f"block {key.hex()[:12]} cannot be read now: {error.strerror}")
        return None

    def correct(self, source: BlockFileSource) -> None:
        """Enter the row of a block anew, from what its file says: the catalog said something else."""
        if not self.catalog.read_only:
            probe = probe_of(source.info.parent, source.token_ids)
            self.catalog.insert([(source.info, probe, disk_usage(source.file_nbytes), source.created)])

    def read_ids(self, key: bytes) -> TokenIds | None:
        """Return the token ids of a block, or None like `open`."""
        try:
            return read_ids(self.path(key), self.codec, max_bytes=self.largest_file)
        except FileNotFoundError:
            self._forget(key, None)
        except BlockFormatError as error:
            self.refuse(key, error)
        except OSError as error:
            self._report(f"read:{error.errno}", f"block {key.hex()[:12]} cannot be read now: {error.strerror}")
        return None

    def _is_stale(self) -> bool:
        """True when the store was encrypted, or given another key, since it was opened: it is not ours any more."""
        try:
            stale = marker_stamp(self.root) != self.codec.stamp
        except OSError:
            return False
        if stale:
            self._report(
                "stale",
                f"the encryption of {self.root} has changed since it was opened: nothing more is read or stored; "
                "open it again",
            )
        return stale

    def refuse(self, key: bytes, error: BlockFormatError) -> None:
        """Do not use a file: it goes to quarantine, unless it only wants its key."""
        if not isinstance(error, EncryptedBlockError):
            self.quarantine(key, str(error))
            return
        self._bad.add(key)
        self._report("encrypted", f"{self.root} has encrypted blocks, which are not used: open it with its key")

    def quarantine(self, key: bytes, reason: str) -> None:
        """Move a file that must not be used out of the way, and forget the block."""
        if self._is_stale():
            self._bad.add(key)
            return
        path = self.path(key)
        folder = self.root / "quarantine"
        kept = "" if self.catalog.read_only else f" (kept in {folder} for a while)"
        self._report(f"bad:{key.hex()}", f"the block file {path.name} was dropped{kept}: {reason}")
        self._bad.add(key)
        if self.catalog.read_only:
            return
        target = folder / path.name
        try:
            make_private_dir(folder)
            path.replace(target)
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n".encode()
            write_file(folder / f"{path.name}.reason.txt", [memoryview(text)])
            self._bound_quarantine(folder)
        except OSError:
            self._unlink(key)  # better gone than found bad at every call
        self._forget(key, "quarantined")

    def _bound_quarantine(self, folder: Path) -> None:
        """Keep the newest few bad files: evidence, but not outside every budget."""
        files = [path for path in folder.iterdir() if not path.name.endswith(".txt")]
        files.sort(key=lambda path: path.lstat().st_mtime_ns, reverse=True)
        total = 0
        for rank, path in enumerate(files):
            total += disk_usage(path.lstat().st_size)
            if rank and (rank >= _QUARANTINE_FILES or total > self.max_bytes // 20):
                unlink_quietly(path)

    def empty_quarantine(self, keys: Iterable[bytes] | None) -> None:
        """Delete the quarantined files of ``keys``, or all."""
        folder = self.root / "quarantine"
        names = None if keys is None else {key.hex() for key in self.codec.keys(keys)}
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if names is None or path.name[:64] in names:
                    unlink_quietly(path)

    def _forget(self, key: bytes, reason: str | None) -> None:
        with contextlib.suppress(sqlite3.Error):
            if not self.catalog.read_only:
                self.catalog.delete([key], reason)
                self._bad.discard(key)

    # -- the rest ----------------------------------------------------------------------------------

    def touch(self, keys: Iterable[bytes]) -> None:
        """Mark a prefix as used now; written to the catalog later."""
        self.catalog.touch_later(keys)

    def remove(self, keys: Iterable[bytes], reason: str | None = "removed") -> int:
        """Delete blocks; return how many were here."""
        removed = 0
        for key in keys:
            # Each alone: between the row and its file a block is on the disk without being counted, and
            # another process may fill what looks free.
            for gone in self.catalog.delete([key], reason):
                self._unlink(gone)
                removed += 1
        return removed

    def evict(self, keys: Iterable[bytes]) -> list[bytes]:
        """Delete those of ``keys`` (ends first) that no block follows and no name pins; return them."""
        gone: list[bytes] = []
        for key in keys:
            # Looked at in the transaction that deletes it: another process may just have added a block after it.
            with self.catalog.transaction():
                row = self.catalog.row(key)
                if row is None or row.children or row.pins:
                    continue
                self.catalog.delete([key], "removed")
            self._unlink(key)
            gone.append(key)
        return gone

    def clear(self) -> int:
        """Delete every block; return how many there were."""
        gone = self.remove([row.info.key for row in self.catalog.rows()])
        for folder in os.scandir(self.root / "blocks") if (self.root / "blocks").is_dir() else ():
            with contextlib.suppress(OSError):
                os.rmdir(folder.path)  # noqa: PTH106
        return gone
