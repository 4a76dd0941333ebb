"""The only module that touches ``transformers.cache_utils``: our cache layers, and what they hold.

transformers builds a `DynamicCache` whose layers grow by concatenation: every decoded token copies all KV of
all layers. Ours are allocated once for the whole call, append in place and return views. The object handed to
``generate()`` is exactly a `DynamicCache`; only its ``layers`` are ours, because code in transformers tests the
type of the cache but only calls the layers.

Bytes move between blocks and layers here too: `capture` reads rows out of a cache after a forward (never
inside ``update()``: a cache half-way through a forward is torn) and `load_rows` writes them back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvembed._block import Layout, TensorSpec
from kvembed._errors import UnsupportedModelError
from kvembed._memory import HostPool, host_buffer
from kvembed._rows import Rows, as_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CacheSpec", "FullLayer", "LayerSpec", "SlidingLayer", "capture", "export_cache", "probe_cache_spec"]

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class LayerSpec:
    """What one layer of the cache holds for each token.

    Args:
        heads: Key-value heads.
        k_width: Elements of a key head.
        v_width: Elements of a value head.
        dtype: Element type.
        device: Where the layer computes.
        window: Sliding (or chunked) window in tokens, None for full attention.
    """

    heads: int
    k_width: int
    v_width: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token, keys and values."""
        return self.heads * (self.k_width + self.v_width) * self.dtype.itemsize


@dataclass(frozen=True)
class CacheSpec:
    """The shape of a model's cache: enough to build an empty one and to lay out its blocks."""

    layers: tuple[LayerSpec, ...]
    block_size: int
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        tensors = []
        for i, layer in enumerate(self.layers):
            dtype = _DTYPE_NAMES[layer.dtype]
            tensors.append(TensorSpec(i, "k", layer.heads, layer.k_width, dtype))
            tensors.append(TensorSpec(i, "v", layer.heads, layer.v_width, dtype))
        object.__setattr__(self, "layout", Layout(tuple(tensors)))

    @property
    def kinds(self) -> list[str]:
        """One word per layer, for the fingerprint: ``"full"`` or ``"sliding:512"``."""
        return ["full" if s.window is None else f"sliding:{s.window}" for s in self.layers]

    @property
    def token_nbytes(self) -> int:
        """Bytes of KV one token takes in a block."""
        return self.layout.token_nbytes

    @property
    def extendable(self) -> bool:
        """True when stored blocks can be appended to a cache that holds tokens already (no windows)."""
        return all(layer.window is None for layer in self.layers)

    def host_nbytes(self, capacity: int) -> int:
        """Bytes of host memory a cache for ``capacity`` tokens takes (layers on other devices take none)."""
        return sum(_layer_bytes(s, self._rows(s, capacity)) for s in self.layers if s.device.type == "cpu")

    def new_cache(self, model_config: Any, capacity: int, pool: HostPool | None = None) -> DynamicCache:
        """Return an empty cache with room for ``capacity`` tokens in every layer.

        Args:
            model_config: The model's config.
            capacity: Tokens.
            pool: Where host memory comes from, and goes back to with the cache's last view.
        """
        cache = DynamicCache(config=model_config)
        nbytes = self.host_nbytes(capacity)
        memory = _HostMemory(host_buffer(nbytes) if pool is None else pool.take(nbytes))
        cache.layers[:] = [self._new_layer(i, spec, capacity, memory) for i, spec in enumerate(self.layers)]
        return cache

    def _rows(self, spec: LayerSpec, capacity: int) -> int:
        if spec.window is None:
            return capacity
        # Twice the window, so that moving the last window to the front happens once in a window's
        # worth of tokens; two blocks more, so that a block is still whole when it is captured.
        return min(capacity, 2 * spec.window + 2 * self.block_size)

    def _new_layer(self, index: int, spec: LayerSpec, capacity: int, memory: _HostMemory) -> FullLayer | SlidingLayer:
        rows = self._rows(spec, capacity)
        k = memory.take((1, spec.heads, rows, spec.k_width), spec)
        v = memory.take((1, spec.heads, rows, spec.v_width), spec)
        if spec.window is None:
            return FullLayer(index, k, v)
        return SlidingLayer(index, k, v, spec.window)


def _layer_bytes(spec: LayerSpec, rows: int) -> int:
    # Two tensors, each padded to a multiple of 64 bytes.
    return rows * spec.token_nbytes + 2 * 64


class _HostMemory:
    """One allocation for all layers of a cache that compute on the CPU."""

    def __init__(self, buffer: np.ndarray) -> None:
        self._at = 0
        self._memory = torch.from_numpy(buffer)

    def take(self, shape: tuple[int, ...], spec: LayerSpec) -> torch.Tensor:
        """Return an uninitialised tensor; on a device other than the CPU, one of its own."""
        if spec.device.type != "cpu":
            return torch.empty(shape, dtype=spec.dtype, device=spec.device)
        nbytes = int(np.prod(shape)) * spec.dtype.itemsize
        flat = self._memory[self._at : self._at + nbytes]
        self._at += (nbytes + 63) // 64 * 64
        return flat.view(spec.dtype).view(shape)


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


def probe_cache_spec(cache: Any, block_size: int) -> CacheSpec:
    """Read the shape of a cache that one short forward has filled.

    Args:
        cache: The `DynamicCache` a plain forward of the model filled.
        block_size: Tokens of a full block.

    Raises:
        UnsupportedModelError: A layer is of a kind that is not kept yet; the message names it.
    """
    if type(cache) is not DynamicCache:
        raise UnsupportedModelError(f"cache class {type(cache).__name__} cannot be kept")
    layers = []
    for i, layer in enumerate(cache.layers):
        # The exact type: a subclass may hold more than keys and values.
        if not isinstance(layer, DynamicLayer) or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(f"layer {i} is a {type(layer).__name__}, which cannot be kept yet")
        keys, values = layer.keys, layer.values
        if keys is None or values is None or keys.ndim != 4 or values.ndim != 4 or keys.shape[1] != values.shape[1]:
            raise UnsupportedModelError(f"layer {i} keeps no keys and values of the usual shape")
        if keys.dtype not in _DTYPE_NAMES or values.dtype != keys.dtype:
            raise UnsupportedModelError(f"layer {i} keeps KV as {keys.dtype}, which cannot be kept yet")
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        layers.append(LayerSpec(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device, window))
    if not layers:
        raise UnsupportedModelError("the model filled no cache layer")
    return CacheSpec(tuple(layers), block_size)


def new_stock_cache(model_config: Any) -> DynamicCache:
    """Return the cache transformers itself would make for this config."""
    return DynamicCache(config=model_config)


def capture(cache: Any, layout: Layout, start: int, end: int) -> np.ndarray:
    """Copy the KV of tokens ``start..end`` out of a cache of ours, after a forward.

    Returns:
        uint8 array of ``layout.nbytes(end - start)`` bytes in host memory, laid out as a block.
    """
    n = end - start
    data = host_buffer(layout.nbytes(n))
    at = 0
    for layer in cache.layers:
        for rows in layer.rows(start, end):
            heads, width = rows.shape[1], rows.shape[3] * rows.element_size()
            out = data[at : at + heads * n * width].reshape(heads, n, width)
            at += heads * n * width
            source = as_bytes(rows)
            if source is not None:
                np.copyto(out, source)
            else:
                torch.from_numpy(out).view(rows.dtype).copy_(rows[0])
    return data


def cache_nbytes(cache: Any) -> int:
    """Bytes allocated by the layers of a cache of ours."""
    return sum(layer.buffer_nbytes for layer in cache.layers)


def common_length(cache: Any) -> int | None:
    """Return the tokens all layers hold, or None for a cache that is torn or no longer ours."""
    lengths = {layer.get_seq_length() if layer.attached else -1 for layer in cache.layers}
    length = lengths.pop()
    return length if not lengths and length >= 0 else None


def export_cache(cache: Any) -> None:
    """Turn a cache of ours into a stock one, in place, for a caller who gets to keep it.

    Stock layers never write into rows they were given, so nothing is copied here.
    """
    cache.layers = [layer.plain() if isinstance(layer, FullLayer | SlidingLayer) else layer for layer in cache.layers]


def truncate(cache: Any, length: int) -> None:
    """Cut all layers back to their first ``length`` tokens (each layer's ``can_keep`` must allow it)."""
    for layer in cache.layers:
        layer.set_length(length)
        layer.captured = min(layer.captured, length)


def copy_prefix(source: Any, target: Any, length: int, whole_from: int) -> None:
    """Copy the first ``length`` tokens of one cache of ours into an empty one."""
    for old, new in zip(source.layers, target.layers, strict=True):
        start = new.begin_restore(length, whole_from)
        for a, b in zip(new.rows(start, length), old.rows(start, length), strict=True):
            a.copy_(b)


def layers_of(cache: Any) -> Sequence[FullLayer | SlidingLayer]:
    """Return the layers of a cache of ours."""
    return cache.layers
