"""`Block`: the KV of up to 256 consecutive tokens for all layers, and `Layout`: how its bytes lie.

A block's bytes are layer-major: for every layer its tensors one after the other (keys, values), each
``[heads, tokens, width]`` and contiguous. The same bytes are the data section of the block file, so a
block is written with one call, and one layer can be read without the others.

A block may be stored in a codec (`kvembed._codecs`). Then its tensors hold codes, each followed by its scales, and
``Layout.dtype`` says what they decode to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from kvembed._codecs.names import LOSSLESS, fidelity
from kvembed._errors import BlockFormatError

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


_SCALES = re.compile(r"(.+)_scale_([1-9][0-9]{0,6})")


def dtype_nbytes(dtype: str) -> int:
    """Return the bytes of one element of a safetensors dtype name such as ``"F32"``."""
    return _DTYPE_NBYTES[dtype]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer: ``[heads, tokens, width]``, tokens left open.

    Args:
        layer: Layer index.
        name: ``"k"`` or ``"v"`` (other layer kinds may add names). ``"k_scale_128"`` are the scales of ``"k"``, a row
            for every 128 tokens.
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

    @cached_property
    def group(self) -> int:
        """Tokens that share a row: 1, but for scales."""
        match = _SCALES.fullmatch(self.name)
        return int(match[2]) if match else 1

    @cached_property
    def scales_of(self) -> str | None:
        """Name of the tensor whose scales these are, or None."""
        match = _SCALES.fullmatch(self.name)
        return match[1] if match else None

    def rows(self, n_tokens: int) -> int:
        """Rows of each head for ``n_tokens`` tokens."""
        return -(-n_tokens // self.group)

    def nbytes(self, n_tokens: int) -> int:
        """Bytes of the whole tensor for ``n_tokens`` tokens."""
        return self.heads * self.rows(n_tokens) * self.row_nbytes


@dataclass(frozen=True)
class Layout:
    """The tensors of a block, in the order in which their bytes lie (layer-major).

    Args:
        tensors: As they are stored.
        dtype: What tensors in a codec decode to (a safetensors dtype name); None when all are what they say.
    """

    tensors: tuple[TensorSpec, ...]
    dtype: str | None = None

    @cached_property
    def token_nbytes(self) -> int:
        """Bytes one token takes over all tensors; not for blocks in a codec, where it depends on how many there are."""
        return sum(spec.nbytes(1) for spec in self.tensors)

    @cached_property
    def _starts(self) -> dict[int, tuple[int, ...]]:
        return {}

    def _starts_of(self, n_tokens: int) -> tuple[int, ...]:
        starts = self._starts.get(n_tokens)
        if starts is None:
            made, at = [], 0
            for spec in self.tensors:
                made.append(at)
                at += spec.nbytes(n_tokens)
            # Kept: a model has blocks of one size, and tails of some.
            starts = self._starts[n_tokens] = (*made, at)
        return starts

    def offset(self, index: int, n_tokens: int) -> int:
        """Byte offset of tensor number ``index`` in a block of ``n_tokens`` tokens."""
        return self._starts_of(n_tokens)[index]

    def nbytes(self, n_tokens: int) -> int:
        """Bytes of the KV of a block of ``n_tokens`` tokens."""
        return self._starts_of(n_tokens)[-1]

    @cached_property
    def decoded(self) -> Layout:
        """What a reader gets to see: this very layout, unless it is in a codec."""
        if self.dtype is None:
            return self
        plain = (self.tensors[place] for place, _ in self.places)
        return Layout(tuple(TensorSpec(t.layer, t.name, t.heads, t.width, self.dtype) for t in plain))

    @cached_property
    def places(self) -> tuple[tuple[int, int | None], ...]:
        """For each tensor of `decoded` the number of its codes here, and that of its scales (None without).

        Raises:
            BlockFormatError: Scales that fit no tensor.
        """
        found: list[tuple[int, int | None]] = []
        for number, spec in enumerate(self.tensors):
            if self.dtype is None or spec.scales_of is None:
                found.append((number, None))
                continue
            codes = self.tensors[found[-1][0]] if found else None
            if (
                codes is None
                or found[-1] != (number - 1, None)
                or (codes.layer, codes.name, codes.heads) != (spec.layer, spec.scales_of, spec.heads)
                or spec.width not in (1, codes.width)
                or spec.dtype != "F32"
            ):
                raise BlockFormatError(f"{spec.name!r} of layer {spec.layer} are not the scales of what is before them")
            found[-1] = (number - 1, number)
        return tuple(found)


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
        nbytes: Bytes of the block's KV, as it is stored.
        codec: The least faithful codec that its values have been through, be it in a block it was computed on;
            ``"lossless"`` when none has.
    """

    key: bytes
    parent: bytes
    namespace: bytes
    start: int
    n_tokens: int
    exact: bool
    nbytes: int
    codec: str = LOSSLESS

    @property
    def rank(self) -> tuple[int, bool]:
        """How good it is: of two blocks with one key the one with the greater rank is kept."""
        return fidelity(self.codec), self.exact


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
        """Return tensor number ``index`` as uint8 ``[heads, rows, row_nbytes]`` (a row a token), without a copy."""
        spec = self.layout.tensors[index]
        n = self.info.n_tokens
        at = self.layout.offset(index, n)
        return self.data[at : at + spec.nbytes(n)].reshape(spec.heads, spec.rows(n), spec.row_nbytes)
