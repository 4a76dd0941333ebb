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


def test_twenty_turns_and_a_restart(smollm2: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

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
                assert reply.usage.bypass_reason is None
                if number != turns.start:
                    assert reply.usage.computed_tokens <= cost(text)
                elif number:  # after the restart: the last tail may be too short to have been stored
                    assert reply.usage.computed_tokens <= cost(text) + 8
                if number in (0, 1, 11, 12, 19):  # plain transformers computes the whole conversation for each
                    assert _is_plain(model, reply), number
            cached.close()

    talk(range(12))
    talk(range(12, 20))
