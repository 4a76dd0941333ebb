"""Twenty turns with a real model and its real chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvembed import CachedModel, KVStore

if TYPE_CHECKING:
    from pathlib import Path

    from kvembed import Reply

pytestmark = [pytest.mark.model, pytest.mark.slow]

NEW = 6
WORDS = ["rivers", "bread", "the moon", "chess", "wool", "maps", "rain", "glass", "bees", "salt"]


def _is_plain(model: Any, reply: Reply) -> bool:
    ids = torch.from_numpy(reply.prompt_ids.astype(np.int64))[None]
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return plain[0, ids.shape[1] :].tolist() == reply.token_ids.tolist()


def _choices(model: Any, reply: Reply) -> list[int]:
    """Return the token that plain transformers, given the prompt and the reply so far, finds likeliest at each place.

    One forward: greedy generation over the same ids says the same, but computes the conversation for every turn.
    """
    ids = torch.from_numpy(np.concatenate([reply.prompt_ids, reply.token_ids]).astype(np.int64))[None]
    logits = model(ids, use_cache=False).logits[0]
    return logits.argmax(-1).tolist()


@torch.no_grad()
def test_twenty_turns_and_a_restart(smollm2: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    replies: list[Reply] = []

    def cost(text: str) -> int:
        around = f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return len(tokenizer(around, add_special_tokens=False)["input_ids"]) + 1

    def talk(turns: range) -> None:
        with KVStore(tmp_path / "store") as store:
            cached = CachedModel(model, tokenizer, store=store, progress=False)
            session = cached.session("long", system="You are brief.")
            for number in turns:
                text = f"Tell me one thing about {WORDS[number % 10]}, number {number}."
                reply = session.send(text, max_new_tokens=NEW)
                replies.append(reply)
                assert reply.usage.bypass_reason is None
                if number != turns.start:
                    assert reply.usage.computed_tokens <= cost(text)
                elif number:  # after the restart: the last tail may be too short to have been stored
                    assert reply.usage.computed_tokens <= cost(text) + 8
            cached.close()

    talk(range(12))
    talk(range(12, 20))

    choices = _choices(model, replies[-1])
    whole = [*replies[-1].prompt_ids.tolist(), *replies[-1].token_ids.tolist()]
    for number, reply in enumerate(replies):
        start, said = len(reply.prompt_ids), reply.token_ids.tolist()
        assert whole[: start + len(said)] == [*reply.prompt_ids.tolist(), *said], number  # nothing was rewritten
        assert choices[start - 1 : start - 1 + len(said)] == said, number
    for number in (0, 12, 19):
        assert _is_plain(model, replies[number]), number
