"""The arithmetic of the codecs: what every other implementation (the CUDA kernels) has to give bit for bit.

All of it is in float32, with IEEE division and rounding to nearest, ties to even::

    most  = max |x| over a group
    scale = most / 127 (int8)  or  most / 448 (fp8, e4m3 without infinities)
    code  = x / scale, rounded to a whole number and held to [-127, 127]  or  rounded to e4m3 and held to +-448;
            0, with the sign of x, where the scale is 0
    value = code * scale, rounded to the type of the cache

A group is, in each head, one token over all channels (``by="token"``) or one channel over up to ``span`` tokens
(``by="channel"``). A group with a value that is not finite has a scale that is not a number: callers store such
tensors as they are.
"""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["FP8", "INT8", "dequantise_into", "quantise"]

INT8, FP8 = torch.int8, torch.float8_e4m3fn
_MOST = {INT8: 127.0, FP8: 448.0}
_SERIAL = (1 << 15) - 1  # torch starts threads for more elements, which for so few cost more than they give


def quantise(
    x: torch.Tensor, code: torch.dtype, by: Literal["token", "channel"], span: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of a tensor.

    Args:
        x: ``[heads, tokens, width]``, of any float type.
        code: `INT8` or `FP8`.
        by: What shares a scale.
        span: Tokens of a group by channel; 1 by token.

    Returns:
        Codes ``[heads, tokens, width]`` of type ``code`` and float32 scales: ``[heads, tokens, 1]`` by token,
        ``[heads, ceil(tokens / span), width]`` by channel.
    """
    heads, n, width = x.shape
    codes = torch.empty(x.shape, dtype=code)
    scales = torch.empty((heads, n, 1) if by == "token" else (heads, -(-n // span), width))
    step = max(1, _SERIAL // (heads * width)) if by == "token" else span
    some = max(1, _SERIAL // (step * width))  # heads
    for number, start in enumerate(range(0, n, step)):
        rows = slice(start, start + step) if by == "token" else slice(number, number + 1)
        for head in range(0, heads, some):
            part = x[head : head + some, start : start + step]
            codes[head : head + some, start : start + step] = _coded(
                part, code, 2 if by == "token" else 1, scales[head : head + some, rows]
            )
    return codes, scales


def _coded(x: torch.Tensor, code: torch.dtype, axis: int, scales: torch.Tensor) -> torch.Tensor:
    """Return the codes of groups along an axis, and fill ``scales``."""
    x, most_code = x.float(), _MOST[code]
    most = x.abs().amax(dim=axis, keepdim=True)  # keeps what is not a number
    scale = torch.where(torch.isfinite(most), most / most_code, torch.nan)
    scaled = x / torch.where(scale > 0, scale, torch.inf)
    if code is INT8:
        scaled.round_()
    scales.copy_(scale)
    return scaled.clamp_(-most_code, most_code)  # rounded to e4m3 where it is assigned


def dequantise_into(target: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, span: int, skip: int = 0) -> None:
    """Fill rows of a cache with the values of codes.

    Args:
        target: ``[heads, n, width]``, of the cache's type; heads may lie apart.
        codes: ``[heads, tokens, width]``.
        scales: As `quantise` returns them.
        span: Tokens that share a row of scales.
        skip: Tokens of ``codes`` before the first one wanted.
    """
    heads, n, width = target.shape
    step = max(1, _SERIAL // (heads * width))
    at = 0
    while at < n:
        row = (skip + at) // span
        if span == 1:
            end = min(n, at + step)
            scale = scales[:, skip + at : skip + end]
        else:
            end = min(n, at + step, (row + 1) * span - skip)
            scale = scales[:, row : row + 1]
        part, some = target[:, at:end], codes[:, skip + at : skip + end]
        if codes.dtype is FP8:
            some = _half(some)  # 256 times smaller, which is exact in both types
            scale = scale * 256.0
        if target.dtype is torch.float32:
            part.copy_(some)
            part.mul_(scale)
        else:
            part.copy_(some.float().mul_(scale))
        at = end


def _half(codes: torch.Tensor) -> torch.Tensor:
    """Return e4m3 codes as float16 numbers divided by 256: the same bits, with a wider exponent.

    Six times as fast as torch's own conversion on a CPU. The code of no number is none that is ever stored.
    """
    bits = codes.view(INT8).to(torch.int16)  # the sign is in both upper bits of the exponent now
    return bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
