"""What `KVStore` does about bad files, bad options, folders that cannot be written, and after `close`."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvembed import BlockFormatError, ConfigError, KVStore, StoreClosedError, StoreReadOnlyError, StoreWarning
from kvembed._keys import as_token_ids
from kvembed._store_open import open_folder
from kvembed._testing import (
    FINGERPRINT,
    assert_reads,
    block_path,
    keys_of,
    put_all,
    random_block,
    random_chain,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_a_bad_file_is_a_miss_once_and_kept_aside(tmp_path: Path) -> None:
    chain = random_chain(3)
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        put_all(store, chain)
        store.flush()
        path = block_path(store, chain[1])
        path.write_bytes(path.read_bytes()[:-1])
        assert len(store.lookup(keys_of(chain))) == 3
        assert store.open(chain[1].key) is None
        assert not path.exists()
        assert len(store.lookup(keys_of(chain))) == 1
        assert store.why_missing(chain[1].key) == "quarantined"
        names = sorted(p.name for p in (tmp_path / "quarantine").iterdir())
        assert names == [path.name, f"{path.name}.reason.txt"]
        assert "bytes, not the" in (tmp_path / "quarantine" / names[1]).read_text()
        problems = store.take_problems()
        assert len(problems) == 1
        assert "was dropped" in problems[0]
        assert store.take_problems() == []
        store.put(chain[1])
        store.flush()
        assert len(store.lookup(keys_of(chain))) == 3
        assert store.why_missing(chain[1].key) is None
        assert store.verify().problems == ()


def test_bytes_that_changed_are_found_when_read_and_discarded(tmp_path: Path) -> None:
    block = random_block()
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        store.put(block)
        store.flush()
        path = block_path(store, block)
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
        source = store.open(block.key)
        assert source is not None
        rows = np.zeros((2, 16, 32), np.uint8)
        source.read_into(0, [rows])
        with pytest.raises(BlockFormatError, match="tensor 3"):
            source.read_into(3, [rows])
        source.close()
        store.discard(block.key, "tensor 3 does not match its checksum")
        assert store.lookup([block.key]) == []
        assert store.why_missing(block.key) == "quarantined"


def test_a_block_under_the_name_of_another_is_not_served(tmp_path: Path) -> None:
    a, b = random_block(seed=1), random_block(seed=2)
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        put_all(store, [a, b])
        store.flush()
        block_path(store, a).write_bytes(block_path(store, b).read_bytes())
        assert store.open(a.key) is None
        assert_reads(store, b, "disk")


def test_a_missing_file_is_a_miss(tmp_path: Path) -> None:
    block = random_block()
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        store.put(block)
        store.flush()
        block_path(store, block).unlink()
        assert store.open(block.key) is None
        assert store.lookup([block.key]) == []
        assert store.find_tail(block.info.parent, block.token_ids) is None
        assert store.take_problems() == []
        store.put(block)
        store.flush()
        assert_reads(store, block, "disk")


def test_too_many_open_files_is_no_reason_to_drop_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block()
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        store.put(block)
        store.flush()

        def fail(*_: Any) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr("os.open", fail)
        assert store.open(block.key) is None
        monkeypatch.undo()
        assert_reads(store, block, "disk")
        assert ["Too many open files" in problem for problem in store.take_problems()] == [True]


def test_quarantine_is_bounded(tmp_path: Path) -> None:
    blocks = [random_block(seed=n) for n in range(20)]
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        put_all(store, blocks)
        for block in blocks:
            store.flush()
            store.discard(block.key, "test")
        assert 1 <= len(list((tmp_path / "quarantine").glob("*.safetensors"))) <= 8
        assert len(store.take_problems()) == 20


def test_after_close_everything_says_so(tmp_path: Path) -> None:
    store = KVStore(tmp_path)
    store.put(random_block())
    store.close()
    store.close()
    calls: list[Any] = [
        lambda: store.lookup([]),
        lambda: store.find_tail(bytes(32), as_token_ids(range(9))),
        lambda: store.open(bytes(32)),
        lambda: store.put(random_block()),
        lambda: store.promote([]),
        lambda: store.touch([]),
        lambda: store.discard(bytes(32), ""),
        lambda: store.reserve("a", 1),
        lambda: store.register_namespace(bytes(32), {}),
        store.namespaces,
        lambda: store.get_note(bytes(32), ""),
        lambda: store.set_note(bytes(32), "", 1),
        lambda: store.why_missing(bytes(32)),
        lambda: store.children(bytes(32)),
        lambda: store.token_ids(bytes(32)),
        store.stats,
        store.ls,
        lambda: store.pin([bytes(32)]),
        lambda: store.unpin("a"),
        store.pins,
        store.prune,
        lambda: store.remove([bytes(32)]),
        lambda: store.forget("a"),
        store.verify,
        store.clear,
        store.flush,
    ]
    for call in calls:
        with pytest.raises(StoreClosedError, match="closed"):
            call()
    assert store.take_problems() == []
    assert store.closed
    assert "closed" in repr(store)


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="durability"):
        KVStore(tmp_path, durability="maybe")
    with pytest.raises(ConfigError, match="max_disk_bytes"):
        KVStore(tmp_path, max_disk_bytes="lots")
    with pytest.raises(ConfigError, match="max_cpu_bytes"):
        KVStore(tmp_path, max_cpu_bytes="-1")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        KVStore(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_shares_of_memory_and_disk(tmp_path: Path) -> None:
    with KVStore(tmp_path, max_cpu_bytes="10%", max_disk_bytes="1%") as store:
        assert 0 < store.max_cpu_bytes < 1 << 44
        assert 0 < store.max_disk_bytes < 1 << 50
    with KVStore(tmp_path) as store:
        assert store.max_cpu_bytes <= 4 << 30
        assert store.max_disk_bytes <= 20 << 30


def test_a_budget_too_small_for_one_block_is_one_problem(tmp_path: Path) -> None:
    with KVStore(tmp_path, max_cpu_bytes=1000, max_disk_bytes=6000) as store:
        put_all(store, random_chain(3))
        store.flush()
        problems = store.take_problems()
        assert len(problems) == 1
        assert "too small for one block (needs" in problems[0]
        assert store.lookup(keys_of(random_chain(3))) == []


@pytest.mark.skipif(os.name == "nt", reason="modes are a POSIX matter")
def test_everything_is_private_under_umask_0(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with KVStore(tmp_path / "a" / "store", max_cpu_bytes=None) as store:
            store.register_namespace(FINGERPRINT, {"name": "tiny"})
            put_all(store, random_chain(3))
            store.flush()
            store.discard(random_chain(3)[2].key, "test")
            for path in (tmp_path / "a").rglob("*"):
                wanted = 0o700 if path.is_dir() else 0o600
                assert stat.S_IMODE(path.stat().st_mode) == wanted, path
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
            assert store.verify().problems == ()
    finally:
        os.umask(old)


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVEMBED_CACHE_DIR", str(tmp_path / "cache"))
    with KVStore() as store:
        assert store.path == tmp_path / "cache" / "store"
        assert (tmp_path / "cache" / "store").is_dir()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = random_chain(2)
    with KVStore(tmp_path / "store") as store:
        put_all(store, chain)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("kvembed._store_open.make_private_dir", fail)
    with pytest.raises(
        StoreReadOnlyError, match=r"new cannot be written \(Read-only file system\).*max_disk_bytes=None"
    ):
        KVStore(tmp_path / "new")
    with pytest.raises(StoreReadOnlyError, match="cannot be written"):
        KVStore(tmp_path / "store", read_only=False)
    with pytest.warns(StoreWarning, match="opened read-only") as caught:
        store = KVStore(tmp_path / "store")
    assert len(caught) == 1
    with store:
        assert len(store.lookup(keys_of(chain))) == 2


def test_read_only_reads_and_changes_nothing(tmp_path: Path) -> None:
    chain = random_chain(3)
    with KVStore(tmp_path) as store:
        store.register_namespace(FINGERPRINT, {"name": "tiny"})
        put_all(store, chain)
        store.pin(keys_of(chain), "doc")

    def contents() -> dict[str, tuple[int, int]]:
        files = (p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(("-shm", "-wal")))
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}

    before = contents()
    with KVStore(tmp_path, read_only=True) as store:
        assert [s.tier for s in store.lookup(keys_of(chain))] == ["disk"] * 3
        assert_reads(store, chain[0], "disk")
        new = random_block(seed=50)
        store.put(new)
        assert [s.tier for s in store.lookup([new.key])] == ["cpu"]
        store.touch(keys_of(chain))
        store.promote(keys_of(chain))
        store.flush()
        assert [s.tier for s in store.lookup(keys_of(chain))] == ["cpu"] * 3
        store.set_note(FINGERPRINT, "x", 1)
        assert store.get_note(FINGERPRINT, "x") == 1
        store.register_namespace(bytes(32), {"name": "new"})
        assert set(store.namespaces()) == {FINGERPRINT, bytes(32)}
        store.discard(chain[2].key, "test")
        assert store.stats().read_only
        for change in (
            store.clear,
            lambda: store.pin([new.key]),
            lambda: store.forget("doc"),
            lambda: store.unpin("doc"),
            store.prune,
        ):
            with pytest.raises(StoreReadOnlyError, match="read-only"):
                change()
        assert store.prune(max_bytes=0, unpinned_only=False, dry_run=True).blocks == 3
        assert store.verify().ok
        assert len(store.ls()) == 2
    assert contents() == before


def test_a_bad_block_of_a_read_only_store_is_found_once(tmp_path: Path) -> None:
    chain = random_chain(3)
    with KVStore(tmp_path) as store:
        put_all(store, chain)
        store.flush()
        path = block_path(store, chain[1])
    path.write_bytes(b"garbage")
    with KVStore(tmp_path, read_only=True) as store:
        assert len(store.lookup(keys_of(chain))) == 3
        assert store.open(chain[1].key) is None
        assert len(store.lookup(keys_of(chain))) == 1
        store.discard(chain[0].key, "its bytes changed")
        assert store.lookup(keys_of(chain)) == []
        assert store.find_tail(chain[0].info.parent, chain[0].token_ids) is None
        assert store.open(chain[0].key) is None
        assert len(store.take_problems()) == 2
    assert path.read_bytes() == b"garbage"


def test_read_only_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreReadOnlyError, match="holds no store"):
        KVStore(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


def test_read_only_with_a_bad_catalog_warns(tmp_path: Path) -> None:
    (tmp_path / "kvembed.db").write_bytes(b"garbage" * 1000)
    with pytest.warns(StoreWarning, match="not used"):
        store = KVStore(tmp_path, read_only=True)
    with store:
        store.put(random_block())
        assert len(store.lookup([random_block().key])) == 1
    assert (tmp_path / "kvembed.db").read_bytes() == b"garbage" * 1000


def test_opening_leaves_no_trace_but_the_store(tmp_path: Path) -> None:
    opened = open_folder(tmp_path / "s", None)
    assert opened.catalog is not None
    opened.catalog.close()
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        ".catalog.lock",
        "blocks",
        "kvembed.db",
        "namespaces",
        "quarantine",
    ]


def test_nothing_runs_until_the_first_put(tmp_path: Path) -> None:
    before = threading.active_count()
    with KVStore(tmp_path) as store:
        store.lookup([bytes(32)])
        store.stats()
        assert threading.active_count() == before
        store.put(random_block())
        assert [t.name for t in threading.enumerate() if t.name == "kvembed-writer"] == ["kvembed-writer"]
    assert threading.active_count() == before


def test_importing_the_store_needs_no_torch() -> None:
    code = "import sys, kvembed; kvembed.KVStore; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
