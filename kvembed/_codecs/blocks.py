"""Blocks in a codec: made when they are stored, decoded into the rows of a cache as they are read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from kvembed._block import Block, Layout, TensorSpec
from kvembed._codecs.names import changed_dtypes, worst
from kvembed._codecs.quantise import FP8, INT8, dequantise_into, quantise
from kvembed._errors import BlockFormatError, ConfigError
from kvembed._memory import host_buffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._block import BlockInfo
    from kvembed._keys import TokenIds
    from kvembed._tiers._base import BlockSource

__all__ = ["SPAN", "DecodingSource", "encoded_block"]

SPAN = 128
"""Tokens of a channel that share a scale. A full block has two such groups; of a tail only the last one is not full, so
that storing it again, longer, rounds no more than that one anew."""

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": INT8,
    "F8_E4M3": FP8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ROWS: dict[str, Literal["channel", "token"]] = {"k": "channel", "v": "token"}
# For keys and values: the type of the codes; None leaves 16-bit types as they are and makes bfloat16 of float32.
_CODES: dict[str, dict[str, torch.dtype | None]] = {
    "bf16": {"k": None, "v": None},
    "k16v8": {"k": None, "v": INT8},
    "int8": {"k": INT8, "v": INT8},
    "fp8": {"k": FP8, "v": FP8},
}


def encoded_block(block: Block, codec: str) -> Block:
    """Return a block as a store of some codec keeps it.

    Only keys and values of tokens are changed: recurrent states and tensors of other kinds are not, and neither is a
    tensor with a value that is not finite, or one that would not get smaller. A block of which nothing was changed is
    returned as it is.

    Args:
        block: The block, not in a codec yet.
        codec: Name of the codec.
    """
    wanted = changed_dtypes(codec)
    dtypes = {spec.dtype for spec in block.layout.tensors}
    if block.layout.dtype is not None or len(dtypes) != 1 or not dtypes <= wanted:
        return block
    (dtype,) = dtypes
    specs: list[TensorSpec] = []
    parts: list[torch.Tensor] = []
    changed = False
    for index, spec in enumerate(block.layout.tensors):
        by = _ROWS.get(spec.name)
        if by is None:
            return block
        x = torch.from_numpy(block.tensor(index)).view(_DTYPES[dtype])
        code = _CODES[codec][spec.name]
        new = _rounded(x) if code is None else _quantised(x, code, by)
        changed = changed or new is not None
        for number, part in enumerate((x,) if new is None else new):
            name = spec.name if number == 0 else f"{spec.name}_scale_{1 if by == 'token' else SPAN}"
            specs.append(TensorSpec(spec.layer, name, spec.heads, part.shape[2], _NAMES[part.dtype]))
            parts.append(part)
    if not changed:
        return block
    layout, n = Layout(tuple(specs), dtype), block.info.n_tokens
    data = host_buffer(layout.nbytes(n))
    for index, part in enumerate(parts):
        at = layout.offset(index, n)
        out = torch.from_numpy(data[at : at + part.nbytes]).view(part.dtype)
        out.copy_(part.reshape(-1))
    info = replace(block.info, nbytes=data.nbytes, exact=False, codec=worst(block.info.codec, codec))
    return Block(info, block.token_ids, layout, data)


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor] | None:
    """Return bfloat16 of float32; None for what is to be left as it is."""
    if x.dtype != torch.float32:
        return None
    fits = not x.numel() or bool(x.abs().amax() <= torch.finfo(torch.bfloat16).max)  # False for what is not a number
    return (x.to(torch.bfloat16),) if fits else None


def _quantised(
    x: torch.Tensor, code: torch.dtype, by: Literal["token", "channel"]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    codes, scales = quantise(x, code, by, 1 if by == "token" else SPAN)
    if codes.nbytes + scales.nbytes >= x.nbytes:
        return None  # a few tokens have as many scales
    return (codes, scales) if bool(torch.isfinite(scales).all()) else None


class DecodingSource:
    """A block in a codec opened for reading: `kvembed._tiers._base.BlockSource` of the values it stands for.

    Args:
        source: The block as it is stored.

    Raises:
        BlockFormatError: Its tensors are not those of a codec.
    """

    def __init__(self, source: BlockSource) -> None:
        self.info: BlockInfo = source.info
        self.token_ids: TokenIds = source.token_ids
        self.stored_layout: Layout = source.layout
        self.layout: Layout = source.layout.decoded
        self.tier = source.tier
        for spec in self.stored_layout.tensors:
            if spec.dtype not in _DTYPES:
                raise BlockFormatError(f"a block in a codec has no values of type {spec.dtype}")
        self._source = source

    def read_into(self, index: int, rows: Sequence[np.ndarray], skip: int = 0) -> None:
        """Read, check and decode tensors; see `kvembed._tiers._base.BlockSource.read_into`."""
        total = self.info.n_tokens
        places = self.stored_layout.places[index : index + len(rows)]
        first = places[0][0]
        stored = self._source.read(first, max(max(codes, scales or 0) for codes, scales in places) + 1 - first)
        for number, (target, (codes_at, scales_at)) in enumerate(zip(rows, places, strict=True), start=index):
            spec, n = self.layout.tensors[number], target.shape[1]
            if target.shape != (spec.heads, n, spec.row_nbytes) or not 0 <= skip <= total - n:
                raise ConfigError(f"rows {target.shape} do not fit tensor {number} of a block of {total} tokens")
            out = torch.from_numpy(target).view(_DTYPES[spec.dtype])
            codes = self._values(codes_at, stored[codes_at - first])
            if scales_at is None:
                out.copy_(codes[:, skip : skip + n])
            else:
                scales = self._values(scales_at, stored[scales_at - first])
                dequantise_into(out, codes, scales, self.stored_layout.tensors[scales_at].group, skip)

    def _values(self, index: int, data: np.ndarray) -> torch.Tensor:
        # Never written to; a block in memory may be read-only, at which torch would warn.
        data = data if data.flags.writeable else data.copy()
        return torch.from_numpy(data).view(_DTYPES[self.stored_layout.tensors[index].dtype])

    def read(self, index: int, count: int) -> list[np.ndarray]:
        """Return decoded tensors; see `kvembed._tiers._base.BlockSource.read`."""
        n = self.info.n_tokens
        specs = self.layout.tensors[index : index + count]
        rows = [np.empty((spec.heads, n, spec.row_nbytes), np.uint8) for spec in specs]
        self.read_into(index, rows)
        return rows

    def close(self) -> None:
        """Release what the source holds; harmless when repeated."""
        self._source.close()
