"""What encryption costs: ``python benchmarks/encryption.py [--mb 768] [--rounds 7]``.

The same blocks (SmolLM2's, 11.8 MB each) are restored from a plain and from an encrypted store in turn, the way a call
does it: two threads, layer by layer, straight into the rows of one cache; files in the page cache. Also writing them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from kvembed import KVStore
from kvembed._block import Layout, TensorSpec
from kvembed._testing import keys_of, put_all, random_chain

# SmolLM2-135M in float32: 30 layers, 3 key-value heads of 64.
_LAYERS = 30
_LAYOUT = Layout(tuple(TensorSpec(layer, name, 3, 64, "F32") for layer in range(_LAYERS) for name in ("k", "v")))
_TOKENS = 256
_READERS = 2


def restore(store: KVStore, keys: list[bytes], rows: list[np.ndarray], readers: int) -> float:
    """Fill the rows from the store with so many threads; return the seconds."""
    sources = [store.open(key) for key in keys]
    layers = iter(range(_LAYERS))
    lock = threading.Lock()
    failed: list[BaseException] = []

    def read() -> None:
        try:
            while True:
                with lock:
                    layer = next(layers, None)
                if layer is None:
                    return
                for number, source in enumerate(sources):
                    assert source is not None
                    at = slice(number * _TOKENS, (number + 1) * _TOKENS)
                    source.read_into(2 * layer, [rows[2 * layer][:, at], rows[2 * layer + 1][:, at]])
        except BaseException as error:
            failed.append(error)

    began = time.perf_counter()
    threads = [threading.Thread(target=read) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    for source in sources:
        assert source is not None
        source.close()
    if failed:
        raise failed[0]
    return seconds


def main() -> None:
    """Print medians as JSON: GB/s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    chain = random_chain((args.mb << 20) // _LAYOUT.nbytes(_TOKENS), tokens=_TOKENS, layout=_LAYOUT)
    nbytes = sum(block.info.nbytes for block in chain)
    rates: dict[str, list[float]] = {}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvembed-encryption-", dir=memory) as folder:
        stores = {
            name: KVStore(Path(folder) / name, key=key, max_cpu_bytes=None, max_disk_bytes="8GiB")
            for name, key in (("plain", None), ("encrypted", os.urandom(32)))
        }
        for name, store in stores.items():
            began = time.perf_counter()
            put_all(store, chain)
            store.flush()
            rates[f"write, {name}"] = [nbytes / (time.perf_counter() - began) / 1e9]
        rows = [np.ones((3, len(chain) * _TOKENS, 256), np.uint8) for _ in _LAYOUT.tensors]
        for _ in range(args.rounds):
            for readers in (1, _READERS):
                for name, store in stores.items():
                    seconds = restore(store, keys_of(chain), rows, readers)
                    rates.setdefault(f"restore, {name}, {readers} threads", []).append(nbytes / seconds / 1e9)
        for index in range(len(rows)):
            expected = np.concatenate([block.tensor(index) for block in chain], axis=1)
            assert np.array_equal(rows[index], expected)
        for store in stores.values():
            store.close()
    print(json.dumps({name: round(statistics.median(values), 2) for name, values in rates.items()}, indent=1))


if __name__ == "__main__":
    main()
