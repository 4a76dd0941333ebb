"""The catalog made again from the files, and the clean-up after crashes. The files are the truth."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvembed._blockfile import open_block
from kvembed._catalog import Catalog
from kvembed._codec import NAMESPACE_FILE, Codec, read_decoded
from kvembed._errors import BlockFormatError
from kvembed._files import disk_usage, is_temp_name, unlink_quietly
from kvembed._keys import probe_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvembed._block import BlockInfo
    from kvembed._tiers.disk import DiskTier

__all__ = [
    "adopt_all",
    "block_files",
    "has_blocks",
    "housekeeping",
    "key_of",
    "locked",
    "open_or_rebuild",
    "read_row",
    "rebuild",
]

CATALOG_NAME = "kvembed.db"
_SUFFIX = ".safetensors"
_STALE_S = 3600.0
_HOUSEKEEPING_S = 6 * 3600.0


def block_files(root: Path) -> Iterator[os.DirEntry[str]]:
    """Yield every entry in the folders of block files."""
    try:
        folders = sorted(os.scandir(root / "blocks"), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for folder in folders:
        if folder.is_dir(follow_symlinks=False):
            with os.scandir(folder.path) as entries:
                yield from sorted(entries, key=lambda entry: entry.name)


def has_blocks(root: Path) -> bool:
    """Return True when a folder holds block files."""
    return any(entry.name.endswith(_SUFFIX) for entry in block_files(root))


def read_row(path: Path, codec: Codec | None = None) -> tuple[BlockInfo, bytes, int, float]:
    """Return the catalog row of a block file: info, probe, bytes on disk, time of creation.

    Raises:
        BlockFormatError: The file must not be used, or is not where its key says.
        FileNotFoundError: It is gone.
    """
    codec = codec or Codec()
    source = open_block(path, codec)
    try:
        if f"{codec.key(source.info.key).hex()}{_SUFFIX}" != path.name:
            raise BlockFormatError("it holds another block")
        size = disk_usage(source.file_nbytes)
        return source.info, probe_of(source.info.parent, source.token_ids), size, source.created
    finally:
        source.close()


def rebuild(root: Path, progress: Callable[[int, int], None] | None = None, codec: Codec | None = None) -> int:
    """Make a new catalog from the block files if the one that is there cannot be used.

    Args:
        root: Folder of the store.
        progress: Called with files done and files in all.
        codec: The store's.

    Returns:
        Number of blocks in the catalog.
    """
    path = root / CATALOG_NAME
    with locked(root):
        if not _problem(root, path, codec):
            catalog = Catalog(path, codec=codec)
            count = catalog.counters().blocks
            catalog.close()
            return count
        return _replace(root, path, progress, codec)


def open_or_rebuild(root: Path, *, sync: bool = False, codec: Codec | None = None) -> tuple[Catalog, str]:
    """Open a catalog that is missing or was found unusable: created, or made again from the block files.

    Args:
        root: Folder of the store.
        sync: Wait for the device at every commit.
        codec: The store's.

    Returns:
        The catalog, and what the user should be told, if anything.
    """
    path = root / CATALOG_NAME
    with locked(root):
        problem, words = _problem(root, path, codec), ""
        if problem:
            found = _replace(root, path, None, codec)
            words = f"{path} {problem}; it was made again from {found} block files"
        return Catalog(path, create=True, sync=sync, codec=codec), words


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep others from making or replacing what belongs to a folder as a whole: its catalog, its marker."""
    # A catalog is created and replaced under this lock only. Without it a process could create one
    # between the moment another moves a bad catalog away and the moment it puts the new one in place, and
    # its -wal file would be played into the new database.
    from filelock import FileLock

    with FileLock(str(root / ".catalog.lock"), mode=0o600):
        yield


def _problem(root: Path, path: Path, codec: Codec | None) -> str:
    """Return why a catalog cannot be used, or nothing: it can, or there is nothing to lose."""
    if Catalog.damage_mark(path).exists():
        return "was found damaged"
    if not path.is_file() or path.is_symlink():
        if path.is_symlink() or path.exists():
            return "is not a regular file"
        return "is missing" if path.with_name(f"{path.name}-wal").exists() or has_blocks(root) else ""
    if path.stat().st_size == 0 and has_blocks(root):
        return "is empty"
    catalog = None
    try:
        catalog = Catalog(path, codec=codec)
        catalog.counters()
    except sqlite3.OperationalError:
        raise  # locked, or no right to read it: not a matter of its content
    except sqlite3.DatabaseError as error:
        return f"cannot be used ({error})"
    finally:
        if catalog is not None:
            catalog.close()
    return ""


def _replace(root: Path, path: Path, progress: Callable[[int, int], None] | None, codec: Codec | None) -> int:
    _move_aside(root, path)
    for left in root.glob(f".{path.name}.*"):
        unlink_quietly(left)
    count = _build(root, path, progress, codec or Codec())
    unlink_quietly(Catalog.damage_mark(path))
    return count


def _move_aside(root: Path, path: Path) -> None:
    # The -wal file also when it is alone: SQLite would play it into the new database.
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.is_symlink() or part.exists():
            if not part.is_symlink():
                part.chmod(0o600)
            part.replace(root / "quarantine" / f"{part.name}.{stamp}")


def _build(root: Path, path: Path, progress: Callable[[int, int], None] | None, codec: Codec) -> int:
    # Built under another name: a crash half-way must leave the catalog missing, not incomplete.
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    catalog = Catalog(temp, create=True, codec=codec)
    try:
        for file in sorted((root / "namespaces").glob("*.json")):
            try:
                # Not read_text(): a FIFO of that name would never end.
                digest = key_of(file, codec)
                fields = json.loads(read_decoded(file, codec, NAMESPACE_FILE + (digest or b"")))
            except (ValueError, OSError, RecursionError, BlockFormatError):
                continue  # a namespace without fields only explains less
            if digest is not None and isinstance(fields, dict):
                catalog.add_namespace(digest, fields)
        count = adopt_all(root, catalog, progress)
        # Back into one file, so that one rename puts it in place.
        with catalog.connection() as db:
            db.execute("PRAGMA journal_mode = DELETE")
    except BaseException:
        catalog.close()
        unlink_quietly(temp)
        raise
    catalog.close()
    temp.replace(path)
    return count


def adopt_all(root: Path, catalog: Catalog, progress: Callable[[int, int], None] | None = None) -> int:
    """Enter every good block file into a catalog; return how many there are."""
    names = [Path(entry.path) for entry in block_files(root) if entry.name.endswith(_SUFFIX)]
    rows: list[tuple[BlockInfo, bytes, int, float]] = []
    for done, name in enumerate(names, 1):
        # A bad file is left where it is: verify() names it.
        with contextlib.suppress(BlockFormatError, OSError):
            rows.append(read_row(name, catalog.codec))
        if progress is not None:
            progress(done, len(names))
    catalog.insert(rows)
    return len(rows)


def housekeeping(disk: DiskTier) -> Iterator[None]:
    """Clean up after crashed writers, one folder of blocks a step.

    Temporary files older than an hour are deleted; blocks that have a file but no row (the crash came
    between the two) are entered, so that they count against the budget and can be found.
    """
    # Once in a while, not by every process: a large store has many files to look at.
    if not disk.catalog.claim("housekeeping", _HOUSEKEEPING_S):
        return
    before = time.time() - _STALE_S
    try:
        folders = sorted(Path(entry.path) for entry in os.scandir(disk.root / "blocks") if entry.is_dir())
    except FileNotFoundError:
        return
    for folder in folders:
        adopt(disk, folder, before)
        yield


def adopt(disk: DiskTier, folder: Path, before: float) -> None:
    """Do the housekeeping of one folder, for files last changed before a time."""
    names: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                changed = entry.stat(follow_symlinks=False).st_mtime
                if before <= changed <= before + 2 * _STALE_S:
                    continue  # new, or being written; what lies further ahead is from before a clock was set back
                if is_temp_name(entry.name):
                    unlink_quietly(Path(entry.path))
                elif entry.name.endswith(_SUFFIX) and len(entry.name) == 64 + len(_SUFFIX):
                    names.append(Path(entry.path))
    except FileNotFoundError:
        return
    keys = {key_of(name, disk.codec): name for name in names}
    known = disk.catalog.get([key for key in keys if key is not None])
    for key, name in keys.items():
        if key is None or key in known:
            continue
        try:
            disk.catalog.insert([read_row(name, disk.codec)])
        except FileNotFoundError:
            continue
        except BlockFormatError as error:
            disk.refuse(key, error)
        except OSError:
            continue  # next time


def key_of(path: Path, codec: Codec) -> bytes | None:
    """Return the key that a file is named by, None when it is named otherwise."""
    try:
        written = bytes.fromhex(path.stem)
    except ValueError:
        return None
    return codec.original(written) if len(written) == 32 else None
