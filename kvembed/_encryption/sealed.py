"""`SealedCodec`: files under AES-256-GCM in parts that are read by themselves, names under keys of their own.

::

    64 bytes   "KVEMSEAL", version, part size, head size, 0, content size, salt: little-endian
    head       encrypted by itself, with its tag of 16 bytes
    parts      each encrypted by itself, with its tag; the last may be shorter

Every file has a key of its own, made from the store's and its random salt; the nonce is the number of the part, and
whether it is the last. So no nonce comes twice under one key, however many files are written, and a part is good in one
place of one file only. The first 64 bytes go into every tag.
"""

from __future__ import annotations

import secrets
import struct
import threading
from typing import TYPE_CHECKING, Any

import blake3

from kvembed._blockheader import MAX_HEADER_BYTES, SEALED_MAGIC
from kvembed._codec import Codec, Decoded
from kvembed._errors import BlockFormatError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvembed._files import RandomAccess

__all__ = ["SEALED_VERSION", "SealedCodec"]

SEALED_VERSION = 1
_PREFIX = struct.Struct("<8sIIIIQ32s")
_TAG = 16
_LEAST_PART, _MOST_PART = 1 << 10, 16 << 20
_USUAL_PART = 64 << 10
_GROUP = 256 << 10  # bytes read at once: more would not stay in the processor's cache until they are decrypted


def _need_library() -> None:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise ConfigError("encryption needs a package that is missing: pip install 'kvembed[encryption]'") from None
    if not hasattr(AESGCM, "decrypt_into"):
        raise ConfigError("encryption needs cryptography 47 or later: pip install 'kvembed[encryption]'")


def _derive(key: bytes, salt: bytes | None, info: bytes, nbytes: int = 32) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), nbytes, salt, info).derive(key)


class _Shape:
    """Where the parts of one file lie."""

    def __init__(self, nbytes: int, head: int, part: int) -> None:
        self.nbytes, self.head, self.part = nbytes, head, part
        self.rest = -(-(nbytes - head) // part)  # parts after the head
        self.count = self.rest + (head > 0)
        self.file_nbytes = _PREFIX.size + nbytes + self.count * _TAG

    def number_at(self, offset: int) -> int:
        """Return the number of the part that holds a byte of the content."""
        return 0 if offset < self.head else (offset - self.head) // self.part + (self.head > 0)

    def span(self, number: int) -> tuple[int, int]:
        """Return where a part's content begins and ends."""
        if self.head:
            if number == 0:
                return 0, self.head
            number -= 1
        start = self.head + number * self.part
        return start, min(start + self.part, self.nbytes)

    def place(self, number: int) -> int:
        """Return where in the file a part begins."""
        return _PREFIX.size + self.span(number)[0] + number * _TAG

    def nonce(self, number: int) -> bytes:
        """Return the nonce of a part."""
        return number.to_bytes(11, "big") + bytes([number == self.count - 1])


class _Scratch(threading.local):
    """Buffers of one thread, kept from file to file."""

    def __init__(self) -> None:
        self.sealed = bytearray(_GROUP + 16 * _TAG)
        self.plain = bytearray(_USUAL_PART)

    def get(self, sealed: int, plain: int) -> tuple[memoryview, memoryview]:
        if len(self.sealed) < sealed:
            self.sealed = bytearray(sealed)
        if len(self.plain) < plain:
            self.plain = bytearray(plain)
        return memoryview(self.sealed)[:sealed], memoryview(self.plain)[:plain]


class _Run:
    """Buffers taken as one run of bytes, gone through once."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = buffers
        self._number = self._at = 0

    def whole(self, nbytes: int) -> memoryview | None:
        """Return the next ``nbytes`` bytes if they lie in one buffer; else None, and stay."""
        self._skip()
        here = self._buffers[self._number]
        if len(here) - self._at < nbytes:
            return None
        self._at += nbytes
        return here[self._at - nbytes : self._at]

    def fill(self, data: memoryview) -> None:
        """Fill the next bytes from ``data``."""
        while data:
            self._skip()
            here = self._buffers[self._number][self._at : self._at + len(data)]
            here[:] = data[: len(here)]
            self._at += len(here)
            data = data[len(here) :]

    def gather(self, nbytes: int) -> bytes:
        """Return a copy of the next ``nbytes`` bytes."""
        parts: list[memoryview] = []
        while nbytes:
            self._skip()
            parts.append(self._buffers[self._number][self._at : self._at + nbytes])
            self._at += len(parts[-1])
            nbytes -= len(parts[-1])
        return b"".join(parts)

    def _skip(self) -> None:
        while self._at == len(self._buffers[self._number]):
            self._number, self._at = self._number + 1, 0


class _SealedFile:
    """`kvembed._files.RandomAccess` to the content of an encrypted file.

    As with checksums, what was read may be wrong where it raises: tags are checked after decrypting.
    """

    def __init__(self, file: RandomAccess, shape: _Shape, cipher: Any, about: bytes, scratch: _Scratch) -> None:
        self._file, self._shape, self._cipher, self._about, self._scratch = file, shape, cipher, about, scratch

    def read(self, nbytes: int, offset: int) -> bytes:
        nbytes = max(0, min(nbytes, self._shape.nbytes - offset))
        result = bytearray(nbytes)
        if nbytes:
            self.read_into([memoryview(result)], offset)
        return bytes(result)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        shape, end = self._shape, offset + sum(len(view) for view in buffers)
        if end > shape.nbytes:
            raise BlockFormatError("the file ends before its data does")
        targets, at = _Run(buffers), offset
        while at < end:
            first = last = shape.number_at(at)
            begin = shape.place(first)
            stop = shape.span(last)[1]
            while stop < end and shape.place(last + 1) + shape.part + _TAG - begin <= _GROUP:
                last += 1
                stop = shape.span(last)[1]
            nbytes = shape.span(last)[1] + (last + 1) * _TAG + _PREFIX.size - begin
            sealed, plain = self._scratch.get(nbytes, max(shape.head if first == 0 else 0, shape.part))
            self._file.read_into([sealed], begin)
            for number in range(first, last + 1):
                at = self._open_part(number, at, end, sealed[shape.place(number) - begin :], plain, targets)

    def _open_part(self, number: int, at: int, end: int, sealed: memoryview, plain: memoryview, targets: _Run) -> int:
        """Decrypt one part into what is wanted of it, from ``at`` on; return where that ends."""
        start, stop = self._shape.span(number)
        upto = min(stop, end)
        target = targets.whole(stop - start) if (at, upto) == (start, stop) else None
        into = plain[: stop - start] if target is None else target
        self._decrypt(number, sealed[: stop - start + _TAG], into)
        if target is None:
            targets.fill(into[at - start : upto - start])
        return upto

    def _decrypt(self, number: int, sealed: memoryview, into: memoryview) -> None:
        from cryptography.exceptions import InvalidTag

        try:
            self._cipher.decrypt_into(self._shape.nonce(number), sealed, self._about, into)
        except InvalidTag:
            raise BlockFormatError(f"part {number} does not decrypt: it is damaged, or of another key") from None

    def close(self) -> None:
        self._file.close()


class SealedCodec(Codec):
    """Encrypts the files and names of a store.

    Args:
        master: The store's key, 32 bytes; not kept.
        salt: The store's salt, for `mark`.
        stamp: As for `Codec`.

    Raises:
        ConfigError: The package that encrypts is missing.
    """

    encrypted = True

    def __init__(self, master: bytes, salt: bytes, stamp: tuple[int, ...] | None = None) -> None:
        _need_library()
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV

        super().__init__(stamp)
        self.mark = _derive(master, salt, b"kvembed/check/1").hex()
        self._files = _derive(master, None, b"kvembed/files/1")
        self._probes = _derive(master, None, b"kvembed/probes/1")
        self._texts = AESSIV(_derive(master, None, b"kvembed/texts/1", 64))
        # Single blocks: what is encrypted are digests, two halves of 16 bytes that never come twice unless the whole
        # does. That is a permutation nobody without the key can compute, and the one with the key can turn round.
        self._names = Cipher(algorithms.AES(_derive(master, None, b"kvembed/names/1")), modes.ECB())
        self._scratch = _Scratch()

    # -- names ---------------------------------------------------------------------------------------

    def key(self, key: bytes) -> bytes:
        """See `Codec.key`."""
        return self._names.encryptor().update(key)

    def keys(self, keys: Iterable[bytes]) -> list[bytes]:
        """See `Codec.keys`."""
        packed = self._names.encryptor().update(b"".join(keys))
        return [packed[at : at + 32] for at in range(0, len(packed), 32)]

    def original(self, written: bytes) -> bytes:
        """See `Codec.original`."""
        if type(written) is not bytes:
            return bytes(32)  # a catalog may hold anything
        return self._names.decryptor().update(written)

    def originals(self, written: list[bytes]) -> list[bytes]:
        """See `Codec.originals`."""
        if any(type(name) is not bytes or len(name) != 32 for name in written):
            return [self.original(name) for name in written]
        packed = self._names.decryptor().update(b"".join(written))
        return [packed[at : at + 32] for at in range(0, len(packed), 32)]

    def probe(self, probe: bytes) -> bytes:
        """See `Codec.probe`."""
        # Not HMAC: the OpenSSL behind Python's takes locks that a forked child may find taken for ever.
        return blake3.blake3(probe, key=self._probes).digest(length=len(probe))

    def text(self, text: str, *about: bytes) -> bytes:
        """See `Codec.text`."""
        # With a byte more: nothing at all cannot be encrypted.
        return self._texts.encrypt(text.encode("utf-8", "surrogatepass") + b"\0", [b"text", *about])

    def original_text(self, written: str | bytes, *about: bytes) -> str:
        """See `Codec.original_text`."""
        from cryptography.exceptions import InvalidTag

        try:
            if isinstance(written, str):
                raise BlockFormatError("an entry of the catalog is not encrypted")
            return self._texts.decrypt(written, [b"text", *about])[:-1].decode("utf-8", "surrogatepass")
        except (InvalidTag, ValueError):
            raise BlockFormatError("an entry of the catalog does not decrypt") from None

    # -- files ---------------------------------------------------------------------------------------

    def _cipher(self, prefix: bytes, salt: bytes, about: bytes) -> tuple[Any, bytes]:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(_derive(self._files, salt, b"kvembed/file/1")), prefix + about

    def file_nbytes(self, nbytes: int, head: int, part: int) -> int:
        """See `Codec.file_nbytes`."""
        return _Shape(nbytes, head, _part_size(part)).file_nbytes

    def encode(self, buffers: Sequence[memoryview], head: int, part: int, about: bytes) -> Sequence[memoryview]:
        """See `Codec.encode`."""
        shape = _Shape(sum(view.nbytes for view in buffers), head, _part_size(part))
        salt = secrets.token_bytes(32)
        prefix = _PREFIX.pack(SEALED_MAGIC, SEALED_VERSION, shape.part, head, 0, shape.nbytes, salt)
        cipher, about = self._cipher(prefix, salt, about)
        result = memoryview(bytearray(shape.file_nbytes))
        result[: len(prefix)] = prefix
        source = _Run([view.cast("B") for view in buffers])
        for number in range(shape.count):
            start, stop = shape.span(number)
            plain = source.whole(stop - start) or source.gather(stop - start)
            at = shape.place(number)
            cipher.encrypt_into(shape.nonce(number), plain, about, result[at : at + stop - start + _TAG])
        return [result]

    def decode(self, file: RandomAccess, nbytes: int, about: bytes) -> Decoded:
        """See `Codec.decode`."""
        prefix = file.read(_PREFIX.size, 0)
        if prefix[:8] != SEALED_MAGIC or len(prefix) < _PREFIX.size:
            raise BlockFormatError("it is not encrypted, which files of this store are")
        _, version, part, head, zero, content, salt = _PREFIX.unpack(prefix)
        if version != SEALED_VERSION:
            raise BlockFormatError(f"encrypted in format {version}; this version of kvembed reads {SEALED_VERSION}")
        if not (
            _LEAST_PART <= part <= _MOST_PART and head <= min(content, MAX_HEADER_BYTES + 8) and content and not zero
        ):
            raise BlockFormatError("the sizes of its encrypted parts are impossible")
        shape = _Shape(content, head, part)
        if shape.file_nbytes != nbytes:
            raise BlockFormatError(f"the file has {nbytes:,} bytes, not the {shape.file_nbytes:,} its parts take")
        cipher, about = self._cipher(prefix, salt, about)
        return Decoded(_SealedFile(file, shape, cipher, about, self._scratch), content, head or content)


def _part_size(part: int) -> int:
    """Return the size of parts for content that is read in multiples of ``part`` bytes."""
    if part < _USUAL_PART // 4:
        return _USUAL_PART
    return min(part, 1 << 20)
