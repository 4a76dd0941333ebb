"""Prefill: the part of a prompt that is not kept, computed on a grid of absolute positions.

A cold call computes the grid ``[0, 256), [256, 512) ...`` and leaves the rest to transformers, so a warm call that
reuses up to a block edge runs the very same forwards. Where it was checked that this gives the same bits, several
blocks are computed in one forward, because a small model feels reading its weights for every block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvembed import hf

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed._cachespec import CacheSpec
    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence
    from kvembed._wrapped import WrappedModel

__all__ = ["Prefill"]

_WIDE_STEP = 1024
"""Tokens of a wide step: reading the weights is felt in steps of 256 tokens, and hardly in these."""
_LEAST_BLOCK = 128
"""Smaller blocks were chosen for fine steps: they are not joined."""
_LONGEST_STEP_S = 5.0


class Prefill:
    """Computes prompts for one model.

    Args:
        wrapped: The model.
        spec: Shape of its cache.
        on_progress: Called with (tokens done, tokens in all) after each step.
        put: Called after each step to store what is finished.
        put_state: Called to store the state at the end of a sequence.
    """

    def __init__(
        self,
        wrapped: WrappedModel,
        spec: CacheSpec,
        on_progress: Callable[[int, int], object] | None,
        put: Callable[[LiveSequence], object] | None,
        put_state: Callable[[LiveSequence], object],
    ) -> None:
        self._wrapped = wrapped
        self._spec = spec
        self._size = spec.block_size
        self._on_progress = on_progress
        self._put = put
        self._put_state = put_state

    def run(self, sequence: LiveSequence, ids: TokenIds, upto: int | None = None) -> None:
        """Compute a prompt up to where transformers takes over.

        Args:
            sequence: Holds a prefix of ``ids``; grows with every step.
            ids: The prompt.
            upto: Compute exactly so many tokens. By default the last piece, which may be shorter than a block, is
                left to ``generate()``, which has to run a forward anyway.
        """
        size, n, wrapped = self._size, len(ids), self._wrapped
        device = wrapped.model.get_input_embeddings().weight.device
        tensor = torch.from_numpy(ids.astype(np.int64))[None].to(device)
        if upto is None and sequence.has_state:
            upto = n - 1  # so that a snapshot is taken at the prompt's end
        last = n - 1 if upto is None else upto
        while (position := len(sequence.ids)) < last:
            exact = sequence.exact == position and not wrapped.stepwise
            edge = self._next_edge(position, last, n, exact=exact, whole=upto is not None)
            if edge is None:
                break
            wrapped.forward(tensor[:, position:edge], position, sequence.cache, logits=0)
            if edge - position > size and exact and wrapped.wide_steps is None:
                same = self._same_bits_in_small(sequence, tensor, edge)
                wrapped.note_wide_steps(same)
                if not same:
                    hf.truncate(sequence.cache, position)
                    continue
            sequence.ids = ids[:edge]
            if exact and edge % size == 0:
                sequence.exact = edge
            if self._put is not None:
                self._put(sequence)
                if sequence.has_state and edge % size == 0 and edge < last < edge + size:
                    self._put_state(sequence)  # the last one at an edge
            if self._on_progress is not None:
                self._on_progress(edge, n)

    def _next_edge(self, position: int, last: int, n: int, *, exact: bool, whole: bool) -> int | None:
        """Return where the next step ends, or None to leave the rest to transformers."""
        size = self._size
        if self._wrapped.stepwise:
            # One forward from the start is right, and so is one token at a time; several on top of others are not.
            return last if position == 0 else position + 1
        edge = (position // size + 1) * size
        if edge > last:
            return last if whole else None
        wide = position + _WIDE_STEP // size * size
        if size >= _LEAST_BLOCK and exact and wide <= last and self._wrapped.wide_steps is not False and self._is_quick:
            return wide
        if not exact and not whole and n - position <= size:
            return None  # off the grid anyway: one forward for the rest is cheaper than two
        if not exact and edge - position < size // 4 and edge + size <= last:
            edge += size  # likewise: no forward for a few tokens
        return edge

    @property
    def _is_quick(self) -> bool:
        """True when a wide step is short enough for progress and interrupts; unknown counts as quick."""
        rate = self._wrapped.prefill_rate
        return rate is None or rate * _LONGEST_STEP_S >= _WIDE_STEP

    def _same_bits_in_small(self, sequence: LiveSequence, tensor: torch.Tensor, edge: int) -> bool:
        """Compute the last block before ``edge`` again by itself; True when its KV has the bits of the wide step."""
        start = edge - self._size
        cache = hf.new_cache(self._spec, self._wrapped.model.config, edge)
        hf.copy_prefix(sequence.cache, cache, start, start)
        self._wrapped.forward(tensor[:, start:edge], start, cache, logits=0)
        pairs = zip(hf.layers_of(sequence.cache), hf.layers_of(cache), strict=True)
        return all(
            torch.equal(a, b)
            for wide, small in pairs
            for a, b in zip(wide.rows(start, edge), small.rows(start, edge), strict=True)
        )
