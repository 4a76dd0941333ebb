"""`Codec`: how a store's files and names look on disk; this one leaves them as they are.

`kvembed._encryption` has the other one. Catalog, disk tier and everything that looks into the folder ask the store's
codec, so that nothing else knows whether a store is encrypted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvembed._errors import BlockFormatError
from kvembed._files import open_regular, random_access

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from kvembed._files import RandomAccess

__all__ = [
    "BLOCK_FILE",
    "MANIFEST_FILE",
    "MARKER_NAME",
    "NAMESPACE_FILE",
    "Codec",
    "Decoded",
    "marker_stamp",
    "read_decoded",
]

MARKER_NAME = "encryption.json"
"""A file of this name in its folder says that a store is encrypted."""

BLOCK_FILE = b"block"
"""What `Codec.encode` is told of a block file."""
MANIFEST_FILE = b"manifest"
"""What it is told of the manifest of a portable file."""
NAMESPACE_FILE = b"namespace"
"""What it is told of the fields of a fingerprint, with the fingerprint."""

_FIRST_READ = 16 << 10  # the header of a 30-layer model is 7 KB: one read gets it whole


def marker_stamp(root: Path) -> tuple[int, ...] | None:
    """Return what changes when a store's marker does; None when there is none."""
    try:
        info = (root / MARKER_NAME).stat()
    except FileNotFoundError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


class Decoded(NamedTuple):
    """A file as if it were not encrypted.

    Args:
        file: Reads it.
        nbytes: Its size.
        head: How many of its first bytes are best read at once.
    """

    file: RandomAccess
    nbytes: int
    head: int


class Codec:
    """Leaves everything as it is.

    Args:
        stamp: `marker_stamp` of the folder when it was opened.
    """

    encrypted = False
    mark = ""
    """What the catalog says of its key: nothing, or something that only this key gives."""

    def __init__(self, stamp: tuple[int, ...] | None = None) -> None:
        self.stamp = stamp

    # -- names in file names and in the catalog ------------------------------------------------------

    def key(self, key: bytes) -> bytes:
        """Return what stands for a key of 32 bytes (of a block, or a fingerprint), 32 bytes too."""
        return key

    def keys(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return what stands for each of ``keys``."""
        return list(keys)

    def original(self, written: bytes) -> bytes:
        """Return the key for which ``written`` stands."""
        return written

    def originals(self, written: list[bytes]) -> list[bytes]:
        """Return the keys for which ``written`` stand."""
        return written

    def probe(self, probe: bytes) -> bytes:
        """Return what stands for a probe of 8 bytes; there is no way back."""
        return probe

    def text(self, text: str, *about: bytes) -> str | bytes:
        """Return what stands for a text; the same for the same text ``about`` the same."""
        return text

    def original_text(self, written: str | bytes, *about: bytes) -> str:
        """Return the text for which ``written`` stands.

        Raises:
            BlockFormatError: It stands for none.
        """
        if isinstance(written, bytes):
            raise BlockFormatError("an entry of the catalog is not text")
        return written

    # -- files ---------------------------------------------------------------------------------------

    def file_nbytes(self, nbytes: int, head: int, part: int) -> int:
        """Return the size on disk of a file of ``nbytes`` bytes; see `encode`."""
        return nbytes

    def encode(self, buffers: Sequence[memoryview], head: int, part: int, about: bytes) -> Sequence[memoryview]:
        """Return a file's content as it is to be written.

        Args:
            buffers: Its content.
            head: Length of what is read by itself, at the beginning.
            part: What comes after is read in multiples of so many bytes, mostly.
            about: What file this is; reading it asks for the same.
        """
        return buffers

    def decode(self, file: RandomAccess, nbytes: int, about: bytes) -> Decoded:
        """Return what reads the content of a file as it was before `encode`.

        Args:
            file: The open file.
            nbytes: Its size.
            about: As for `encode`.

        Raises:
            BlockFormatError: It is not one that `encode` made, with this key.
        """
        return Decoded(file, nbytes, _FIRST_READ)


def read_decoded(path: Path, codec: Codec, about: bytes, limit: int = 1 << 20) -> bytes:
    """Return the content of a small file; raises like `kvembed._files.open_regular`, and when it is no such file."""
    fd, size = open_regular(path)
    file = random_access(fd)
    try:
        if size > limit:
            raise BlockFormatError(f"larger than {limit:,} bytes")
        decoded = codec.decode(file, size, about)
        return decoded.file.read(decoded.nbytes, 0)
    finally:
        file.close()
