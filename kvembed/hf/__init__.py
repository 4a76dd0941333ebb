"""The only package that touches ``transformers.cache_utils``: our cache layers, and caches made of them.

transformers builds a `DynamicCache` whose layers grow by concatenation: every decoded token copies all KV of
all layers. Ours are allocated once for the whole call, append in place and return views. The object handed to
``generate()`` is exactly a `DynamicCache`; only its ``layers`` are ours, because code in transformers tests the
type of the cache but only calls the layers. A layer without keys and values of its own stays a stock one.

Bytes move between blocks and layers after a forward, never inside ``update()``: a cache half-way through a forward
is torn. What differs between versions of transformers is in ``_compat.py``.
"""

from __future__ import annotations

from kvembed.hf._caches import (
    cache_nbytes,
    can_join,
    capture,
    capture_states,
    common_length,
    copy_prefix,
    device_block,
    expand,
    export_cache,
    join,
    layers_of,
    load_states,
    new_cache,
    new_stock_cache,
    probe_cache_spec,
    state_tensors,
    states_nbytes,
    tensors_in,
    truncate,
)
from kvembed.hf._compat import CHUNKS_RESUME, check_version
from kvembed.hf._layers import FullLayer, HybridLayer, HybridSlidingLayer, SlidingLayer
from kvembed.hf._shared import shared_cache

__all__ = [
    "CHUNKS_RESUME",
    "FullLayer",
    "HybridLayer",
    "HybridSlidingLayer",
    "SlidingLayer",
    "cache_nbytes",
    "can_join",
    "capture",
    "capture_states",
    "check_version",
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
    "shared_cache",
    "state_tensors",
    "states_nbytes",
    "tensors_in",
    "truncate",
]
