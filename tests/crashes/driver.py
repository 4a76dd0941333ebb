"""Runs workloads in forked children that are killed, or whose calls fail, and checks what they leave.

    python -m tests.crashes.driver kill --runs 5000 --seed 1
    python -m tests.crashes.driver fail --runs 2000
    python -m tests.crashes.driver kill --runs 1000 --encrypted

A process of its own, because a fork of a process that has loaded torch costs ten times as much.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed import KVEmbedError, StoreWarning
from kvembed._testing import random_block

from ._steps import FAILURES, Steps, jumping_clock
from ._workloads import KEYS, OLD, WORKLOADS, Workload, copy_folder, known_blocks, opened

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed import KVStore
    from kvembed._block import Block

_HANGS_AFTER_S = 60
_KNOWN = known_blocks()
_ROOT_NAMES = {"blocks", "quarantine", "namespaces", "kvembed.db", ".catalog.lock", "encryption.json"}


def in_child(
    load: Workload, root: Path, steps: Steps | None, before: Callable[[], None] = lambda: None
) -> tuple[int, list[bytes], dict[str, Any]]:
    """Run a workload in a fork; return its exit status, the keys it had flushed, and what it said at its end."""
    ends = os.pipe()
    write, close = os.write, os.close
    pid = os.fork()
    if pid:
        close(ends[1])
        with os.fdopen(ends[0], "rb") as pipe:
            said = pipe.read().split(b"\n")
        status = os.waitpid(pid, 0)[1]
        flushed = [bytes.fromhex(line[1:].decode()) for line in said if line.startswith(b"+")]
        last = [json.loads(line) for line in said if line.startswith(b"{")]
        return status, flushed, last[0] if last else {}
    code = 1
    try:
        signal.alarm(_HANGS_AFTER_S)
        lost: list[str] = []
        threading.excepthook = lambda args: lost.append(f"{args.exc_type.__name__}: {args.exc_value}")
        before()
        if steps is not None:
            steps.install()

        def ack(blocks: list[Block]) -> None:
            write(ends[1], b"".join(b"+" + block.key.hex().encode() + b"\n" for block in blocks))

        with load.schema(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load.work(load, root, ack)
                error = ""
            except KVEmbedError as problem:
                error = f"{type(problem).__name__}: {problem}"
        if steps is not None:
            steps.stop()
        count, names = (steps.count, steps.names) if steps is not None else (0, [])
        write(ends[1], json.dumps({"error": error, "lost": lost, "steps": count, "names": names}).encode() + b"\n")
        code = 0
    except BaseException:
        write(ends[1], json.dumps({"leaked": traceback.format_exc(limit=-8)}).encode() + b"\n")
    finally:
        os._exit(code)


def check(load: Workload, root: Path, flushed: list[bytes], *, strict: bool) -> list[str]:
    """Return what is wrong with a folder after a crash; ``strict``: nothing but what the kill explains may be."""
    wrong: list[str] = []
    with load.schema(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with opened(root, max_cpu_bytes=None, max_disk_bytes=load.budget) as store:
                _check_open(load, root, store, flushed, wrong, strict)
        except Exception:
            wrong.append(f"does not open: {traceback.format_exc(limit=-6)}")
    for warning in caught:
        if not issubclass(warning.category, StoreWarning) or (strict and not load.damaged):
            wrong.append(f"warned: {warning.message}")
    return wrong


def _check_open(
    load: Workload, root: Path, store: KVStore, flushed: list[bytes], wrong: list[str], strict: bool
) -> None:
    assert store._catalog is not None
    assert store._disk is not None
    if strict and not load.damaged:
        # Written before its row is committed, and deleted after it.
        keys = [row.info.key for row in store._catalog.rows()]
        without = [key.hex()[:8] for key in keys if not store._disk.path(key).exists()]
        wrong += [f"rows without files: {without}"] if without else []
    _read(store, wrong, "before the repair")
    problems = store.take_problems()
    if strict and not load.damaged and problems:
        wrong.append(f"problems: {problems}")
    for left in root.rglob(".*.tmp"):
        os.utime(left, (1e9, 1e9))  # so that they are old enough to be nobody's
    report = store.verify(fix=True)
    if not report.ok:
        wrong.append(f"verify could not repair: {report.problems}")
    again = store.verify()
    if again.problems:
        wrong.append(f"verify found more after its repair: {again.problems}")
    here = _read(store, wrong, "after the repair")
    may_go = {block.key for block in load.may_go}
    if strict:
        must = {block.key for block in load.before} | (set(flushed) - may_go)
        if missing := must - here:
            wrong.append(f"{len(missing)} blocks are lost: {sorted(key.hex()[:8] for key in missing)}")
    counters, rows = store._catalog.counters(), list(store._catalog.rows())
    sums = (len(rows), sum(r.info.nbytes for r in rows), sum(r.file_bytes for r in rows))
    if (counters.blocks, counters.nbytes, counters.file_bytes) != sums:
        wrong.append(f"counters {counters} do not fit the rows: {sums}")
    if odd := {path.name for path in root.iterdir()} - _ROOT_NAMES - {"kvembed.db-wal", "kvembed.db-shm"}:
        wrong.append(f"left behind: {odd}")
    new = random_block(seed=4242)
    store.put(new)
    store.flush()
    if store.lookup([new.key]) == []:
        wrong.append(f"a new block cannot be put: {store.take_problems()}")


def _read(store: KVStore, wrong: list[str], when: str) -> set[bytes]:
    """Read every block there is, and compare it with what its key says; return the keys of the good ones."""
    good: set[bytes] = set()
    for key, versions in _KNOWN.items():
        if not store.lookup([key]):
            continue
        source = store.open(key)
        if source is None:
            continue
        try:
            data = np.concatenate([_tensor(source, index) for index in range(len(source.layout.tensors))])
        except KVEmbedError as error:
            store.discard(key, str(error))
            continue
        finally:
            source.close()
        fits = [b for b in versions if np.array_equal(b.data, data) and b.info == source.info]
        if fits and np.array_equal(fits[0].token_ids, source.token_ids):
            good.add(key)
        else:
            wrong.append(f"WRONG BYTES {when}: {key.hex()[:12]}")
    return good


def _tensor(source: Any, index: int) -> np.ndarray:
    spec = source.layout.tensors[index]
    rows = np.zeros((spec.heads, source.info.n_tokens, spec.row_nbytes), np.uint8)
    source.read_into(index, [rows])
    return rows.reshape(-1)


class Runs:
    """Prepared folders, and runs that start from copies of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self.wrong: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        for name, load in WORKLOADS.items():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                load.prepare(self.template(name))

    def template(self, name: str) -> Path:
        return self._folder / "templates" / name

    def fresh(self, name: str) -> Path:
        self._number += 1
        root = self._folder / f"run{self._number}"
        copy_folder(self.template(name), root)
        return root

    def steps_of(self, name: str, *, reads: bool) -> list[str]:
        """Return the steps of a workload that nobody disturbs."""
        root = self.fresh(name)
        steps = Steps(lambda _: None, 0, reads=reads)
        status, flushed, said = in_child(WORKLOADS[name], root, steps)
        self.finish(name, root, f"{name}, undisturbed", status, flushed, said, killed=False, strict=True)
        if said.get("error"):
            self.wrong.append(f"{name}, undisturbed: {said['error']}")
        return said.get("names", [])

    def finish(
        self, name: str, root: Path, what: str, status: int, flushed: list[bytes], said: dict[str, Any], **how: bool
    ) -> None:
        """Check a folder and remove it."""
        self.counts[name] += 1
        signalled = os.WIFSIGNALED(status) and os.WTERMSIG(status)
        if signalled == signal.SIGALRM and not how.get("timer"):
            self.wrong.append(f"{what}: HANGS")
        elif how["killed"] and not signalled:
            # The writer and the caller share the steps, so a run may have a few more or fewer than the counted one.
            self.counts["not killed"] += 1
        if said.get("leaked") or said.get("lost"):
            self.wrong.append(f"{what}: LEAKED {said.get('leaked') or said['lost']}")
        self.wrong += [f"{what}: {line}" for line in check(WORKLOADS[name], root, flushed, strict=how["strict"])]
        shutil.rmtree(root)


def kill_runs(runs: Runs, total: int, seed: int) -> None:
    """Kill at every step in turn, evenly spread when there are more steps than runs, and at random times."""
    steps = {name: runs.steps_of(name, reads=False) for name in WORKLOADS}
    every = [(name, at) for name, names in steps.items() for at in range(1, len(names) + 1)]
    timed = total // 5
    rng = random.Random(seed)
    if len(every) > total - timed:
        stride = len(every) / (total - timed)
        every = [every[int(i * stride + rng.random() * stride)] for i in range(total - timed)]
    for name, at in every:
        load, root = WORKLOADS[name], runs.fresh(name)
        # One in six is killed once more, in the middle of what the next process does about it.
        deaths = [at]
        status, flushed, said = in_child(load, root, Steps.killing(at))
        if rng.random() < 1 / 6:
            deaths.append(rng.randrange(1, 40))
            status, more, said = in_child(load, root, Steps.killing(deaths[1]))
            flushed += more
        what = f"{name}, killed at {deaths} ({steps[name][at - 1]})"
        runs.finish(name, root, what, status, flushed, said, killed=True, strict=True)
    for number in range(total - len(every)):
        name = rng.choice(list(WORKLOADS))
        root = runs.fresh(name)
        if number % 2:
            # Inside the C code too: the kernel ends the process when a file grows beyond the limit, so in the
            # middle of a write of SQLite's.
            limit = rng.randrange(0, 120_000)
            before, what = (lambda n=limit: _limit_files(n)), f"{name}, files limited to {limit}"
        else:
            seconds = rng.uniform(0.0005, 0.04)
            before, what = (lambda s=seconds: _alarm(s)), f"{name}, stopped after {1e3 * seconds:.1f} ms"
        status, flushed, said = in_child(WORKLOADS[name], root, None, before)
        runs.finish(name, root, what, status, flushed, said, killed=False, strict=True, timer=True)


def _limit_files(nbytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def _alarm(seconds: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def fail_runs(runs: Runs, total: int, seed: int) -> None:
    """Fail one call, or all from one on; write and read in short pieces; let the clock jump."""
    rng = random.Random(seed)
    steps = {name: runs.steps_of(name, reads=True) for name in WORKLOADS}
    names = list(WORKLOADS)
    for number in range(total):
        name, kind = names[number % len(names)], rng.choice([*FAILURES, "short", "clock"])
        load, root = WORKLOADS[name], runs.fresh(name)
        if kind in FAILURES:
            sql = kind in ("locked", "io", "full", "malformed")
            fits = [i for i, s in enumerate(steps[name], 1) if s.startswith("before") and s.endswith("sql") == sql]
            at, onwards = rng.choice(fits), rng.random() < 0.4
            what = f"{name}, {kind} {'from' if onwards else 'at'} step {at} ({steps[name][at - 1]})"
            child = in_child(load, root, Steps.failing(at, kind, onwards=onwards), _impatient)
            runs.finish(name, root, what, *child, killed=False, strict=False)
        else:
            chosen = rng.randrange(1 << 30)
            before = (lambda s=chosen: _short(s)) if kind == "short" else (lambda s=chosen: _jump(s))
            child = in_child(load, root, None, before)
            if child[2].get("error"):
                runs.wrong.append(f"{name}, {kind} {chosen}: {child[2]['error']}")
            runs.finish(name, root, f"{name}, {kind} {chosen}", *child, killed=False, strict=True)


def _impatient() -> None:
    import kvembed._connections as connections

    connections._BUSY_S = 0.2  # type: ignore[attr-defined]


def _jump(seed: int) -> None:
    time.time = jumping_clock(seed)


def _short(seed: int) -> None:
    """Have every read and write do a part of what it is asked for."""
    rng = random.Random(seed)
    write, writev, pread, preadv = os.write, os.writev, os.pread, os.preadv

    def part(view: Any) -> memoryview:
        view = memoryview(view)
        return view[: rng.randint(1, max(1, len(view)))]

    os.write = lambda fd, data: write(fd, part(data))
    os.writev = lambda fd, parts: writev(fd, [part(parts[0])])
    os.pread = lambda fd, n, at: pread(fd, rng.randint(1, n) if n else 0, at)
    os.preadv = lambda fd, parts, at: preadv(fd, [part(parts[0])], at)


def main() -> None:
    """Run, and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "fail"])
    parser.add_argument("--runs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encrypted", action="store_true", help="Encrypt the stores.")
    args = parser.parse_args()
    if args.encrypted:
        KEYS.append(bytes(range(32)))
    began = time.perf_counter()
    assert OLD
    # What a killed process leaves does not depend on the file system; waiting for a device would take most of the time.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvembed-crashes-", dir=memory) as folder:
        runs = Runs(Path(folder))
        (kill_runs if args.what == "kill" else fail_runs)(runs, args.runs, args.seed)
        seconds = round(time.perf_counter() - began, 1)
        total = sum(runs.counts[name] for name in WORKLOADS)
        json.dump({"runs": total, "seconds": seconds, "counts": runs.counts, "wrong": runs.wrong}, sys.stdout, indent=1)
    print()
    sys.exit(bool(runs.wrong))


if __name__ == "__main__":
    main()
