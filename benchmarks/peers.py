"""kvembed beside its peers on one document and one set of questions: cold, warm, after a restart.

- plain transformers: ``generate()`` over the whole prompt every time.
- recipe: the one in transformers' documentation ("prefill a cache", ``copy.deepcopy`` for every question), with
  ``torch.save`` and ``torch.load`` to survive a restart.
- llama.cpp: its own state file, weights as the GGUF file has them (Q4_1). Needs Node.js and an installed
  node-llama-cpp: ``npm install node-llama-cpp``, then ``--node-llama node_modules/node-llama-cpp --gguf FILE``.
- kvembed: as in README.

All get the same token ids, and the time to the first new token is measured over everything from ids to token:
lookup, reading files, copying caches. "After a restart" is a new process with the model loaded and files in the
page cache.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from transformers import DynamicCache

from kvembed import CachedModel, KVStore

SUFFIX = 20
REPLY = 16
GREEDY = {"do_sample": False}


def main() -> None:
    args = _arguments()
    if args.child:
        print(json.dumps(restarted(args.model, json.loads(args.child))))
        return
    model, tokenizer = common.load(args.model)
    ids = common.text_ids(tokenizer)
    rows = []
    notes = [f"Suffix of {SUFFIX} tokens; medians of {args.rounds} rounds; replies of {REPLY} greedy tokens compared."]
    for length in args.lengths:
        prompts = [common.prompt(ids, length, SUFFIX, r) for r in range(args.rounds)]
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(model, prompts, length, Path(folder))
            for name in ("recipe", "kvembed"):
                task = {"kind": name, "folder": folder, "length": length}
                runs = [_child(args.model, {**task, "variant": r}) for r in range(args.rounds)]
                measured[name]["restart"] = [run["seconds"] for run in runs]
                measured[name]["restart reply"] = runs[0]["reply"]
            if args.node_llama and args.gguf:
                measured["llama.cpp"] = llama_cpp(args, prompts, length, Path(folder))
            else:
                notes.append("llama.cpp was left out: no --node-llama and --gguf.")
        reference = measured["plain transformers"]["reply"]
        for name, figures in measured.items():
            again = figures.get("restart reply", figures["reply"])
            rows.append(
                {
                    "document tokens": length,
                    "": name,
                    "cold s": common.median(figures["cold"]),
                    "warm s": common.median(figures["warm"]),
                    "after restart s": common.median(figures.get("restart", figures["warm"])),
                    "same reply": figures["reply"] == reference and again == reference,
                }
            )
    common.report("peers", rows, notes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="alias, folder or hub id")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--node-llama", help="folder of an installed node-llama-cpp")
    parser.add_argument("--gguf", help="GGUF file of the same model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(model: Any, prompts: list[torch.Tensor], length: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Everything but restarts. The short calls follow each other, round by round, so that drift hits all alike.

    Not with the long calls in between: memory that lay idle for many seconds is slow on virtual machines that give
    it back to their host, and what would be measured is that.
    """
    store = KVStore(folder / "store")
    cached = CachedModel(model, store=store, progress=False)
    plain: dict[str, Any] = {"cold": [], "warm": []}
    recipe: dict[str, Any] = {"cold": [], "warm": []}
    ours: dict[str, Any] = {"cold": [], "warm": []}
    document = prompts[0][:, :length]
    kept = DynamicCache(config=model.config)
    with torch.no_grad():
        prefill_s, _ = common.timed(
            lambda: model(document, past_key_values=kept, attention_mask=torch.ones_like(document), logits_to_keep=1)
        )
    torch.save(kept, folder / "recipe.pt")
    seconds, _ = common.timed(lambda: new_ids(cached, prompts[0], 1))
    ours["cold"].append(seconds)
    for prompt in prompts:
        plain["cold"].append(common.timed(lambda p=prompt: new_ids(model, p, 1))[0])
    new_ids(model, prompts[0], 1, past_key_values=copy.deepcopy(kept))
    new_ids(cached, prompts[0], 1)
    for r, prompt in enumerate(prompts):
        seconds, _ = common.timed(lambda p=prompt: new_ids(model, p, 1, past_key_values=copy.deepcopy(kept)))
        recipe["warm"].append(seconds)
        if r == 0:
            recipe["cold"].append(prefill_s + seconds)
        seconds, _ = common.timed(lambda p=prompt: new_ids(cached, p, 1))
        assert cached.usage.cached_tokens >= length
        ours["warm"].append(seconds)
    plain["warm"] = plain["cold"]
    plain["reply"] = new_ids(model, prompts[0], REPLY)
    recipe["reply"] = new_ids(model, prompts[0], REPLY, past_key_values=copy.deepcopy(kept))
    ours["reply"] = new_ids(cached, prompts[0], REPLY)
    cached.close()
    store.close()
    return {"plain transformers": plain, "recipe": recipe, "kvembed": ours}


def new_ids(model: Any, prompt: torch.Tensor, n: int, **options: Any) -> list[int]:
    """Greedy ids of a model, plain or cached."""
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, **GREEDY, **options)
    return out[0, prompt.shape[1] :].tolist()


def _child(model: str, task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", model, "--child", json.dumps(task)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def restarted(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """Answer one question in this new process from what is on disk."""
    folder = Path(task["folder"])
    model, tokenizer = common.load(name)
    if task["kind"] == "recipe":
        prompt = _first_use(model, tokenizer, task)

        def answer(n: int) -> list[int]:
            kept = torch.load(folder / "recipe.pt", weights_only=False)
            return new_ids(model, prompt, n, past_key_values=kept)

        seconds, _ = common.timed(lambda: answer(1))
        return {"seconds": seconds, "reply": answer(REPLY)}
    with KVStore(folder / "store") as store:
        cached = CachedModel(model, tokenizer, store=store, progress=False)
        prompt = _first_use(model, tokenizer, task)
        seconds, _ = common.timed(lambda: new_ids(cached, prompt, 1))
        assert set(cached.usage.cached_tokens_by_tier) == {"disk"}, cached.usage
        reply = new_ids(cached, prompt, REPLY)
        cached.close()
    return {"seconds": seconds, "reply": reply}


def _first_use(model: Any, tokenizer: Any, task: dict[str, Any]) -> torch.Tensor:
    """Tokenise, and let torch set up its threads; all methods pay for both alike."""
    ids = common.text_ids(tokenizer)
    with torch.no_grad():
        model(ids[None, :SUFFIX])
    return common.prompt(ids, task["length"], SUFFIX, task["variant"])


def llama_cpp(args: argparse.Namespace, prompts: list[torch.Tensor], length: int, folder: Path) -> dict[str, Any]:
    """The same through llama.cpp; see ``peers_llamacpp.mjs``."""
    task = {
        "package": str(Path(args.node_llama).resolve()),
        "gguf": args.gguf,
        "threads": os.cpu_count(),
        "document": prompts[0][0, :length].tolist(),
        "suffixes": [p[0, length:].tolist() for p in prompts],
        "state": str(folder / "llama.state"),
        "tokens": REPLY,
        "restart": False,
    }
    first = _node(task)
    again = [_node({**task, "restart": True, "suffixes": task["suffixes"][r:]}) for r in range(args.rounds)]
    return {
        "cold": [first["cold_s"]],
        "warm": first["warm_s"],
        "restart": [run["restart_s"] for run in again],
        "reply": first["reply"],
        "restart reply": again[0]["reply"],
    }


def _node(task: dict[str, Any]) -> dict[str, Any]:
    command = ["node", str(Path(__file__).with_name("peers_llamacpp.mjs"))]
    done = subprocess.run(command, input=json.dumps(task), check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
