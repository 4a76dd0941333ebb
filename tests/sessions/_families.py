"""Families of chat templates over byte-level tokenizers with their special tokens, and replies by a script."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from kvembed import Reply

__all__ = ["byte_tokenizer", "Family", "FAMILIES", "plain_reply", "Script"]

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """A chat template and what belongs to it.

    Args:
        name: For the test's name.
        template: File of the template.
        model: Name of the fixture that makes the tiny model.
        bos: Token a text begins with.
        eos: Token a reply ends with.
        special: Further special tokens.
        words: Tokens that are not special, but one token.
        thinks: What a reply that thinks begins with, before its thoughts.
        system: System message.
        arguments: Arguments of the template.
        loss: What is said of the prompt of turn N, ``{}`` being N - 1; None where nothing is lost.
    """

    name: str
    template: str
    model: str
    bos: str
    eos: str
    special: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    thinks: str | None = None
    system: str | None = "Be brief, be kind."
    arguments: dict[str, Any] = field(default_factory=dict)
    loss: str | None = None


_THINKING = ("<think>", "</think>")
_QWEN = {
    "template": "qwen3",
    "model": "tiny_llama",
    "bos": "<|endoftext|>",
    "eos": "<|im_end|>",
    "special": ("<|im_start|>",),
    "words": _THINKING,
    "loss": "the template removed the thinking of turn {}",
}
_MISTRAL = {
    "template": "mistral",
    "model": "tiny_mistral",
    "bos": "<s>",
    "eos": "</s>",
    "special": ("[INST]", "[/INST]"),
}
FAMILIES = (
    Family("smollm2", "smollm2", "tiny_llama", "<|im_start|>", "<|im_end|>"),
    Family("smollm2-no-system", "smollm2", "tiny_llama", "<|im_start|>", "<|im_end|>", system=None),
    Family("qwen3", **_QWEN, thinks="<think>\n"),
    Family("qwen3-not-thinking", **_QWEN, arguments={"enable_thinking": False}),
    Family(
        "llama3",
        "llama3",
        "tiny_llama",
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    Family("gemma3", "gemma3", "tiny_gemma3", "<bos>", "<end_of_turn>", ("<start_of_turn>",)),
    Family("mistral", **_MISTRAL, loss="the template moved the system prompt into the last user message"),
    Family("mistral-no-system", **_MISTRAL, system=None),
    Family(
        "deepseek-r1",
        "deepseek_r1",
        "tiny_llama",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
        _THINKING,
        thinks="",
        loss="the template removed the thinking of turn {}",
    ),
)


def byte_tokenizer(family: Family) -> Any:
    """Make a tokenizer with one token for each byte and each of the family's own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", family.bos, family.eos, *family.special])
    core.add_tokens([AddedToken(word, normalized=False) for word in family.words])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token=family.bos,
        eos_token=family.eos,
        additional_special_tokens=list(family.special),
    )
    tokenizer.chat_template = (TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8")
    tokenizer.model_max_length = 8192
    return tokenizer


class Script:
    """Decides some tokens of a reply, and leaves the model the choice of letters for the others.

    Args:
        tokenizer: Whose tokens.
        parts: Text that is said, and numbers of letters to choose; the end token follows.
        ends: Whether it does.
    """

    def __init__(self, tokenizer: Any, *parts: str | int, ends: bool = True) -> None:
        self._plan: list[list[int]] = []
        letters = tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
        for part in parts:
            if isinstance(part, int):
                self._plan += [letters] * part
            else:
                self._plan += [[i] for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        self._plan += [[tokenizer.eos_token_id]] if ends else []
        self._start: int | None = None

    def __len__(self) -> int:
        return len(self._plan)

    def __call__(self, _: int, ids: torch.Tensor) -> list[int]:
        if self._start is None:
            self._start = len(ids)
        return self._plan[min(len(ids) - self._start, len(self._plan) - 1)]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of ``generate()``, from the start of the script."""
        self._start = None
        return {"prefix_allowed_tokens_fn": self, "max_new_tokens": len(self)}


def plain_reply(hf_model: Any, reply: Reply, script: Script) -> list[int]:
    """Return what transformers answers to the same ids."""
    ids = torch.from_numpy(reply.prompt_ids.astype(np.int64))[None]
    result = hf_model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **script.arguments)
    return result[0, ids.shape[1] :].tolist()
