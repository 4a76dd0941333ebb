"""Feeds a store files that were tampered with: ``python -m tests.hostile.fuzz --files 10000``.

Each file takes the place of a good one in a store; the store is asked for the block the way a restore does it. It must
answer with the right bytes (the change did not matter) or with a miss, one warning that names the file, and the file in
quarantine. Anything else, an exception, the memory or the time it took, is reported.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvembed import KVStore
from kvembed._block import Layout, TensorSpec
from kvembed._errors import BlockFormatError
from kvembed._testing import SMALL_LAYOUT, block_path, put_all, random_chain

from ._mutate import mutated, mutated_sealed

if TYPE_CHECKING:
    from kvembed._block import Block

_MOST_BYTES = 48 << 20
_MOST_S = 10.0  # a machine may be busy; a hang is longer


def read_as_a_restore(store: KVStore, block: Block) -> str:
    """Read a block into rows of the right shape; return ``"right"``, ``"miss"`` or what was wrong."""
    source = store.open(block.key, exact_only=block.info.exact)
    if source is None:
        return "miss"
    try:
        # What the engine compares before it reads (`Engine._open_pieces`).
        same = source.info.start == block.info.start and np.array_equal(source.token_ids, block.token_ids)
        if not same or source.layout != block.layout:
            store.discard(block.key, "holds other tokens or another layout than its key says")
            return "miss"
        for index, spec in enumerate(block.layout.tensors):
            rows = np.zeros((spec.heads, block.info.n_tokens, spec.row_nbytes), np.uint8)
            source.read_into(index, [rows])
            if not np.array_equal(rows, block.tensor(index)):
                return "WRONG BYTES"
    except BlockFormatError as error:
        store.discard(block.key, str(error))
        return "miss"
    finally:
        source.close()
    return "right"


def fuzz(
    folder: Path, files: int, seed: int, key: bytes | None = None
) -> tuple[collections.Counter[str], list[str], int]:
    """Return how many files were answered how, what was wrong, and the most memory in use at once (bytes)."""
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    # Encrypted files in several parts.
    layout = SMALL_LAYOUT if key is None else Layout(tuple(TensorSpec(0, name, 2, 256, "F32") for name in ("k", "v")))
    block, other = random_chain(2, seed=5, layout=layout)[1], random_chain(1, seed=6, layout=layout)[0]
    peak = 0
    change = mutated if key is None else mutated_sealed
    with KVStore(folder, max_cpu_bytes=None, key=key) as store:
        put_all(store, [block, other])
        store.flush()
        path = block_path(store, block)
        good, foreign = path.read_bytes(), block_path(store, other).read_bytes()
        tracemalloc.start()
        for number in range(seed, seed + files):
            what, content = change(good, [foreign], number)
            if not store.lookup([block.key]):
                store.put(block)
                store.flush()
            path.write_bytes(content)
            store._problems._seen.clear()
            tracemalloc.reset_peak()
            began = time.perf_counter()
            try:
                answer = read_as_a_restore(store, block)
            except Exception as error:
                answer = f"raised {type(error).__name__}: {error}"
            seconds, used = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
            peak = max(peak, used)
            problems = store.take_problems()
            if answer == "miss":
                if len(problems) != 1 or path.name not in problems[0]:
                    answer = f"a miss with {problems}"
                elif path.exists() or not (folder / "quarantine" / path.name).exists():
                    answer = "a miss, but not in quarantine"
                elif store.lookup([block.key]):
                    answer = "a miss, but still found"
            elif answer == "right" and problems:
                answer = f"right, but with {problems}"
            if answer not in ("right", "miss"):
                wrong.append(f"seed {number}, {what}: {answer}")
            if used > _MOST_BYTES or seconds > _MOST_S:
                wrong.append(f"seed {number}, {what}: {used:,} bytes, {seconds:.1f} s")
            counts[f"{answer.split(' ')[0]}: {what if ',' not in what else what.split(',')[0]}"] += 1
        tracemalloc.stop()
        if not wrong and store.verify(fix=True).ok is False:
            wrong.append("verify could not repair")
    return counts, wrong, peak


def main() -> None:
    """Print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encrypted", action="store_true", help="Encrypt the store.")
    args = parser.parse_args()
    began = time.perf_counter()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvembed-fuzz-", dir=memory) as folder:
        counts, wrong, peak = fuzz(Path(folder), args.files, args.seed, bytes(32) if args.encrypted else None)
    seconds = round(time.perf_counter() - began, 1)
    result = {"files": sum(counts.values()), "seconds": seconds, "peak_bytes": peak, "counts": counts, "wrong": wrong}
    json.dump(result, sys.stdout, indent=1, sort_keys=True)
    print()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
