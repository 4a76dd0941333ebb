"""The real thing: SmolLM2 and Gemma 3 in float32 on real text, from every tier, against plain transformers.

Everything slow is done once for the module: the plain runs, and one pass over all prompts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from ._lab import Lab, assert_equal_bits, cut_texts, environment_of_a_child, random_ids, run, run_full, tokens

pytestmark = [pytest.mark.model, pytest.mark.slow]
ALL_THREADS = True

NEW = {"cold": 32, "live": 8, "cpu": 8, "disk": 8, "new process": 16}
"""Tokens generated, compared with the first ones of the plain run's 32. Decoding is most of the time here, and a
wrong KV of the prompt shows in the first tokens."""
TIERS = ["cold", "live", "cpu", "disk"]
LENGTHS = [200, 205, 210, 220, 230, 240, 256, 257, 300, 330, 400, 513, 700, 1500]
QUESTIONS = [
    "What is a list comprehension?",
    "Write one sentence about the sea.",
    "Name three prime numbers and say why they are prime.",
    "How does a hash table find a key? Answer in two sentences.",
    "Translate to French: the cache is warm.",
    "What is the capital of Italy, and what is it known for?",
]


@dataclass
class Played:
    """One pass over all prompts."""

    folder: Path
    model_folder: Path
    prompts: list[torch.Tensor]
    plain: list[list[int]]
    found: dict[str, list[list[int]]] = field(default_factory=lambda: {tier: [] for tier in TIERS})
    cached: dict[str, list[int]] = field(default_factory=lambda: {tier: [] for tier in TIERS})


def play(model_folder: Path, folder: Path, prompts: list[torch.Tensor]) -> tuple[Any, Played]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    lab = Lab(folder)
    result = Played(folder, model_folder, prompts, [tokens(run(model, p, NEW["cold"])) for p in prompts])
    cached = lab.wrap(model, lab.store(max_cpu_bytes="1GiB", max_disk_bytes="2GiB"), block_size=256, max_live=1)
    for prompt in prompts:
        for tier in TIERS:
            if tier != "cold":
                lab.leave_only(cached, tier)
            result.found[tier].append(tokens(run(cached, prompt, NEW[tier])))
            result.cached[tier].append(cached.usage.cached_tokens_by_tier.get(tier, 0))
    lab.finish()
    return model, result


@pytest.fixture(scope="module")
def smol(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Played]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for q in QUESTIONS
    ]
    prompts = [*cut_texts(tokenizer, LENGTHS), *chats]
    assert len(prompts) == 20
    return play(smollm2, tmp_path_factory.mktemp("smol"), prompts)


@pytest.fixture(scope="module")
def gemma(gemma3_270m: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Played]:
    from transformers import AutoTokenizer

    prompts = cut_texts(AutoTokenizer.from_pretrained(gemma3_270m), [700, 1040, 1300])
    return play(gemma3_270m, tmp_path_factory.mktemp("gemma"), prompts)


def check_tier(played: Played, tier: str) -> None:
    for i, (found, expected) in enumerate(zip(played.found[tier], played.plain, strict=True)):
        n = played.prompts[i].shape[1] + NEW[tier]
        assert found == expected[:n], f"prompt {i} of {played.prompts[i].shape[1]} tokens"
    if tier != "cold":
        assert played.cached[tier] == [prompt.shape[1] - 1 for prompt in played.prompts]


@pytest.mark.parametrize("tier", TIERS)
def test_smollm2_gives_the_tokens_of_plain_transformers(smol: tuple[Any, Played], tier: str) -> None:
    check_tier(smol[1], tier)


@pytest.mark.parametrize("tier", TIERS)
def test_gemma3_gives_the_tokens_of_plain_transformers(gemma: tuple[Any, Played], tier: str) -> None:
    check_tier(gemma[1], tier)


CHILD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from kvembed import CachedModel, KVStore

folder, store, new = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
results = []
with CachedModel(model, store=KVStore(store), max_live=0, progress=False) as cached:
    for ids in json.load(sys.stdin):
        ids = torch.tensor([ids])
        out = cached.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(new), do_sample=False)
        results.append([out[0].tolist(), cached.usage.cached_tokens_by_tier.get("disk", 0)])
json.dump(results, sys.stdout)
"""


def check_new_process(played: Played) -> None:
    new = NEW["new process"]
    environment = environment_of_a_child(PYTHONHASHSEED="11")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(played.model_folder), str(played.folder / "store"), str(new)],
        input=json.dumps([prompt[0].tolist() for prompt in played.prompts]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for (found, from_disk), expected, prompt in zip(results, played.plain, played.prompts, strict=True):
        assert found == expected[: prompt.shape[1] + new]
        assert from_disk == prompt.shape[1] - 1


@pytest.mark.multiprocess
def test_smollm2_in_a_new_process(smol: tuple[Any, Played]) -> None:
    check_new_process(smol[1])


@pytest.mark.multiprocess
def test_gemma3_in_a_new_process(gemma: tuple[Any, Played]) -> None:
    check_new_process(gemma[1])


def check_bits(lab: Lab, model: Any, prompt: torch.Tensor) -> None:
    edge = (prompt.shape[1] - 1) // 256 * 256
    room = {"max_cpu_bytes": "1GiB", "max_disk_bytes": "1GiB"}
    expected = run_full(lab.wrap(model, lab.store("cold", **room), block_size=256), prompt, 4)
    cached = lab.wrap(model, lab.store("warm", **room), block_size=256, deterministic=True)
    other = torch.cat([prompt[:, : edge + 3], random_ids(20)], dim=1)
    run(cached, other, 2)
    for tier in ("live", "cpu", "disk"):
        lab.leave_only(cached, tier)
        assert cached.lookup(prompt).exact_tokens == edge
        assert_equal_bits(run_full(cached, prompt, 4), expected)
        assert cached.usage.cached_tokens_by_tier == {tier: edge}


def test_smollm2_has_the_bits_of_a_cold_call(lab: Lab, smol: tuple[Any, Played]) -> None:
    check_bits(lab, smol[0], smol[1].prompts[LENGTHS.index(700)])


def test_gemma3_has_the_bits_of_a_cold_call(lab: Lab, gemma: tuple[Any, Played]) -> None:
    check_bits(lab, gemma[0], gemma[1].prompts[1])
