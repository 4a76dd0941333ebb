"""The background writer: order, backpressure, a disk that fails, the end of the process, fork."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import KVStore
from kvembed._catalog import Catalog
from kvembed._testing import assert_reads, block_path, forget_memory, keys_of, put_all, random_block, random_chain

if TYPE_CHECKING:
    from pathlib import Path

    from kvembed._block import Block


class SlowDisk:
    """Holds every write until `go` is set, and counts what comes through."""

    def __init__(self, store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
        assert store._disk is not None
        self.go = threading.Event()
        self.written: list[bytes] = []
        self._put = store._disk.put
        monkeypatch.setattr(store._disk, "put", self.put)

    def put(self, block: Block) -> bool:
        assert self.go.wait(20)
        self.written.append(block.key)
        return self._put(block)


def test_put_returns_before_the_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = random_chain(5)
    with KVStore(tmp_path) as store:
        disk = SlowDisk(store, monkeypatch)
        put_all(store, chain)
        assert len(store.lookup(keys_of(chain))) == 5
        assert store.stats().pending_writes == 5
        assert not store.flush(timeout=0.05)
        disk.go.set()
        assert store.flush()
        assert store.stats().pending_writes == 0
        assert disk.written == keys_of(chain)


def test_the_writer_yields_to_the_model(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("thread priorities are a Linux matter")
    with KVStore(tmp_path) as store:
        store.put(random_block())
        store.flush()
        (thread,) = [t for t in threading.enumerate() if t.name == "kvembed-writer"]
        assert thread.daemon
        assert thread.native_id is not None
        assert os.getpriority(os.PRIO_PROCESS, thread.native_id) >= 10
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 10


def test_a_block_already_here_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block()
    with KVStore(tmp_path) as store:
        disk = SlowDisk(store, monkeypatch)
        disk.go.set()
        for _ in range(3):
            store.put(block)
            store.flush()
        assert disk.written == [block.key]
        forget_memory(store)
        inode = block_path(store, block).stat().st_ino
        store.put(block)
        store.flush()
        assert block_path(store, block).stat().st_ino == inode


@pytest.mark.parametrize("cpu", [3 * 4096, 1000, None], ids=["room for three", "room for none", "off"])
def test_a_slow_disk_slows_put_down_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: int | None
) -> None:
    blocks = [random_block(seed=n) for n in range(12)]
    with KVStore(tmp_path, max_cpu_bytes=cpu) as store:
        disk = SlowDisk(store, monkeypatch)
        accepted: list[int] = []

        def producer() -> None:
            for number, block in enumerate(blocks):
                store.put(block)
                accepted.append(number)

        thread = threading.Thread(target=producer)
        thread.start()
        time.sleep(0.3)
        # What fits into the tier, and one outside it.
        assert len(accepted) == (3 if cpu == 3 * 4096 else 1)
        if store._cpu is not None:
            assert store._cpu.nbytes <= store._cpu.max_bytes
        disk.go.set()
        thread.join(20)
        assert len(accepted) == 12
        store.flush()
        assert sorted(disk.written) == sorted(keys_of(blocks))
        for block in blocks:
            store.open(block.key)
        forget_memory(store)
        for block in blocks:
            assert_reads(store, block, "disk")


def test_an_exact_block_put_while_a_rough_one_waits_is_the_one_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = random_block(seed=1)
    rough = random_block(ids=exact.token_ids, seed=2, exact=False)
    with KVStore(tmp_path) as store:
        disk = SlowDisk(store, monkeypatch)
        store.put(random_block(seed=9))  # keeps the writer busy
        store.put(rough)
        store.put(exact)
        disk.go.set()
        forget_memory(store)
        assert_reads(store, exact, "disk")
        assert disk.written.count(exact.key) == 1


def test_memory_held_by_a_live_cache_does_not_stop_storing(tmp_path: Path) -> None:
    chain = random_chain(20)
    with KVStore(tmp_path, max_cpu_bytes=1 << 20) as store:
        store.reserve("live", 2 << 20)
        put_all(store, chain)
        store.flush()
        assert [s.tier for s in store.lookup(keys_of(chain))] == ["disk"] * 20


def test_promotion_copies_from_the_root_on_as_far_as_it_fits(tmp_path: Path) -> None:
    chain = random_chain(6)
    with KVStore(tmp_path) as store:
        put_all(store, chain)
    with KVStore(tmp_path, max_cpu_bytes=4 * 4096) as store:
        store.promote(keys_of(chain))
        store.flush()
        assert [s.tier for s in store.lookup(keys_of(chain))] == ["cpu"] * 4 + ["disk"] * 2
        assert_reads(store, chain[0], "cpu")
        assert store.take_problems() == []


def test_promotion_of_a_bad_block_drops_it(tmp_path: Path) -> None:
    chain = random_chain(3)
    with KVStore(tmp_path, max_cpu_bytes="1MiB") as store:
        put_all(store, chain)
        forget_memory(store)
        path = block_path(store, chain[1])
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
        store.promote(keys_of(chain))
        store.flush()
        assert [s.tier for s in store.lookup(keys_of(chain))] == ["cpu"]
        assert store.why_missing(chain[1].key) == "quarantined"


# -- a disk that fails -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), OSError(5, "Input/output error"), OSError(30, "Read-only file system")],
)
def test_a_full_disk_is_one_problem_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    before, during, after = random_chain(3, seed=1), random_chain(5, seed=2), random_chain(3, seed=3)
    with KVStore(tmp_path, max_cpu_bytes="1MiB") as store:
        put_all(store, before)
        store.flush()

        def fail(fd: int, buffers: Any) -> None:
            os.write(fd, bytes(buffers[0])[:10])
            raise error

        monkeypatch.setattr("kvembed._files.write_all", fail)
        put_all(store, during)
        store.flush()
        problems = store.take_problems()
        assert len(problems) == 1
        assert str(error.strerror) in problems[0]
        assert "memory only" in problems[0]
        assert len(store.lookup(keys_of(during))) == 5  # from memory
        monkeypatch.undo()
        put_all(store, after)  # still within the pause
        store.flush()
        assert len(list((tmp_path / "blocks").rglob("*"))) - len(list((tmp_path / "blocks").iterdir())) == 3
        assert store.verify().problems == ()
        store._writer._paused_until = 0.0
        late = random_chain(2, seed=4)
        put_all(store, late)
        forget_memory(store)
        assert [len(store.lookup(keys_of(c))) for c in (before, during, after, late)] == [3, 0, 0, 2]
        assert store.take_problems() == []


def test_a_catalog_that_cannot_be_written_leaves_no_file_without_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = random_block()
    with KVStore(tmp_path) as store:
        assert store._disk is not None

        def fail(_: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(store._disk.catalog, "insert", fail)
        store.put(block)
        store.flush()
        assert not block_path(store, block).exists()
        assert "disk is full" in store.take_problems()[0]
        monkeypatch.undo()
        assert store.verify().problems == ()


def test_a_catalog_that_cannot_be_read_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block()
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        store.put(block)
        store.flush()
        assert store._catalog is not None

        def fail(*_: Any, **__: Any) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        for name in ("get", "tails", "children", "why_missing", "note", "set_note", "namespaces", "add_namespace"):
            monkeypatch.setattr(store._catalog, name, fail)
        assert store.lookup([block.key]) == []
        assert store.find_tail(block.info.parent, block.token_ids) is None
        assert store.children(block.info.parent) == []
        assert store.why_missing(block.key) is None
        assert store.get_note(bytes(32), "a") is None
        store.set_note(bytes(32), "a", 1)
        assert store.get_note(bytes(32), "a") == 1
        store.register_namespace(bytes(32), {"name": "x"})
        assert store.namespaces() == {bytes(32): {"name": "x"}}
        assert all("disk I/O error" in problem for problem in store.take_problems())
        monkeypatch.undo()
        assert len(store.lookup([block.key])) == 1


def test_a_bug_in_a_job_does_not_end_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVStore(tmp_path) as store:
        assert store._disk is not None

        def fail(_: Any) -> None:
            raise ZeroDivisionError("oops")

        monkeypatch.setattr(store._disk, "put", fail)
        store.put(random_block(seed=1))
        store.flush()
        monkeypatch.undo()
        store.put(random_block(seed=2))
        store.flush()
        assert "ZeroDivisionError: oops" in store.take_problems()[0]
        assert block_path(store, random_block(seed=2)).exists()


# -- cleaning up after others ------------------------------------------------------------------------


def test_leftovers_of_crashed_writers_are_cleaned_up(tmp_path: Path) -> None:
    chain = random_chain(3)
    with KVStore(tmp_path) as store:
        put_all(store, chain)
        store.flush()
        files = [block_path(store, block) for block in chain]
    # As after a crash between the file and its row, and one in the middle of a write.
    catalog = Catalog(tmp_path / "kvembed.db", create=True)
    catalog.delete([chain[2].key])
    with catalog.connection() as db:
        db.execute("DELETE FROM meta WHERE name = 'housekeeping'")
    catalog.close()
    old, new = (files[0].parent / f".{name}.1.ab.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half a block")
    for path in (old, files[2]):
        os.utime(path, (1e9, 1e9))
    with KVStore(tmp_path) as store:
        assert len(store.lookup(keys_of(chain))) == 2
        store.put(random_block(seed=77))
        deadline = time.monotonic() + 10
        while len(store.lookup(keys_of(chain))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(store.lookup(keys_of(chain))) == 3
        assert not old.exists()
        assert new.exists()


def test_housekeeping_is_not_repeated_by_every_process(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "kvembed.db", create=True)
    assert catalog.claim("housekeeping", 3600)
    assert not catalog.claim("housekeeping", 3600)
    assert catalog.claim("housekeeping", 0)
    with catalog.connection() as db:
        db.execute("UPDATE meta SET value = value + 1e6 WHERE name = 'housekeeping'")
    assert catalog.claim("housekeeping", 3600)  # a clock that was set back
    catalog.close()
