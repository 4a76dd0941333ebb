"""Processes that use one store at random, with a budget far below what they use, while somebody measures.

::

    python benchmarks/soak.py --minutes 10                 # 4 processes, blocks of random bytes
    python benchmarks/soak.py --minutes 10 --mode model    # 4 processes, a tiny model against plain transformers

With ``blocks`` every block that is read is compared with the bytes that were put. With ``model`` every answer
is compared with that of an uncached run. In both an observer adds up, as often as it can, what the folder of
block files takes on the disk (``st_blocks`` as `du` does: temporary files and folders included), and compares it
with the budget plus one block for each writer. Ends with status 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed import KVStore
from kvembed._testing import keys_of, random_chain

if TYPE_CHECKING:
    from collections.abc import Iterator

CHAINS, LENGTH, TOKENS = 60, 8, 64  # of blocks mode
BLOCK_FILE = TOKENS * 256 + 8192  # bytes of tensors and ids, the header, whole pages
DOCUMENTS, QUESTIONS, BLOCK_SIZE = 12, 6, 32  # of model mode


def du(folder: Path) -> int:
    """Return what `du` says of a folder while others change it."""
    total = 0
    pending = [os.fspath(folder)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    try:
                        info = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    total += info.st_blocks * 512 if hasattr(info, "st_blocks") else info.st_size
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except FileNotFoundError:
            continue
    return total


def until(seconds: float) -> Iterator[int]:
    """Count up for so long."""
    number, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield number
        number += 1


# --- blocks -----------------------------------------------------------------------------------------


def use_blocks(root: Path, seed: int, seconds: float, budget: int) -> dict[str, int]:
    """Look up, read, compare, put, touch, pin, prune and remove chains of random blocks."""
    rng = random.Random(seed)
    counts = {"calls": 0, "reads": 0, "wrong": 0, "puts": 0}
    chains: dict[int, Any] = {}
    options: dict[str, Any] = {"max_cpu_bytes": 10 * TOKENS * 256, "max_disk_bytes": budget, "ttl": "20s"}
    # Many more writes than any SSD should see: that is the point.
    store = KVStore(root, max_write_bytes_per_day=None, **options)
    for number in until(seconds):
        which = min(int(rng.expovariate(1 / 12)), CHAINS - 1)
        if which not in chains:
            chains[which] = random_chain(LENGTH, seed=which, tokens=TOKENS)
        chain = chains[which][: rng.randint(1, LENGTH)]
        counts["calls"] += 1
        found = store.lookup(keys_of(chain))
        for stored, block in zip(found, chain, strict=False):
            source = store.open(stored.info.key)
            if source is None:
                break  # evicted by another process meanwhile: a miss
            counts["reads"] += 1
            same = source.info == block.info and np.array_equal(source.token_ids, block.token_ids)
            for index, spec in enumerate(source.layout.tensors):
                rows = np.zeros((spec.heads, block.info.n_tokens, spec.row_nbytes), np.uint8)
                source.read_into(index, [rows])
                same = same and np.array_equal(rows, block.tensor(index))
            source.close()
            counts["wrong"] += not same
        for block in chain[len(found) :]:
            store.put(block)
            counts["puts"] += 1
        store.touch(keys_of(chain))
        dice = rng.random()
        if dice < 0.01:
            store.pin(keys_of(chain[:2]), f"pin{rng.randrange(3)}")
        elif dice < 0.02:
            store.unpin(f"pin{rng.randrange(3)}")
        elif dice < 0.025:
            store.remove(keys_of(chain)[::-1])
        elif dice < 0.03:
            store.prune(older_than_s=5.0)
        elif dice < 0.035:
            store.promote(keys_of(chain))
        elif dice < 0.04:
            store.close()
            store = KVStore(root, max_write_bytes_per_day=None, **options)
        if number % 50 == 0:
            check_problems(store, counts)
    check_problems(store, counts)
    store.close()
    return counts


def check_problems(store: KVStore, counts: dict[str, int]) -> None:
    """Count what went wrong in the background as wrong; a budget that pins fill is none of it."""
    for problem in store.take_problems():
        if "has no room" not in problem:
            print(problem, file=sys.stderr)
            counts["wrong"] += 1


# --- a model ----------------------------------------------------------------------------------------


def tiny_model() -> Any:
    """Return a small Llama with random weights: the same in every process."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Weights larger than usual make peaked logits, so that greedy decoding does not hang on rounding.
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        bos_token_id=257,
        eos_token_id=None,
        pad_token_id=256,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def prompt_of(which: int, question: int) -> Any:
    """Return a document with a question after it, as ids."""
    import torch

    rng = random.Random(which)
    document = [rng.randrange(250) for _ in range(BLOCK_SIZE * rng.randint(3, 12) + rng.randrange(BLOCK_SIZE))]
    rng = random.Random(1000 * which + question + 1)
    return torch.tensor([[*document, *(rng.randrange(250) for _ in range(rng.randint(2, 40)))]])


def use_model(root: Path, seed: int, seconds: float, budget: int) -> dict[str, int]:
    """Ask random questions about random documents, and compare with plain transformers."""
    import torch

    from kvembed import CachedModel

    rng = random.Random(seed)
    counts = {"calls": 0, "reused": 0, "wrong": 0}
    plain, expected = tiny_model(), {}
    options: dict[str, Any] = {"max_cpu_bytes": 1 << 18, "max_disk_bytes": budget, "max_write_bytes_per_day": None}
    with (
        KVStore(root, **options) as store,
        CachedModel(tiny_model(), store=store, block_size=BLOCK_SIZE, max_live=1, progress=False) as model,
    ):
        for _ in until(seconds):
            which, question = rng.randrange(DOCUMENTS), rng.randrange(QUESTIONS)
            ids = prompt_of(which, question)
            arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
            if (which, question) not in expected:
                expected[which, question] = plain.generate(ids, **arguments)
            if rng.random() < 0.5:
                model.drop_live()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                answer = model.generate(ids, **arguments)
            counts["calls"] += 1
            counts["wrong"] += any("has no room" not in str(warning.message) for warning in caught)
            counts["reused"] += model.usage.cached_tokens
            counts["wrong"] += not torch.equal(answer, expected[which, question])
        check_problems(store, counts)
    return counts


# --- the run ----------------------------------------------------------------------------------------


def budget_of(mode: str, share: float) -> tuple[int, int, int]:
    """Return the working set, the budget, and the largest block file."""
    if mode == "blocks":
        working_set, largest = CHAINS * LENGTH * BLOCK_FILE, BLOCK_FILE
    else:
        largest = BLOCK_SIZE * 3 * 2 * 2 * 16 * 4 + 8192
        blocks = sum(
            prompt_of(which, question).shape[1] // BLOCK_SIZE + 1
            for which in range(DOCUMENTS)
            for question in range(QUESTIONS)
        )
        # Of the documents once, and the last blocks of every question.
        blocks = blocks // QUESTIONS + 2 * DOCUMENTS * QUESTIONS
        working_set = blocks * largest
    return working_set, int(working_set * share), largest


def run(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Start the processes, watch, and return what was seen."""
    working_set, budget, largest = budget_of(arguments.mode, arguments.share)
    if arguments.encrypted:
        os.environ["KVEMBED_KEY"] = os.urandom(32).hex()  # what all of them take for an encrypted store
    KVStore(root, max_disk_bytes=budget, key="env" if arguments.encrypted else None).close()
    command = [sys.executable, __file__, "--mode", arguments.mode, "--child", str(root)]
    command += ["--minutes", str(arguments.minutes)]
    children = [
        subprocess.Popen(
            [*command, "--seed", str(arguments.seed + n), "--budget", str(budget)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(arguments.processes)
    ]
    samples = most = over = 0
    # A new block can add its file and the page of a new folder.
    allowed = budget + arguments.processes * (largest + 4096)
    try:
        while any(child.poll() is None for child in children):
            used = du(root / "blocks")
            samples, most, over = samples + 1, max(most, used), over + (used > allowed)
            time.sleep(arguments.pause)
        results = [json.loads(child.communicate()[0] or "{}") for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
    with KVStore(root, max_disk_bytes=budget) as store:
        problems = [] if any(child.returncode for child in children) else list(store.verify().problems)
        stats = store.stats()
    totals = {name: sum(result.get(name, 0) for result in results) for name in results[0]}
    return {
        "mode": arguments.mode,
        "processes": arguments.processes,
        "minutes": arguments.minutes,
        "working_set": working_set,
        "budget": budget,
        "allowed": allowed,
        "largest_du": most,
        "du_samples": samples,
        "du_over": over,
        "failed": sum(child.returncode != 0 for child in children),
        "problems": problems,
        "written": stats.written_bytes,
        "evicted_or_dropped": stats.written_bytes - stats.tiers[-1].nbytes,
        **totals,
    }


def main() -> int:
    """Run as the observer, or as one of the processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mode", choices=("blocks", "model"), default="blocks")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.1, help="budget as a part of the working set")
    parser.add_argument("--pause", type=float, default=0.002, help="seconds between looks at the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encrypted", action="store_true", help="encrypt the store")
    for name in ("child", "budget"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        warnings.simplefilter("error")
        use = use_blocks if arguments.mode == "blocks" else use_model
        print(json.dumps(use(Path(arguments.child), arguments.seed, 60 * arguments.minutes, int(arguments.budget))))
        return 0
    with tempfile.TemporaryDirectory(prefix="kvembed-soak-") as folder:
        result = run(arguments, Path(folder))
    print(json.dumps(result, indent=1))
    sound = not result["wrong"] and not result["failed"] and not result["problems"] and not result["du_over"]
    return 0 if sound and result["calls"] else 1


if __name__ == "__main__":
    sys.exit(main())
