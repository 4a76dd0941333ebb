"""Caches made of our layers: their shape, building them, and moving bytes between them and blocks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed._cachespec import DTYPE_NAMES, CacheSpec, LayerSpec, RowsSpec
from kvembed._errors import UnsupportedModelError
from kvembed._memory import HostPool, host_buffer
from kvembed._rows import as_bytes
from kvembed._snapshot import decode_states, encode_states
from kvembed._tiers.gpu import DeviceBlock
from kvembed.hf._compat import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from kvembed.hf._layers import HYBRIDS, FullLayer, SlidingLayer, state_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvembed._block import BlockInfo, Layout
    from kvembed._keys import TokenIds
    from kvembed._tiers._base import BlockSource
    from kvembed._transfer import Transfers

__all__ = [
    "cache_nbytes",
    "can_join",
    "capture",
    "capture_states",
    "common_length",
    "copy_prefix",
    "device_block",
    "expand",
    "export_cache",
    "join",
    "layers_of",
    "load_states",
    "new_cache",
    "new_stock_cache",
    "probe_cache_spec",
    "state_tensors",
    "states_nbytes",
    "tensors_in",
    "truncate",
]

# --- the shape of a cache ------------------------------------------------------------------------------


def probe_cache_spec(cache: Any, block_size: int) -> CacheSpec:
    """Read the shape of a cache that one short forward has filled.

    Args:
        cache: The `DynamicCache` a plain forward of the model filled.
        block_size: Tokens of a full block.

    Raises:
        UnsupportedModelError: A layer is of a kind that cannot be kept; the message names it.
    """
    if type(cache) is not DynamicCache:
        raise UnsupportedModelError(f"cache class {type(cache).__name__} cannot be kept")
    for name, value in vars(cache).items():
        if name != "layers" and any(True for _ in tensors_in(value)):
            raise UnsupportedModelError(f"the model keeps {name} on the cache, beside its layers")
    layers = tuple(_probe_layer(i, layer) for i, layer in enumerate(cache.layers))
    spec = CacheSpec(layers, block_size)
    if not spec.has_state and not any(True for _ in spec.rows()):
        raise UnsupportedModelError("the model filled no cache layer")
    encode_states(_states(cache, spec))  # raises when something in there cannot be stored
    return spec


def _probe_layer(index: int, layer: Any) -> LayerSpec:
    # The exact type: a subclass may hold more than its base.
    name = type(layer).__name__
    if type(layer) is DummyLayer:
        return LayerSpec(name)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        if keys is None and values is None:
            return LayerSpec(name)  # nothing ever comes here: keys are another layer's, or there is no attention
        return LayerSpec(name, _probe_rows(index, layer, keys, values))
    if type(layer) in HYBRIDS and keys is not None and values is not None:
        return LayerSpec(name, _probe_rows(index, layer, keys, values), has_state=True)
    # A layer nothing ever comes to has nothing to keep.
    return LayerSpec(name, has_state=any(True for _ in tensors_in(vars(layer))))


def _probe_rows(index: int, layer: Any, keys: Any, values: Any) -> RowsSpec:
    if keys is None or values is None or keys.ndim != 4 or values.ndim != 4 or keys.shape[1] != values.shape[1]:
        raise UnsupportedModelError(f"layer {index} keeps no keys and values of the usual shape")
    if keys.dtype not in DTYPE_NAMES or values.dtype != keys.dtype:
        raise UnsupportedModelError(f"layer {index} keeps KV as {keys.dtype}, which cannot be kept yet")
    window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
    return RowsSpec(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device, window)


def new_stock_cache(model_config: Any) -> DynamicCache:
    """Return the cache transformers itself would make for this config."""
    return DynamicCache(config=model_config)


def new_cache(spec: CacheSpec, model_config: Any, capacity: int, pool: HostPool | None = None) -> DynamicCache:
    """Return an empty cache with room for ``capacity`` tokens in every layer.

    Args:
        spec: Its shape.
        model_config: The model's config.
        capacity: Tokens.
        pool: Where host memory comes from, and goes back to with the cache's last view.
    """
    cache = DynamicCache(config=model_config)
    nbytes = spec.host_nbytes(capacity)
    memory = _HostMemory(host_buffer(nbytes) if pool is None else pool.take(nbytes))
    for order, (i, rows) in enumerate(spec.rows()):
        n = spec.row_capacity(rows, capacity)
        k = memory.take((1, rows.heads, n, rows.k_width), rows)
        v = memory.take((1, rows.heads, n, rows.v_width), rows)
        if spec.layers[i].has_state:
            cache.layers[i] = HYBRIDS[type(cache.layers[i])](order, k, v, cache.layers[i])
        elif rows.window is None:
            cache.layers[i] = FullLayer(order, k, v)
        else:
            cache.layers[i] = SlidingLayer(order, k, v, rows.window)
    return cache


class _HostMemory:
    """One allocation for all layers of a cache that compute on the CPU."""

    def __init__(self, buffer: np.ndarray) -> None:
        self._at = 0
        self._memory = torch.from_numpy(buffer)

    def take(self, shape: tuple[int, ...], rows: RowsSpec) -> torch.Tensor:
        """Return an uninitialised tensor; on a device other than the CPU, one of its own."""
        if rows.device.type != "cpu":
            return torch.empty(shape, dtype=rows.dtype, device=rows.device)
        nbytes = int(np.prod(shape)) * rows.dtype.itemsize
        flat = self._memory[self._at : self._at + nbytes]
        self._at += (nbytes + 63) // 64 * 64
        return flat.view(rows.dtype).view(shape)


# --- a cache as a whole --------------------------------------------------------------------------------


def layers_of(cache: Any) -> list[FullLayer | SlidingLayer]:
    """Return the layers with rows of ours, in order."""
    return [layer for layer in cache.layers if isinstance(layer, FullLayer | SlidingLayer)]


def capture(cache: Any, layout: Layout, start: int, end: int) -> np.ndarray:
    """Copy the KV of tokens ``start..end`` out of a cache of ours, after a forward.

    Returns:
        uint8 array of ``layout.nbytes(end - start)`` bytes in host memory, laid out as a block.
    """
    n = end - start
    data = host_buffer(layout.nbytes(n))
    at = 0
    for layer in layers_of(cache):
        for rows in layer.rows(start, end):
            heads, width = rows.shape[1], rows.shape[3] * rows.element_size()
            out = data[at : at + heads * n * width].reshape(heads, n, width)
            at += heads * n * width
            source = as_bytes(rows)
            if source is not None:
                np.copyto(out, source)
            else:
                torch.from_numpy(out).view(rows.dtype).copy_(rows[0])
    data[at:] = 0  # a model without rows
    return data


def device_block(cache: Any, info: BlockInfo, ids: TokenIds, layout: Layout, transfers: Transfers) -> DeviceBlock:
    """Copy the KV of a block's tokens inside the devices its layers are on, after a forward."""
    end = info.start + info.n_tokens
    tensors = [
        rows[0].clone(memory_format=torch.contiguous_format).view(torch.uint8)
        for layer in layers_of(cache)
        for rows in layer.rows(info.start, end)
    ]
    return DeviceBlock(info, ids, layout, tensors, transfers)


def _states(cache: Any, spec: CacheSpec) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, layer_spec in enumerate(spec.layers):
        if layer_spec.has_state:
            yield i, state_attributes(cache.layers[i])


def capture_states(cache: Any, spec: CacheSpec) -> tuple[Layout, np.ndarray]:
    """Copy what is not rows out of a cache, after a forward; see `kvembed._snapshot`."""
    return encode_states(_states(cache, spec))


def load_states(cache: Any, spec: CacheSpec, source: BlockSource) -> None:
    """Put a snapshot into a new cache of ours.

    Raises:
        ValueError: It is not a snapshot of such a cache.
        BlockFormatError: The bytes are not those that were stored.
    """
    states = decode_states(source)
    if set(states) != {i for i, layer in enumerate(spec.layers) if layer.has_state}:
        raise ValueError("the snapshot is of other layers")
    for i, attributes in states.items():
        for name, value in attributes.items():
            setattr(cache.layers[i], name, value)


def cache_nbytes(cache: Any) -> int:
    """Bytes held by the layers of a cache of ours."""
    return sum(layer.buffer_nbytes for layer in layers_of(cache)) + states_nbytes(cache)


def states_nbytes(cache: Any) -> int:
    """Bytes of state, which a snapshot of the cache would take."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in state_tensors(layer))


def state_tensors(layer: Any) -> list[torch.Tensor]:
    """Return the tensors of a layer that belong to a position."""
    return list(tensors_in(state_attributes(layer)))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested attributes, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def common_length(cache: Any) -> int | None:
    """Return the tokens all layers with rows hold; None for a cache that is torn, no longer ours, or has none."""
    lengths = {layer.get_seq_length() if layer.attached else -1 for layer in layers_of(cache)}
    return lengths.pop() if len(lengths) == 1 and min(lengths) >= 0 else None


def export_cache(cache: Any) -> None:
    """Turn a cache of ours into a stock one, in place, for a caller who gets to keep it.

    Stock layers never write into rows they were given, so nothing is copied here.
    """
    cache.layers = [layer.plain() if isinstance(layer, FullLayer | SlidingLayer) else layer for layer in cache.layers]


def expand(cache: Any, copies: int, rows: int = 1) -> None:
    """Repeat each row of a cache, for beams or several sequences; it is no longer ours to keep then."""
    cache.reorder_cache(torch.arange(rows).repeat_interleave(copies))


def can_join(spec: CacheSpec) -> bool:
    """True when caches of such a shape can be laid side by side as the rows of a batch."""
    names = {cls.__name__ for cls in (LinearAttentionLayer, *HYBRIDS)}
    return all(layer.class_name in names for layer in spec.layers if layer.has_state)


def join(caches: Sequence[Any], model_config: Any) -> Any:
    """Return a stock cache with the sequences of several caches of ours as its rows.

    Args:
        caches: Each holds one sequence. Of different lengths only where all layers are full attention.
        model_config: The model's config.

    Returns:
        The rows right-aligned, with zeros before the shorter ones. The caches are left as they are.
    """
    joined = new_stock_cache(model_config)
    layers = zip(*(cache.layers for cache in caches), strict=True)
    joined.layers = [_join_layers([_plain(layer) for layer in row]) for row in layers]
    return joined


def _plain(layer: Any) -> Any:
    return layer.plain() if isinstance(layer, FullLayer | SlidingLayer) else copy.copy(layer)


def _join_layers(layers: list[Any]) -> Any:
    joined = layers[0]
    for name, value in vars(joined).items():
        values = [getattr(layer, name) for layer in layers]
        if name in ("keys", "values") and value is not None:
            setattr(joined, name, _right_aligned(values))
        else:
            setattr(joined, name, _join_states(values))
    return joined


def _right_aligned(parts: list[torch.Tensor]) -> torch.Tensor:
    longest = max(part.shape[2] for part in parts)
    first = parts[0]
    rows = first.new_zeros((len(parts), first.shape[1], longest, first.shape[3]))
    for row, part in zip(rows, parts, strict=True):
        row[:, longest - part.shape[2] :] = part[0]
    return rows


def _join_states(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _join_states([value[key] for value in values]) for key in first}
    if isinstance(first, torch.Tensor) and first.ndim:
        return torch.cat(values)
    return first  # numbers and flags, which agree for the same number of tokens


def truncate(cache: Any, length: int) -> None:
    """Cut all layers back to their first ``length`` tokens (each layer's ``can_keep`` must allow it)."""
    for layer in layers_of(cache):
        layer.set_length(length)
        layer.captured = min(layer.captured, length)


def copy_prefix(source: Any, target: Any, length: int, whole_from: int) -> None:
    """Copy the first ``length`` tokens of one cache of ours, without state, into an empty one."""
    for old, new in zip(layers_of(source), layers_of(target), strict=True):
        start = new.begin_restore(length, whole_from)
        for a, b in zip(new.rows(start, length), old.rows(start, length), strict=True):
            a.copy_(b)
