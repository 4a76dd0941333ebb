"""Sizes, times and counts: read as people write them, and printed as people read them."""

from __future__ import annotations

import re

from kvembed._errors import ConfigError

__all__ = ["format_bytes", "format_count", "format_seconds", "parse_age", "parse_bytes"]

_SIZE = re.compile(r"\s*([0-9]+(?:[_,][0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*|%)\s*")

# A bare letter is binary, as in `du -h`, docker and ulimit; KB, MB ... are decimal, as printed on disks.
_FACTORS = {"": 1, "b": 1, "%": 0} | {
    letter + suffix: base ** (power + 1)
    for power, letter in enumerate("kmgtp")
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_bytes(value: int | float | str, *, of: int | None = None, name: str = "size") -> int:
    """Return a number of bytes from ``4294967296``, ``"4GiB"``, ``"500MB"`` or ``"10%"``.

    ``KiB MiB GiB TiB PiB`` (and the bare letters ``K M G T P``) count in 1024, ``KB MB GB TB PB`` in 1000.

    Args:
        value: What to read; a number is bytes.
        of: Bytes that a percentage refers to; without it a percentage is refused.
        name: What the value is for, named in errors.

    Returns:
        Whole bytes, rounded down.

    Raises:
        ConfigError: The value cannot be read, is negative, or is a percentage of nothing known.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f'{name}: expected bytes such as 4294967296, "4GiB" or "500MB", got {value!r}')
    if isinstance(value, int | float):
        # The comparison is false for nan too.
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name}: must be a finite number of bytes, 0 or more, got {value!r}")
        return int(value)
    match = _SIZE.fullmatch(value)
    unit = match[2].lower() if match else ""
    if match is None or unit not in _FACTORS:
        raise ConfigError(f'{name}: cannot read {value!r}; write it like "4GiB", "500MB" or "10%"')
    text = match[1].replace("_", "").replace(",", "")
    if unit != "%":
        # Whole numbers stay integers: a float would round above 2**53.
        return int(text) * _FACTORS[unit] if text.isdigit() else int(float(text) * _FACTORS[unit])
    if of is None:
        raise ConfigError(f'{name}: a percentage has nothing to refer to here; write it like "4GiB"')
    if float(text) > 100:
        raise ConfigError(f"{name}: {value!r} is more than all there is; use at most 100%")
    return int(of * float(text) / 100)


_AGE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*")
_AGE_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_age(value: int | float | str, *, name: str = "") -> float:
    """Return the seconds of an age such as ``"30d"``, ``"12h"`` or ``"90m"``; a number is seconds.

    Args:
        value: What to read.
        name: What the value is for, named in errors.

    Raises:
        ConfigError: It cannot be read, or is negative.
    """
    if isinstance(value, str):
        match = _AGE.fullmatch(value.lower())
        if match is not None:
            return float(match[1]) * _AGE_SECONDS[match[2]]
    elif not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    where = f"{name}: " if name else ""
    raise ConfigError(f"{where}cannot read the age {value!r}; write it like 30d, 12h, 90m or 2w")


def format_bytes(n: int | float) -> str:
    """Return bytes in binary units: ``"512 B"``, ``"1.5 GiB"``."""
    sign, size = ("-" if n < 0 else ""), float(abs(n))
    # 1023.95 would print as "1024.0": the next unit starts a little below 1024.
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < (1023.5 if unit == "B" else 1023.95):
            return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= 1024
    return f"{sign}{size:.1f} PiB"


def format_seconds(seconds: float) -> str:
    """Return a duration: ``"850 µs"``, ``"12 ms"``, ``"0.21 s"``, ``"3 min 05 s"``, ``"2 h 10 min"``."""
    sign, s = ("-" if seconds < 0 else ""), abs(seconds)
    if s < 0.0009995:
        return f"{sign}{s * 1e6:.0f} µs" if s else "0 s"
    if s < 0.0995:
        return f"{sign}{s * 1e3:.1f} ms" if s < 0.00995 else f"{sign}{s * 1e3:.0f} ms"
    if s < 59.95:
        return f"{sign}{s:.2f} s" if s < 9.995 else f"{sign}{s:.1f} s"
    whole = round(s)
    if whole < 3600:
        return f"{sign}{whole // 60} min {whole % 60:02d} s"
    return f"{sign}{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(n: int) -> str:
    """Return a count with thousands separated: ``"4,129"``."""
    return f"{n:,}"
