"""Attention of several sequences over one prefix that they share: each of its keys is read once for all of them.

The queries of all rows attend to the prefix together, without a mask, and each row to its own tokens; both are put
together by their log-sum-exps, as in `kvembed._attention`. Equal to rounding to each row by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvembed._errors import UnsupportedModelError

__all__ = ["shared_attention", "SharedRun"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class SharedRun:
    """Takes each layer's prefix from its cache to its attention, and notices a model that attends in another way."""

    _waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _mask: torch.Tensor | None = None

    def offer(self, key: torch.Tensor, prefix_k: torch.Tensor, prefix_v: torch.Tensor) -> None:
        """Say what comes before the keys that a layer's ``update()`` returns.

        Raises:
            UnsupportedModelError: The layer before never asked for it.
        """
        self.check()
        self._waiting.append((key, prefix_k, prefix_v))

    def take(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what comes before these keys.

        Raises:
            UnsupportedModelError: They are not what the cache returned last.
        """
        if len(self._waiting) != 1 or self._waiting[0][0] is not key:
            raise UnsupportedModelError("the model attends to other keys than its cache returns")
        return self._waiting.pop()[1:]

    def check(self) -> None:
        """Raise `UnsupportedModelError` when a layer has not asked for its prefix."""
        if self._waiting:
            raise UnsupportedModelError("a layer of the model attends without the attention it was given")

    def own_mask(self, mask: torch.Tensor | None, prefix: int, q: int) -> torch.Tensor | None:
        """Return a mask less the prefix, of which all must be seen.

        Raises:
            UnsupportedModelError: It is of another kind.
        """
        if mask is None:
            if q > 1:
                raise UnsupportedModelError("several queries without a mask")
            return None
        if mask is not self._mask:  # all layers share one
            if mask.dtype != torch.bool or not bool(mask[..., :prefix].all()):
                raise UnsupportedModelError("a mask that hides a part of the document")
            self._mask = mask
        return mask[..., prefix:]


def shared_attention(
    run: SharedRun,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Attend to the prefix and to each row's own tokens.

    Args:
        run: Knows the prefix.
        query: ``[rows, heads, q, width]``, float32 on the CPU.
        key: ``[rows, kv_heads, n, width]``, what came after the prefix.
        value: Likewise.
        mask: Boolean ``[rows, 1, q, prefix + n]``, or None for one query.
        scaling: Factor on the scores, or None for ``width ** -0.5``.

    Returns:
        ``[rows, q, heads, width]``.
    """
    prefix_k, prefix_v = run.take(key)
    rows, heads, q, width = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    group = heads // kv_heads
    scale = width**-0.5 if scaling is None else scaling
    own_mask = run.own_mask(mask, prefix_k.shape[2], q)
    grouped = query.reshape(rows, kv_heads, group * q, width)
    packed = grouped.transpose(0, 1).reshape(1, kv_heads, rows * group * q, width)
    before, before_lse = _flash(packed, prefix_k, prefix_v, 0.0, False, scale=scale)
    before = before.reshape(kv_heads, rows, group * q, width).transpose(0, 1)
    before_lse = before_lse.reshape(kv_heads, rows, group * q).transpose(0, 1)
    scores = torch.matmul(grouped, key.transpose(2, 3)).float() * scale
    if own_mask is not None:
        # Not minus infinity: the padding between prefix and question sees nothing here, and must not become nan.
        least = torch.finfo(scores.dtype).min
        hidden = ~own_mask.expand(rows, 1, q, n)
        scores.view(rows, kv_heads, group, q, n).masked_fill_(hidden[:, :, None], least)
    own_lse = torch.logsumexp(scores, dim=-1)
    own = torch.matmul(torch.exp(scores - own_lse[..., None]), value.float())
    weight = torch.sigmoid(before_lse - own_lse).unsqueeze(-1)
    joined = torch.lerp(own, before.float(), weight).to(query.dtype)
    return joined.reshape(rows, heads, q, width).transpose(1, 2)
