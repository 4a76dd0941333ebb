"""Scoring: the log-probabilities of many continuations of one prompt, whose KV is computed once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed import hf
from kvembed._block import Block, BlockInfo
from kvembed._errors import PromptError
from kvembed._keys import SNAPSHOT_IDS, as_token_ids
from kvembed._prompt import tokenize
from kvembed._tiers.cpu import MemorySource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._engine import Engine
    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence

__all__ = ["Score", "continuation_ids", "score_on", "score_plainly"]


@dataclass(frozen=True)
class Score:
    """How likely a model finds one continuation of a prompt.

    Args:
        logprob: Natural logarithm of its probability: the sum of ``token_logprobs``.
        token_logprobs: One for each of its tokens.
        token_ids: Its tokens.
        is_greedy: Whether greedy decoding would have written it.
    """

    logprob: float
    token_logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]
    is_greedy: bool


def continuation_ids(tokenizer: Any, prompt: Any, ids: TokenIds, continuation: Any) -> TokenIds:
    """Return the ids of a continuation, as text that follows the prompt or as ids.

    Text is tokenised together with the prompt where that leaves the prompt's tokens as they are, so that a leading
    space means what it means inside a text.

    Raises:
        PromptError: It is empty.
    """
    if isinstance(continuation, str):
        if tokenizer is None:
            raise PromptError("continuations as text need a tokenizer: pass token ids")
        own = tokenize(tokenizer, continuation, special=False)
        if isinstance(prompt, str):
            whole = tokenize(tokenizer, prompt + continuation, special=True)
            if len(whole) > len(ids) and np.array_equal(whole[: len(ids)], ids):
                own = whole[len(ids) :]
    else:
        own = as_token_ids(np.asarray(continuation))
    if not len(own):
        raise PromptError("a continuation is empty")
    return own


def score_on(engine: Engine, sequence: LiveSequence, ids: TokenIds, continuations: Sequence[TokenIds]) -> list[Score]:
    """Score continuations on a sequence that holds all of ``ids`` but the last token.

    The prompt's last token is computed once for the first token of every continuation; each longer one then costs a
    forward of its tokens but the last, after which the cache is cut back.

    Args:
        engine: Where the model runs.
        sequence: Its cache is left as it was.
        ids: The prompt.
        continuations: Ids of each.
    """
    held, device = len(ids) - 1, engine.model.get_input_embeddings().weight.device
    states = _states_of(engine, sequence) if sequence.has_state else None

    def forward(tokens: TokenIds) -> torch.Tensor:
        step = 1 if engine.wrapped.stepwise else len(tokens)
        rows = []
        for start in range(0, len(tokens), step):
            part = torch.from_numpy(tokens[start : start + step].astype(np.int64))[None].to(device)
            output = engine.wrapped.forward(part, held + start, sequence.cache, logits=step)
            rows.append(torch.log_softmax(output.logits[0, -step:].float(), dim=-1))
        hf.truncate(sequence.cache, held)
        if states is not None:
            hf.load_states(sequence.cache, engine.spec, states)
        return torch.cat(rows)

    first = forward(ids[held:])
    return [
        _score(first if len(own) == 1 else forward(np.concatenate([ids[held:], own[:-1]])), own)
        for own in continuations
    ]


def _states_of(engine: Engine, sequence: LiveSequence) -> MemorySource:
    layout, data = hf.capture_states(sequence.cache, engine.spec)
    info = BlockInfo(b"", b"", b"", len(sequence.ids), 1, False, data.nbytes)
    return MemorySource(Block(info, SNAPSHOT_IDS, layout, data))


def score_plainly(model: Any, ids: TokenIds, continuations: Sequence[TokenIds]) -> list[Score]:
    """Score with one forward over prompt and continuation each, for models that are not served."""
    scores = []
    for continuation in continuations:
        whole = torch.from_numpy(np.concatenate([ids, continuation]).astype(np.int64))[None].to(model.device)
        with torch.no_grad():
            # From the end: an adapter may put tokens of its own before the prompt, and return logits for them.
            logits = model(whole).logits[0, -len(continuation) - 1 : -1]
        scores.append(_score(torch.log_softmax(logits.float(), dim=-1), continuation))
    return scores


def _score(logprobs: torch.Tensor, continuation: TokenIds) -> Score:
    wanted = torch.from_numpy(continuation.astype(np.int64)).to(logprobs.device)
    chosen = logprobs.gather(1, wanted[:, None])[:, 0].tolist()
    greedy = bool((logprobs.argmax(dim=-1) == wanted).all())
    return Score(float(sum(chosen)), tuple(chosen), tuple(continuation.tolist()), greedy)
