"""What the library and the kernels take, as numpy types: one array describes all copies of a block."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["QUANT", "SEGMENT", "STRIP", "Code", "Direction", "Group", "Type", "check", "strips"]

STRIP = np.dtype([(name, "<u8") for name in ("dst", "src", "dst_pitch", "src_pitch", "row_bytes", "rows")])
"""A strided copy: ``rows`` rows of ``row_bytes`` bytes, which begin a pitch apart on each side."""

SEGMENT = np.dtype([(name, "<u8") for name in ("strided", "packed", "pitch", "row_bytes", "rows", "index")])
"""What `Kernels.gather` packs and `Kernels.scatter` spreads. Row r lies at ``strided + index[r] * pitch``, with
``index`` the address of int64 numbers on the device; 0 there means r itself. Any alignment will do."""

QUANT = np.dtype(
    [
        *[(name, "<u8") for name in ("src", "out", "scales", "head_pitch", "token_pitch")],
        *[(name, "<u4") for name in ("heads", "tokens", "width", "span")],
        *[(name, "u1") for name in ("type", "code", "group")],
        ("reserved", "u1", 5),
    ]
)
"""A tensor ``[heads, tokens, width]`` for `Kernels.quantise`. Pitches are in bytes, multiples of the element's size;
``span`` tokens of a channel share a scale."""


class Direction(IntEnum):
    """Where a copy goes."""

    TO_HOST = 1
    TO_DEVICE = 2
    ON_DEVICE = 3


class Type(IntEnum):
    """Of the elements of a tensor to quantise."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2


class Code(IntEnum):
    """What an element becomes: one byte."""

    INT8 = 0
    FP8_E4M3 = 1


class Group(IntEnum):
    """Which elements share a scale."""

    TOKEN = 0
    """Those of one head and token: scales are ``[heads, tokens]``."""
    CHANNEL = 1
    """Up to ``span`` tokens of one head and channel: scales are ``[heads, ceil(tokens / span), width]``."""
    NONE = 2
    """No scales."""


def strips(rows: Sequence[tuple[int, int, int, int, int, int]]) -> np.ndarray:
    """Return an array of `STRIP` from tuples in the order of its fields."""
    return np.array(rows, dtype=STRIP)


def check(array: np.ndarray, dtype: np.dtype, what: str) -> int:
    """Return the address of a descriptor array.

    Raises:
        TypeError: It is not one of ``dtype``, one-dimensional and contiguous.
    """
    if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
        raise TypeError(f"{what} must be a contiguous one-dimensional array of {dtype.names}")
    return array.__array_interface__["data"][0]
