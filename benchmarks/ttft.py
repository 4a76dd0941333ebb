"""Time to first token with a 20-token suffix: cold, live, cpu tier, disk tier, new process, and plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

import common
import torch
from transformers import DynamicCache

from kvembed import CachedModel, KVStore

SUFFIX = 20
OPTIONS = {"max_new_tokens": 1, "do_sample": False}


def main() -> None:
    args = common.arguments(__doc__ or "", rounds=7)
    if args.child:
        return child(args.model, json.loads(args.child))
    model, tokenizer = common.load(args.model)
    ids = common.text_ids(tokenizer)
    memcpy = common.memcpy_gbps()
    rows = []
    for length in args.lengths:
        with tempfile.TemporaryDirectory() as folder:
            store = KVStore(folder)
            cached = CachedModel(model, tokenizer, store=store, progress=False)
            cold = ask(cached, ids, length, 0)
            store.flush()
            forward, live, cpu, disk, same = [], [], [], [], []
            for r in range(1, args.rounds + 1):
                forward.append(plain_suffix(model, ids, length, cached))
                live.append(ask(cached, ids, length, r))
                assert cached.usage.cached_tokens_by_tier == {"live": length}, cached.usage
                same.append(first_token(cached, ids, length, r))
                cached.drop_live()
                cpu.append(ask(cached, ids, length, r + 100))
                assert set(cached.usage.cached_tokens_by_tier) == {"cpu"}, cached.usage
                store.flush()
            cached.close()
            store.close()
            nbytes = length * cached.kv_bytes_per_token
            with KVStore(folder, max_cpu_bytes=None) as other:
                only_disk = CachedModel(model, tokenizer, store=other, progress=False)
                for r in range(args.rounds):
                    only_disk.drop_live()
                    disk.append(ask(only_disk, ids, length, r + 200))
                    assert set(only_disk.usage.cached_tokens_by_tier) == {"disk"}, only_disk.usage
                only_disk.close()
            process = [new_process(args.model, folder, length, r) for r in range(args.rounds)]
            reference = [plain_first_token(model, ids, length, r) for r in (1, 2)]
            allowed = 0.030 + nbytes / (0.7 * memcpy * 1e9)
            added = common.median(process) - common.median(live)
            rows.append(
                {
                    "document tokens": length,
                    "KV MB": nbytes / 1e6,
                    "cold s": cold,
                    "plain bare forward ms": 1e3 * common.median(forward),
                    "live ms": 1e3 * common.median(live),
                    "live / plain forward": common.paired_ratio(live, forward),
                    "cpu ms": 1e3 * common.median(cpu),
                    "disk ms": 1e3 * common.median(disk),
                    "new process ms": 1e3 * common.median(process),
                    "added over live ms": 1e3 * added,
                    "allowed ms": 1e3 * allowed,
                    "cold / live": cold / common.median(live),
                    "cold / disk": cold / common.median(disk),
                    "same token": same[:2] == reference,
                }
            )
    common.report(
        "ttft",
        rows,
        [
            f"Suffix of {SUFFIX} new tokens each time. memcpy on this machine: {memcpy:.1f} GB/s.",
            "plain bare forward: transformers' own forward of the suffix over a full DynamicCache, nothing else.",
            "new process: model loaded, page cache warm, first call. allowed: 30 ms + KV bytes at 70 % of memcpy.",
        ],
    )


def ask(cached: CachedModel, ids: torch.Tensor, length: int, variant: int) -> float:
    prompt = common.prompt(ids, length, SUFFIX, variant)
    cached.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS)
    return cached.usage.ttft_s


def first_token(cached: CachedModel, ids: torch.Tensor, length: int, variant: int) -> int:
    prompt = common.prompt(ids, length, SUFFIX, variant)
    return int(cached.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS)[0, -1])


def plain_first_token(model, ids: torch.Tensor, length: int, variant: int) -> int:
    prompt = common.prompt(ids, length, SUFFIX, variant)
    return int(model.generate(prompt, attention_mask=torch.ones_like(prompt), **OPTIONS)[0, -1])


def plain_suffix(model, ids: torch.Tensor, length: int, cached: CachedModel) -> float:
    """A bare forward of the suffix over a stock cache that holds the document."""
    sequence = cached._engine.live.of_root(cached._engine.root)[0]
    stock = DynamicCache(config=model.config)
    for i, layer in enumerate(sequence.cache.layers):
        k, v = layer.rows(0, length)
        stock.update(k.clone(), v.clone(), i)
    suffix = common.prompt(ids, length, SUFFIX)[:, length:]
    with torch.no_grad():
        return common.timed(lambda: model(suffix, past_key_values=stock, logits_to_keep=1))[0]


def new_process(model: str, folder: str, length: int, variant: int) -> float:
    task = json.dumps({"folder": folder, "length": length, "variant": 300 + variant})
    done = subprocess.run(
        [sys.executable, __file__, "--model", model, "--child", task], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1])["ttft_s"])


def child(name: str, task: dict) -> None:
    # In the order of a script: load, wrap, read the document, ask.
    model, tokenizer = common.load(name)
    with KVStore(task["folder"]) as store:
        cached = CachedModel(model, tokenizer, store=store, progress=False)
        ids = common.text_ids(tokenizer)
        # The first forward of a process sets up thread pools and kernels; plain transformers pays for that too.
        with torch.no_grad():
            model(ids[None, :SUFFIX])
        began = time.perf_counter()
        ask(cached, ids, task["length"], task["variant"])
        usage = cached.usage
        assert set(usage.cached_tokens_by_tier) == {"disk"}, usage
        print(json.dumps({"ttft_s": usage.ttft_s, "total_s": time.perf_counter() - began}))
        cached.close()


if __name__ == "__main__":
    main()
