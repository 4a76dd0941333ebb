"""Several stores on one folder: in one process, and in several."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvembed import ConfigError, KVStore
from kvembed._testing import assert_reads, block_path, keys_of, put_all, random_block, random_chain

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.multiprocess


def run(code: str, *args: object) -> subprocess.Popen[str]:
    head = "import sys\nfrom kvembed import KVStore\nfrom kvembed._testing import *\n"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", head + code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == ""
    return out.strip()


def test_two_processes_see_each_other(tmp_path: Path) -> None:
    code = """
with KVStore(sys.argv[1]) as store:
    put_all(store, random_chain(4, seed=2))
    store.flush()
    print(len(store.lookup(keys_of(random_chain(4, seed=1)))))
"""
    with KVStore(tmp_path) as store:
        put_all(store, random_chain(4, seed=1))
        store.flush()
        assert finish(run(code, tmp_path)) == "4"
        theirs = random_chain(4, seed=2)
        assert [s.tier for s in store.lookup(keys_of(theirs))] == ["disk"] * 4
        for block in theirs:
            assert_reads(store, block, "disk")
        assert store.verify().problems == ()


def test_many_processes_open_a_new_folder_at_once(tmp_path: Path) -> None:
    code = """
store = KVStore(sys.argv[1], max_cpu_bytes=None)
put_all(store, random_chain(5, seed=int(sys.argv[2])))
put_all(store, random_chain(5, seed=99))
store.close()
"""
    for process in [run(code, tmp_path / "new", number) for number in range(6)]:
        finish(process)
    with KVStore(tmp_path / "new", max_cpu_bytes=None) as store:
        for seed in (*range(6), 99):
            assert len(store.lookup(keys_of(random_chain(5, seed=seed)))) == 5
        assert store.stats().tiers[0].blocks == 35
        assert store.verify().problems == ()


def test_many_processes_open_a_folder_with_a_bad_catalog_at_once(tmp_path: Path) -> None:
    with KVStore(tmp_path) as store:
        put_all(store, random_chain(5))
    (tmp_path / "kvembed.db").write_bytes(b"garbage" * 3000)
    code = """
import warnings
warnings.simplefilter("ignore")
with KVStore(sys.argv[1], max_cpu_bytes=None) as store:
    print(len(store.lookup(keys_of(random_chain(5)))))
    put_all(store, random_chain(3, seed=10 + int(sys.argv[2])))
"""
    assert [finish(p) for p in [run(code, tmp_path, n) for n in range(4)]] == ["5"] * 4
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        assert store.verify().problems == ()
        assert [len(store.lookup(keys_of(random_chain(3, seed=10 + n)))) for n in range(4)] == [3] * 4


def test_the_same_block_written_by_two(tmp_path: Path) -> None:
    with KVStore(tmp_path) as one, KVStore(tmp_path) as two:
        for _ in range(10):
            chain = random_chain(3, seed=7)
            threads = [threading.Thread(target=put_all, args=(store, chain)) for store in (one, two)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            one.flush()
            two.flush()
            assert one.stats().tiers[1].blocks == two.stats().tiers[1].blocks == 3
            assert one.verify().problems == ()
            one.clear()
            assert two._cpu is not None
            two._cpu.clear()


def test_what_another_evicts_is_a_miss(tmp_path: Path) -> None:
    chain = random_chain(3)
    with KVStore(tmp_path, max_cpu_bytes=None) as reader, KVStore(tmp_path) as other:
        put_all(reader, chain)
        reader.flush()
        found = reader.lookup(keys_of(chain))
        source = reader.open(chain[2].key)
        assert source is not None
        other.clear()
        assert len(found) == 3
        assert [reader.open(stored.info.key) for stored in found] == [None, None, None]
        assert reader.lookup(keys_of(chain)) == []
        # What was open stays readable.
        rows = np.zeros((2, 16, 32), np.uint8)
        source.read_into(0, [rows])
        assert np.array_equal(rows, chain[2].tensor(0))
        source.close()
        assert reader.take_problems() == []


def test_new_blocks_are_seen_by_others_within_a_second(tmp_path: Path) -> None:
    code = """
import time
store = KVStore(sys.argv[1])
for line in sys.stdin:
    store.put(random_chain(1, seed=int(line))[0])
    print("put", flush=True)
    # No flush and no close: the background thread is enough.
store.close()
"""
    process = run(code, tmp_path)
    assert process.stdin is not None
    assert process.stdout is not None
    seconds: list[float] = []
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        for seed in range(100, 105):
            process.stdin.write(f"{seed}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "put\n"
            began = time.perf_counter()
            key = random_chain(1, seed=seed)[0].key
            while not store.lookup([key]):
                assert time.perf_counter() - began < 20
                time.sleep(0.005)
            seconds.append(time.perf_counter() - began)
            assert_reads(store, random_chain(1, seed=seed)[0], "disk")
    process.stdin.close()
    process.wait(30)
    process.stdout.close()
    if process.stderr is not None:
        assert process.stderr.read() == ""
        process.stderr.close()
    # The middle one: a busy machine may hold up any process once.
    assert sorted(seconds)[2] < 1.0, seconds


def test_processes_write_the_same_blocks_at_the_same_time(tmp_path: Path) -> None:
    code = """
import time
store = KVStore(sys.argv[1], max_cpu_bytes=None)
for number in range(6):
    chain = random_chain(4, seed=number)
    moment = float(sys.argv[2]) + 0.15 * number
    time.sleep(max(0, moment - time.time()))
    put_all(store, chain)
    store.flush()
    for block in chain:
        assert_reads(store, block, "disk")
assert store.take_problems() == []
store.close()
"""
    start = time.time() + 1.0
    for process in [run(code, tmp_path, start) for _ in range(4)]:
        finish(process)
    files = sorted(p.name for p in (tmp_path / "blocks").rglob("*") if p.is_file())
    assert files == sorted(f"{b.key.hex()}.safetensors" for n in range(6) for b in random_chain(4, seed=n))
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        assert store.verify().problems == ()
        for number in range(6):
            for block in random_chain(4, seed=number):
                assert_reads(store, block, "disk")


def test_eviction_never_takes_a_file_from_under_a_reader(tmp_path: Path) -> None:
    # A reader holds blocks open while another process fills the folder many times over.
    chain = random_chain(6, seed=1)
    code = """
with KVStore(sys.argv[1], max_cpu_bytes=None, max_disk_bytes=80_000) as store:
    for seed in range(10, 30):
        put_all(store, random_chain(4, seed=seed))
    print(len(store.lookup(keys_of(random_chain(6, seed=1)))))
"""
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        put_all(store, chain)
        store.flush()
        sources = [store.open(block.key) for block in chain]
        assert finish(run(code, tmp_path)) == "0"
        for source, block in zip(sources, chain, strict=True):
            assert source is not None
            for index in range(4):
                rows = np.zeros((2, 16, 32), np.uint8)
                source.read_into(index, [rows])
                assert np.array_equal(rows, block.tensor(index))
            source.close()
        assert [store.open(block.key) for block in chain] == [None] * 6
        assert store.take_problems() == []


def _spawned(store: KVStore, seed: int, results: Any) -> None:
    chain = random_chain(2, seed=seed)
    put_all(store, chain)
    results.put((str(store.path), store.max_cpu_bytes, len(store.lookup(keys_of(random_chain(3, seed=1))))))
    store.close()


def test_a_store_handed_to_spawned_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with KVStore(tmp_path, max_cpu_bytes="2MiB") as store:
        put_all(store, random_chain(3, seed=1))
        store.flush()
        processes = [context.Process(target=_spawned, args=(store, seed, results)) for seed in (2, 3)]
        for process in processes:
            process.start()
        assert [results.get(timeout=60) for _ in processes] == [(str(tmp_path), 2 << 20, 3)] * 2
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
        for seed in (2, 3):
            assert len(store.lookup(keys_of(random_chain(2, seed=seed)))) == 2
    with (
        pytest.raises(ConfigError, match="in memory only"),
        KVStore(max_disk_bytes=None) as store,
    ):
        pickle.dumps(store)


def test_pins_and_notes_are_shared(tmp_path: Path) -> None:
    chain = random_chain(2)
    with KVStore(tmp_path) as one, KVStore(tmp_path) as two:
        one.set_note(bytes(32), "rate", 3.5)
        assert two.get_note(bytes(32), "rate") == 3.5
        put_all(one, chain)
        one.flush()
        one.pin(keys_of(chain), "doc")
        assert two.prune(max_bytes=0).blocks == 0
        assert two.forget("doc") == 2
        assert one.pins() == {}


def test_processes_under_eviction_pressure_never_read_wrong_bytes(tmp_path: Path) -> None:
    code = """
import numpy as np, random
rng = random.Random(int(sys.argv[2]))
read = 0
with KVStore(sys.argv[1], max_cpu_bytes=20_000, max_disk_bytes=400_000) as store:
    for _ in range(60):
        chain = random_chain(4, seed=rng.randrange(12))
        for stored, block in zip(store.lookup(keys_of(chain)), chain):
            source = store.open(stored.info.key)
            if source is None:
                break
            assert source.info == block.info and np.array_equal(source.token_ids, block.token_ids)
            for index in range(4):
                rows = np.zeros((2, 16, 32), np.uint8)
                source.read_into(index, [rows])
                assert np.array_equal(rows, block.tensor(index))
            source.close()
            read += 1
        put_all(store, chain)
        store.touch(keys_of(chain))
    assert store.take_problems() == [], store.take_problems()
print(read)
"""
    reads = [int(finish(process)) for process in [run(code, tmp_path, seed) for seed in range(3)]]
    assert all(count > 10 for count in reads), reads
    with KVStore(tmp_path, max_cpu_bytes=None, max_disk_bytes=400_000) as store:
        assert store.verify().problems == ()
        tier = store.stats().tiers[0]
        assert 0 < tier.nbytes <= 400_000 + 3 * 12_288


def du(folder: Path) -> int:
    """Return what `du` says, folders included."""
    total = 0
    for path in [folder, *folder.rglob("*")]:
        info = path.lstat()
        total += info.st_blocks * 512 if hasattr(info, "st_blocks") else info.st_size
    return total


@pytest.mark.skipif(os.name == "nt", reason="du counts blocks of POSIX file systems")
@pytest.mark.parametrize("tokens", [16, 100])
def test_the_budget_holds_by_du(tmp_path: Path, tokens: int) -> None:
    budget = 600_000
    with KVStore(tmp_path, max_cpu_bytes=None, max_disk_bytes=budget) as store:
        most = 0
        for number in range(12):
            put_all(store, random_chain(5, seed=number, tokens=tokens))
            store.flush()
            used = du(tmp_path / "blocks")
            most = max(most, used)
            # One for the writer at work; nothing is written while this looks, so even that is not needed.
            assert used <= budget
        put_all(store, [random_block(ids=range(tokens), salt=str(number)) for number in range(150)])
        store.flush()
        most = max(most, du(tmp_path / "blocks"))
        assert budget * 0.5 < most <= budget
        assert store.verify().problems == ()


def test_a_smaller_budget_at_the_next_opening_is_reached(tmp_path: Path) -> None:
    chains = [random_chain(4, seed=n) for n in range(10)]
    with KVStore(tmp_path) as store:
        for chain in chains:
            put_all(store, chain)
    with KVStore(tmp_path, max_cpu_bytes=None, max_disk_bytes=100_000) as store:
        put_all(store, random_chain(1, seed=50))
        store.flush()
        assert du(tmp_path / "blocks") <= 100_000
        assert block_path(store, random_chain(1, seed=50)[0]).exists()
