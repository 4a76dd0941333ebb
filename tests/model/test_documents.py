"""Documents: prepared or not, pinned, and asked again in another store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import ConfigError

from ._lab import BLOCK, Lab

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "The lighthouse keeper counts the ships at dusk. " * 6


def test_an_unprepared_document_costs_nothing_until_it_is_asked(lab: Lab, model: Any, tiny_tokenizer: Any) -> None:
    cached = lab.wrap(model, tokenizer=tiny_tokenizer)
    document = cached.document(TEXT, prefill=False)
    assert cached.store.ls() == []
    assert document.usage.cached_tokens == 0
    first = document.ask("How many?", max_new_tokens=6)
    assert first.usage.cached_tokens == 0
    again = document.ask("How many?", max_new_tokens=6)
    assert again.usage.cached_tokens >= document.tokens
    assert np.array_equal(first.token_ids, again.token_ids)


def test_the_same_answer_whether_it_was_prepared_or_not(lab: Lab, makers: Any, tiny_tokenizer: Any) -> None:
    model = makers["llama"]()
    answers = []
    for prefill in (True, False):
        cached = lab.wrap(model, lab.store(str(prefill)), tiny_tokenizer)
        document = cached.document(TEXT, prefill=prefill)
        answers.append(document.ask("How many ships?", max_new_tokens=12))
    prompt = torch.from_numpy(answers[0].prompt_ids.astype(np.int64))[None]
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    for answer in answers:
        assert answer.token_ids.tolist() == plain[0, prompt.shape[1] :].tolist()


def test_pinning_needs_a_document_that_was_computed(lab: Lab, model: Any, tiny_tokenizer: Any) -> None:
    cached = lab.wrap(model, tokenizer=tiny_tokenizer)
    with pytest.raises(ConfigError, match="prefill=True"):
        cached.document(TEXT, pin=True, prefill=False)


@pytest.mark.parametrize("asked_first", [False, True], ids=["fresh", "with a longer tail stored"])
def test_a_pinned_document_survives_eviction_to_its_last_token(
    lab: Lab, makers: Any, tiny_tokenizer: Any, asked_first: bool
) -> None:
    store = lab.store(max_cpu_bytes=None)
    cached = lab.wrap(makers["llama"](), store, tiny_tokenizer, max_live=0)
    document = cached.document(TEXT, name="keeper", prefill=not asked_first)
    assert document.tokens % BLOCK >= 8, "the document has to end in a tail for this test"
    if asked_first:
        # Now the document's last tokens are kept only as the start of a longer block.
        document.ask("How many ships went by?", max_new_tokens=BLOCK)
    document.pin()
    store.flush()
    for i in range(8):
        cached.document(f"{i} other text " * 20).ask("What?", max_new_tokens=2)
    store.prune(max_bytes=0)
    found = cached.lookup(torch.from_numpy(document.prompt_ids("And how many tomorrow?").astype(np.int64)))
    assert found.num_tokens >= document.tokens
    document.unpin()
    store.prune(max_bytes=0)
    assert store.ls() == []


def test_a_document_longer_than_the_tokenizer_allows_is_no_warning(
    lab: Lab, model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "model_max_length", 16)
    lab.wrap(model, tokenizer=tiny_tokenizer).document(TEXT, prefill=False).prompt_ids("word " * 20)
    assert not caplog.records


def test_a_folder_of_another_process_answers_from_disk(
    lab: Lab, makers: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "report.txt"
    path.write_text(TEXT, encoding="utf-8")
    model = makers["llama"]()
    store = lab.store()
    first = lab.wrap(model, store, tiny_tokenizer).document(path).ask("What?", max_new_tokens=4)
    store.close()
    again = lab.wrap(model, lab.store(max_cpu_bytes=None), tiny_tokenizer).document(path)
    assert again.name == "report.txt"
    assert set(again.usage.cached_tokens_by_tier) == {"disk"}
    assert again.ask("What?", max_new_tokens=4).text == first.text
