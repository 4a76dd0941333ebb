"""The catalog: rows, counters, eviction order, versions, and what happens when it is missing or damaged."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvembed import KVStore, StoreError, StoreFormatError, StoreWarning
from kvembed._catalog import Catalog
from kvembed._keys import probe_of
from kvembed._rebuild import rebuild
from kvembed._schema import SCHEMA_VERSION
from kvembed._testing import FINGERPRINT, random_block, random_chain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvembed._block import Block


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "kvembed.db", create=True)
    yield catalog
    catalog.close()


def enter(catalog: Catalog, blocks: list[Block], created: float = 1000.0) -> None:
    catalog.insert((b.info, probe_of(b.info.parent, b.token_ids), 8192, created + n) for n, b in enumerate(blocks))


def evictable(catalog: Catalog) -> list[bytes]:
    return [row.info.key for row in catalog.to_evict(100)]


def make_store(root: Path, blocks: list[Block]) -> None:
    with KVStore(root) as store:
        store.register_namespace(FINGERPRINT, {"name": "tiny", "dtype": "float32"})
        for block in blocks:
            store.put(block)


def test_rows_and_counters(catalog: Catalog) -> None:
    chain = random_chain(3)
    enter(catalog, chain)
    assert catalog.get([b.key for b in chain]) == {b.key: b.info for b in chain}
    counters = catalog.counters()
    assert (counters.blocks, counters.nbytes, counters.file_bytes) == (3, 3 * 4096, 3 * 8192)
    assert catalog.delete([chain[2].key, bytes(32)]) == [chain[2].key]
    assert catalog.counters().blocks == 2
    enter(catalog, chain)
    assert catalog.counters().file_bytes == 3 * 8192


def test_more_keys_than_one_statement_takes(catalog: Catalog) -> None:
    chain = random_chain(3)
    enter(catalog, chain)
    others = [os.urandom(32) for _ in range(2500)]
    assert len(catalog.get([*others, chain[1].key])) == 1
    assert catalog.get([]) == {}


def test_a_row_entered_twice_keeps_its_hits(catalog: Catalog) -> None:
    block = random_block()
    enter(catalog, [block])
    catalog.hit_later(block.key)
    catalog.flush_touches()
    enter(catalog, [block], created=5.0)
    row = catalog.row(block.key)
    assert row is not None
    assert (row.hits, row.created) == (1, 5.0)
    assert row.last_used > 1000.0  # a block that is read is in use


def test_only_unpinned_leaves_are_evicted_in_order_of_use_when_all_cost_the_same(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvembed._eviction._ATTENTION_EVEN", float("inf"))
    a, b = random_chain(3, seed=1), random_chain(2, seed=2)
    enter(catalog, a + b)
    assert evictable(catalog) == [a[2].key, b[1].key]
    catalog.touch_later([block.key for block in a], now=9000.0)
    assert catalog.has_touches
    catalog.flush_touches()
    assert not catalog.has_touches
    assert evictable(catalog) == [b[1].key, a[2].key]
    catalog.pin("keep", [b[1].key])
    assert evictable(catalog) == [a[2].key]
    catalog.delete([a[2].key])
    assert evictable(catalog) == [a[1].key]
    catalog.unpin("keep")
    assert evictable(catalog) == [b[1].key, a[1].key]
    assert [row.info.key for row in catalog.to_evict(9, spare=b[1].key)] == [a[1].key]


def test_children_that_came_before_their_parent_count(catalog: Catalog) -> None:
    chain = random_chain(3)
    enter(catalog, chain[::-1])
    assert evictable(catalog) == [chain[2].key]


def test_a_pin_may_come_before_its_block(catalog: Catalog) -> None:
    block = random_block()
    catalog.pin("doc", [block.key])
    enter(catalog, [block])
    assert evictable(catalog) == []
    assert catalog.unpin("doc") == 1
    assert evictable(catalog) == [block.key]


def test_pins_keep_their_order(catalog: Catalog) -> None:
    keys = [os.urandom(32) for _ in range(20)]
    catalog.pin("doc", keys[:15])
    catalog.pin("doc", keys)
    catalog.pin("other", keys[:1])
    assert catalog.pins() == {"doc": keys, "other": keys[:1]}


def test_touching_never_goes_back_in_time(catalog: Catalog) -> None:
    block = random_block()
    enter(catalog, [block])
    catalog.touch_later([block.key], now=1.0)
    catalog.flush_touches()
    row = catalog.row(block.key)
    assert row is not None
    assert row.last_used == 1000.0


def test_a_failed_transaction_changes_nothing(catalog: Catalog) -> None:
    block = random_block()

    def fail() -> None:
        with catalog.transaction():
            enter(catalog, [block])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert catalog.counters().blocks == 0
    # The namespace of the lost transaction must not be remembered either.
    enter(catalog, [block])
    assert catalog.get([block.key])[block.key].namespace == FINGERPRINT
    assert list(catalog.namespaces()) == [FINGERPRINT]


def test_why_missing(catalog: Catalog) -> None:
    chain = random_chain(3)
    enter(catalog, chain)
    catalog.delete([chain[2].key], "evicted")
    catalog.delete([chain[1].key])
    assert [catalog.why_missing(b.key) for b in chain] == [None, None, "evicted"]
    enter(catalog, [chain[2]])
    assert catalog.why_missing(chain[2].key) is None


def test_tombstones_are_bounded(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvembed._catalog._TOMBSTONES", 5)
    monkeypatch.setattr("kvembed._catalog._TRIM_EVERY", 2)
    blocks = [random_block(seed=n) for n in range(12)]
    enter(catalog, blocks)
    for block in blocks:
        catalog.delete([block.key], "evicted")
    with catalog.connection() as db:
        assert 5 <= db.execute("SELECT count(*) FROM tombstones").fetchone()[0] <= 7
    assert catalog.why_missing(blocks[-1].key) == "evicted"
    assert catalog.why_missing(blocks[0].key) is None


def test_no_token_id_is_in_the_catalog(tmp_path: Path, catalog: Catalog) -> None:
    block = random_block(ids=[0x41424344 + n for n in range(16)])
    enter(catalog, [block])
    catalog.close()
    content = b"".join(path.read_bytes() for path in tmp_path.glob("kvembed.db*"))
    assert block.key in content
    assert block.token_ids[:2].tobytes() not in content


@pytest.mark.skipif(os.name == "nt", reason="modes are a POSIX matter")
def test_every_file_of_the_database_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        catalog = Catalog(tmp_path / "kvembed.db", create=True)
        enter(catalog, [random_block()])
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        catalog.close()
    finally:
        os.umask(old)
    assert modes == dict.fromkeys(("kvembed.db", "kvembed.db-wal", "kvembed.db-shm"), 0o600)


def test_each_thread_has_its_own_connection_and_they_end_with_it(catalog: Catalog) -> None:
    enter(catalog, random_chain(3))
    seen: list[tuple[int, int]] = []

    def work() -> None:
        with catalog.connection() as db:
            seen.append((id(db), catalog.counters().blocks))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    with catalog.connection() as db:
        assert id(db) not in {number for number, _ in seen}
    assert [count for _, count in seen] == [3, 3, 3]
    assert len(catalog._connections._all) == 1


def test_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    make_store(tmp_path, [random_block()])
    db = sqlite3.connect(tmp_path / "kvembed.db")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    for read_only in (None, True):
        with pytest.raises(StoreFormatError, match="newer kvembed"):
            KVStore(tmp_path, read_only=read_only)
    assert (tmp_path / "kvembed.db").exists()


def test_migrations_are_recorded(catalog: Catalog) -> None:
    with catalog.connection() as db:
        assert [name for (name,) in db.execute("SELECT name FROM migrations")] == [
            "001_initial",
            "002_budgets",
            "003_codecs",
        ]


def found(store: KVStore, chain: list[Block]) -> int:
    return len(store.lookup([block.key for block in chain]))


def spoil(root: Path, how: str) -> None:
    path = root / "kvembed.db"
    if how == "missing":
        for part in root.glob("kvembed.db*"):
            part.unlink()
    elif how == "garbage":
        path.write_bytes(b"this is not a database at all " * 500)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        os.truncate(path, 5000)
    elif how == "zeroed pages":
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(bytes(path.stat().st_size - 4096))
    elif how == "only the wal is left":
        db = sqlite3.connect(path)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("DELETE FROM blocks")
        wal = (root / "kvembed.db-wal").read_bytes()
        db.close()
        path.unlink()
        (root / "kvembed.db-wal").write_bytes(wal)
    elif how == "marked":
        (root / "kvembed.db.damaged").touch()


@pytest.mark.parametrize(
    "how", ["missing", "garbage", "empty", "cut", "zeroed pages", "only the wal is left", "marked"]
)
def test_a_catalog_that_cannot_be_used_is_made_again(tmp_path: Path, how: str) -> None:
    chain, other = random_chain(5), random_block(seed=99)
    make_store(tmp_path, [*chain, other])
    spoil(tmp_path, how)
    with pytest.warns(StoreWarning, match=r"6 block files") as caught:
        store = KVStore(tmp_path)
    assert len(caught) == 1
    with store:
        assert found(store, chain) == 5
        assert found(store, [other]) == 1
        assert store.verify().problems == ()
        assert store.namespaces() == {FINGERPRINT: {"name": "tiny", "dtype": "float32"}}
        store.put(random_block(seed=100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KVStore(tmp_path).close()


def test_a_crash_before_the_first_row_is_made_good_in_silence(tmp_path: Path) -> None:
    make_store(tmp_path, [random_block()])
    catalog = Catalog(tmp_path / "kvembed.db")
    catalog.delete([random_block().key])
    catalog.close()
    with KVStore(tmp_path) as store:
        assert found(store, [random_block()]) == 1


def test_a_locked_catalog_is_an_error_not_a_reason_to_make_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path, [random_block()])
    monkeypatch.setattr("kvembed._connections._BUSY_S", 0.05)
    db = sqlite3.connect(tmp_path / "kvembed.db")
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    db.execute("UPDATE blocks SET hits = 1")
    with pytest.raises(StoreError, match="cannot be opened"):
        KVStore(tmp_path)
    db.execute("ROLLBACK")
    db.close()
    with KVStore(tmp_path) as store:
        assert found(store, [random_block()]) == 1


def test_bad_files_do_not_stop_a_rebuild(tmp_path: Path) -> None:
    chain = random_chain(4)
    make_store(tmp_path, chain)
    files = {path.stem: path for path in (tmp_path / "blocks").rglob("*.safetensors")}
    files[chain[3].key.hex()].write_bytes(b"garbage")
    (tmp_path / "namespaces" / "nonsense.json").write_text("{")
    (tmp_path / "blocks" / "notes.txt").write_text("not ours")
    (tmp_path / "kvembed.db").unlink()
    steps: list[tuple[int, int]] = []
    assert rebuild(tmp_path, lambda done, total: steps.append((done, total))) == 3
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_rebuild_by_another_process_is_not_undone(tmp_path: Path) -> None:
    make_store(tmp_path, random_chain(2))
    before = (tmp_path / "kvembed.db").stat().st_ino
    assert rebuild(tmp_path) == 2  # finds a good catalog: somebody else was faster
    assert (tmp_path / "kvembed.db").stat().st_ino == before


def test_damage_met_while_running_is_a_miss_now_and_mended_at_the_next_opening(tmp_path: Path) -> None:
    chain = random_chain(40)
    make_store(tmp_path, chain)
    store = KVStore(tmp_path, max_cpu_bytes=None)
    # The pages are read when first needed: they are destroyed before that.
    with (tmp_path / "kvembed.db").open("r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * (os.path.getsize(tmp_path / "kvembed.db") - 8192))  # noqa: PTH202
    assert store.lookup([block.key for block in chain]) == []
    problems = store.take_problems()
    assert len(problems) == 1
    assert "catalog failed" in problems[0]
    with pytest.warns(StoreWarning, match="found damaged; it was made again from 40 block files"):
        other = KVStore(tmp_path)
    # What the first one still meets does not condemn the new catalog.
    assert store.lookup([block.key for block in chain]) == []
    store.close()
    assert found(other, chain) == 40
    other.close()
    with KVStore(tmp_path) as store:
        assert found(store, chain) == 40


@pytest.mark.slow
def test_a_catalog_of_many_rows_answers_for_many_keys(tmp_path: Path) -> None:
    chains = [random_chain(40, seed=n, tokens=8) for n in range(250)]
    catalog = Catalog(tmp_path / "kvembed.db", create=True)
    enter(catalog, [block for chain in chains for block in chain])
    keys = [block.key for chain in chains[:10] for block in chain]
    # How long it takes is measured by benchmarks/lookup.py: on a busy machine a bound here says nothing.
    assert len(catalog.get(keys)) == 400
    catalog.close()
