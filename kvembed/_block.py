"""`Block`: the KV of up to 256 consecutive tokens for all layers, and `Layout`: how its bytes lie.

A block's bytes are layer-major: for every layer its tensors one after the other (keys, values), each
``[heads, tokens, width]`` and contiguous. The same bytes are the data section of the block file, so a
block is written with one call, and one layer can be read without the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from kvembed._keys import TokenIds

__all__ = ["Block", "BlockInfo", "Layout", "TensorSpec", "dtype_nbytes"]

_DTYPE_NBYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
}


def dtype_nbytes(dtype: str) -> int:
    """Return the bytes of one element of a safetensors dtype name such as ``"F32"``."""
    return _DTYPE_NBYTES[dtype]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer: ``[heads, tokens, width]``, tokens left open.

    Args:
        layer: Layer index.
        name: ``"k"`` or ``"v"`` (other layer kinds may add names).
        heads: Number of key-value heads.
        width: Elements a head holds for each token.
        dtype: safetensors dtype name.
    """

    layer: int
    name: str
    heads: int
    width: int
    dtype: str

    @property
    def row_nbytes(self) -> int:
        """Bytes of one head for one token."""
        return self.width * dtype_nbytes(self.dtype)

    def nbytes(self, n_tokens: int) -> int:
        """Bytes of the whole tensor for ``n_tokens`` tokens."""
        return self.heads * n_tokens * self.row_nbytes


@dataclass(frozen=True)
class Layout:
    """The tensors of a block, in the order in which their bytes lie (layer-major)."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def token_nbytes(self) -> int:
        """Bytes one token takes over all tensors."""
        return sum(spec.nbytes(1) for spec in self.tensors)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        # Offsets for one token; for n tokens every offset is n times as large, since each tensor
        # before it is.
        starts, at = [], 0
        for spec in self.tensors:
            starts.append(at)
            at += spec.nbytes(1)
        return tuple(starts)

    def offset(self, index: int, n_tokens: int) -> int:
        """Byte offset of tensor number ``index`` in a block of ``n_tokens`` tokens."""
        return self._starts[index] * n_tokens

    def nbytes(self, n_tokens: int) -> int:
        """Bytes of the KV of a block of ``n_tokens`` tokens."""
        return self.token_nbytes * n_tokens


@dataclass(frozen=True)
class BlockInfo:
    """What is known of a block without its bytes.

    Args:
        key: 32-byte chained key.
        parent: Key of the block before it, or the root.
        namespace: 32-byte fingerprint digest of the model that computed it.
        start: Position of its first token in the sequence.
        n_tokens: Number of tokens, at most the block size.
        exact: True when the KV is bit for bit what a cold grid prefill makes (every token computed
            in a grid step, on ancestors that are exact too). KV of decode steps or of off-grid
            pieces is equal only to rounding.
        nbytes: Bytes of the block's KV.
    """

    key: bytes
    parent: bytes
    namespace: bytes
    start: int
    n_tokens: int
    exact: bool
    nbytes: int


@dataclass(frozen=True, eq=False)
class Block:
    """An immutable block with its bytes in host memory.

    Args:
        info: Identity and size.
        token_ids: int32 array of ``info.n_tokens`` ids.
        layout: How ``data`` is divided.
        data: uint8 array of ``layout.nbytes(info.n_tokens)`` bytes.
    """

    info: BlockInfo
    token_ids: TokenIds
    layout: Layout
    data: np.ndarray = field(repr=False)

    @property
    def key(self) -> bytes:
        """The block's key."""
        return self.info.key

    def tensor(self, index: int) -> np.ndarray:
        """Return tensor number ``index`` as uint8 ``[heads, tokens, row_nbytes]``, without a copy."""
        spec = self.layout.tensors[index]
        n = self.info.n_tokens
        at = self.layout.offset(index, n)
        return self.data[at : at + spec.nbytes(n)].reshape(spec.heads, n, spec.row_nbytes)
