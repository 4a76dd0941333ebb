"""What safety costs: ``python benchmarks/store.py [--blocks 100000] [--files 4000] [--mb 512]``.

Three figures, each the median of several rounds: the share of a restore that checking the checksums takes, opening a
store of many blocks after its process was killed, and making its catalog again from the files.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lookup import fill  # in this folder

from kvembed import KVStore, _blockfile
from kvembed._block import Layout, TensorSpec
from kvembed._testing import block_path, keys_of, put_all, random_chain

if TYPE_CHECKING:
    from collections.abc import Callable

# SmolLM2-135M in float32: 30 layers, 3 key-value heads of 64. A block of 256 tokens has 11.8 MB.
_LAYOUT = Layout(tuple(TensorSpec(layer, name, 3, 64, "F32") for layer in range(30) for name in ("k", "v")))
_BLOCK_TOKENS = 256

# Changes rows until it is killed, so that the log is long and was not played into the database.
_WORK = """
import sys
from kvembed import KVStore
store = KVStore(sys.argv[1], max_cpu_bytes=None)
keys = [row.info.key for row in store._catalog.rows("LIMIT 5000")]
print("ready", flush=True)
while True:
    for at in range(0, len(keys), 100):
        store._catalog.touch_later(keys[at : at + 100])
        store._catalog.flush_touches()
        print(at, flush=True)
"""
_OPEN = """
import sys, time
from kvembed import KVStore
import kvembed._store_open, kvembed._rebuild, filelock
began = time.perf_counter()
store = KVStore(sys.argv[1], max_cpu_bytes=None)
print(time.perf_counter() - began, store.stats().tiers[-1].blocks)
store.close()
"""


def timed(call: Callable[[], object]) -> float:
    """Return the seconds a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def checksum_share(root: Path, nbytes: int, rounds: int) -> dict[str, float]:
    """Restore the same blocks with and without comparing checksums, in turn; files in the page cache."""
    chain = random_chain(max(2, nbytes // _LAYOUT.nbytes(_BLOCK_TOKENS)), tokens=_BLOCK_TOKENS, layout=_LAYOUT)
    total = sum(block.info.nbytes for block in chain)
    with KVStore(root, max_cpu_bytes=None, max_disk_bytes=4 * total) as store:
        put_all(store, chain)
        store.flush()
        # Rows of a cache that holds the whole prompt: [heads, all tokens, bytes of a row], touched before.
        rows = [np.zeros((3, len(chain) * _BLOCK_TOKENS, 256), np.uint8) for _ in _LAYOUT.tensors]

        def restore() -> None:
            for number, key in enumerate(keys_of(chain)):
                source = store.open(key)
                assert source is not None
                at = number * _BLOCK_TOKENS
                for index in range(0, len(rows), 2):
                    source.read_into(index, [row[:, at : at + _BLOCK_TOKENS] for row in rows[index : index + 2]])
                source.close()

        restore()
        checked, unchecked = [], []
        real = _blockfile._checksum
        for _ in range(rounds):
            checked.append(timed(restore))
            # The smallest lie that leaves everything else as it is: every checksum is what the header says.
            _blockfile._checksum = lambda _: _Anything()  # type: ignore[assignment]
            try:
                unchecked.append(timed(restore))
            finally:
                _blockfile._checksum = real
    share = statistics.median(1 - b / a for a, b in zip(checked, unchecked, strict=True))
    return {
        "restore, GB/s": total / statistics.median(checked) / 1e9,
        "without checksums, GB/s": total / statistics.median(unchecked) / 1e9,
        "share of the checksums, %": 100 * share,
    }


class _Anything(int):
    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = int.__hash__


def open_after_a_crash(root: Path, blocks: int, rounds: int) -> dict[str, float]:
    """Kill a process that changes a large catalog, and time the next opening."""
    fill(root, np.zeros(0, "<i4"), blocks)
    seconds: list[float] = []
    for _ in range(rounds):
        worker = subprocess.Popen([sys.executable, "-c", _WORK, str(root)], stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        for _ in range(60):
            worker.stdout.readline()
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        assert (root / "kvembed.db-wal").stat().st_size > 0
        took, found = subprocess.check_output([sys.executable, "-c", _OPEN, str(root)], text=True).split()
        assert int(found) == blocks
        seconds.append(float(took))
    return {f"open {blocks:,} blocks after a crash, ms": 1e3 * statistics.median(seconds)}


def rebuild_rate(root: Path, files: int, rounds: int) -> dict[str, float]:
    """Delete the catalog and time the opening that makes it again from the files."""
    layout = Layout(tuple(TensorSpec(layer, name, 1, 2, "F32") for layer in range(30) for name in ("k", "v")))
    with KVStore(root, max_cpu_bytes=None, max_disk_bytes=1 << 40) as store:
        for seed in range(files // 40):
            # Headers as long as real ones; KV small, since a rebuild does not read it.
            put_all(store, random_chain(40, seed=seed, tokens=16, layout=layout))
        store.flush()
        count = store.stats().tiers[-1].blocks
        assert block_path(store, random_chain(1, tokens=16, layout=layout)[0]).exists()
    rates: list[float] = []
    for _ in range(rounds):
        for part in root.glob("kvembed.db*"):
            part.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            began = time.perf_counter()
            store = KVStore(root, max_cpu_bytes=None, max_disk_bytes=1 << 40)
            rates.append(count / (time.perf_counter() - began))
        assert store.stats().tiers[-1].blocks == count
        store.close()
    return {f"rebuild of {count:,} files, files/s": statistics.median(rates)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=4000)
    parser.add_argument("--mb", type=int, default=512, help="KV to restore, in MB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        figures = checksum_share(root / "restore", args.mb << 20, args.rounds)
        figures |= open_after_a_crash(root / "open", args.blocks, args.rounds)
        figures |= rebuild_rate(root / "rebuild", args.files, args.rounds)
    if args.json:
        print(json.dumps({"cores": os.cpu_count(), **figures}))
        return
    for name, value in figures.items():
        print(f"{name:<45} {value:10.2f}")


if __name__ == "__main__":
    main()
