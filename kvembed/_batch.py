"""Batches: every row of a left-padded batch with its own hit, put together into one cache for transformers.

Each row is matched, restored and prefilled on its own, which shares blocks between rows and with single calls; then
the rows are laid side by side, right-aligned, with zeros in front of the shorter ones. transformers' attention mask
hides those. That is right for full attention only: a window or a state would have seen the padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._keys import as_token_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence

__all__ = ["is_left_padded", "join_rows", "new_tokens", "rows_of_batch"]


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


def join_rows(model_config: Any, sequences: Sequence[LiveSequence]) -> Any:
    """Return a stock cache that holds the sequences as the rows of a batch, right-aligned."""
    longest = max(len(sequence.ids) for sequence in sequences)
    cache: Any = hf.new_stock_cache(model_config)
    owned = [hf.layers_of(sequence.cache) for sequence in sequences]
    for i, layer in enumerate(cache.layers):
        parts = [layers[i].rows(0, len(sequence.ids)) for layers, sequence in zip(owned, sequences, strict=True)]
        joined = []
        for which in (0, 1):
            first = parts[0][which]
            rows = first.new_zeros((len(parts), first.shape[1], longest, first.shape[3]))
            for r, part in enumerate(parts):
                rows[r, :, longest - part[which].shape[2] :] = part[which][0]
            joined.append(rows)
        layer.update(*joined)
    return cache


def new_tokens(result: Any, prompt_tokens: int, eos: Sequence[int]) -> int:
    """Return how many tokens were generated in all rows; what follows the end of a row is padding."""
    total = 0
    for row in getattr(result, "sequences", result)[:, prompt_tokens:].tolist():
        ends = [i for i, token in enumerate(row) if token in eos]
        total += ends[0] + 1 if ends else len(row)
    return total
