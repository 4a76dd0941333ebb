"""Many questions in one go say what each says by itself, and what rounding could turn is asked by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import CachedModel, KVStore, PromptError
from kvembed import _together as together

from .conftest import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvembed import Answer

TEXT = "The lighthouse keeper counts the ships at dusk. " * 6
QUESTIONS = ["Who?", "How many ships were there on Monday?", "What does the keeper do, and when?", "Why?", "At dusk?"]


def plain_replies(model: CachedModel, answers: list[Answer], new: int, **kwargs: Any) -> list[list[int]]:
    """Return what plain transformers answers to the same prompts, one after another."""
    found = []
    for answer in answers:
        ids = torch.from_numpy(answer.prompt_ids.astype(np.int64))[None]
        arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, **kwargs}
        found.append(model.hf_model.generate(ids, **arguments)[0, ids.shape[1] :].tolist())
    return found


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that was computed together."""
    seen: list[int] = []
    real = together._rows

    def rows(replies: torch.Tensor, *args: Any) -> Any:
        seen.append(len(replies))
        return real(replies, *args)

    monkeypatch.setattr(together, "_rows", rows)
    return seen


@pytest.mark.parametrize("tier", ["live", "cpu", "disk", "cold"])
def test_answers_are_those_of_plain_transformers(model: CachedModel, batches: list[int], tier: str) -> None:
    document = model.document(TEXT, prefill=tier != "cold")
    if tier in ("cpu", "disk"):
        model.drop_live()
    if tier == "disk":
        model.store.flush()
        assert model.store._cpu is not None
        model.store._cpu.clear()
    answers = document.ask_many(QUESTIONS, max_new_tokens=24)
    assert [answer.question for answer in answers] == QUESTIONS
    assert batches == [len(QUESTIONS)]
    assert [answer.token_ids.tolist() for answer in answers] == plain_replies(model, answers, 24)
    for answer in answers:
        assert answer.usage.completion_tokens == len(answer.token_ids)
        assert answer.usage.prompt_tokens == len(answer.prompt_ids)
    # Again, now that the model is trusted: each computes its question at most.
    again = document.ask_many(QUESTIONS[::-1], max_new_tokens=24)
    assert [a.text for a in again] == [a.text for a in answers][::-1]
    assert all(a.usage.computed_tokens <= len(a.prompt_ids) - document.tokens for a in again)


def test_the_scores_are_equal_to_rounding(model: CachedModel) -> None:
    document = model.document(TEXT)
    prompts = [document.prompt_ids(question) for question in QUESTIONS]
    suffixes = [ids[document.tokens :] for ids in prompts]
    rows = together.answer_together(model, document.prefix_ids, suffixes, 1, {}, False)
    for ids, row in zip(prompts, rows, strict=True):
        with torch.no_grad():
            logits = model.hf_model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, -1]
        assert float((logits - row.first).abs().max()) < 1e-4


def test_ends_penalties_and_batches(model: CachedModel, batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_MOST_ROWS", 2)
    document = model.document(TEXT)
    first = document.ask(QUESTIONS[1], max_new_tokens=8)
    eos = int(first.token_ids[3])
    options: dict[str, Any] = {"eos_token_id": eos, "repetition_penalty": 1.3}
    answers = document.ask_many(QUESTIONS, max_new_tokens=16, **options)
    assert batches == [2, 2, 1]
    expected = plain_replies(model, answers, 16, pad_token_id=256, **options)
    assert [answer.token_ids.tolist() for answer in answers] == expected


def test_what_rounding_could_turn_is_asked_by_itself(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, batches: list[int]
) -> None:
    hf_model = tiny_llama()
    with torch.no_grad():  # every token has a twin of exactly its score
        head = hf_model.lm_head.weight
        head[128:256] = head[:128]
    with KVStore(tmp_path) as store:
        model = CachedModel(hf_model, tiny_tokenizer, store=store, block_size=BLOCK, progress=False)
        answers = model.document(TEXT).ask_many(QUESTIONS, max_new_tokens=6)
        assert batches == [len(QUESTIONS)]
        assert [answer.token_ids.tolist() for answer in answers] == plain_replies(model, answers, 6)
        document = model.document(TEXT)
        rows = together.answer_together(
            model, document.prefix_ids, [a.prompt_ids[document.tokens :] for a in answers], 6, {}, False
        )
        assert not any(row.sure for row in rows)
        model.close()


def test_a_model_that_answers_otherwise_in_batches_is_not_trusted(
    model: CachedModel, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = together.SharedRun.take

    def take(self: Any, key: torch.Tensor) -> Any:
        prefix_k, prefix_v = real(self, key)
        return prefix_k, prefix_v * 1.01

    monkeypatch.setattr(together.SharedRun, "take", take)
    document = model.document(TEXT)
    for _ in range(2):
        answers = document.ask_many(QUESTIONS, max_new_tokens=8)
        assert [answer.token_ids.tolist() for answer in answers] == plain_replies(model, answers, 8)
    assert batches == [len(QUESTIONS)], "the second time nobody tries"


@pytest.mark.parametrize("family", ["tiny_gemma3", "tiny_mistral", "eager", "bfloat16", "sampled"])
def test_elsewhere_one_follows_the_other(
    request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path: Path, batches: list[int], family: str
) -> None:
    plain = family in ("eager", "bfloat16", "sampled")
    hf_model = request.getfixturevalue("tiny_llama" if plain else family)()
    options: dict[str, Any] = {"do_sample": True, "top_k": 1} if family == "sampled" else {}
    if family == "eager":
        hf_model.set_attn_implementation("eager")
    if family == "bfloat16":
        hf_model = hf_model.to(torch.bfloat16)
    with KVStore(tmp_path) as store:
        model = CachedModel(hf_model, tiny_tokenizer, store=store, block_size=BLOCK, progress=False)
        document = model.document(TEXT)
        answers = document.ask_many(QUESTIONS, max_new_tokens=5, **options)
        assert batches == []
        assert [a.text for a in answers] == [document.ask(q, max_new_tokens=5, **options).text for q in QUESTIONS]
        if family == "bfloat16":
            assert len(document.ask_many(QUESTIONS, max_new_tokens=5, together=True)) == len(QUESTIONS)
            assert batches == [len(QUESTIONS)]
        model.close()


def test_progress_and_bad_questions(model: CachedModel) -> None:
    document = model.document(TEXT)
    seen: list[tuple[int, int]] = []
    document.ask_many(QUESTIONS, max_new_tokens=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(QUESTIONS), len(QUESTIONS))
    assert document.ask_many([]) == []
    with pytest.raises(PromptError, match="question is empty"):
        document.ask_many(["Who?", " "])


def test_lossy_kv_is_told(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    with KVStore(tmp_path / "lossy", codec="int8") as store:
        cached = CachedModel(tiny_llama(), tiny_tokenizer, store=store, block_size=BLOCK, progress=False)
        document = cached.document(TEXT)
        fresh = document.ask_many(QUESTIONS, max_new_tokens=4)
        cached.drop_live()
        stored = document.ask_many(QUESTIONS, max_new_tokens=4)
        cached.close()
    assert {answer.usage.lossy for answer in fresh} == {None}
    assert {answer.usage.lossy for answer in stored} == {"int8"}
