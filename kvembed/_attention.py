"""Grouped-query attention over views, for the wrapped model only.

transformers' sdpa path repeats keys and values for every forward with a mask; over views of a preallocated
cache that repeat is a strided copy and costs more than the attention. torch's ``enable_gqa`` reads each
key-value head once. On the CPU the bits are the same, which the oracle checks for every model before the path
is used; elsewhere (a CUDA mask falls back to the slow math kernel) transformers' own function runs.

The function is registered under a name of its own, which changes nothing for other models, and the config of
the wrapped model carries that name only while a kvembed call runs.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["AttentionSwitch"]

_NAME = "kvembed_sdpa"


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
        module: The attention module (``num_key_value_groups`` is read from it).
        query: ``[batch, heads, q, width]``.
        key: ``[batch, kv_heads, kv, width]``.
        value: ``[batch, kv_heads, kv, width]``.
        attention_mask: Boolean or additive ``[batch, 1, q, kv]``, or None.
        dropout: Dropout probability.
        scaling: Factor on the scores, or None for ``width ** -0.5``.
        is_causal: Overrides the module's own flag.
        **kwargs: Anything else hands the call to transformers.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    q_length = query.shape[2]
    unusual = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    static = attention_mask is None and key.shape[2] != q_length
    if groups == 1 or q_length == 1 or unusual or static or query.device.type != "cpu" or torch.is_grad_enabled():
        # One query token: transformers packs the group itself. A static cache: it cuts the keys.
        # Training: its path, bit for bit.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = attention_mask is None and (is_causal if is_causal is not None else getattr(module, "is_causal", True))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=causal, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


class AttentionSwitch:
    """Puts the grouped path under one model while kvembed runs it, and takes it away after.

    Args:
        model: The wrapped model. Only configs whose implementation is ``"sdpa"`` are switched: another choice
            of the user's (eager, flash) stays.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._lock = threading.RLock()
        self.enabled = True

    def _configs(self) -> list[Any]:
        seen = {id(m.config): m.config for m in self._model.modules() if hasattr(m, "config")}
        return [c for c in seen.values() if getattr(c, "_attn_implementation_internal", None) == "sdpa"]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run a block of code with the grouped path (when enabled)."""
        if not self.enabled:
            yield
            return
        with self._lock:
            if _NAME not in ALL_ATTENTION_FUNCTIONS:
                ALL_ATTENTION_FUNCTIONS.register(_NAME, grouped_attention_forward)
                ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
            configs = self._configs()
            try:
                for config in configs:
                    config._attn_implementation_internal = _NAME
                yield
            finally:
                for config in configs:
                    config._attn_implementation_internal = "sdpa"
