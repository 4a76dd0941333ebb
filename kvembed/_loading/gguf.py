"""The metadata of a GGUF file, read with the standard library alone.

The `gguf` package reads it too, but takes seconds over a vocabulary of 262,144 tokens, of which nothing
is wanted here, and is an optional dependency that a wrong file must not be needed to find out.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kvembed._errors import ConfigError

if TYPE_CHECKING:
    import os

__all__ = ["read_gguf_metadata"]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_STRING = 1 << 24
_MAX_ITEMS = 1 << 24


def read_gguf_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the key-value pairs of a GGUF file; of arrays only the length.

    Args:
        path: The file.

    Returns:
        Keys such as ``"general.architecture"`` with numbers, booleans, strings, or array lengths.

    Raises:
        ConfigError: The file is not a GGUF file of version 2 or 3, or is cut short.
    """
    with Path(path).open("rb") as file:
        try:
            if file.read(4) != b"GGUF":
                raise ConfigError(f"{path} is not a GGUF file")
            version, _tensors, pairs = _unpack(file, "<IQQ")
            if version not in (2, 3):
                raise ConfigError(f"{path} is a GGUF file of version {version}; versions 2 and 3 can be read")
            if pairs > _MAX_ITEMS:
                raise struct.error
            return {_string(file): _value(file, _unpack(file, "<I")[0]) for _ in range(pairs)}
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise ConfigError(f"{path} is a damaged or incomplete GGUF file; download it again") from error


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    if length > _MAX_STRING:
        raise struct.error
    raw = file.read(length)
    if len(raw) != length:
        raise struct.error
    return raw.decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    item, count = _unpack(file, "<IQ")
    if count > _MAX_ITEMS:
        raise struct.error
    if item in _SCALARS:
        file.seek(count * struct.calcsize(_SCALARS[item]), 1)
    else:
        for _ in range(count):
            _value(file, item)
    return count
