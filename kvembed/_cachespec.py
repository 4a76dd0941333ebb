"""`CacheSpec`: the shape of a model's cache, layer by layer, and how the bytes of its blocks lie.

A layer holds *rows* (keys and values of each token, which any prefix can be cut from), or a *state* (what a
recurrent layer has made of all tokens so far, which is only good at the very token it was taken at), or both, or
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kvembed._block import Layout, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DTYPE_NAMES", "CacheSpec", "LayerSpec", "RowsSpec"]

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""Element types of keys and values that are kept, by their safetensors names."""


@dataclass(frozen=True)
class RowsSpec:
    """What one layer holds for each token.

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

    @property
    def kind(self) -> str:
        """One word: ``"full"`` or ``"sliding:512"``."""
        return "full" if self.window is None else f"sliding:{self.window}"


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a cache.

    Args:
        class_name: transformers' class of it.
        rows: What it holds for each token, or None.
        has_state: Whether it holds something that only snapshots can bring back.
    """

    class_name: str
    rows: RowsSpec | None = None
    has_state: bool = False

    @property
    def kind(self) -> str:
        """One word for the fingerprint, such as ``"full"``, ``"state:LinearAttentionLayer"`` or ``"none"``."""
        parts = [self.rows.kind] if self.rows is not None else []
        if self.has_state:
            parts.append(f"state:{self.class_name}")
        return "+".join(parts) or "none"


@dataclass(frozen=True)
class CacheSpec:
    """The shape of a model's cache: enough to build an empty one and to lay out its blocks.

    Args:
        layers: What each layer holds.
        block_size: Tokens of a full block.
    """

    layers: tuple[LayerSpec, ...]
    block_size: int
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        tensors = []
        for i, rows in self.rows():
            dtype = DTYPE_NAMES[rows.dtype]
            tensors.append(TensorSpec(i, "k", rows.heads, rows.k_width, dtype))
            tensors.append(TensorSpec(i, "v", rows.heads, rows.v_width, dtype))
        # Blocks of purely recurrent models hold token ids only; their format wants a tensor for each block.
        tensors = tensors or [TensorSpec(0, "none", 1, 1, "U8")]
        object.__setattr__(self, "layout", Layout(tuple(tensors)))

    def rows(self) -> Iterator[tuple[int, RowsSpec]]:
        """Yield (layer number, shape) of every layer that holds rows."""
        for i, layer in enumerate(self.layers):
            if layer.rows is not None:
                yield i, layer.rows

    @property
    def kinds(self) -> list[str]:
        """One word for each layer."""
        return [layer.kind for layer in self.layers]

    @property
    def token_nbytes(self) -> int:
        """Bytes of KV one token takes in a block."""
        return self.layout.token_nbytes

    @property
    def has_state(self) -> bool:
        """True when a prefix can only be taken up where a snapshot was taken."""
        return any(layer.has_state for layer in self.layers)

    @property
    def extendable(self) -> bool:
        """True when stored blocks can be appended to a cache that holds tokens already (no windows, no state)."""
        return not self.has_state and all(rows.window is None for _, rows in self.rows())

    @property
    def full_only(self) -> bool:
        """True when every layer is full attention: then batches can be put together from single rows."""
        return self.extendable and all(layer.rows is not None for layer in self.layers)

    def row_capacity(self, rows: RowsSpec, capacity: int) -> int:
        """Return the rows a layer is given for ``capacity`` tokens."""
        if rows.window is None:
            return capacity
        # Twice the window, so that moving the last window to the front happens once in a window's
        # worth of tokens; two blocks more, so that a block is still whole when it is captured.
        return min(capacity, 2 * rows.window + 2 * self.block_size)

    def host_nbytes(self, capacity: int) -> int:
        """Bytes of host memory a cache for ``capacity`` tokens takes (layers on other devices take none)."""
        # Two tensors a layer, each padded to a multiple of 64 bytes.
        return sum(
            self.row_capacity(rows, capacity) * rows.token_nbytes + 2 * 64
            for _, rows in self.rows()
            if rows.device.type == "cpu"
        )
