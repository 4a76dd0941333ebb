"""Cache layers: rows allocated once, appended in place, shown to transformers as views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvembed._errors import UnsupportedModelError
from kvembed._rows import Rows
from kvembed.hf._compat import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "HYBRIDS",
    "STATE_NAMES",
    "FullLayer",
    "HybridLayer",
    "HybridSlidingLayer",
    "SlidingLayer",
    "state_attributes",
]

STATE_NAMES = frozenset(vars(LinearAttentionLayer())) - {"device", "dtype"}
"""Attributes of a hybrid layer that belong to a position, not to tokens."""


class FullLayer(Rows, DynamicLayer):
    """Full attention: ``[1, heads, capacity, width]`` allocated once, appended in place.

    ``keys`` and ``values`` are views of the rows in use, as transformers expects of a `DynamicLayer`.
    """

    def __init__(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        DynamicLayer.__init__(self)
        self._init_rows(index, k, v)
        self._show(0, 0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the rows were allocated with the cache."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[1, heads, n, width]`` states; return views of all rows."""
        self._pass_gate()
        if not self._fits_rows(key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        end = self._length + key_states.shape[-2]
        if end > self.capacity:
            self._grow(end)
        self._append(key_states, value_states)
        self.set_length(end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens in the layer."""
        return self._length if self.attached else super().get_seq_length()

    def set_length(self, length: int) -> None:
        """Show the first ``length`` tokens (their rows are already filled)."""
        if length < self._length:
            self._before_overwriting()
        self._length = length
        self._show(0, length)

    def begin_restore(self, length: int, whole_from: int) -> int:
        """Make room for ``length`` restored tokens; return the first position that must be filled."""
        have = self._length
        if length > self.capacity:
            self._grow(length)
        self.set_length(length)
        return have

    def can_keep(self, length: int, whole_from: int) -> bool:
        """True when the layer can be cut back to its first ``length`` tokens."""
        return length <= self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (a negative count, as transformers has it)."""
        if not self.attached or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        elif tokens_to_remove < 0:
            self.set_length(max(0, self._length + tokens_to_remove))

    def plain(self) -> DynamicLayer:
        """Return a stock layer over the same rows (it copies when it grows)."""
        layer = DynamicLayer()
        layer.dtype, layer.device = self.dtype, self.device
        layer.keys, layer.values, layer.is_initialized = self.keys, self.values, True
        return layer


class SlidingLayer(Rows, DynamicSlidingWindowLayer):
    """Sliding or chunked window: keeps at least the last ``window - 1`` tokens, in place.

    Rows hold more than the window, so that moving the window to the front is rare, that a block is still
    whole when it is captured, and that a recent sequence can be cut back a little and go on.
    """

    def __init__(self, index: int, k: torch.Tensor, v: torch.Tensor, window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window=window)
        self._init_rows(index, k, v)
        self._sliding_window_tensor = self._sliding_window_tensor.to(k.device)
        self._show(0, 0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the rows were allocated with the cache."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states; return views of the last ``window - 1`` tokens before them and of all new ones."""
        self._pass_gate()
        if self.record_past or not self._fits_rows(key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        before = self._length
        end = before + key_states.shape[-2]
        if end - self.first > self.capacity:
            self._make_room(end)
        row_end = self._append(key_states, value_states)
        seen_from = max(self.first, before - self.sliding_window + 1) - self.first
        k, v = self._k[:, :, seen_from:row_end], self._v[:, :, seen_from:row_end]
        self.set_length(end)
        return k, v

    def _make_room(self, end: int) -> None:
        """Drop rows outside the window that were captured; grow when that is not enough."""
        keep_from = max(self.first, min(self._length - self.sliding_window + 1, self.captured))
        shift = keep_from - self.first
        used = self._length - keep_from
        if shift > 0:
            self._before_overwriting()
            for buffer in (self._k, self._v):
                kept = buffer[:, :, shift : shift + used]
                # Source and destination overlap when less than half is dropped.
                buffer[:, :, :used] = kept.clone() if shift < used else kept
            self.first = keep_from
        if end - self.first > self.capacity:
            self._grow(end - self.first)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def set_length(self, length: int) -> None:
        """Make ``length`` the number of tokens seen (rows of its window are already filled)."""
        if length < self._length:
            self._before_overwriting()
        self._length = self.cumulative_length = length
        self._show(max(0, length - self.sliding_window + 1 - self.first), length - self.first)

    def begin_restore(self, length: int, whole_from: int) -> int:
        """Make room for the window before ``length``; return the first position that must be filled.

        Args:
            length: Tokens restored.
            whole_from: Start of the block that ``length`` cuts: it is filled from there on, so that
                it can be captured whole later, also when the window is shorter than a block.
        """
        if self._length:
            raise UnsupportedModelError("a sliding layer is restored whole or not at all")
        self.first = self._needed_from(length, whole_from)
        if length - self.first > self.capacity:
            self._grow(length - self.first)
        self.set_length(length)
        return self.first

    def can_keep(self, length: int, whole_from: int) -> bool:
        """True when the window before ``length``, and the block it cuts, are still here."""
        return length <= self._length and self._needed_from(length, whole_from) >= self.first

    def _needed_from(self, length: int, whole_from: int) -> int:
        return max(0, min(length - self.sliding_window + 1, whole_from))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (a negative count); raises as transformers does when the window is gone."""
        length = max(0, self._length + tokens_to_remove)
        if self.attached and not self.record_past and tokens_to_remove < 0 and self.can_keep(length, length):
            self.set_length(length)
        else:
            super().crop(tokens_to_remove)

    def plain(self) -> DynamicSlidingWindowLayer:
        """Return a stock layer over the same rows (it copies when it grows)."""
        layer = DynamicSlidingWindowLayer(sliding_window=self.sliding_window)
        layer.dtype, layer.device = self.dtype, self.device
        layer.keys, layer.values, layer.is_initialized = self.keys, self.values, True
        layer.cumulative_length = self.cumulative_length
        layer._sliding_window_tensor = self._sliding_window_tensor
        return layer


class _State:
    """The part of a hybrid layer that belongs to a position: what a stock linear-attention layer would hold."""

    def _init_state(self, stock: Any) -> None:
        for name in STATE_NAMES:
            setattr(self, name, getattr(stock, name))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make room for the state; the rows were allocated with the cache."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)  # pyright: ignore[reportArgumentType]


class HybridLayer(_State, FullLayer, LinearAttentionAndFullAttentionLayer):
    """Full attention beside linear attention in one layer: rows of ours, and the stock state."""

    def __init__(self, index: int, k: torch.Tensor, v: torch.Tensor, stock: Any) -> None:
        FullLayer.__init__(self, index, k, v)
        self._init_state(stock)

    def crop(self, tokens_to_remove: int) -> None:
        """As the stock layer: raises unless past states were recorded."""
        LinearAttentionAndFullAttentionLayer.crop(self, tokens_to_remove)

    def plain(self) -> Any:
        """Return a stock layer over the same rows and state."""
        return _with_rows_of(self, LinearAttentionAndFullAttentionLayer(self.number_of_states))


class HybridSlidingLayer(_State, SlidingLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """Sliding attention beside linear attention in one layer."""

    def __init__(self, index: int, k: torch.Tensor, v: torch.Tensor, stock: Any) -> None:
        SlidingLayer.__init__(self, index, k, v, stock.sliding_window)
        self._init_state(stock)

    def crop(self, tokens_to_remove: int) -> None:
        """As the stock layer: raises unless past states were recorded."""
        LinearAttentionAndSlidingWindowAttentionLayer.crop(self, tokens_to_remove)

    def plain(self) -> Any:
        """Return a stock layer over the same rows and state."""
        stock = LinearAttentionAndSlidingWindowAttentionLayer(self.sliding_window, self.number_of_states)
        stock.cumulative_length = self.cumulative_length
        return _with_rows_of(self, stock)


HYBRIDS = {
    LinearAttentionAndFullAttentionLayer: HybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: HybridSlidingLayer,
}


def _with_rows_of(layer: Any, stock: Any) -> Any:
    for name in STATE_NAMES:
        setattr(stock, name, getattr(layer, name))
    stock.dtype, stock.device = layer.dtype, layer.device
    stock.keys, stock.values, stock.is_initialized = layer.keys, layer.values, True
    return stock


def state_attributes(layer: Any) -> dict[str, Any]:
    """Return what of a layer belongs to a position: nothing of our row layers, all of a stock one."""
    if isinstance(layer, FullLayer | SlidingLayer | LinearAttentionAndFullAttentionLayer) or type(layer) in HYBRIDS:
        return {name: value for name, value in vars(layer).items() if name in STATE_NAMES}
    return dict(vars(layer))
