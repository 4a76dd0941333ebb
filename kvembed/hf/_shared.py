"""Cache layers of several sequences that begin with the same tokens: those are held once, and only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvembed.hf._caches import layers_of, new_stock_cache
from kvembed.hf._compat import DynamicLayer

if TYPE_CHECKING:
    import torch

    from kvembed._shared_attention import SharedRun

__all__ = ["shared_cache"]


class SharedLayer(DynamicLayer):
    """Full attention of ``rows`` sequences: one prefix for all, and ``[rows, heads, n, width]`` after it.

    ``update()`` returns the rows' own tokens; the attention is told of the prefix by another way, because repeating it
    for every row would cost more than all else.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, rows: int, room: int, run: SharedRun) -> None:
        super().__init__()
        self._prefix = (k, v)
        self._run = run
        self._own_k = k.new_empty((rows, k.shape[1], room, k.shape[3]))
        self._own_v = v.new_empty((rows, v.shape[1], room, v.shape[3]))
        self._length = 0
        self.dtype, self.device, self.is_initialized = k.dtype, k.device, True
        self.keys, self.values = self._own_k[:, :, :0], self._own_v[:, :, :0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[rows, heads, n, width]`` states; return views of all that came after the prefix."""
        start, end = self._length, self._length + key_states.shape[-2]
        if end > self._own_k.shape[2]:
            room = max(end, 2 * self._own_k.shape[2])
            self._own_k, self._own_v = (_longer(old, start, room) for old in (self._own_k, self._own_v))
        self._own_k[:, :, start:end] = key_states
        self._own_v[:, :, start:end] = value_states
        self._length = end
        self.keys, self.values = self._own_k[:, :, :end], self._own_v[:, :, :end]
        self._run.offer(self.keys, *self._prefix)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of a row, the prefix included."""
        return self._prefix[0].shape[2] + self._length


def _longer(old: torch.Tensor, used: int, room: int) -> torch.Tensor:
    new = old.new_empty((*old.shape[:2], room, old.shape[3]))
    new[:, :, :used] = old[:, :, :used]
    return new


def shared_cache(cache: Any, length: int, rows: int, room: int, model_config: Any, run: SharedRun) -> Any:
    """Return a cache of several sequences that all begin with the first tokens of one.

    Args:
        cache: Ours, of a model whose layers are all full attention; it must not change meanwhile.
        length: How many of its tokens.
        rows: How many sequences.
        room: Tokens after these to make room for; more are made when it is not enough.
        model_config: The model's config.
        run: Takes the prefix from each layer to the attention.
    """
    shared: Any = new_stock_cache(model_config)
    shared.layers = [SharedLayer(*layer.rows(0, length), rows, room, run) for layer in layers_of(cache)]
    return shared
