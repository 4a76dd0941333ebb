"""Grouped-query attention over views, in chunks of a block, for the wrapped model only.

transformers' sdpa path repeats keys and values for every forward with a mask; over views of a preallocated
cache that repeat is a strided copy and costs more than the attention. Here each key-value head is read once.

Queries are taken in chunks of a block, each with the keys up to its own end. So a forward of four blocks does the
very same attention calls as four forwards of one, and its keys and values have the same bits where the matrix
products do (`Engine` checks that before it relies on it); its matrix products are faster, because the weights are
read once.

In float32, where the mask is plainly causal, a chunk is two calls without any mask, one over the keys before it and one
over its own square, put together by their log-sum-exps as in FlashAttention (Dao et al., 2022, arXiv:2205.14135).
That is equal to rounding, not to the bit; in shorter types the merge would round once more, so there the mask is kept.

Only on the CPU: elsewhere transformers' own function runs. The function is registered under a name of its own, which
changes nothing for other models, and the config of the wrapped model carries that name only while a kvembed call runs.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvembed._errors import UnsupportedModelError
from kvembed._shared_attention import SharedRun, shared_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["AttentionSwitch"]

_NAME = "kvembed_sdpa"
_UNUSUAL = ("softcap", "position_bias", "cache", "s_aux")
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class _Running:
    """One kvembed call under way: its chunk size, and what is known of the mask its layers share."""

    chunk: int
    shared: SharedRun | None = None
    mask: torch.Tensor | None = None
    kind: str = ""


# Per thread and task, because two wrapped models may run at once.
_RUNNING: ContextVar[_Running | None] = ContextVar("kvembed_attention", default=None)


def grouped_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend without repeating keys and values; same contract as transformers' ``sdpa_attention_forward``.

    Args:
        module: The attention module.
        query: ``[batch, heads, q, width]``.
        key: ``[batch, kv_heads, kv, width]``.
        value: ``[batch, kv_heads, kv, width]``.
        attention_mask: Boolean or additive ``[batch, 1, q, kv]``, or None.
        dropout: Dropout probability.
        scaling: Factor on the scores, or None for ``width ** -0.5``.
        is_causal: Overrides the module's own flag.
        **kwargs: Anything else hands the call to transformers.
    """
    running = _RUNNING.get()
    if running is not None and running.shared is not None:
        if dropout or any(kwargs.get(name) is not None for name in _UNUSUAL):
            raise UnsupportedModelError("attention with more than queries, keys and values")
        return shared_attention(running.shared, query, key, value, attention_mask, scaling), None
    q, kv = query.shape[2], key.shape[2]
    unusual = any(kwargs.get(name) is not None for name in _UNUSUAL)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    kind = "other"
    if running is not None and not unusual and not dropout and query.shape[0] == 1 and query.device.type == "cpu":
        kind = _kind_of_mask(running, attention_mask, q, kv, causal=causal)
    # One query token: transformers packs the group itself. Training: its path, bit for bit.
    if running is None or kind == "other" or q == 1 or torch.is_grad_enabled():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    merges = kind == "causal" and query.dtype == torch.float32 and key.shape[3] == value.shape[3]
    output = query.new_empty((1, q, query.shape[1], value.shape[3]))
    for start in range(0, q, running.chunk):
        end = min(start + running.chunk, q)
        rows, seen = query[:, :, start:end], kv - q + end
        k, v = key[:, :, :seen], value[:, :, :seen]
        if merges:
            part = _merged(rows, k, v, scaling)
        else:
            mask = None if attention_mask is None else attention_mask[:, :, start:end, :seen]
            if mask is None and start:  # the square of the first chunk needs none
                mask = torch.ones(end - start, seen, dtype=torch.bool).tril(seen - (end - start))
            part = torch.nn.functional.scaled_dot_product_attention(
                rows, k, v, attn_mask=mask, scale=scaling, is_causal=mask is None, enable_gqa=True
            )
        output[:, start:end] = part.transpose(1, 2)
    return output, None


def _kind_of_mask(running: _Running, mask: torch.Tensor | None, q: int, kv: int, *, causal: bool) -> str:
    """Return ``"causal"``, ``"earlier"`` (rows see no later key, but not all before them) or ``"other"``."""
    if mask is None:
        # Without a mask and with more keys than queries the cache is a static one.
        return "causal" if causal and q == kv else "other"
    if mask is running.mask:
        return running.kind
    kind = "other"
    if mask.dtype == torch.bool and mask.shape == (1, 1, q, kv):
        square = mask[0, 0, :, kv - q :]
        if not bool(square.triu(1).any()):
            whole = bool(mask[0, 0, :, : kv - q].all()) and int(square.sum()) == q * (q + 1) // 2
            kind = "causal" if whole else "earlier"
    running.mask, running.kind = mask, kind  # all layers of a kind share one mask
    return kind


def _merged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Attend causally to ``[1, kv_heads, kv, width]`` keys, of which the last are the queries' own."""
    heads, q, width = query.shape[1:]
    kv_heads, past = key.shape[1], key.shape[2] - q
    own, own_lse = _flash(query, key[:, :, past:], value[:, :, past:], 0.0, True, scale=scaling)
    if not past:
        return own
    # All queries of a group as rows of one head: each key is read once.
    packed = query.reshape(1, kv_heads, heads // kv_heads * q, width)
    before, before_lse = _flash(packed, key[:, :, :past], value[:, :, :past], 0.0, False, scale=scaling)
    weight = torch.sigmoid(before_lse.reshape(own_lse.shape) - own_lse).unsqueeze(-1)
    return torch.lerp(own, before.reshape(own.shape), weight.to(own.dtype))


class AttentionSwitch:
    """Puts the grouped path under one model while kvembed runs it, and takes it away after.

    Args:
        model: The wrapped model. Only configs whose implementation is ``"sdpa"`` are switched: another choice
            of the user's (eager, flash) stays.
        chunk: Queries taken at a time: the tokens of a block.
    """

    def __init__(self, model: torch.nn.Module, chunk: int) -> None:
        self._model = model
        self._chunk = chunk
        self._lock = threading.RLock()
        self.enabled = True

    def _configs(self) -> list[Any]:
        seen = {id(m.config): m.config for m in self._model.modules() if hasattr(m, "config")}
        return [c for c in seen.values() if getattr(c, "_attn_implementation_internal", None) == "sdpa"]

    @contextmanager
    def active(self, shared: SharedRun | None = None) -> Iterator[None]:
        """Run a block of code with the grouped path (when enabled).

        Args:
            shared: What the rows of a batch share; see `kvembed._shared_attention`.
        """
        if not self.enabled:
            yield
            return
        with self._lock:
            if _NAME not in ALL_ATTENTION_FUNCTIONS:
                # Here, because versions that are too old to be wrapped lack it, and have to be importable to say so.
                from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

                ALL_ATTENTION_FUNCTIONS.register(_NAME, grouped_attention_forward)
                ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
            configs = self._configs()
            token = _RUNNING.set(_Running(self._chunk, shared))
            try:
                for config in configs:
                    config._attn_implementation_internal = _NAME
                yield
            finally:
                _RUNNING.reset(token)
                for config in configs:
                    config._attn_implementation_internal = "sdpa"
