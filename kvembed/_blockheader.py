"""The header of a block file: made here, and read back here without trusting it.

A block file is a plain safetensors file, so every tool that reads those can show it::

    8 bytes    length of the header, little-endian
    header     {"0000.k": {...}, "0000.v": {...}, ..., "token_ids": {...}, "__metadata__": {...}}, then spaces
    KV bytes   exactly ``Block.data``, starting on a multiple of 64
    token ids  int32; last, because safetensors allows no holes and the KV should be aligned

``__metadata__`` has two strings: ``kvembed``, a JSON object with identity and checksums, and
``kvembed_xxh3``, the checksum of that string. The tensor entries come *before* the metadata (safetensors
itself writes them after): all blocks of one shape share these bytes, so parsing them is remembered.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import xxhash

from kvembed._block import Block, BlockInfo, Layout, TensorSpec
from kvembed._codecs.names import LOSSLESS, fidelity
from kvembed._errors import BlockFormatError, EncryptedBlockError

__all__ = [
    "FORMAT_VERSION",
    "MAX_HEADER_BYTES",
    "SEALED_MAGIC",
    "BlockHeader",
    "build_header",
    "parse_header",
    "parse_length",
]

FORMAT_VERSION = 2
"""Version of the block file; a greater one is refused by name, and reading it is left to that version. A block that has
been through no codec is still written as version 1, byte for byte."""

MAX_HEADER_BYTES = 2 << 20
"""Room for more than 10,000 tensors. JSON made to be large in memory grows some 25 times when it is parsed."""
SEALED_MAGIC = b"KVEMSEAL"
"""What an encrypted file begins with; no header is that long."""
_MAX_TOKENS = 1 << 20
_ALIGN = 64
_NAME = re.compile(r"([0-9]{4,9})\.([A-Za-z0-9_]{1,64})")
_IDS = "token_ids"
_DECODED = frozenset({"F32", "F16", "BF16"})
_META_KEY = b'"__metadata__":'


@dataclass(frozen=True)
class BlockHeader:
    """What a block file says about itself, checked.

    Args:
        info: Identity of the block.
        layout: Its tensors.
        data_start: Byte offset of the KV in the file.
        checksums: xxh3-64 of every tensor, in layout order.
        ids_checksum: xxh3-64 of the token ids.
        created: Unix time of the block.
    """

    info: BlockInfo
    layout: Layout
    data_start: int
    checksums: tuple[int, ...]
    ids_checksum: int
    created: float

    @property
    def ids_start(self) -> int:
        """Byte offset of the token ids."""
        return self.data_start + self.info.nbytes

    @property
    def file_nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.ids_start + 4 * self.info.n_tokens


def _hex(data: Any) -> str:
    return xxhash.xxh3_64_hexdigest(data)


@lru_cache(maxsize=16)
def _tensor_section(layout: Layout, n: int) -> bytes:
    """Return the header's tensor entries, without braces, ending in a comma."""
    entries: list[str] = []
    at = 0
    for spec in layout.tensors:
        end = at + spec.nbytes(n)
        shape = f"[{spec.heads},{spec.rows(n)},{spec.width}]"
        entries.append(
            f'"{spec.layer:04d}.{spec.name}":{{"dtype":"{spec.dtype}","shape":{shape},"data_offsets":[{at},{end}]}}'
        )
        at = end
    entries.append(f'"{_IDS}":{{"dtype":"I32","shape":[{n}],"data_offsets":[{at},{at + 4 * n}]}}')
    return ",".join(entries).encode() + b","


def build_header(block: Block, created: float, writer: str) -> bytes:
    """Return the bytes of a block file before its KV, length field included.

    Args:
        block: The block to be written.
        created: Unix time to record.
        writer: Name and version of the program that writes.
    """
    info = block.info
    section = _tensor_section(block.layout, info.n_tokens)
    data = block.data.data
    checksums: list[str] = []
    at = 0
    for spec in block.layout.tensors:
        end = at + spec.nbytes(info.n_tokens)
        checksums.append(_hex(data[at:end]))
        at = end
    lossless = block.layout.dtype is None and info.codec == LOSSLESS
    identity = json.dumps(
        {
            "format": 1 if lossless else 2,
            "key": info.key.hex(),
            "parent": info.parent.hex(),
            "namespace": info.namespace.hex(),
            "start": info.start,
            "n_tokens": info.n_tokens,
            "exact": info.exact,
            "created": created,
            "writer": writer,
            "tensors": _hex(section),
            "checksums": checksums,
            "ids_checksum": _hex(block.token_ids.data),
            **({} if lossless else {"codec": info.codec, "dtype": block.layout.dtype}),
        },
        separators=(",", ":"),
    )
    meta = json.dumps({"kvembed": identity, "kvembed_xxh3": _hex(identity.encode())}, separators=(",", ":"))
    header = b"{" + section + _META_KEY + meta.encode() + b"}"
    header += b" " * (-(8 + len(header)) % _ALIGN)
    return len(header).to_bytes(8, "little") + header


def parse_length(prefix: bytes, file_nbytes: int) -> int:
    """Return the header's length from the first 8 bytes of a file of ``file_nbytes`` bytes.

    Raises:
        BlockFormatError: It cannot be: the file is too short, or not a safetensors file.
    """
    if len(prefix) < 8:
        raise BlockFormatError("too short for a block file")
    if prefix[:8] == SEALED_MAGIC:
        raise EncryptedBlockError("it is encrypted, and can only be read with the key of its store")
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_nbytes - 8):
        raise BlockFormatError("the header's length is impossible")
    return length


def parse_header(header: bytes, file_nbytes: int) -> BlockHeader:
    """Check a header and return what it says.

    Args:
        header: Its bytes, without the length field.
        file_nbytes: Size of the file it came from.

    Raises:
        BlockFormatError: Anything is not as `build_header` makes it, or the file has another size.
    """
    try:
        return _parse(header, file_nbytes)
    except BlockFormatError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise BlockFormatError(f"the header cannot be read ({type(error).__name__})") from error


def _parse(header: bytes, file_nbytes: int) -> BlockHeader:
    cut = header.find(_META_KEY)
    if cut < 0:
        raise BlockFormatError("not a kvembed block (no metadata)")
    meta = _object(b"{" + header[cut:])["__metadata__"]
    identity = meta["kvembed"]
    if set(meta) != {"kvembed", "kvembed_xxh3"} or meta["kvembed_xxh3"] != _hex(identity.encode()):
        raise BlockFormatError("the metadata does not match its checksum")
    fields = _object(identity.encode())
    version = fields["format"]
    if version not in (1, 2) or type(version) is not int:
        raise BlockFormatError(
            f"written in block format {version!r}; this version of kvembed reads up to {FORMAT_VERSION}"
        )
    section = header[1:cut]
    if header[:1] != b"{" or fields["tensors"] != _hex(section):
        raise BlockFormatError("the tensor list does not match its checksum")
    codec, dtype = (LOSSLESS, None) if version == 1 else (_codec(fields["codec"]), fields["dtype"])
    if dtype is not None and dtype not in _DECODED:
        raise BlockFormatError("the codec decodes to a type that no cache has")
    layout, n = _parse_section(section, dtype)
    checksums = tuple(_u64(text) for text in fields["checksums"])
    if n != _integer(fields["n_tokens"]) or len(checksums) != len(layout.tensors):
        raise BlockFormatError("the metadata does not fit the tensors")
    if codec != LOSSLESS and fields["exact"] is not False:
        raise BlockFormatError("a block that was in a lossy codec cannot be exact")
    if type(fields["exact"]) is not bool or type(fields["created"]) not in (int, float):
        raise BlockFormatError("a metadata field has the wrong type")
    info = BlockInfo(
        key=_digest(fields["key"]),
        parent=_digest(fields["parent"]),
        namespace=_digest(fields["namespace"]),
        start=_integer(fields["start"]),
        n_tokens=n,
        exact=fields["exact"],
        nbytes=layout.nbytes(n),
        codec=codec,
    )
    result = BlockHeader(
        info, layout, 8 + len(header), checksums, _u64(fields["ids_checksum"]), float(fields["created"])
    )
    if result.file_nbytes != file_nbytes:
        raise BlockFormatError(f"the file has {file_nbytes:,} bytes, not the {result.file_nbytes:,} its header says")
    return result


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BlockFormatError("the header names something twice")
    return result


def _object(text: bytes) -> dict[str, Any]:
    # Decoded here: json.loads(bytes) would also accept UTF-16 and UTF-32.
    value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    if type(value) is not dict:
        raise BlockFormatError("the header is not an object")
    return value


def _integer(value: Any, limit: int = 1 << 48) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise BlockFormatError("a number in the header is impossible")
    return value


def _digest(text: str) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != 32 or value.hex() != text:
        raise BlockFormatError("a key in the header is not 32 bytes")
    return value


def _codec(name: Any) -> str:
    if type(name) is not str or fidelity(name) < 0:
        raise BlockFormatError("it is in a codec that this version of kvembed does not know")
    return name


def _u64(text: str) -> int:
    if len(text) != 16:
        raise BlockFormatError("a checksum in the header is not 8 bytes")
    return int(text, 16)


# Remembered: one model makes blocks of one or two shapes, and reading 60 entries costs more than all the
# rest of the header. Sharing the Layout also makes comparing it with another block's a pointer comparison.
@lru_cache(maxsize=32)
def _parse_section(section: bytes, dtype: str | None) -> tuple[Layout, int]:
    entries = _object(b"{" + section.rstrip(b",") + b"}")
    ids = entries.pop(_IDS)
    (n,) = ids["shape"]
    if not 1 <= _integer(n) <= _MAX_TOKENS or not entries:
        raise BlockFormatError("a block of no tokens, or of too many")
    specs: list[TensorSpec] = []
    for name, entry in entries.items():
        match = _NAME.fullmatch(name)
        heads, rows, width = entry["shape"]
        if match is None or (dtype is None and "_scale_" in match[2]):
            raise BlockFormatError(f"{name!r} is not a tensor of a block")
        spec = TensorSpec(int(match[1]), match[2], _integer(heads), _integer(width), entry["dtype"])
        if rows != spec.rows(n):
            raise BlockFormatError(f"{name!r} is not a tensor of a block")
        specs.append(spec)
    layout = Layout(tuple(specs), dtype)
    if not layout.places:
        raise BlockFormatError("a block of no tensors")
    # The entries must be exactly those that a writer makes from this layout: no holes, no overlaps, no
    # other order. Comparing bytes says all of it at once.
    if _tensor_section(layout, n) != section:
        raise BlockFormatError("the tensors do not lie as a block's do")
    return layout, n
