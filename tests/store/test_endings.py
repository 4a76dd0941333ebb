"""How a process ends: with close, without, by a signal, or by becoming two."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvembed import KVStore
from kvembed._connections import _Connection
from kvembed._testing import assert_reads, forget_memory, keys_of, put_all, random_block, random_chain

if TYPE_CHECKING:
    from kvembed._block import Block


def hold_writes(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keep everything from the disk until the event returned is set."""
    assert store._disk is not None
    go, put = threading.Event(), store._disk.put
    monkeypatch.setattr(store._disk, "put", lambda block: go.wait(20) and put(block))
    return go


SCRIPT = """
import sys
from kvembed import KVStore
from kvembed._testing import random_chain, put_all
store = KVStore(sys.argv[1], max_cpu_bytes="16MiB")
put_all(store, random_chain(40))
store.touch([random_chain(1)[0].key])
"""


def stored(root: Path, chain: list[Block]) -> int:
    with KVStore(root, max_cpu_bytes=None) as store:
        assert store.verify().problems == ()
        return len(store.lookup(keys_of(chain)))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "ending",
    [
        "",
        "raise SystemExit(3)",
        "raise RuntimeError",
        "import threading; threading.Thread(target=print).start()",
        "del store",
    ],
    ids=["end", "exit", "error", "other threads", "dropped"],
)
def test_a_process_that_does_not_close_loses_nothing(tmp_path: Path, ending: str) -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT + ending, str(tmp_path)], capture_output=True, text=True)
    assert "kvembed" not in result.stderr
    assert stored(tmp_path, random_chain(40)) == 40


def test_a_connection_that_outlives_its_module_closes_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    held = _Connection(sqlite3.connect(":memory:"))
    db = held.db
    monkeypatch.setattr("kvembed._connections.os", None)  # as the interpreter does at its end
    del held
    gc.collect()  # an error there would be a warning, and so fail
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        db.execute("SELECT 1")


@pytest.mark.multiprocess
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1])
def test_a_killed_process_leaves_a_sound_store(tmp_path: Path, after_s: float) -> None:
    code = SCRIPT + "\nprint('ready', flush=True)\nfor n in range(1, 1000): put_all(store, random_chain(3, seed=n))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        # A file may lack its row, and a temporary file may be left; never the other way round, never wrong bytes.
        report = store.verify()
        assert all("missing in the catalog" in p or "cut off" in p for p in report.problems), report.problems
        found = store.lookup(keys_of(random_chain(40)))
        for stored_block, block in zip(found, random_chain(40), strict=False):
            assert stored_block.info == block.info
            assert_reads(store, block, "disk")
        store.put(random_block(seed=5000))
        assert store.verify(fix=True).ok


def test_close_writes_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = random_chain(10)
    store = KVStore(tmp_path)
    go = hold_writes(store, monkeypatch)
    put_all(store, chain)
    threading.Timer(0.1, go.set).start()
    store.close()
    assert stored(tmp_path, chain) == 10


def test_a_store_that_is_dropped_ends_its_thread_and_loses_nothing(tmp_path: Path) -> None:
    chain = random_chain(10)
    store = KVStore(tmp_path)
    put_all(store, chain)
    gone = weakref.ref(store)
    (thread,) = [t for t in threading.enumerate() if t.name == "kvembed-writer"]
    del store
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()
    del thread
    gc.collect()
    assert stored(tmp_path, chain) == 10


@pytest.mark.parametrize("cpu", ["1MiB", None])
def test_work_is_done_where_no_thread_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: str | None
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    chain = random_chain(3)
    store = KVStore(tmp_path, max_cpu_bytes=cpu)
    monkeypatch.setattr(threading.Thread, "start", fail)
    put_all(store, chain)
    assert store.flush()
    store.close()
    monkeypatch.undo()
    assert stored(tmp_path, chain) == 3


def _child(store: KVStore, chain: list[Block], new: list[Block], answers: Any) -> None:
    try:
        found = len(store.lookup(keys_of(chain)))
        pending = store.stats().pending_writes
        put_all(store, new)
        flushed = store.flush(10)
        rows = np.zeros((2, 16, 32), np.uint8)
        source = store.open(chain[0].key)
        assert source is not None
        source.read_into(0, [rows])
        same = bool(np.array_equal(rows, chain[0].tensor(0)))
        source.close()
        store.close()
        answers.put((found, pending, flushed, same))
    except BaseException as error:
        answers.put(repr(error))


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("cpu", ["1MiB", None])
def test_a_forked_child_uses_the_store_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: str | None
) -> None:
    context = multiprocessing.get_context("fork")
    chain, new, mine = random_chain(4, seed=1), random_chain(4, seed=2), random_chain(4, seed=3)
    with KVStore(tmp_path, max_cpu_bytes=cpu) as store:
        put_all(store, chain)
        store.flush()
        go = hold_writes(store, monkeypatch)
        if cpu is not None:
            put_all(store, mine)  # waits in the parent's queue while the child is made
        answers = context.SimpleQueue()
        child = context.Process(target=_child, args=(store, chain, [], answers))
        child.start()
        answer = answers.get()
        child.join(20)
        assert answer == (4, 0, True, True)
        go.set()
        monkeypatch.undo()
        child = context.Process(target=_child, args=(store, chain, new, answers))
        child.start()
        answer = answers.get()
        child.join(20)
        assert answer == (4, 0, True, True)
        put_all(store, mine)
        store.flush()
        forget_memory(store)
        for blocks in (chain, new, mine):
            assert [s.tier for s in store.lookup(keys_of(blocks))] == ["disk"] * 4
        assert store.verify().problems == ()


def _busy_child(store: KVStore, seed: int, answers: Any) -> None:
    try:
        with store:
            put_all(store, random_chain(3, seed=seed))
            store.flush()
        answers.put(store.take_problems())
    except BaseException as error:
        answers.put(repr(error))


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forks_while_other_threads_are_at_work(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers, stop, errors = context.SimpleQueue(), threading.Event(), list[BaseException]()
    with KVStore(tmp_path, max_cpu_bytes="1MiB") as store:

        def work(seed: int) -> None:
            try:
                while not stop.is_set():
                    chain = random_chain(3, seed=seed)
                    put_all(store, chain)
                    store.touch(keys_of(chain))
                    store.lookup([*keys_of(chain), bytes(32)])
                    seed += 10
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(1_000 + n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for number in range(6):
            child = context.Process(target=_busy_child, args=(store, number, answers))
            child.start()
            assert answers.get() == []
            child.join(20)
        stop.set()
        for thread in threads:
            thread.join()
        assert errors == []
        store.flush()
        assert store.take_problems() == []
        for number in range(6):
            assert len(store.lookup(keys_of(random_chain(3, seed=number)))) == 3
        assert store.verify().problems == ()


@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_no_open_database_crosses_a_fork(tmp_path: Path) -> None:
    def databases() -> list[str]:
        found: list[str] = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that is listing
                found.append(str(link.readlink()))
        return [name for name in found if "kvembed.db" in name]

    def child(answers: Any) -> None:
        try:
            answers.put(databases())
        except BaseException as error:
            answers.put(repr(error))

    context = multiprocessing.get_context("fork")
    with KVStore(tmp_path) as store:
        put_all(store, random_chain(3))
        store.flush()
        answers = context.SimpleQueue()
        process = context.Process(target=child, args=(answers,))
        process.start()
        assert answers.get() == []
        process.join(20)
        assert len(store.lookup(keys_of(random_chain(3)))) == 3
        forget_memory(store)
        assert len(store.lookup(keys_of(random_chain(3)))) == 3
        assert databases() != []
