"""How long finding a prefix takes in a large store: ``python benchmarks/lookup.py [--blocks 100000]``.

Makes a catalog with so many rows (no files: lookup reads none), then measures hashing a 100k-token prompt,
``KVStore.lookup`` of its blocks, and opening the store in a new process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvembed import KVStore
from kvembed._block import BlockInfo
from kvembed._catalog import Catalog
from kvembed._keys import as_token_ids, block_key, chain_keys, probe_of, root_key
from kvembed._testing import FINGERPRINT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK_TOKENS = 256
_OPEN = """
import json, sys, time
from kvembed import KVStore
KVStore  # imported before the clock starts
began = time.perf_counter()
store = KVStore(sys.argv[1], max_cpu_bytes=None)
opened = time.perf_counter() - began
began = time.perf_counter()
stats = store.stats()
print(json.dumps([opened, time.perf_counter() - began, stats.tiers[-1].blocks]))
store.close()
"""


def fill(root: Path, prompt: np.ndarray, blocks: int) -> None:
    """Enter the prompt's blocks and random others, until there are ``blocks``."""

    def rows() -> Iterator[tuple[BlockInfo, bytes, int, float]]:
        rng = np.random.default_rng(1)
        parent, start, made = root_key(FINGERPRINT), 0, 0
        left = prompt
        while made < blocks:
            if len(left) < BLOCK_TOKENS:
                left = as_token_ids(rng.integers(0, 50_000, 40 * BLOCK_TOKENS))
                parent, start = root_key(FINGERPRINT), 0
            ids, left = left[:BLOCK_TOKENS], left[BLOCK_TOKENS:]
            key = block_key(parent, ids)
            info = BlockInfo(key, parent, FINGERPRINT, start, BLOCK_TOKENS, True, 11_796_480)
            yield info, probe_of(parent, ids), 11_808_768, 1_700_000_000.0 + made
            parent, start, made = key, start + BLOCK_TOKENS, made + 1

    (root / "blocks").mkdir(parents=True)
    catalog = Catalog(root / "kvembed.db", create=True)
    catalog.insert(rows())
    catalog.close()


def median_ms(call: Callable[[], object], rounds: int = 15) -> float:
    """Return the median time of a call in milliseconds."""
    times: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def measure(root: Path, prompt: np.ndarray) -> dict[str, float]:
    """Return every figure in milliseconds."""
    start = root_key(FINGERPRINT)
    keys = chain_keys(start, prompt, BLOCK_TOKENS)
    other = chain_keys(root_key(FINGERPRINT, "other"), prompt, BLOCK_TOKENS)
    tail = as_token_ids(np.arange(200))
    opened = [json.loads(subprocess.check_output([sys.executable, "-c", _OPEN, str(root)])) for _ in range(5)]
    with KVStore(root, max_cpu_bytes=None, read_only=True) as store:
        assert len(store.lookup(keys)) == len(keys)
        assert store.lookup(other) == []
        return {
            f"hash {len(prompt):,} tokens": median_ms(lambda: chain_keys(start, prompt, BLOCK_TOKENS)),
            f"lookup of {len(keys)} blocks, all here": median_ms(lambda: store.lookup(keys)),
            f"lookup of {len(keys)} blocks, none here": median_ms(lambda: store.lookup(other)),
            "find_tail, none here": median_ms(lambda: store.find_tail(keys[-1], tail)),
            "open in a new process": 1e3 * statistics.median(row[0] for row in opened),
            "stats() after that": 1e3 * statistics.median(row[1] for row in opened),
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    prompt = as_token_ids(np.random.default_rng(0).integers(0, 50_000, args.tokens))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        began = time.perf_counter()
        fill(root, prompt, args.blocks)
        filled = time.perf_counter() - began
        figures = measure(root, prompt)
    if args.json:
        print(json.dumps({"blocks": args.blocks, "milliseconds": figures}))
        return
    print(f"{args.blocks:,} blocks in the catalog (entered in {filled:.1f} s)")
    for name, value in figures.items():
        print(f"{name:<40} {value:8.2f} ms")


if __name__ == "__main__":
    main()
