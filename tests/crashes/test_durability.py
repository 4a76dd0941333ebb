"""What is flushed to the device in each mode, in which order, and what a power cut may then take away."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import KVStore
from kvembed._testing import assert_reads, block_path, keys_of, put_all, random_chain

if TYPE_CHECKING:
    from kvembed._block import Block


class Trace:
    """What happens to the disk, in order: ("write", name), ("fsync", name), ("replace", name), ("commit", "")."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self._names: dict[int, str] = {}
        self._patch = patch
        self._wrap("open", lambda args, result: self._names.update({result: Path(args[0]).name}))
        self._wrap("writev", lambda args, _: self.events.append(("write", self._name(args[0]))))
        self._wrap("fsync", lambda args, _: self.events.append(("fsync", self._name(args[0]))))
        self._wrap("replace", lambda args, _: self.events.append(("replace", Path(args[1]).name)))
        trace, real = self, sqlite3.connect

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                result = super().execute(sql, *args)
                if sql == "COMMIT":
                    trace.events.append(("commit", ""))
                return result

        patch.setattr(sqlite3, "connect", lambda *args, **kwargs: real(*args, **kwargs, factory=Connection))

    def _name(self, fd: int) -> str:
        return self._names.get(fd, "")

    def _wrap(self, name: str, note: Any) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            note(args, result)
            return result

        self._patch.setattr(os, name, call)


@pytest.mark.skipif(not hasattr(os, "writev"), reason="this system has no writev")
@pytest.mark.parametrize("durability", ["fast", "safe"])
def test_what_is_flushed_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str) -> None:
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        put_all(store, random_chain(1, seed=1))
    with monkeypatch.context() as patch:
        trace = Trace(patch)
        with KVStore(tmp_path, max_cpu_bytes=None, durability=durability) as store:
            (block,) = random_chain(1, seed=2)
            start = len(trace.events)
            store.put(block)
            store.flush()
            path = block_path(store, block)
            events = [e for e in trace.events[start:] if e[0] != "commit"]
            last = trace.events[-1]
    temp = events[0][1]
    assert temp.startswith(f".{block.key.hex()}")
    if durability == "fast":
        assert [e for e in events if e[0] == "fsync"] == []
        assert events == [("write", temp), ("replace", path.name)]
    else:
        folder = path.parent
        # The file before its name, the name before its row, and the new folder's name too.
        expected = [("write", temp), ("fsync", temp), ("replace", path.name), ("fsync", folder.name)]
        assert events == [*expected, ("fsync", "blocks")]
    assert last == ("commit", "")


@pytest.mark.parametrize(("durability", "level"), [("fast", 1), ("safe", 2)])
def test_how_the_catalog_commits(tmp_path: Path, durability: str, level: int) -> None:
    with KVStore(tmp_path, durability=durability) as store:
        assert store._catalog is not None
        with store._catalog.connection() as db:
            assert db.execute("PRAGMA synchronous").fetchone() == (level,)


@pytest.mark.multiprocess
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("durability", ["fast", "safe"])
def test_the_system_is_told(tmp_path: Path, durability: str) -> None:
    code = (
        "import sys\nfrom kvembed import KVStore\nfrom kvembed._testing import *\n"
        "store = KVStore(sys.argv[1], max_cpu_bytes=None, durability=sys.argv[2])\n"
        "for block in random_chain(3, seed=2):\n    store.put(block); store.flush()\n"
        "import os; os._exit(0)\n"
    )
    with KVStore(tmp_path / "s", max_cpu_bytes=None) as store:
        put_all(store, random_chain(1, seed=1))
    log = tmp_path / "log"
    command = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", "-o", str(log), sys.executable, "-c", code]
    done = subprocess.run([*command, str(tmp_path / "s"), durability], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"strace may not be used here: {done.stderr[-200:]}")
    calls = [line for line in log.read_text().splitlines() if "sync(" in line]
    wal = [line for line in calls if "kvembed.db-wal" in line]
    blocks = [line for line in calls if ".tmp" in line]
    assert len(blocks) == (3 if durability == "safe" else 0), calls
    assert (len(wal) >= 3) == (durability == "safe"), calls


# ------------------------------------------------------------------------------------------- power cuts


def cut_power(source: Path, target: Path, kept: set[str], seed: int, *, wal_is_safe: bool) -> None:
    """Copy a folder as a power cut may leave it.

    Every file whose content was not flushed is there with holes, shorter, empty, or not at all; the catalog's
    log loses any part of its end that was not flushed.
    """
    rng = random.Random(seed)
    shutil.copytree(source, target)
    for path in target.rglob("*.safetensors"):
        if path.name in kept:
            continue
        data = bytearray(path.read_bytes())
        what = rng.choice(["whole", "holes", "short", "empty", "missing"])
        if what == "missing":
            path.unlink()
            continue
        if what == "holes":
            at = rng.randrange(len(data)) // 4096 * 4096
            data[at : at + 4096] = bytes(len(data[at : at + 4096]))
        path.write_bytes({"short": data[: rng.randrange(len(data))], "empty": b""}.get(what, bytes(data)))
    wal = target / "kvembed.db-wal"
    if not wal_is_safe and wal.exists():
        os.truncate(wal, rng.randrange(wal.stat().st_size + 1))


def found_after(root: Path, chain: list[Block]) -> set[bytes]:
    """Return the keys of what can be read; whatever is served must be right."""
    here: set[bytes] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with KVStore(root, max_cpu_bytes=None) as store:
            for repaired in (False, True):
                if repaired:
                    assert store.verify(fix=True).ok
                    assert store.verify().problems == ()
                for block in chain:
                    source = store.open(block.key)
                    if source is None:
                        continue
                    source.close()
                    if repaired:
                        assert_reads(store, block, "disk")
                        here.add(block.key)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["fast", "safe"])
def test_a_power_cut(tmp_path: Path, durability: str) -> None:
    old, new = random_chain(6, seed=1), random_chain(8, seed=2)
    with KVStore(tmp_path / "s", max_cpu_bytes=None) as store:
        put_all(store, old)
    # On the device for long; closing has played the log into the database.
    kept = {f"{key.hex()}.safetensors" for key in keys_of(old)}
    store = KVStore(tmp_path / "s", max_cpu_bytes=None, durability=durability)
    put_all(store, new)
    store.flush()
    if durability == "safe":
        kept |= {f"{key.hex()}.safetensors" for key in keys_of(new)}
    shutil.copytree(tmp_path / "s", tmp_path / "at the cut")
    store.close()
    least = len(old) + len(new)
    for seed in range(25):
        root = tmp_path / str(seed)
        cut_power(tmp_path / "at the cut", root, kept, seed, wal_is_safe=durability == "safe")
        here = found_after(root, [*old, *new])
        assert here >= set(keys_of(old))
        if durability == "safe":
            assert here >= set(keys_of(new))
        least = min(least, len(here))
        shutil.rmtree(root)
    # The cuts did cut: without flushing something is lost, which is what "fast" means.
    assert (least < len(old) + len(new)) == (durability == "fast")
