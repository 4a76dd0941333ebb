"""From what people pass as a prompt (text, messages, ids, a tensor) to token ids."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed._errors import ConfigError, PromptError
from kvembed._keys import as_token_ids
from kvembed._media import has_media

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kvembed._keys import TokenIds

__all__ = [
    "as_prompt",
    "check_prompt",
    "context_length",
    "decoder",
    "encode",
    "MARK",
    "split_at_mark",
    "split_chat",
    "tokenize",
]

MARK = "\u241fQUESTION\u241f"
"""Stands for the user's words where a chat template is rendered to be cut there."""


_MEDIA_SIGN = " ⟨media⟩ "


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Return a function from ids to text for people, special tokens included; without a tokenizer, the ids."""

    def decode(tokens: list[int]) -> str:
        text = ""
        # Content ids are no tokens.
        for is_media, part in itertools.groupby(tokens, key=lambda token: token < 0):
            ids = list(part)
            if is_media:
                text += _MEDIA_SIGN
            else:
                text += tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))
        return text

    return decode


def encode(tokenizer: Any, prompt: Any, *, media: bool = False) -> TokenIds:
    """Return the ids of a prompt.

    Args:
        tokenizer: The model's tokenizer; not needed for ids.
        prompt: Text; chat messages (dicts with ``role`` and ``content``, rendered with the chat template and
            the start of a reply); a list or array of ids; a tensor ``[n]`` or ``[1, n]``; or a dict with
            ``input_ids``, as tokenizers and processors return it.
        media: Whether such a dict may bring pictures too.

    Raises:
        PromptError: The prompt is of none of these kinds, or a batch, or has media where only text will do.
        ConfigError: Text without a tokenizer, or messages without a chat template.
    """
    if isinstance(prompt, str):
        return tokenize(_need(tokenizer, "text"), prompt, special=True)
    if isinstance(prompt, Mapping):
        if has_media(prompt) and not media:
            raise PromptError("prompts with media can only be generated from: call generate(**inputs)")
        prompt = prompt["input_ids"]
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping):
        if not getattr(_need(tokenizer, "messages"), "chat_template", None):
            raise ConfigError("the tokenizer has no chat template: pass text, or set tokenizer.chat_template")
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        return tokenize(tokenizer, text, special=False)
    detach = getattr(prompt, "detach", None)
    ids = np.asarray(prompt if detach is None else detach().cpu().numpy())
    if ids.size == 0:
        return as_token_ids([])
    if ids.dtype.kind not in "iu" or ids.ndim > 2 or (ids.ndim == 2 and ids.shape[0] != 1):
        raise PromptError(
            "a prompt is text, a list of messages, a list of token ids, or a tensor of shape [n] or [1, n]; "
            f"got {type(prompt).__name__} of shape {ids.shape}"
        )
    return as_token_ids(ids)


def tokenize(tokenizer: Any, text: str, *, special: bool) -> TokenIds:
    """Return the ids of a text, with or without the tokenizer's special tokens."""
    # verbose: transformers logs that a text is longer than the model's context; here that is an error with advice.
    return as_token_ids(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def as_prompt(model: Any, ids: TokenIds) -> torch.Tensor:
    """Return ids as the int64 tensor ``[1, n]`` on the model's device that ``generate()`` takes."""
    import torch

    return torch.from_numpy(ids.astype(np.int64))[None].to(device=model.device)


def _need(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise ConfigError(f"{what} needs a tokenizer: pass one to CachedModel(model, tokenizer), or pass token ids")
    return tokenizer


def context_length(model: Any) -> int | None:
    """Return how many tokens the model was made for, or None when its config does not say."""
    text_config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_prompt(model: Any, ids: TokenIds, max_new_tokens: int = 1) -> None:
    """Raise `PromptError` for a prompt that is empty or does not fit."""
    if len(ids) == 0:
        raise PromptError("the prompt is empty: give at least one token")
    limit = context_length(model)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise PromptError(
            f"the prompt has {len(ids):,} tokens and {max_new_tokens:,} more are to be generated, but the model's "
            f"context is {limit:,} tokens: shorten the prompt, split the document, or use a model with a longer context"
        )


def split_chat(tokenizer: Any, document: str, system: str | None) -> tuple[str, str, bool]:
    """Return the text before and after a question about ``document``, in the model's own chat format.

    The template is rendered once around a marker and cut there, so that everything before the question is the
    same for every question. Without a template, a question is introduced by "Question: ".

    Returns:
        Text before the question, text after it, and whether special tokens are already in the text.
    """
    _need(tokenizer, "a document")
    if not getattr(tokenizer, "chat_template", None):
        return f"{document}\n\n", "\nAnswer:", False
    messages = [{"role": "user", "content": f"{document}\n\n{MARK}"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return *split_at_mark(text), True


def split_at_mark(text: str) -> tuple[str, str]:
    """Return what a chat template put before and after `MARK`, which stood in the user's words.

    Raises:
        ConfigError: It left them out.
    """
    before, mark, after = text.partition(MARK)
    if not mark:
        raise ConfigError("the chat template does not show the user's text: set tokenizer.chat_template")
    return before, after
