"""Greedy tokens of 20 prompts against plain ``generate()``: cold, live, cpu, disk and new process; and bits."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import common
import torch

from kvembed import CachedModel, KVStore

NEW = 32
QUESTIONS = ("What is a generator?", "How does slicing work?", "Explain the with statement.", "What does yield do?")


def prompts(tokenizer) -> list[torch.Tensor]:
    """Twenty prompts: stretches of the reference of many lengths, each ended by a question, and short chats."""
    ids = common.text_ids(tokenizer)
    made = []
    for i in range(14):
        length = (150, 255, 256, 257, 400, 511, 512, 513, 700, 900, 1024, 1100, 1300, 1500)[i]
        question = tokenizer(f"\n\nQuestion: {QUESTIONS[i % 4]}\nAnswer:", return_tensors="pt").input_ids[0]
        made.append(torch.cat([ids[3000 * i : 3000 * i + length], question])[None])
    for i in range(6):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[i % 4] + " " * (i // 4)}], tokenize=False, add_generation_prompt=True
        )
        made.append(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)
    return made


def new_tokens(model, prompt: torch.Tensor) -> list[int]:
    """Greedy tokens of a model, plain or cached."""
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
    return out[0, prompt.shape[1] :].tolist()


def main() -> None:
    args = common.arguments(__doc__ or "")
    model, tokenizer = common.load(args.model)
    made = prompts(tokenizer)
    if args.child:
        with KVStore(args.child, max_cpu_bytes=None) as store:
            cached = CachedModel(model, tokenizer, store=store, progress=False, max_live=0)
            rows = [(new_tokens(cached, p), cached.usage.cached_tokens_by_tier) for p in made]
            print(json.dumps(rows))
        return
    plain = [new_tokens(model, p) for p in made]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with KVStore(folder) as store:
            cached = CachedModel(model, tokenizer, store=store, progress=False)
            cold, live, cpu = [], [], []
            tiers: dict[str, dict[str, int]] = {"cold": {}, "live": {}, "cpu": {}}
            for p in made:
                cold.append(new_tokens(cached, p))
                _add(tiers["cold"], cached)
                live.append(new_tokens(cached, p))
                _add(tiers["live"], cached)
            cached.drop_live()
            for p in made:
                cpu.append(new_tokens(cached, p))
                _add(tiers["cpu"], cached)
                cached.drop_live()
            store.flush()
        with KVStore(folder, max_cpu_bytes=None) as store:
            cached = CachedModel(model, tokenizer, store=store, progress=False, max_live=0)
            tiers["disk"] = {}
            disk = []
            for p in made:
                disk.append(new_tokens(cached, p))
                _add(tiers["disk"], cached)
        command = [sys.executable, __file__, "--model", args.model, "--child", folder]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        tiers["new process"] = {}
        for _, by_tier in answer:
            for tier, n in by_tier.items():
                tiers["new process"][tier] = tiers["new process"].get(tier, 0) + n
        results = {
            "cold": cold,
            "live": live,
            "cpu": cpu,
            "disk": disk,
            "new process": [tokens for tokens, _ in answer],
        }
        for name, tokens in results.items():
            equal = sum(a == b for a, b in zip(tokens, plain, strict=True))
            rows.append(
                {
                    "run": name,
                    "prompts identical": f"{equal} of {len(plain)}",
                    "tokens by tier": " ".join(f"{k} {v:,}" for k, v in tiers[name].items()) or "none (computed)",
                }
            )
    rows += bits(model, tokenizer, made)
    common.report("identity", rows, [f"{NEW} greedy tokens a prompt, fp32. Bits: logits of every step and all KV."])


def _add(counts: dict[str, int], cached: CachedModel) -> None:
    for tier, n in cached.usage.cached_tokens_by_tier.items():
        counts[tier] = counts.get(tier, 0) + n


def bits(model, tokenizer, made) -> list[dict]:
    """``torch.equal`` of a warm call and a cold one, reuse ending on a block edge, for every tier."""
    rows = []
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    chosen = [p for p in made if p.shape[1] > 600][:4]
    equal = dict.fromkeys(("live", "cpu", "disk"), 0)
    for p in chosen:
        with tempfile.TemporaryDirectory() as folder:
            with KVStore(folder) as store:
                cold = CachedModel(model, tokenizer, store=store, progress=False)
                reference = cold.generate(p, attention_mask=torch.ones_like(p), **options)
                assert cold.usage.cached_tokens == 0
                warm = CachedModel(model, tokenizer, store=store, progress=False, deterministic=True)
                equal["cpu"] += same_bits(warm.generate(p, attention_mask=torch.ones_like(p), **options), reference)
                assert set(warm.usage.cached_tokens_by_tier) == {"cpu"}
                warm.generate(p, attention_mask=torch.ones_like(p), max_new_tokens=2, do_sample=False)
                equal["live"] += same_bits(warm.generate(p, attention_mask=torch.ones_like(p), **options), reference)
                assert set(warm.usage.cached_tokens_by_tier) == {"live"}
                store.flush()
            with KVStore(folder, max_cpu_bytes=None) as store:
                warm = CachedModel(model, tokenizer, store=store, progress=False, deterministic=True)
                equal["disk"] += same_bits(warm.generate(p, attention_mask=torch.ones_like(p), **options), reference)
                assert set(warm.usage.cached_tokens_by_tier) == {"disk"}
    for tier, n in equal.items():
        rows.append({"run": f"bits, {tier}", "prompts identical": f"{n} of {len(chosen)}", "tokens by tier": tier})
    return rows


def same_bits(a, b) -> bool:
    logits = all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
    layers = zip(a.past_key_values.layers, b.past_key_values.layers, strict=True)
    return logits and all(torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in layers)


if __name__ == "__main__":
    main()
