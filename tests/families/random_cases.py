"""Random cases: a family, a history, a prompt that shares some of it, a way of generating, a tier.

``python -m tests.families.random_cases --count 5000`` runs many, ``--part 1/4`` a quarter of them; ``test_random.py``
runs a few hundred of the same.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from kvembed import CacheBypassWarning, CachedModel, KVStore

from .test_families import SERVED
from .zoo import build

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Case", "draw", "run_cases"]

BLOCK = 16
TIERS = ("live", "cpu", "disk")
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "beams": {"num_beams": 2},
    "samples": {"num_return_sequences": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.2},
    "chunked": {"prefill_chunk_size": 8},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "batch": {},
    "batch of beams": {"num_beams": 2},
    "assisted": {},
}


@dataclass(frozen=True)
class Case:
    """One case.

    Args:
        family: Name in the zoo.
        number: Seeds everything random in it.
        mode: Name in `MODES`.
        tier: The fastest tier that still holds anything.
        history: Tokens of the first prompt.
        cut: Tokens the second prompt shares with the first and its reply.
        suffix: Tokens of its own.
        deterministic: Whether only bit-exact reuse is allowed.
    """

    family: str
    number: int
    mode: str
    tier: str
    history: int
    cut: int
    suffix: int
    deterministic: bool


def draw(count: int, seed: int) -> list[Case]:
    """Return cases, those of one family together."""
    random_ = random.Random(seed)
    cases = []
    for number in range(count):
        history = random_.randint(2, 100)
        cases.append(
            Case(
                family=random_.choice(SERVED),
                number=number,
                mode=random_.choice(["greedy", *MODES]),
                tier=random_.choice(TIERS),
                history=history,
                cut=random_.randint(0, history + 5),
                suffix=random_.randint(1, 40),
                deterministic=random_.random() < 0.2,
            )
        )
    return sorted(cases, key=lambda case: case.family)


def _generate(model: Any, ids: torch.Tensor, case: Case, assistant: Any = None) -> list[list[int]]:
    torch.manual_seed(case.number)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, **MODES[case.mode]}
    if assistant is not None:
        options["assistant_model"] = assistant
    return model.generate(ids, **options).tolist()


def _wrong(model: Any, case: Case) -> str | None:
    """Run one case; return what is wrong."""
    torch.manual_seed(case.number)
    history = torch.randint(0, 250, (1, case.history))
    options = {"max_new_tokens": 6, "do_sample": False}
    mask = torch.ones_like(history)
    with tempfile.TemporaryDirectory() as folder, KVStore(folder, max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(
            model, store=store, block_size=BLOCK, progress=False, deterministic=case.deterministic, max_live=2
        )
        reply = cached.generate(history, attention_mask=mask, **options)
        if reply.tolist() != model.generate(history, attention_mask=mask, **options).tolist():
            return "the cold call"
        torch.manual_seed(case.number + 1)
        prompt = torch.cat([reply[:, : case.cut], torch.randint(0, 250, (1, case.suffix))], dim=1)
        plain_assistant = assistant = None
        if case.mode == "assisted":
            plain_assistant = build("mistral", case.number % 2)
            assistant = CachedModel(plain_assistant, store=store, block_size=BLOCK, progress=False)
        if case.mode.startswith("batch"):
            prompt = torch.cat([prompt, prompt.flip(1)])
        try:
            expected = _generate(model, prompt, case, plain_assistant)
        except ValueError:
            return None  # transformers refuses this mode for this family
        for tier in (case.tier, "live"):
            if tier != "live":
                cached.drop_live()
            if tier == "disk":
                store.flush()
                assert store._cpu is not None
                store._cpu.clear()
            found = _generate(cached, prompt, case, assistant)
            if found != expected:
                return f"the warm call: {cached.usage!r}"
        store.flush()
        problems = store.verify().problems
        return f"the store: {problems}" if problems else None


def run_cases(cases: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    """Run cases; yield those that went wrong, and how."""
    for family, group in groupby(cases, key=lambda case: case.family):
        model = build(family)
        for case in group:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CacheBypassWarning)
                wrong = _wrong(model, case)
            if wrong is not None:
                yield case, wrong


def main() -> None:
    """Run many cases and report."""
    import logging

    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="which of how many equal parts, such as 2/4")
    args = parser.parse_args()
    part, parts = (int(number) for number in args.part.split("/"))
    cases = draw(args.count, args.seed)
    cases = cases[len(cases) * (part - 1) // parts : len(cases) * part // parts]
    began = time.perf_counter()
    wrong = 0
    for case, what in run_cases(cases):
        wrong += 1
        print(f"WRONG {what} in {case}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(cases):,} cases of seed {args.seed}, part {args.part}, {wrong} wrong, {seconds:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
