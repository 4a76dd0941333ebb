"""Peak memory of a cold call over plain ``generate()`` at 4,096 tokens, each in a process of its own."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch

from kvembed import CachedModel, KVStore

BUDGETS = ("0", "64MiB", "256MiB")


def main() -> None:
    args = common.arguments(__doc__ or "", rounds=3, lengths=(4096,))
    if args.child:
        return child(args.model, json.loads(args.child))
    rows = []
    for length in args.lengths:
        plain = common.median([run(args.model, length, None) for _ in range(args.rounds)])
        for budget in BUDGETS:
            ours = common.median([run(args.model, length, budget) for _ in range(args.rounds)])
            rows.append(
                {
                    "prompt tokens": length,
                    "max_cpu_bytes": budget,
                    "plain peak MiB": plain,
                    "kvembed peak MiB": ours,
                    "over plain MiB": ours - plain,
                }
            )
    common.report("memory", rows, ["Reach: at most the cpu budget and one block (11.3 MiB) for the writer over plain."])


def run(model: str, length: int, budget: str | None) -> float:
    task = json.dumps({"length": length, "budget": budget})
    command = [sys.executable, __file__, "--model", model, "--child", task]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def child(name: str, task: dict) -> None:
    model, tokenizer = common.load(name)
    prompt = common.prompt(common.text_ids(tokenizer), task["length"])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    reset_peak()
    if task["budget"] is None:
        model.generate(prompt, **options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            budget = None if task["budget"] == "0" else task["budget"]
            with KVStore(folder, max_cpu_bytes=budget) as store:
                CachedModel(model, tokenizer, store=store, progress=False).generate(prompt, **options)
    print(peak())


def reset_peak() -> None:
    """Forget the peak of loading the model (Linux); elsewhere it hides smaller peaks after it."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak() -> float:
    """Peak resident memory in MiB since `reset_peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024  # pyright: ignore[reportOptionalSubscript]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
