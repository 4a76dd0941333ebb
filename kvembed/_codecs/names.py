"""What the codecs are called, and which is the more faithful; nothing here needs torch.

A store reads blocks that are stored at least as faithfully as its own codec stores them. So a lossless store never
reads a lossy block, and two processes that open one folder with different codecs end at the better one.
"""

from __future__ import annotations

from kvembed._errors import ConfigError

__all__ = ["CODECS", "LOSSLESS", "changed_dtypes", "check_codec", "fidelity", "worst"]

LOSSLESS = "lossless"

CODECS = ("fp8", "int8", "k16v8", "bf16", LOSSLESS)
"""All codecs, the least faithful first."""

_RANKS = {name: rank for rank, name in enumerate(CODECS)}
_CHANGED = {
    LOSSLESS: frozenset[str](),
    "bf16": frozenset({"F32"}),
    "k16v8": frozenset({"F32", "BF16", "F16"}),
    "int8": frozenset({"F32", "BF16", "F16"}),
    "fp8": frozenset({"F32", "BF16", "F16"}),
}


def fidelity(codec: str) -> int:
    """Return the rank of a codec, larger is more faithful; -1 for one that this version does not know."""
    return _RANKS.get(codec, -1)


def worst(*codecs: str) -> str:
    """Return the least faithful of some codecs."""
    return min(codecs, key=fidelity)


def changed_dtypes(codec: str) -> frozenset[str]:
    """Return the element types (safetensors names) that a codec stores otherwise; the others it leaves as they are."""
    return _CHANGED[codec]


def check_codec(codec: str) -> str:
    """Return ``codec`` when there is one of that name.

    Raises:
        ConfigError: There is none.
    """
    if codec not in _RANKS:
        names = ", ".join(f'"{name}"' for name in reversed(CODECS))
        raise ConfigError(f"codec must be one of {names}, got {codec!r}")
    return codec
