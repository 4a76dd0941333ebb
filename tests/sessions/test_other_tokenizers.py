"""A conversation that goes on with a model whose tokenizer gives the same text other ids."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kvembed import CachedModel, KVStore
from kvembed._sessions.marks import tokenizer_digest

from .test_sessions import BLOCK, plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def other_tokenizer(tiny_tokenizer: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the ids of its bytes in reverse: the same template, and other words for every id."""
    content = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {token: 255 - number for token, number in content["model"]["vocab"].items()}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|sep|>"],
    )
    other.chat_template = tiny_tokenizer.chat_template
    other.model_max_length = tiny_tokenizer.model_max_length
    return other


def test_ids_of_another_tokenizer_are_never_taken_over(
    model: CachedModel, tiny_llama: Callable[..., Any], other_tokenizer: Any, tmp_path: Path
) -> None:
    first = model.session("trip", system="Be brief.")
    first.send("One?", max_new_tokens=9)
    last = first.send("Two?", max_new_tokens=9)
    with KVStore(tmp_path / "other") as store:
        switched = CachedModel(tiny_llama(seed=7), other_tokenizer, store=store, block_size=BLOCK, progress=False)
        session = switched.session("trip")
        reply = session.send("Three?", max_new_tokens=9)
        messages = [{"role": "system", "content": "Be brief."}]
        for turn in session.turns[:-1]:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.reply or ""}]
        messages.append({"role": "user", "content": "Three?"})
        text = other_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert reply.prompt_ids.tolist() == other_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reply.token_ids.tolist() == plain(switched, reply, 9)
        assert reply.loss is not None
        assert "another tokenizer" in reply.loss
        assert tokenizer_digest(other_tokenizer) not in session.export("json")
        # From there on it is its own conversation.
        again = session.send("Four?", max_new_tokens=9)
        assert again.usage.cached_tokens >= len(reply.prompt_ids)
        assert again.loss is None
        switched.close()
    # Back with the first model: what it computed is found, what the other one said is tokenised anew.
    back = model.session("trip").send("Five?", max_new_tokens=9)
    assert back.token_ids.tolist() == plain(model, back, 9)
    assert back.usage.cached_tokens == len(last.prompt_ids) + len(last.token_ids) - 1  # the last token has no KV yet


def test_a_digest_does_not_depend_on_what_a_tokenizer_was_used_for(tiny_tokenizer: Any, other_tokenizer: Any) -> None:
    used = copy.deepcopy(tiny_tokenizer)
    used(["one", "two two"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(used) == tokenizer_digest(tiny_tokenizer) != tokenizer_digest(other_tokenizer)
    used.add_tokens(["<tool>"])
    assert tokenizer_digest(used) != tokenizer_digest(tiny_tokenizer)
