"""Opening the folder of a store: created, found, found read-only, or repaired."""

from __future__ import annotations

import os
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvembed._admission import POLICIES, Admission
from kvembed._budgets import DiskBudget, NamespaceQuotas, write_budget
from kvembed._catalog import Catalog
from kvembed._codec import Codec, marker_stamp
from kvembed._errors import ConfigError, StoreError, StoreKeyError, StoreReadOnlyError
from kvembed._files import fsync_dir
from kvembed._ledger import Ledger
from kvembed._mounts import network_filesystem
from kvembed._paths import make_private_dir, store_dir
from kvembed._rebuild import CATALOG_NAME, adopt_all, has_blocks, housekeeping, open_or_rebuild
from kvembed._tiers.disk import DiskTier
from kvembed._units import parse_age

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvembed._encryption.sources import Key
    from kvembed._tiers.cpu import CpuTier

__all__ = ["DiskOptions", "OpenedFolder", "chores", "open_disk", "open_folder"]

_EXPIRY_EVERY_S = 6 * 3600.0
_EXPIRY_STEP = 100

_FOLDERS = ("blocks", "namespaces", "quarantine")


@dataclass
class OpenedFolder:
    """A store's folder, ready for use.

    Args:
        path: The folder.
        catalog: Its catalog, or None when it cannot be used.
        read_only: Nothing may be written.
        codec: How files and names look there.
        used: Bytes of the block files, by the catalog.
        warnings: What the user should be told.
        writer: Name and version recorded in files.
    """

    path: Path
    catalog: Catalog | None
    read_only: bool
    codec: Codec = field(default_factory=Codec)
    used: int = 0
    warnings: list[str] = field(default_factory=list)
    writer: str = "kvembed"


def open_folder(
    path: str | os.PathLike[str] | None, read_only: bool | None, *, sync: bool = False, key: Key | None = None
) -> OpenedFolder:
    """Open the folder of a store; see `kvembed.KVStore` for the arguments and errors."""
    folder = store_dir() if path is None else Path(path).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a store needs a folder, pass another path to KVStore")
    result = OpenedFolder(folder, None, bool(read_only), writer=_writer_name())
    network = network_filesystem(folder)
    if network is not None:
        result.warnings.append(
            f"{folder} is on a network file system ({network}), where locks between machines are not reliable; use it "
            "from one machine at a time, or pass a local folder to KVStore"
        )
    if not read_only:
        new = not folder.exists()
        error = _prepare(folder)
        if error is None and sync and new:
            fsync_dir(folder.parent)
        if error is not None:
            if read_only is False or not (folder / CATALOG_NAME).is_file():
                raise StoreReadOnlyError(
                    f"{folder} cannot be written ({error.strerror}); pass another path to KVStore, "
                    "or max_disk_bytes=None to keep blocks in memory only"
                ) from error
            result.read_only = True
            result.warnings.append(
                f"{folder} cannot be written ({error.strerror}); opened read-only, nothing is stored"
            )
    try:
        result.codec = _codec(folder, key, read_only=result.read_only)
        if result.read_only:
            _open_read_only(result)
        else:
            _open_writable(result, sync)
        if result.catalog is not None:
            result.used = result.catalog.counters().file_bytes
    except (sqlite3.Error, OSError) as error:
        if result.catalog is not None:
            result.catalog.close()
        raise StoreError(
            f"{folder / CATALOG_NAME} cannot be opened ({error}); wait for other users of the folder or pass another "
            "path to KVStore"
        ) from error
    return result


def _codec(folder: Path, key: Key | None, *, read_only: bool) -> Codec:
    if key is None and marker_stamp(folder) is None:
        return Codec()
    from kvembed._encryption.marker import codec_for

    return codec_for(folder, key, read_only=read_only)


def _writer_name() -> str:
    from kvembed import __version__

    return f"kvembed {__version__}"


def _prepare(folder: Path) -> OSError | None:
    """Create what is missing; return the error of a folder that cannot be written."""
    try:
        make_private_dir(folder)
        for name in _FOLDERS:
            make_private_dir(folder / name)
        # Tried out, not asked: os.access says yes to root on a read-only mount.
        probe = folder / f".probe.{os.getpid()}.tmp"
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o600))
        probe.unlink()
    except OSError as error:
        return error
    return None


def _open_read_only(result: OpenedFolder) -> None:
    path = result.path / CATALOG_NAME
    if not path.is_file():
        raise StoreReadOnlyError(f"{result.path} holds no store to open read-only; pass the path of one")
    try:
        result.catalog = Catalog(path, read_only=True, codec=result.codec)
    except sqlite3.DatabaseError as error:
        result.warnings.append(f"{path} cannot be read ({error}); blocks on disk are not used")


def _open_writable(result: OpenedFolder, sync: bool) -> None:
    path = result.path / CATALOG_NAME
    result.catalog = _open_usable(path, sync, result.codec)
    if result.catalog is None:
        result.catalog, words = open_or_rebuild(result.path, sync=sync, codec=result.codec)
        result.warnings.extend([words] if words else [])
    if not result.codec.encrypted and marker_stamp(result.path) is not None:
        # Another process has made it an encrypted store in between.
        result.catalog.close()
        raise StoreKeyError(f"{result.path} has just become an encrypted store; open it with its key")
    # No rows beside block files: a process was killed between its first block and the row of it.
    if result.catalog.counters().blocks == 0 and has_blocks(result.path):
        adopt_all(result.path, result.catalog)


def _open_usable(path: Path, sync: bool, codec: Codec) -> Catalog | None:
    """Return the catalog, or None when it is missing or bad: then it takes the lock to go on."""
    if Catalog.damage_mark(path).exists() or path.is_symlink() or not path.is_file() or path.stat().st_size == 0:
        return None
    catalog = None
    try:
        catalog = Catalog(path, sync=sync, codec=codec)
        catalog.counters()
    except sqlite3.DatabaseError as error:
        if catalog is not None:
            catalog.close()
        if isinstance(error, sqlite3.OperationalError) and path.exists():
            raise
        return None
    return catalog


class DiskOptions:
    """What `kvembed.KVStore` was told about its disk tier, checked before anything is opened.

    Raises:
        ConfigError: An option cannot be read.
    """

    def __init__(
        self,
        max_disk_bytes: int | str | None,
        max_write_bytes_per_day: int | str | None,
        max_namespace_bytes: int | str | Mapping[str, int | str] | None,
        write_policy: str,
        ttl: int | float | str | None,
        durability: str,
        key: Key | None = None,
    ) -> None:
        if durability not in ("fast", "safe"):
            raise ConfigError(f'durability must be "fast" or "safe", got {durability!r}')
        if write_policy not in POLICIES:
            raise ConfigError(f"write_policy must be one of {', '.join(map(repr, POLICIES))}, got {write_policy!r}")
        self.max_disk_bytes = max_disk_bytes
        self.max_write_bytes_per_day = max_write_bytes_per_day
        self.quotas = NamespaceQuotas(max_namespace_bytes)
        self.write_policy = write_policy
        self.ttl_s = None if ttl is None else parse_age(ttl, name="ttl")
        self.durability = durability
        self.key = key
        if not self.on and (self.ttl_s is not None or self.quotas or key is not None):
            raise ConfigError("ttl, max_namespace_bytes and key are for blocks on disk: give max_disk_bytes too")

    @property
    def on(self) -> bool:
        """True when there is a disk tier."""
        return self.max_disk_bytes is not None and self.max_disk_bytes != 0


def open_disk(
    opened: OpenedFolder,
    catalog: Catalog,
    options: DiskOptions,
    report: Callable[[str, str], None],
    seconds_per_token: Callable[[bytes], float | None],
) -> tuple[DiskTier, Ledger, Admission]:
    """Make the disk tier of an opened folder, and what limits it.

    Args:
        opened: The folder.
        catalog: Its catalog.
        options: What the user said.
        report: Called with a kind and a message when something is wrong.
        seconds_per_token: Prefill speed of a model by its digest, None when it was not measured.
    """
    budget = DiskBudget(options.max_disk_bytes, opened.path, opened.used)
    ledger = Ledger(catalog)
    admission = Admission(
        catalog,
        ledger,
        policy=options.write_policy,
        per_day=write_budget(options.max_write_bytes_per_day, opened.path),
        quotas=options.quotas,
        seconds_per_token=seconds_per_token,
        report=report,
    )
    tier = DiskTier(
        opened.path,
        catalog,
        budget.now(lambda: 0),
        durability=options.durability,
        report=report,
        writer=opened.writer,
        admission=admission,
        budget=budget,
    )
    return tier, ledger, admission


def chores(disk: DiskTier, cpu: CpuTier | None, ttl_s: float | None) -> Iterator[None]:
    """Do what a store needs done now and then, in small steps.

    Args:
        disk: The disk tier.
        cpu: The cpu tier.
        ttl_s: Drop blocks that were not used for so long; pinned ones and what leads to them stay.
    """
    yield from housekeeping(disk)
    if ttl_s is None or not disk.catalog.claim("expiry", min(_EXPIRY_EVERY_S, ttl_s / 4)):
        return
    before = time.time() - ttl_s
    # Ends of sequences first; then what they followed is an end itself.
    while keys := disk.catalog.to_expire(before, _EXPIRY_STEP):
        if cpu is not None:
            cpu.remove(keys)
        disk.remove(keys)
        yield
