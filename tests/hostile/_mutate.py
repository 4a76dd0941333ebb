"""Changes a block file in the ways that disks, other programs and people do; every one from a seed."""

from __future__ import annotations

import json
import random
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MUTATIONS", "mutated", "mutated_sealed", "rewritten"]


def header_end(good: bytes) -> int:
    """Return where the KV of a good file begins, and somewhere in a file that is good no more."""
    return min(8 + int.from_bytes(good[:8], "little"), len(good) - 200)


def rewritten(
    good: bytes, change: Callable[[dict[str, Any], dict[str, Any]], object], *, checksums: bool = True
) -> bytes:
    """Return the file with ``change(header, identity)`` applied, its inner checksums made right again."""
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    identity = json.loads(header["__metadata__"]["kvembed"])
    change(header, identity)
    meta = header.pop("__metadata__")
    section = json.dumps(header, separators=(",", ":")).encode()[1:-1] + b","
    if checksums:
        identity["tensors"] = xxhash.xxh3_64_hexdigest(section)
        meta["kvembed"] = json.dumps(identity, separators=(",", ":"))
        meta["kvembed_xxh3"] = xxhash.xxh3_64_hexdigest(meta["kvembed"].encode())
    text = b"{" + section + b'"__metadata__":' + json.dumps(meta, separators=(",", ":")).encode() + b"}"
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + good[8 + length :]


def _flip_header(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(header_end(good))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _flip_data(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    data[rng.randrange(header_end(good), len(good))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _bytes(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    at, n = rng.randrange(len(data)), rng.randint(1, 200)
    data[at : at + n] = rng.randbytes(len(data[at : at + n]))
    return bytes(data)


def _cut(good: bytes, rng: random.Random) -> bytes:
    edges = [0, 1, 7, 8, 9, header_end(good), len(good) - 64, len(good) - 1, 4096]
    at = rng.choice(edges) + rng.choice([-1, 0, 0, 1]) if rng.random() < 0.5 else rng.randrange(len(good))
    return good[: max(0, min(at, len(good) - 1))]


def _longer(good: bytes, rng: random.Random) -> bytes:
    return good + rng.randbytes(rng.choice([1, 4, 64, 4096]))


def _length(good: bytes, rng: random.Random) -> bytes:
    right = int.from_bytes(good[:8], "little")
    wrong = rng.choice([0, 1, right - 1, right + 1, right + 64, 2 * right, 1 << 20, 1 << 31, (1 << 64) - 1, len(good)])
    return (wrong % (1 << 64)).to_bytes(8, "little") + good[8:]


def _holes(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    at = rng.randrange(0, len(data), 512)
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    return bytes(data)


def _nan(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    begin = header_end(good)
    at = begin + 4 * rng.randrange((len(good) - begin) // 4 - 16)
    data[at : at + 64] = np.full(16, np.nan, np.float32).tobytes()
    return bytes(data)


def _shifted(good: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(good))
    return good[:at] + rng.randbytes(rng.randint(1, 8)) + good[at:]


def _doubled(good: bytes, rng: random.Random) -> bytes:
    return good[: rng.randrange(len(good))] + good


_ODD: list[Any] = [
    None, True, -1, 0, 1, 2, 17, 1 << 31, 1 << 62, 1 << 70, 1.5, 1e300, "", "0", "ab", "ab" * 32, "/etc/passwd",
    "\ud83d\ude00", "x" * 5000, [], [[]], [0], [1, 2], [-1, 5], {}, {"a": 1}, [1 << 60, 16, 8], "F32", "F16", "BOOL",
]  # fmt: skip


def _entry(good: bytes, rng: random.Random) -> bytes:
    def change(header: dict[str, Any], _: dict[str, Any]) -> None:
        name = rng.choice([key for key in header if key != "__metadata__"])
        what = rng.randrange(7)
        if what == 0:
            header[name] = rng.choice(_ODD)
        elif what == 1:
            header[rng.choice(["../../x", "0000.k ", "9999999999.k", "a", "0000.\x00", "0000.k\n"])] = header.pop(name)
        elif what == 2:
            header.pop(name)
        elif what == 3:
            # Overlapping or out of order.
            header[name]["data_offsets"] = rng.choice(
                [v["data_offsets"] for k, v in header.items() if k[0] != "_"][::-1]
            )
            header[name]["data_offsets"] = [header[name]["data_offsets"][0], header[name]["data_offsets"][1] + 4]
        else:
            field = rng.choice(["dtype", "shape", "data_offsets", "extra"])
            header[name][field] = rng.choice(_ODD)

    return rewritten(good, change)


def _identity(good: bytes, rng: random.Random) -> bytes:
    def change(_: dict[str, Any], identity: dict[str, Any]) -> None:
        field = rng.choice(sorted(identity.keys() - {"writer", "created", "exact", "namespace", "start"}))
        before = identity[field]
        while identity[field] == before and type(identity[field]) is type(before):
            identity[field] = rng.choice(_ODD)

    return rewritten(good, change)


def _version(good: bytes, rng: random.Random) -> bytes:
    return rewritten(good, lambda h, i: i.update(format=rng.choice([0, 2, 3, 99, 1 << 40, "1", None])))


def _checksum(good: bytes, rng: random.Random) -> bytes:
    def change(_: dict[str, Any], identity: dict[str, Any]) -> None:
        at = rng.randrange(len(identity["checksums"]))
        identity["checksums"][at] = rng.choice(["0" * 16, "f" * 16, "", "-" + "0" * 15, 0, None, "0x" + "0" * 14])

    return rewritten(good, change)


def _bomb(good: bytes, rng: random.Random) -> bytes:
    piece = rng.choice([b"[" * 30_000, b'{"a":' * 30_000, b"[]," * 100_000, b"9" * 20_000, b'"\\u0000' * 5000])
    header = rng.choice([b'{"__metadata__":', b'{"a":', b""]) + piece
    return len(header).to_bytes(8, "little") + header + good[-rng.randint(1, 500) :]


def _noise(good: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 8, 100, 5000, 20_000]))


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped bits in the header": _flip_header,
    "a flipped bit in the data": _flip_data,
    "other bytes": _bytes,
    "cut": _cut,
    "longer": _longer,
    "another header length": _length,
    "a hole": _holes,
    "NaN": _nan,
    "shifted": _shifted,
    "doubled": _doubled,
    "a tensor entry, checksums right": _entry,
    "an identity field, checksums right": _identity,
    "another version, checksums right": _version,
    "a checksum": _checksum,
    "a JSON bomb": _bomb,
    "noise": _noise,
}


def mutated(good: bytes, others: list[bytes], seed: int) -> tuple[str, bytes]:
    """Return what was done and the file; ``others`` are sound files that belong elsewhere."""
    rng = random.Random(seed)
    name = rng.choice([*MUTATIONS, "a sound file of another block", "two changes"])
    if name == "two changes":
        first, second = rng.sample(["other bytes", "cut", "a hole", "flipped bits in the header", "longer"], 2)
        return f"{first}, {second}", MUTATIONS[second](MUTATIONS[first](good, rng) + b"x" * 8400, rng)
    if name not in MUTATIONS:
        return name, rng.choice(others)
    return name, MUTATIONS[name](good, rng)


# ------------------------------------------------------------------------------------- encrypted files

_PREFIX = struct.Struct("<8sIIIIQ32s")
_FIELDS = ("magic", "version", "part size", "head size", "zero", "content size", "salt")
_GENERAL = (
    "other bytes",
    "cut",
    "longer",
    "another header length",
    "a hole",
    "shifted",
    "doubled",
    "a JSON bomb",
    "noise",
)


def sealed_regions(good: bytes) -> dict[str, tuple[int, int]]:
    """Return where what lies in a good encrypted file: fields, and each part's content and tag."""
    regions: dict[str, tuple[int, int]] = {}
    at = 0
    for name, nbytes in zip(_FIELDS, (8, 4, 4, 4, 4, 8, 32), strict=True):
        regions[name] = (at, at + nbytes)
        at += nbytes
    _, _, part, head, _, content, _ = _PREFIX.unpack(good[: _PREFIX.size])
    sizes = [head, *[part] * ((content - head) // part), (content - head) % part]
    for number, nbytes in enumerate(size for size in sizes if size):
        regions[f"part {number}"] = (at, at + nbytes)
        regions[f"tag {number}"] = (at + nbytes, at + nbytes + 16)
        at += nbytes + 16
    assert at == len(good)
    return regions


def _sealed_field(good: bytes, rng: random.Random) -> bytes:
    fields = list(_PREFIX.unpack(good[: _PREFIX.size]))
    at = rng.randrange(1, 6)
    before = fields[at]
    while fields[at] == before:
        fields[at] = rng.choice([0, 1, 16, before - 1, before + 1, before ^ 64, before * 2, (1 << 32) - 1]) % (1 << 32)
    return _PREFIX.pack(*fields) + good[_PREFIX.size :]


def _swapped_parts(good: bytes, rng: random.Random) -> bytes:
    parts = [span for name, span in sealed_regions(good).items() if name.startswith("part")]
    (a, b), (c, d) = rng.sample(parts, 2)
    n = min(b - a, d - c)
    data = bytearray(good)
    data[a : a + n], data[c : c + n] = good[c : c + n], good[a : a + n]
    return bytes(data)


def mutated_sealed(good: bytes, others: list[bytes], seed: int) -> tuple[str, bytes]:
    """Return what was done to an encrypted file, and the file."""
    rng = random.Random(seed)
    regions = sealed_regions(good)
    kind = rng.choice(["region", "region", "field", "swapped parts", "another's", "general", "general"])
    if kind == "field":
        return "a field of the prefix", _sealed_field(good, rng)
    if kind == "swapped parts":
        return kind, _swapped_parts(good, rng)
    if kind == "another's":
        other, cut = rng.choice(others), rng.choice([0, _PREFIX.size, len(good) // 2])
        return "an encrypted file of another block, or half of it", (good[:cut] + other[cut:]) if cut else other
    if kind == "general":
        name = rng.choice(_GENERAL)
        return name, MUTATIONS[name](good, rng)
    # Every region in turn.
    name, (begin, end) = list(regions.items())[seed % len(regions)]
    data = bytearray(good)
    data[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return f"a flipped bit in: {name}", bytes(data)
