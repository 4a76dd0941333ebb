"""Several questions about one prefix in one go: the rows of a batch that hold what they share only once.

All rows are computed together, so that weights and the prefix's keys are read once for all of them. That rounds in
another order than one row by itself, by some 1e-5 in float32. So every row notes how far the token that was chosen is
ahead of the next one, and a row in which two were as close as rounding could turn them is not believed: the caller asks
that question by itself. Before a model is trusted with this, one question is answered both ways and compared.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from kvembed import hf
from kvembed._attempt import Request
from kvembed._bypass import generation_value
from kvembed._call import Watch, with_watch
from kvembed._errors import UnsupportedModelError
from kvembed._html import COMPUTED
from kvembed._keys import as_token_ids
from kvembed._prompt import as_prompt
from kvembed._shared_attention import SharedRun
from kvembed._spans import tiers_of
from kvembed._usage import Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._attempt import Attempt
    from kvembed._keys import TokenIds
    from kvembed._model import CachedModel
    from kvembed._progress import Progress

__all__ = [
    "answer_together",
    "can_answer_together",
    "Margins",
    "needs_trial",
    "note_error",
    "rows_at_once",
    "TogetherRow",
]

_NOTE = "rows_together"
_LEAST_MARGIN = 1e-3
"""Logits this close may be turned by rounding: some 50 times what was measured."""
_MOST_ERROR = 5e-4
_MOST_COARSE_ERROR = 2.0
_MOST_ROWS = 16
_MOST_BYTES = 512 << 20
_KNOWN_ARGUMENTS = frozenset({"max_new_tokens", "min_new_tokens", "eos_token_id", "repetition_penalty", "do_sample"})
_UNKNOWN_MODES = (
    "no_repeat_ngram_size",
    "num_beams",
    "num_return_sequences",
    "prompt_lookup_num_tokens",
    "stop_strings",
)


class Margins(LogitsProcessor):
    """Notes how sure each token was; changes nothing.

    Attributes:
        first: The scores of the first step, ``[rows, vocabulary]``.
        steps: For each step, the distance of the best score to the second, ``[rows]``.
    """

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Look at the scores of one step."""
        if self.first is None:
            self.first = scores.clone()
        best = scores.topk(2, dim=-1).values
        self.steps.append(best[:, 0] - best[:, 1])
        return scores


@dataclass(frozen=True)
class TogetherRow:
    """What one row said.

    Args:
        token_ids: Its reply, with the token that ended it.
        sure: False when two tokens were so close that by itself it might have said something else.
        usage: What it cost: its own part of the batch's seconds; the time to the first token is the batch's.
        first: Its scores at the first step.
    """

    token_ids: TokenIds
    sure: bool
    usage: Usage
    first: torch.Tensor = field(repr=False)


def can_answer_together(model: CachedModel, kwargs: dict[str, Any], *, exact: bool = True) -> bool:
    """True where several questions may be computed together: greedy, on the CPU, all full attention.

    Args:
        model: Who answers.
        kwargs: Arguments of ``generate()``.
        exact: Only where the texts are the same for sure: in float32.
    """
    engine = model._engine
    if model.deterministic or model._refusal() is not None or model.support is not None:
        return False
    if not kwargs.keys() <= _KNOWN_ARGUMENTS or kwargs.get("do_sample"):
        return False
    wrapped, hf_model = engine.wrapped, model.hf_model
    if any(generation_value(hf_model, None, kwargs, name) not in (None, 0, 1) for name in _UNKNOWN_MODES):
        return False
    spec = engine.spec
    if not spec.full_only or spec.has_state or not wrapped.switch.enabled or wrapped.compiled or wrapped.stepwise:
        return False
    dtypes = (torch.float32,) if exact else (torch.float32, torch.bfloat16)
    on_cpu = all(rows.device.type == "cpu" and rows.dtype in dtypes for _, rows in spec.rows())
    same_width = all(rows.k_width == rows.v_width for _, rows in spec.rows())
    if not on_cpu or not same_width or wrapped.attn_implementation != "sdpa" or hf_model.dtype not in dtypes:
        return False
    return _noted(model) is not False


def _noted(model: CachedModel) -> Any:
    """Return what is noted: how far both ways were apart, False where they disagree, None where nobody has looked."""
    return model.store.get_note(model._engine.fingerprint.digest, _NOTE)


def note_error(model: CachedModel, alone: Margins | None, row: TogetherRow | None, same: bool) -> bool:
    """Remember how far one question's scores are apart both ways; False where the model cannot be trusted with this."""
    error = float("inf")
    if alone is not None and alone.first is not None and row is not None:
        error = float((alone.first[0] - row.first).abs().max())
    if model.hf_model.dtype == torch.float32:
        good = same and error <= _MOST_ERROR
    else:  # a text says nothing there: rounding turns it too
        good = error <= _MOST_COARSE_ERROR
    model.store.set_note(model._engine.fingerprint.digest, _NOTE, error if good else False)
    return good


def needs_trial(model: CachedModel) -> bool:
    """True when nobody has compared both ways for this model yet."""
    return not isinstance(_noted(model), float)


def rows_at_once(model: CachedModel, tokens: int) -> int:
    """Return how many rows to compute together, each of so many tokens after the prefix."""
    return max(2, min(_MOST_ROWS, _MOST_BYTES // max(1, tokens * model.kv_bytes_per_token)))


def answer_together(
    model: CachedModel,
    prefix: TokenIds,
    suffixes: Sequence[TokenIds],
    max_new_tokens: int,
    kwargs: dict[str, Any],
    progress: Progress,
) -> list[TogetherRow]:
    """Answer several questions in one batch.

    Args:
        model: Who answers; `can_answer_together` said yes.
        prefix: What all prompts begin with.
        suffixes: How each goes on.
        max_new_tokens: Most tokens of a reply.
        kwargs: Further arguments of ``generate()``.
        progress: Of the prefix, should it have to be computed.

    Raises:
        UnsupportedModelError: The model attends in another way than it seemed to.
    """
    engine, runner = model._engine, model._runner
    began = time.perf_counter()
    longest = max(len(suffix) for suffix in suffixes)
    # Between prefix and question, so that the prefix is at the same positions in all rows. The prefix's own last token,
    # because what punishes repetitions looks at padding too.
    ids = np.full((len(suffixes), len(prefix) + longest), prefix[-1], dtype=np.int64)
    mask = np.ones_like(ids)
    ids[:, : len(prefix)] = prefix
    for row, suffix in enumerate(suffixes):
        ids[row, ids.shape[1] - len(suffix) :] = suffix
        mask[row, len(prefix) : ids.shape[1] - len(suffix)] = 0
    margins, watch, run = Margins(), Watch(), SharedRun()
    eos = _eos(model, kwargs)
    arguments = {
        "attention_mask": torch.from_numpy(mask),
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "logits_processor": LogitsProcessorList([margins]),
        "stopping_criteria": with_watch(None, watch),
        "pad_token_id": eos[0] if eos else int(prefix[-1]),
        **kwargs,
    }

    def attempt_once(cold: bool) -> tuple[Any, Attempt]:
        wanted = as_token_ids([*prefix.tolist(), 0])
        with runner._stages.attempt(
            prefix, 2 * engine.block_size, deterministic=False, cold=cold, wanted=wanted, strict=True
        ) as attempt:
            runner._stages.prefill(attempt, progress, upto=len(prefix))
            runner._stages.end_restore(attempt)
            attempt.fed = len(prefix)
            config = model.hf_model.config
            room = longest + min(max_new_tokens, 64)
            cache = hf.shared_cache(attempt.sequence.cache, len(prefix), len(suffixes), room, config, run)
            with engine.wrapped.switch.active(run):
                found = model.hf_model.generate(torch.from_numpy(ids), past_key_values=cache, **arguments)
            run.check()
        return found, attempt

    with model._lock:
        engine.check_identity()
        request = Request(as_prompt(model.hf_model, prefix), None, {}, False, progress)
        refusal = runner._refusal(request)
        if refusal is not None:
            raise UnsupportedModelError(refusal)
        found, attempt = runner._stages.repeat(attempt_once)
        runner._report_problems()
        seconds = time.perf_counter() - began
        rows = _rows(found[:, ids.shape[1] :], margins, eos)
        usages = _usages(model, attempt, suffixes, rows, seconds, (watch.first_token_at or began) - began)
        for usage in usages:
            model._note(usage)
    first = margins.first
    assert first is not None
    return [TogetherRow(*row, usage, first[i]) for i, (row, usage) in enumerate(zip(rows, usages, strict=True))]


def _eos(model: CachedModel, kwargs: dict[str, Any]) -> list[int]:
    eos = generation_value(model.hf_model, None, kwargs, "eos_token_id")
    return [] if eos is None else [int(e) for e in (eos if isinstance(eos, list | tuple) else [eos])]


def _rows(replies: torch.Tensor, margins: Margins, eos: list[int]) -> list[tuple[TokenIds, bool]]:
    """Return each row's reply, and whether rounding cannot have decided any of it."""
    steps = torch.stack(margins.steps)  # [steps, rows]
    rows = []
    for i, reply in enumerate(replies.tolist()):
        end = next((at + 1 for at, token in enumerate(reply) if token in eos), len(reply))
        rows.append((as_token_ids(reply[:end]), bool((steps[:end, i] > _LEAST_MARGIN).all())))
    return rows


def _usages(
    model: CachedModel,
    attempt: Attempt,
    suffixes: Sequence[TokenIds],
    rows: list[tuple[TokenIds, bool]],
    seconds: float,
    ttft: float,
) -> list[Usage]:
    """Return what each row cost: the first one reads or computes the prefix, the others find it where that put it."""
    known = model._engine.wrapped.prefill_rate
    prefix, share = len(attempt.ids), 1 / len(rows)
    usages = []
    for i, (suffix, (reply, _)) in enumerate(zip(suffixes, rows, strict=True)):
        spans = attempt.spans if i == 0 else (("live", prefix),)
        tiers = tiers_of(spans)
        cached = sum(tiers.values())
        usages.append(
            Usage(
                prompt_tokens=prefix + len(suffix),
                completion_tokens=len(reply),
                cached_tokens_by_tier=tiers,
                lookup_s=attempt.match.seconds * share,
                prefill_s=ttft * share,
                decode_s=(seconds - ttft) * share,
                ttft_s=ttft,
                total_s=seconds * share,
                saved_s=cached / known if known and cached else None,
                spans=(*spans, (COMPUTED, len(suffix))),
                lossy=attempt.lossy,
            )
        )
    return usages
