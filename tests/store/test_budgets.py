"""Budgets: what is evicted first, quotas, daily writes, what is written at all, and what is dropped with age."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import ConfigError, KVStore
from kvembed._block import Block, BlockInfo
from kvembed._budgets import DiskBudget, NamespaceQuotas, write_budget
from kvembed._catalog import Catalog
from kvembed._eviction import work, worth
from kvembed._keys import SNAPSHOT_IDS, block_key, probe_of, root_key, snapshot_key
from kvembed._schema import MIGRATIONS, statements
from kvembed._testing import (
    FINGERPRINT,
    SMALL_LAYOUT,
    assert_reads,
    block_path,
    forget_memory,
    keys_of,
    put_all,
    random_block,
    random_chain,
)
from kvembed._tiers.cpu import CpuTier

if TYPE_CHECKING:
    from pathlib import Path

FILE = 8192  # what a block of 16 small tokens takes on disk


def of_model(block: Block, digest: bytes) -> Block:
    """The same tokens of another model."""
    parent = root_key(digest) if block.info.start == 0 else block.info.parent
    key = block_key(parent, block.token_ids)
    info = BlockInfo(key, parent, digest, block.info.start, block.info.n_tokens, True, block.info.nbytes)
    return Block(info, block.token_ids, block.layout, block.data)


def on_disk(store: KVStore, blocks: list[Block]) -> list[bool]:
    store.flush()
    return [block_path(store, block).exists() for block in blocks]


def age(root: Path, seconds: float, keys: list[bytes] | None = None) -> None:
    """Make blocks look unused for so long, and housekeeping due."""
    db = sqlite3.connect(root / "kvembed.db")
    if keys is None:
        db.execute("UPDATE blocks SET last_used = last_used - ?", (seconds,))
    else:
        db.executemany("UPDATE blocks SET last_used = last_used - ? WHERE key = ?", [(seconds, key) for key in keys])
    db.execute("DELETE FROM meta WHERE name IN ('housekeeping', 'expiry')")
    db.commit()
    db.close()


# -- what a block is worth ---------------------------------------------------------------------------


def info_at(start: int, n: int = 256) -> BlockInfo:
    return BlockInfo(bytes(32), bytes(range(32)), FINGERPRINT, start, n, True, n * 40_000)


def test_work_grows_with_the_position() -> None:
    assert work(info_at(0)) == pytest.approx(256 * (1 + 128 / 8192))
    # At 8,192 attention costs as much as all weights.
    assert work(info_at(8192 - 128)) == pytest.approx(2 * 256)
    assert worth(info_at(0), 10_000_000) == pytest.approx(work(info_at(0)) / 10_000_000)


def test_a_snapshot_stands_for_the_tokens_before_it_and_small_things_are_not_kept_for_ever() -> None:
    parent = bytes(32)
    info = BlockInfo(snapshot_key(parent), parent, FINGERPRINT, 4096, 1, True, 1000)
    assert work(info) > 2048
    # A thousand bytes count as the 2,048 tokens they stand for: about as much as KV of them, not 10,000 times.
    assert worth(info, 1000) == pytest.approx(work(info) / (2048 << 14))
    assert list(SNAPSHOT_IDS) == [-1]


@pytest.fixture
def catalog(tmp_path: Path) -> Any:
    catalog = Catalog(tmp_path / "kvembed.db", create=True)
    yield catalog
    catalog.close()


def enter(catalog: Catalog, block: Block, file_bytes: int = 16 << 14, when: float = 1000.0) -> Block:
    catalog.insert([(block.info, probe_of(block.info.parent, block.token_ids), file_bytes, when)])
    return block


def first_out(catalog: Catalog) -> bytes:
    return catalog.to_evict(1)[0].info.key


def test_blocks_that_are_cheap_to_compute_go_before_dear_ones_of_the_same_size(catalog: Catalog) -> None:
    slow, fast = bytes([1]) * 32, bytes([2]) * 32
    for digest, speed in ((slow, 50.0), (fast, 5000.0)):
        catalog.add_namespace(digest)
        catalog.set_note(digest, "prefill_tokens_per_second", speed)
    dear = enter(catalog, of_model(random_block(seed=1), slow), when=1000.0)
    cheap = enter(catalog, of_model(random_block(seed=2), fast), when=2000.0)  # used later, and yet
    assert first_out(catalog) == cheap.key
    catalog.delete([cheap.key], "evicted")
    assert first_out(catalog) == dear.key


def test_large_blocks_go_before_small_ones_of_the_same_cost(catalog: Catalog) -> None:
    enter(catalog, random_block(seed=1), file_bytes=16 << 14)
    large = enter(catalog, random_block(seed=2), file_bytes=64 << 14, when=2000.0)
    assert first_out(catalog) == large.key


def test_nothing_stays_for_ever(catalog: Catalog) -> None:
    slow = bytes([1]) * 32
    catalog.add_namespace(slow)
    catalog.set_note(slow, "prefill_tokens_per_second", 100.0)  # ten times as dear as the others
    dear = enter(catalog, of_model(random_block(seed=0), slow))
    others = 0
    while catalog.row(dear.key) is not None and others < 40:
        others += 1
        enter(catalog, random_block(seed=others), when=1000.0 + others)
        catalog.delete([first_out(catalog)], "evicted")
    assert 8 <= others <= 12
    # Used again in time, it stays.
    again = enter(catalog, of_model(random_block(seed=0), slow))
    enter(catalog, random_block(seed=100))
    assert first_out(catalog) != again.key


def test_memory_gives_up_what_is_on_disk_before_what_is_only_here() -> None:
    tier = CpuTier(3 * 4096)
    only_here, written = random_block(seed=1), random_block(seed=2)
    tier.put(only_here)
    tier.put(written, on_disk=True)
    tier.put(random_block(seed=3))
    tier.put(random_block(seed=4))
    assert [info is not None for info in tier.contains([only_here.key, written.key])] == [True, False]


def test_what_the_writer_wrote_leaves_memory_before_what_it_could_not(tmp_path: Path) -> None:
    written, held_back, *others = [random_block(seed=n) for n in range(5)]
    with KVStore(tmp_path, max_cpu_bytes=3 * 4096, max_write_bytes_per_day=FILE) as store:
        for block in (written, held_back):
            store.put(block)
            store.flush()
        store.touch([written.key])  # used last, but it can be read again
        put_all(store, others[:2])
        store.flush()
        assert_reads(store, held_back, "cpu")
        assert_reads(store, written, "disk")


def test_memory_weighs_models_too_and_nothing_stays_for_ever() -> None:
    slow = bytes([1]) * 32
    tier = CpuTier(2 * 4096, {slow: 0.01}.get)  # ten times the default
    dear = of_model(random_block(seed=0), slow)
    tier.put(dear)
    others = 0
    while tier.contains([dear.key])[0] is not None and others < 40:
        others += 1
        tier.put(random_block(seed=others))
    assert 8 <= others <= 14


# -- shares of the disk ------------------------------------------------------------------------------


def test_a_share_of_the_disk_follows_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    share, fixed = DiskBudget("10%", tmp_path, 0), DiskBudget(50_000, tmp_path, 0)
    assert (share.now(lambda: 0), fixed.now(lambda: 0)) == (100_000, 50_000)
    free = 500_000
    assert share.now(lambda: 0) == 100_000  # not looked at more often than every ten seconds
    monkeypatch.setattr("kvembed._budgets._LOOK_AGAIN_S", 0.0)
    assert (share.now(lambda: 20_000), fixed.now(lambda: 0)) == (52_000, 50_000)


def test_a_store_gives_up_blocks_when_the_disk_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvembed._budgets._LOOK_AGAIN_S", 0.0)
    free = 4_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    with KVStore(tmp_path, max_disk_bytes="10%", max_write_bytes_per_day=None) as store:
        put_all(store, [random_block(seed=n) for n in range(20)])
        store.flush()
        assert store.stats().tiers[1].blocks == 20
        free = 1_000_000
        store.put(random_block(seed=50))
        store.flush()
        assert store.stats().tiers[1].nbytes <= store.max_disk_bytes < 200_000


# -- quotas of models --------------------------------------------------------------------------------


def test_a_model_stays_within_its_quota_and_others_are_left_alone(tmp_path: Path) -> None:
    one, two = bytes([1]) * 32, bytes([2]) * 32
    with KVStore(tmp_path, max_namespace_bytes={"greedy": 4 * FILE}) as store:
        store.register_namespace(one, {"name": "greedy"})
        store.register_namespace(two, {"name": "modest"})
        others = [of_model(random_block(seed=n), two) for n in range(8)]
        put_all(store, others)
        mine = [of_model(random_block(seed=100 + n), one) for n in range(9)]
        put_all(store, mine)
        assert on_disk(store, mine) == [False] * 5 + [True] * 4
        assert all(on_disk(store, others))
        models = {model.name: model for model in store.stats().models}
        assert (models["greedy"].nbytes, models["greedy"].quota) == (4 * FILE, 4 * FILE)
        assert (models["modest"].blocks, models["modest"].quota) == (8, None)
        assert "greedy" in repr(store.stats())
        assert "greedy" in store.stats()._repr_html_()


def test_quotas_are_found_by_name_digits_or_for_all(tmp_path: Path) -> None:
    digest = bytes.fromhex("ab" * 32)
    quotas = NamespaceQuotas({"llama": "10%", "abababab": 500, "*": 7})
    assert quotas.of(digest, "llama", 1000) == 500
    assert quotas.of(bytes(32), "llama", 1000) == 100
    assert quotas.of(bytes(32), "other", 1000) == 7
    assert NamespaceQuotas("1KiB").of(bytes(32), "", 0) == 1024
    assert NamespaceQuotas(None).of(bytes(32), "", 0) is None
    with pytest.raises(ConfigError, match="max_namespace_bytes"):
        KVStore(tmp_path, max_namespace_bytes={"llama": "lots"})
    with pytest.raises(ConfigError, match="max_namespace_bytes"):
        KVStore(tmp_path, max_disk_bytes=None, max_namespace_bytes=5)


def test_a_quota_full_of_pins_is_one_problem(tmp_path: Path) -> None:
    with KVStore(tmp_path, max_namespace_bytes=2 * FILE) as store:
        chain = random_chain(2)
        put_all(store, chain)
        store.flush()
        store.pin(keys_of(chain), "doc")
        put_all(store, [random_block(seed=n) for n in range(5, 8)])
        store.flush()
        (problem,) = store.take_problems()
        assert "quota" in problem
        assert "max_namespace_bytes" in problem
        assert on_disk(store, chain) == [True, True]


# -- daily writes ------------------------------------------------------------------------------------


def test_what_the_default_write_budget_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"small": 20 << 30, "laptop": 256 << 30, "array": 50 << 40}
    expected = {"small": 8 << 30, "laptop": (256 << 30) // 10, "array": 200 << 30}
    for name, size in sizes.items():
        monkeypatch.setattr(shutil, "disk_usage", lambda path, n=size: shutil._ntuple_diskusage(n, 0, n))
        assert write_budget("auto", tmp_path) == expected[name]
    assert write_budget("1%", tmp_path) == (50 << 40) // 100
    assert write_budget(None, tmp_path) is None
    with pytest.raises(ConfigError, match="max_write_bytes_per_day"):
        write_budget("much", tmp_path)


def test_a_spent_write_budget_keeps_new_blocks_in_memory_and_says_so_once(tmp_path: Path) -> None:
    blocks = [random_block(seed=n) for n in range(6)]
    with KVStore(tmp_path, max_write_bytes_per_day=2 * FILE) as store:
        put_all(store, blocks)
        assert on_disk(store, blocks) == [True, True, False, False, False, False]
        for block in blocks:
            assert_reads(store, block, "cpu")
        (problem,) = store.take_problems()
        assert "write budget of 16.0 KiB is spent" in problem
        store.put(random_block(seed=10))
        store.flush()
        assert store.take_problems() == []
        stats = store.stats()
        assert (stats.written_today, stats.max_write_bytes_per_day) == (2 * FILE, 2 * FILE)
        assert stats.held_back_today == 5 * FILE
        assert "written today 16.0 KiB of 16.0 KiB a day" in repr(stats)
    # Another process, the same day.
    with KVStore(tmp_path, max_write_bytes_per_day=2 * FILE) as store:
        store.put(random_block(seed=11))
        assert on_disk(store, [random_block(seed=11)]) == [False]


def test_tomorrow_there_is_a_new_write_budget_and_used_blocks_are_written_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = random_chain(4)
    with KVStore(tmp_path, max_write_bytes_per_day=2 * FILE) as store:
        put_all(store, chain)
        store.touch(keys_of(chain))
        assert on_disk(store, chain) == [True, True, False, False]
        for name in ("_ledger", "_admission", "_store_view"):
            monkeypatch.setattr(f"kvembed.{name}.today", lambda: "2999-01-01")
        store.touch(keys_of(chain))
        assert on_disk(store, chain) == [True] * 4
        assert store.stats().written_today == 2 * FILE
        assert store.written_by_day() == {time.strftime("%Y-%m-%d"): 2 * FILE, "2999-01-01": 2 * FILE}
        assert store.stats().written_bytes == 4 * FILE


def test_what_is_pinned_is_written_although_the_budget_is_spent(tmp_path: Path) -> None:
    chain = random_chain(3)
    with KVStore(tmp_path, max_write_bytes_per_day=0) as store:
        put_all(store, chain)
        assert on_disk(store, chain) == [False] * 3
        store.pin(keys_of(chain), "doc")
        assert on_disk(store, chain) == [True] * 3
        assert store.stats().written_today == 3 * FILE


def test_a_write_that_failed_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with KVStore(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr("kvembed._blockfile.write_file", fail)
            store.put(random_block())
            store.flush()
        assert len(store.take_problems()) == 1
        assert store.stats().written_today == 0


def test_a_block_already_on_disk_costs_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with KVStore(tmp_path) as store:
            store.put(random_block())
            store.flush()
            assert store.stats().written_today == FILE


_WRITE = """
import sys
from kvembed import KVStore
from kvembed._testing import *
with KVStore(sys.argv[1], max_write_bytes_per_day=int(sys.argv[3])) as store:
    put_all(store, [random_block(seed=1000 * int(sys.argv[2]) + n) for n in range(40)])
"""


@pytest.mark.multiprocess
def test_processes_share_one_write_budget(tmp_path: Path) -> None:
    KVStore(tmp_path).close()
    limit = 30 * FILE + 100
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", _WRITE, str(tmp_path), str(number), str(limit)])
        for number in range(3)
    ]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    with KVStore(tmp_path) as store:
        assert store.stats().written_today == 30 * FILE
        assert store.stats().tiers[1].blocks == 30


# -- what is written at all --------------------------------------------------------------------------


def test_by_default_everything_is_on_disk_after_a_restart(tmp_path: Path) -> None:
    chain = random_chain(3)
    with KVStore(tmp_path) as store:
        put_all(store, chain)
        store.touch(keys_of(chain))
    with KVStore(tmp_path) as store:
        assert on_disk(store, chain) == [True] * 3


def call(store: KVStore, chain: list[Block]) -> None:
    """What one call does with whole blocks: store what is new, then mark all as used."""
    known = store.lookup(keys_of(chain))
    put_all(store, chain[len(known) :])
    store.touch(keys_of(chain))


def test_seen_twice_writes_at_the_second_call(tmp_path: Path) -> None:
    once, twice = random_chain(3, seed=1), random_chain(3, seed=2)
    with KVStore(tmp_path, write_policy="seen-twice") as store:
        call(store, once)
        call(store, twice)
        assert on_disk(store, once + twice) == [False] * 6
        call(store, twice)
        assert on_disk(store, once + twice) == [False] * 3 + [True] * 3
        assert store.stats().write_policy == "seen-twice"
    # Seen by another process before, and computed again: that is the second time.
    with KVStore(tmp_path, write_policy="seen-twice") as store:
        call(store, once)
        assert on_disk(store, once) == [True] * 3


def test_seen_twice_writes_what_is_pinned(tmp_path: Path) -> None:
    chain = random_chain(2)
    with KVStore(tmp_path, write_policy="seen-twice") as store:
        call(store, chain)
        store.pin(keys_of(chain), "doc")
        assert on_disk(store, chain) == [True, True]


def test_worth_writes_what_takes_longer_to_compute_than_to_load(tmp_path: Path) -> None:
    slow, fast = bytes([1]) * 32, bytes([2]) * 32
    with KVStore(tmp_path, write_policy="worth") as store:
        assert store._admission is not None
        store._admission._seconds_per_byte = 1e-6  # a disk of 1 MB/s: 4 ms for a block
        for digest, speed in ((slow, 100.0), (fast, 1e6)):
            store.set_note(digest, "prefill_tokens_per_second", speed)
        dear, cheap = of_model(random_block(seed=1), slow), of_model(random_block(seed=2), fast)
        unknown = random_block(seed=3)
        put_all(store, [dear, cheap, unknown])
        assert on_disk(store, [dear, cheap, unknown]) == [True, False, True]
        # 16 tokens at 1,600 tokens/s take 10 ms: worth it only when it is known to be wanted again.
        store.set_note(fast, "prefill_tokens_per_second", 1600.0)
        between = of_model(random_block(seed=4), fast)
        call(store, [between])
        assert on_disk(store, [between]) == [False]
        call(store, [between])
        assert on_disk(store, [between]) == [True]


def test_a_policy_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seen-twice"):
        KVStore(tmp_path, write_policy="sometimes")
    assert not (tmp_path / "kvembed.db").exists()


# -- age ---------------------------------------------------------------------------------------------


def wait_until(done: Any) -> None:
    deadline = time.monotonic() + 10
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done()


def test_unused_blocks_are_dropped_and_pins_spared(tmp_path: Path) -> None:
    old, pinned, used = (random_chain(3, seed=n) for n in (1, 2, 3))
    with KVStore(tmp_path) as store:
        put_all(store, old + pinned + used)
        store.flush()
        store.pin(keys_of(pinned), "doc")
    age(tmp_path, 3600.0, keys_of(old + pinned))
    with KVStore(tmp_path, ttl="30m") as store:
        assert store.stats().ttl_s == 1800
        store.put(random_block(seed=77))  # wakes the writer
        wait_until(lambda: len(store.lookup(keys_of(old))) == 0)
        store.flush()
        assert on_disk(store, old + pinned + used) == [False] * 3 + [True] * 6
        assert store.verify().problems == ()


def test_without_a_ttl_nothing_is_dropped(tmp_path: Path) -> None:
    chain = random_chain(2)
    with KVStore(tmp_path) as store:
        put_all(store, chain)
    age(tmp_path, 1e8)
    with KVStore(tmp_path) as store:
        store.put(random_block(seed=77))
        wait_until(lambda: store._writer._housekeeping is None and store._writer._house_due > 0)
        assert on_disk(store, chain) == [True, True]


def test_a_process_that_runs_for_long_drops_blocks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvembed._writer._HOUSE_EVERY_S", 0.0)
    chain = random_chain(2)
    with KVStore(tmp_path, ttl="1h") as store:
        put_all(store, chain)
        store.flush()
        age(tmp_path, 7200.0)
        store.put(random_block(seed=77))
        wait_until(lambda: not any(block_path(store, block).exists() for block in chain))


@pytest.mark.parametrize("ttl", ["soon", -1])
def test_a_ttl_that_cannot_be_read(tmp_path: Path, ttl: Any) -> None:
    with pytest.raises(ConfigError, match="ttl"):
        KVStore(tmp_path, ttl=ttl)


def test_a_ttl_needs_a_disk_tier() -> None:
    with pytest.raises(ConfigError, match="on disk"):
        KVStore(max_disk_bytes=None, ttl="1d")


# -- blocks in use -----------------------------------------------------------------------------------


def test_a_block_that_was_just_opened_is_not_the_next_to_go(tmp_path: Path) -> None:
    blocks = [random_block(seed=n) for n in range(4)]
    budget = 4 * (FILE + 4096) + 4096
    with KVStore(tmp_path, max_cpu_bytes=None, max_disk_bytes=budget) as store:
        put_all(store, blocks)
        store.flush()
        source = store.open(blocks[0].key)  # the longest unused, but a call is at it
        assert source is not None
        store.put(random_block(seed=9))
        assert on_disk(store, blocks) == [True, False, True, True]
        source.close()


def test_an_exact_block_takes_the_place_of_its_rough_copy_in_a_full_store(tmp_path: Path) -> None:
    rough = [random_block(seed=n, exact=False) for n in range(3)]
    budget = 3 * (FILE + 4096) + 4096
    with KVStore(tmp_path, max_cpu_bytes=None, max_disk_bytes=budget) as store:
        put_all(store, rough)
        store.flush()
    # Smaller by one: the rough copy is the first to go, and must not be in the way of another.
    with KVStore(tmp_path, max_cpu_bytes=None, max_disk_bytes=budget - FILE) as store:
        exact = random_block(seed=0)
        store.put(exact)
        store.flush()
        assert store.take_problems() == []
        assert_reads(store, exact, "disk")


# -- the version before ------------------------------------------------------------------------------


def make_old_catalog(root: Path) -> None:
    """Replace a store's catalog by one of the first version that says the same."""
    new, old = root / "kvembed.db", root / "old.db"
    db = sqlite3.connect(old)
    for statement in statements(MIGRATIONS[0][1]):
        db.execute(statement)
    db.execute("CREATE TABLE migrations (name TEXT PRIMARY KEY, applied REAL NOT NULL)")
    db.execute("INSERT INTO migrations VALUES (?, 1.0)", (MIGRATIONS[0][0],))
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.execute("ATTACH ? AS new", (str(new),))
    names = "key, parent, namespace, start, n_tokens, probe, exact, nbytes, file_bytes, created, last_used, hits"
    db.execute("INSERT INTO namespaces SELECT id, digest, fields, created FROM new.namespaces")
    db.execute("INSERT INTO notes SELECT * FROM new.notes")
    db.execute("INSERT INTO pins SELECT * FROM new.pins")
    db.execute(f"INSERT INTO blocks ({names}) SELECT {names} FROM new.blocks")
    db.commit()
    db.close()
    for part in root.glob("kvembed.db*"):
        part.unlink()
    old.rename(new)
    os.chmod(new, 0o600)  # noqa: PTH101


def test_a_store_of_the_first_version_is_opened_and_goes_on(tmp_path: Path) -> None:
    chain, other = random_chain(5), [of_model(random_block(seed=9), bytes([2]) * 32)]
    with KVStore(tmp_path) as store:
        put_all(store, chain + other)
        store.set_note(FINGERPRINT, "prefill_tokens_per_second", 250.0)
        store.flush()
        store.pin(keys_of(chain), "doc")
        assert store._catalog is not None
        expected = store._catalog.select("SELECT key, worth, priority FROM blocks ORDER BY key")
        spaces = store._catalog.spaces()
    make_old_catalog(tmp_path)
    with KVStore(tmp_path) as store:
        assert store._catalog is not None
        assert store.take_problems() == []
        assert store._catalog.spaces() == spaces
        rows = store._catalog.select("SELECT key, worth, priority FROM blocks ORDER BY key")
        assert [row[0] for row in rows] == [row[0] for row in expected]
        for row, known in zip(rows, expected, strict=True):
            assert row[1] == pytest.approx(known[1])
        # Inserted before the speed was known, their priority was another: now they are weighed with it.
        priorities = {row[0]: row[2] for row in rows}
        assert priorities[chain[0].key] == pytest.approx(worth(chain[0].info, FILE) / 250)
        assert store.pins() == {"doc": keys_of(chain)}
        forget_memory(store)
        for block in chain:
            assert_reads(store, block, "disk")
        call(store, random_chain(2, seed=50))
        store.flush()
        assert store.stats().written_today == 2 * FILE
        assert store.hit_curve().calls == 1
        assert store.verify().problems == ()
    assert SMALL_LAYOUT.nbytes(16) == 4096
