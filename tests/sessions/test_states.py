"""Conversations with a hybrid model, which goes on only where a state was kept: one is where the next turn needs it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import _matching

from ._families import FAMILIES
from .test_templates import WORDS, Chat

if TYPE_CHECKING:
    from pathlib import Path

CASES = {family.name: replace(family, model="") for family in FAMILIES}


@pytest.mark.parametrize("name", ["qwen3", "qwen3-not-thinking", "mistral", "llama3"])
def test_the_next_turn_computes_only_what_changed(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(_matching, "_WORTH_RESTORING", 1)

    def make(*, eos_token_id: int) -> Any:
        from transformers import AutoModelForCausalLM, Qwen3NextConfig

        config = Qwen3NextConfig(
            vocab_size=272,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=0,
            mlp_only_layers=[0, 1, 2, 3],
            layer_types=["linear_attention", "full_attention"] * 2,
            max_position_embeddings=8192,
            initializer_range=0.2,
            eos_token_id=eos_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    chat = Chat(CASES[name], make, tmp_path)
    try:
        assert chat.model._engine.has_state
        for number, text in enumerate(WORDS[:4]):
            # One token before the end of a prompt is where its state is kept, so one more is computed.
            chat.send(text, chat.script(number), slack=1)
    finally:
        chat.close()
