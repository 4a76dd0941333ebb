"""`KVStore.verify`: the folder of a store checked from both sides."""

from __future__ import annotations

import functools
import os
import sqlite3
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvembed._blockfile import open_block
from kvembed._codec import MARKER_NAME
from kvembed._errors import BlockFormatError, EncryptedBlockError
from kvembed._files import disk_usage, is_temp_name, shown, unlink_quietly
from kvembed._rebuild import block_files, key_of, read_row
from kvembed._store_types import VerifyReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvembed._tiers.disk import DiskTier

__all__ = ["verify_blocks", "verify_folder"]

_TEMP_AGE_S = 60.0  # a younger temporary file may be one that another process is writing


class _Findings:
    def __init__(self, fix: bool) -> None:
        self.fix = fix
        self.problems: list[str] = []
        self.fixed = 0

    def add(self, problem: str, repair: Callable[[], object] | None = None) -> None:
        self.problems.append(problem)
        if self.fix and repair is not None:
            repair()
            self.fixed += 1


def verify_folder(disk: DiskTier, fix: bool, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check a store's folder; see `kvembed.KVStore.verify`."""
    findings = _Findings(fix)
    rows = {row.info.key: row for row in disk.catalog.rows()}
    files = [Path(entry.path) for entry in block_files(disk.root)]
    blocks = nbytes = 0
    present: set[bytes] = set()
    for done, path in enumerate(files, 1):
        key = _key_of(disk, path)
        if key is None:
            _stray(path, findings)
        else:
            present.add(key)
            size = _check_file(disk, path, key, findings)
            if size is not None:
                blocks, nbytes = blocks + 1, nbytes + size
        if on_progress is not None:
            on_progress(done, len(files))
    for path in sorted(disk.root.glob(".*.tmp")) + sorted(disk.root.glob("*/.*.tmp")):
        _stray(path, findings)
    with disk.catalog.connection() as db:
        answer = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if answer != "ok":
        damage = sqlite3.DatabaseError(answer)
        findings.add(f"the catalog is damaged ({answer})", lambda: disk.catalog.note_damage(damage))
    for key in rows.keys() - present:
        _check_row(disk, key, findings)
    _check_modes(disk, files, findings)
    return VerifyReport(blocks, nbytes, tuple(findings.problems), findings.fixed)


def verify_blocks(
    disk: DiskTier, keys: Sequence[bytes], fix: bool, on_progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check some blocks only; those that are not on disk are passed over."""
    findings = _Findings(fix)
    blocks = nbytes = 0
    for done, key in enumerate(keys, 1):
        size = _check_file(disk, disk.path(key), key, findings)
        if size is not None:
            blocks, nbytes = blocks + 1, nbytes + size
        else:
            _check_row(disk, key, findings)
        if on_progress is not None:
            on_progress(done, len(keys))
    return VerifyReport(blocks, nbytes, tuple(findings.problems), findings.fixed)


def _check_row(disk: DiskTier, key: bytes, findings: _Findings) -> None:
    # Looked at now: another process may have evicted or written it since the catalog was listed.
    if disk.catalog.row(key) is not None and not disk.path(key).exists():
        findings.add(f"{key.hex()[:12]}: in the catalog, but its file is gone", lambda: disk.catalog.delete([key]))


def _key_of(disk: DiskTier, path: Path) -> bytes | None:
    key = key_of(path, disk.codec)
    return key if key is not None and disk.path(key) == path else None


def _stray(path: Path, findings: _Findings) -> None:
    if not is_temp_name(path.name):
        findings.add(f"{shown(path.name)}: not a file of the store (left alone)")
        return
    try:
        age = time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return
    # Far in the future too: the clock was set back since.
    if abs(age) > _TEMP_AGE_S:
        findings.add(f"{shown(path.name)}: left over from a write that was cut off", lambda: unlink_quietly(path))


def _check_file(disk: DiskTier, path: Path, key: bytes, findings: _Findings) -> int | None:
    try:
        source = open_block(path, disk.codec, max_bytes=disk.largest_file)
        info, size = source.info, source.file_nbytes
        try:
            if info.key != key:
                raise BlockFormatError("it holds another block")
            source.check_all()
        finally:
            source.close()
    except FileNotFoundError:
        return None  # evicted by another process since the folder was listed
    except EncryptedBlockError as error:
        findings.add(f"{path.name}: {error} (left alone)")
        return None
    except BlockFormatError as error:
        reason = str(error)
        findings.add(f"{path.name}: {reason}", lambda: disk.quarantine(key, reason))
        return None
    except OSError as error:
        findings.add(f"{path.name}: cannot be read ({error.strerror})")
        return None
    # Read again: another process may have changed the row since the catalog was listed.
    row = disk.catalog.row(key)
    repair = functools.partial(_enter, disk, path)
    if row is None:
        findings.add(f"{path.name}: missing in the catalog", repair)
    elif row.info != info or row.file_bytes != disk_usage(size):
        findings.add(f"{path.name}: the catalog says something else about it", repair)
    return size


def _enter(disk: DiskTier, path: Path) -> None:
    disk.catalog.insert([read_row(path, disk.codec)])


def _check_modes(disk: DiskTier, files: list[Path], findings: _Findings) -> None:
    if os.name == "nt":
        return  # access is by lists there, inherited from the user's own folders
    folders = {path.parent for path in files} | {disk.root / name for name in ("blocks", "namespaces", "quarantine")}
    others = [
        *(disk.root / "namespaces").glob("*"),
        *(disk.root / "quarantine").glob("*"),
        *disk.root.glob("kvembed.db*"),
        *disk.root.glob(MARKER_NAME),
    ]
    for path in [*sorted(folders), *files, *others]:
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(info.st_mode) or not info.st_mode & 0o077:
            continue
        mode = 0o700 if stat.S_ISDIR(info.st_mode) else 0o600
        findings.add(
            f"{shown(path.name)}: others may read it (mode {stat.S_IMODE(info.st_mode):o})",
            lambda p=path, m=mode: p.chmod(m),
        )
