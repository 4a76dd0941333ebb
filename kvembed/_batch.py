"""Batches: every row with its own hit, put together into one cache for transformers.

Each row is matched, restored and prefilled on its own, which shares blocks between rows and with single calls; then
the rows are laid side by side. Where all layers are full attention they may differ in length: they are right-aligned,
with zeros in front of the shorter ones, which transformers' attention mask hides. A window or a state would have seen
the padding, so there they have to be of equal length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._keys import as_token_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._cachespec import CacheSpec
    from kvembed._keys import TokenIds

__all__ = ["is_left_padded", "new_tokens", "rows_of_batch", "servable_batches"]


def is_left_padded(mask: torch.Tensor) -> bool:
    """True when every row of ``[batch, n]`` is zeros, then at least two ones."""
    ones = (mask == 1).sum(dim=1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    expected = columns[None] >= (mask.shape[1] - ones)[:, None]
    return bool((mask == expected.to(mask.dtype)).all()) and bool((ones >= 2).all())


def rows_of_batch(ids: torch.Tensor, mask: torch.Tensor | None) -> list[TokenIds]:
    """Return the ids of each row, without padding."""
    lengths = [ids.shape[1]] * ids.shape[0] if mask is None else (mask == 1).sum(dim=1).tolist()
    host = ids.cpu().numpy()
    return [as_token_ids(row[len(row) - length :]) for row, length in zip(host, lengths, strict=True)]


def servable_batches(spec: CacheSpec | None) -> str | None:
    """Return which batches can be served: ``"padded"`` (on the left), ``"equal"`` (in length only), or none."""
    if spec is None or not hf.can_join(spec):
        return None
    return "padded" if spec.full_only else "equal"


def new_tokens(result: Any, prompt_tokens: int, eos: Sequence[int]) -> int:
    """Return how many tokens were generated in all rows; what follows the end of a row is padding."""
    total = 0
    for row in getattr(result, "sequences", result)[:, prompt_tokens:].tolist():
        ends = [i for i, token in enumerate(row) if token in eos]
        total += ends[0] + 1 if ends else len(row)
    return total
