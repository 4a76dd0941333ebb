"""What the processes that are killed were doing: a folder prepared, the work, and what must be there afterwards."""

from __future__ import annotations

import os
import shutil
import sqlite3
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvembed import KVStore, _schema
from kvembed._rebuild import housekeeping
from kvembed._testing import FINGERPRINT, block_path, keys_of, put_all, random_block, random_chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvembed._block import Block

__all__ = ["KEYS", "OLD", "WORKLOADS", "Workload", "copy_folder", "known_blocks", "opened"]

OLD = [*random_chain(4, seed=1), *random_chain(2, seed=2)]
NEW = [*random_chain(5, seed=3), *random_chain(1, seed=4)]
ROUGH = [replace(b, info=replace(b.info, exact=False), data=b.data[::-1].copy()) for b in OLD]
TAIL = random_block(OLD[1].key, OLD[2].token_ids[:10], start=32, seed=9, exact=False)


KEYS: list[bytes] = []
"""The key of all stores, if they are to be encrypted."""


def opened(root: Path, **options: object) -> KVStore:
    """Open a store."""
    return KVStore(root, key=KEYS[0] if KEYS else None, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Workload:
    """One thing a process does with a store.

    Args:
        work: Does it, and says which blocks have been flushed.
        prepare: Makes the folder it starts from.
        may_go: Blocks that were there before and may be gone afterwards.
        budget: Disk budget.
        migrations: Added to the catalog's, so that opening has something to migrate.
        damaged: The folder is damaged on purpose, so opening it may warn.
        durability: As for `KVStore`.
    """

    work: Callable[[Workload, Path, Callable[[list[Block]], None]], None]
    prepare: Callable[[Path], None]
    may_go: tuple[Block, ...] = ()
    budget: int = 1 << 30
    migrations: tuple[tuple[str, str], ...] = ()
    damaged: bool = False
    durability: str = "fast"

    def open(self, root: Path, **options: object) -> KVStore:
        """Open the folder the way the workload does."""
        options |= {"max_disk_bytes": self.budget, "durability": self.durability}
        return opened(root, **options)

    @property
    def before(self) -> list[Block]:
        """Blocks that were in the folder at the start and must still be."""
        gone = {block.key for block in self.may_go}
        return [] if self.prepare is nothing else [block for block in OLD if block.key not in gone]

    @contextmanager
    def schema(self) -> Iterator[None]:
        """Have the catalog's code know the added migrations."""
        old = _schema.MIGRATIONS, _schema.SCHEMA_VERSION
        _schema.MIGRATIONS += self.migrations  # type: ignore[misc]
        _schema.SCHEMA_VERSION += len(self.migrations)  # type: ignore[misc]
        try:
            yield
        finally:
            _schema.MIGRATIONS, _schema.SCHEMA_VERSION = old  # type: ignore[misc]


def known_blocks() -> dict[bytes, list[Block]]:
    """Return every content that may be served, by key."""
    known: dict[bytes, list[Block]] = {}
    for block in [*OLD, *NEW, *ROUGH, TAIL]:
        known.setdefault(block.key, []).append(block)
    return known


def nothing(root: Path) -> None:
    """Start from no folder at all."""


def some(root: Path) -> None:
    """Start from a store with the old blocks."""
    with opened(root, max_cpu_bytes=None) as store:
        store.register_namespace(FINGERPRINT, {"name": "tiny"})
        put_all(store, OLD)


def with_rough(root: Path) -> None:
    """Start from blocks that are not exact, and a tail that a whole block will cover."""
    with opened(root, max_cpu_bytes=None) as store:
        put_all(store, ROUGH[:2])
        store.put(TAIL)
        put_all(store, OLD[4:])


def with_bad_files(root: Path) -> None:
    """Start from a store with a file that is cut and one with a flipped bit."""
    some(root)
    with opened(root, max_cpu_bytes=None) as store:
        paths = [block_path(store, block) for block in OLD]
    os.truncate(paths[3], 100)
    data = bytearray(paths[5].read_bytes())
    data[-100] ^= 1
    paths[5].write_bytes(data)


def with_bad_catalog(root: Path) -> None:
    """Start from a catalog that has to be made again."""
    some(root)
    (root / "kvembed.db").write_bytes(b"not a database" * 1000)


def with_leftovers(root: Path) -> None:
    """Start from what crashes leave: a file without a row, and temporary files."""
    some(root)
    with opened(root, max_cpu_bytes=None) as store:
        assert store._catalog is not None
        path = block_path(store, OLD[5])
        store._catalog.delete([OLD[5].key])
        with store._catalog.connection() as db:
            db.execute("DELETE FROM meta WHERE name = 'housekeeping'")
    (path.parent / ".left.1.ab.tmp").write_bytes(b"half")
    for left in path.parent.iterdir():
        os.utime(left, (1e9, 1e9))


def put(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Put blocks, waiting for each; the store writes in its thread."""
    with load.open(root) as store:
        store.register_namespace(FINGERPRINT, {"name": "tiny"})
        for block in NEW:
            store.put(block)
            if store.flush():
                ack([block])


def write_behind(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Put blocks without waiting, pin, touch, read and close."""
    with load.open(root) as store:
        put_all(store, NEW)
        store.touch(keys_of(NEW))
        store.pin(keys_of(NEW), "doc")
        store.promote(keys_of(OLD))
        store.set_note(FINGERPRINT, "rate", 3.5)
    ack(NEW)


def evict(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Put more than the budget holds."""
    with load.open(root, max_cpu_bytes=None) as store:
        put_all(store, NEW)
        put_all(store, OLD)


def better(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Put exact blocks in the place of others, and a whole block in that of a tail."""
    with load.open(root, max_cpu_bytes=None) as store:
        put_all(store, OLD)
    ack(OLD)


def erase(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Remove, prune and forget."""
    with load.open(root, max_cpu_bytes=None) as store:
        store.pin(keys_of(OLD[4:]), "doc")
        store.forget("doc")
        store.remove([OLD[3].key])
        store.prune(max_bytes=0)


def clear(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Delete everything."""
    with load.open(root, max_cpu_bytes=None) as store:
        store.clear()


def read(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Read everything and put what is bad into quarantine."""
    with load.open(root, max_cpu_bytes=None) as store:
        for block in OLD:
            source = store.open(block.key)
            if source is None:
                continue
            try:
                source.read_all()  # type: ignore[attr-defined]
            except Exception as error:
                store.discard(block.key, str(error))
            finally:
                source.close()
        store.flush()


def only_open(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Open and close: creates, migrates, or makes the catalog again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load.open(root).close()


def clean_up(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Do the housekeeping, which the background thread does otherwise."""
    with load.open(root, max_cpu_bytes=None) as store:
        assert store._disk is not None
        with suppress(OSError, sqlite3.Error):  # as the thread does
            for _ in housekeeping(store._disk):
                pass


def repair(load: Workload, root: Path, ack: Callable[[list[Block]], None]) -> None:
    """Run ``verify(fix=True)``."""
    with load.open(root, max_cpu_bytes=None) as store:
        store.verify(fix=True)


_MIGRATIONS = (
    ("998_test", "CREATE TABLE extra (a INTEGER);\nINSERT INTO extra VALUES (1);\n"),
    ("999_test", "ALTER TABLE extra ADD COLUMN b TEXT;\nCREATE INDEX extra_b ON extra (b);\n"),
)

WORKLOADS: dict[str, Workload] = {
    "create": Workload(only_open, nothing),
    "put": Workload(put, nothing),
    "put, safe": Workload(put, some, durability="safe"),
    "write behind": Workload(write_behind, some),
    "evict": Workload(evict, some, may_go=tuple(OLD), budget=60_000),
    "better": Workload(better, with_rough, may_go=tuple(OLD[2:4])),
    "erase": Workload(erase, some, may_go=tuple(OLD)),
    "clear": Workload(clear, some, may_go=tuple(OLD)),
    "quarantine": Workload(read, with_bad_files, may_go=(OLD[3], OLD[5]), damaged=True),
    "migrate": Workload(only_open, some, migrations=_MIGRATIONS),
    "rebuild": Workload(only_open, with_bad_catalog, damaged=True),
    "clean up": Workload(clean_up, with_leftovers, damaged=True),
    "repair": Workload(repair, with_bad_files, may_go=(OLD[3], OLD[5]), damaged=True),
}


def copy_folder(source: Path, target: Path) -> None:
    """Copy a prepared folder, or none."""
    if source.exists():
        shutil.copytree(source, target, symlinks=True)
