"""Twenty questions about one document: asked together, one by one, and with plain transformers.

Also the second question on a longer document: time to first token live, after the model and store were opened anew, and
plain. Plain transformers gets some of the questions only (each costs it the same), and its texts are compared.
"""

from __future__ import annotations

import tempfile
from typing import Any

import common
import numpy as np
import torch

from kvembed import CachedModel, KVStore

NEW = 16
TOPICS = (
    *("assignments", "names", "imports", "classes", "functions", "loops", "exceptions", "attributes", "numbers"),
    *("strings", "lists", "dictionaries", "comparisons", "operators", "scopes", "generators", "decorators"),
    *("modules", "slices", "sets"),
)
QUESTIONS = [f"What is said about {topic}?" for topic in TOPICS]


def plain(model: Any, prompt_ids: np.ndarray, new: int) -> list[int]:
    """Answer with transformers alone."""
    ids = torch.from_numpy(prompt_ids.astype(np.int64))[None]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def text_of(tokenizer: Any, tokens: int) -> str:
    """Return the beginning of the Python reference with about so many tokens."""
    return tokenizer.decode(common.text_ids(tokenizer)[:tokens].tolist())


def throughput(model: Any, tokenizer: Any, length: int, rounds: int, sample: int) -> dict[str, Any]:
    """Measure all questions; each of ours counts with the prefill of the document."""
    prefill, together, single, theirs = [], [], [], []
    same = 0
    with tempfile.TemporaryDirectory() as folder, KVStore(folder) as store:
        cached = CachedModel(model, tokenizer, store=store, progress=False)
        text = text_of(tokenizer, length)
        seconds, document = common.timed(lambda: cached.document(text))
        prefill.append(seconds)
        document.ask_many(QUESTIONS[:2], max_new_tokens=NEW)  # the trial, once for a model
        for r in range(rounds):
            seconds, many = common.timed(lambda: document.ask_many(QUESTIONS, max_new_tokens=NEW))
            together.append(seconds)
            fresh = [f"Round {r}: {question}" for question in QUESTIONS]  # what was asked before is cached
            seconds, _ = common.timed(lambda asked=fresh: [document.ask(q, max_new_tokens=NEW) for q in asked])
            single.append(seconds)
            for answer in many[r::rounds][: max(1, sample // rounds)]:
                seconds, ids = common.timed(lambda a=answer: plain(model, a.prompt_ids, NEW))
                theirs.append(seconds * len(QUESTIONS))
                assert ids == answer.token_ids.tolist(), (answer.question, answer.text)
                same += 1
        cached.close()
    a, b, c = common.median(together), common.median(single), common.median(theirs)
    first = common.median(prefill)
    return {
        "document tokens": document.tokens,
        "questions": len(QUESTIONS),
        "plain, s": c,
        "prefill once, s": first,
        "one by one, s": b,
        "ask_many, s": a,
        "ask_many over one by one": b / a,
        "with prefill over plain": c / (first + a),
        "one by one with prefill over plain": c / (first + b),
        "texts equal to plain": f"{same}/{same}",
    }


def second_question(model: Any, tokenizer: Any, length: int, rounds: int) -> dict[str, Any]:
    """Measure the time to the first token of a second question."""
    live, restarted = [], []
    with tempfile.TemporaryDirectory() as folder:
        text = text_of(tokenizer, length)
        with KVStore(folder) as store:
            cached = CachedModel(model, tokenizer, store=store, progress=False)
            document = cached.document(text)
            document.ask(QUESTIONS[0], max_new_tokens=4)
            for question in QUESTIONS[1 : rounds + 1]:
                live.append(document.ask(question, max_new_tokens=4).usage.ttft_s)
            cached.close()
        answer = None
        for question in QUESTIONS[10 : rounds + 10]:
            with KVStore(folder) as store:  # nothing in memory; the file comes from the system's page cache
                cached = CachedModel(model, tokenizer, store=store, progress=False)
                answer = cached.document(text, prefill=False).ask(question, max_new_tokens=4)
                assert set(answer.usage.cached_tokens_by_tier) == {"disk"}, answer.usage
                restarted.append(answer.usage.ttft_s)
                cached.close()
        assert answer is not None
        prompt = answer.prompt_ids
        seconds, ids = common.timed(lambda: plain(model, prompt, 1))
        assert ids == answer.token_ids.tolist()[:1]
    return {
        "document tokens": document.tokens,
        "plain TTFT, s": seconds,
        "live TTFT, s": common.median(live),
        "after a restart TTFT, s": common.median(restarted),
    }


def main() -> None:
    args = common.arguments(__doc__ or "", rounds=2, lengths=(4000, 7000))
    model, tokenizer = common.load(args.model)
    notes = [f"at most {NEW} tokens an answer; ours with the document's prefill where it says so"]
    common.report("documents", [throughput(model, tokenizer, args.lengths[0], args.rounds, 4)], notes)
    common.report("documents_second", [second_question(model, tokenizer, args.lengths[-1], 3)])


if __name__ == "__main__":
    main()
