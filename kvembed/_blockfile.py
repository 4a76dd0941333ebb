"""Block files: written in one go, opened without trust, read straight into the rows of a cache.

Reading goes past `safetensors`: ``os.preadv`` into the strided rows of the destination is about twice as
fast as loading a tensor and copying it, and a single tensor can be read and checked without the others.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from kvembed._block import Block
from kvembed._blockheader import BlockHeader, build_header, parse_header, parse_length
from kvembed._codec import BLOCK_FILE, Codec
from kvembed._errors import BlockFormatError, ConfigError
from kvembed._files import disk_usage, open_regular, random_access, write_file
from kvembed._keys import block_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kvembed._block import BlockInfo, Layout
    from kvembed._codec import Decoded
    from kvembed._files import RandomAccess
    from kvembed._keys import TokenIds

__all__ = ["BlockFileSource", "EncodedBlock", "open_block", "open_block_in", "read_block", "read_header", "read_ids"]


class EncodedBlock:
    """A block ready to be written: its header is made, so its size on disk is known beforehand.

    Args:
        block: The block.
        writer: Name and version of the program that writes.
        created: Unix time to record; now when None.
        codec: The store's.
    """

    def __init__(self, block: Block, writer: str, created: float | None = None, codec: Codec | None = None) -> None:
        if block.info.nbytes != block.data.nbytes or len(block.token_ids) != block.info.n_tokens:
            raise ConfigError("the block's bytes or token ids do not fit its layout and token count")
        self.block = block
        self.created = time.time() if created is None else created
        self._header = build_header(block, self.created, writer)
        self._codec = codec or Codec()
        nbytes = len(self._header) + block.info.nbytes + 4 * block.info.n_tokens
        self.file_nbytes = self._codec.file_nbytes(nbytes, len(self._header), self._part)

    @property
    def disk_nbytes(self) -> int:
        """What the file takes on the disk, as `du` counts it."""
        return disk_usage(self.file_nbytes)

    @property
    def _part(self) -> int:
        """Bytes in which the KV is read: those of one head, or what divides the heads of all tensors."""
        n = self.block.info.n_tokens
        return math.gcd(*(spec.row_nbytes * spec.rows(n) for spec in self.block.layout.tensors))

    def buffers(self) -> Sequence[memoryview]:
        """Return the content of the file, piece by piece."""
        plain = (memoryview(self._header), self.block.data.data, self.block.token_ids.data.cast("B"))
        return self._codec.encode(plain, len(self._header), self._part, BLOCK_FILE)

    def write(self, path: Path, *, sync: bool = False) -> None:
        """Write the file; see `kvembed._files.write_file`."""
        write_file(path, self.buffers(), sync=sync)


_PART = 4 << 20  # bytes at a time where a file is only checked


def _checksum(buffers: Sequence[memoryview]) -> int:
    """Return the xxh3-64 of ``buffers`` taken as one run of bytes."""
    if len(buffers) == 1:
        return xxhash.xxh3_64_intdigest(buffers[0])
    state = xxhash.xxh3_64()
    for view in buffers:
        state.update(view)
    return state.intdigest()


def _read_header(decoded: Decoded) -> BlockHeader:
    file, size, head = decoded
    first = file.read(min(head, size), 0)
    length = parse_length(first, size)
    header = first[8 : 8 + length]
    if len(header) < length:
        header += file.read(length - len(header), 8 + len(header))
    if len(header) != length:
        raise BlockFormatError("the file ends inside its header")
    return parse_header(header, size)


def _read_ids(file: RandomAccess, header: BlockHeader) -> TokenIds:
    raw = file.read(4 * header.info.n_tokens, header.ids_start)
    if len(raw) != 4 * header.info.n_tokens or xxhash.xxh3_64_intdigest(raw) != header.ids_checksum:
        raise BlockFormatError("the token ids do not match their checksum")
    ids = np.frombuffer(raw, dtype="<i4")
    if block_key(header.info.parent, ids) != header.info.key:
        raise BlockFormatError("the key is not that of the token ids")
    return ids


class BlockFileSource:
    """A block file opened for reading: `kvembed._tiers._base.BlockSource` of the disk tier.

    Args:
        file: The open file; closed with the source.
        header: Its checked header.
        token_ids: Its checked token ids.
        file_nbytes: Size of the file.
    """

    tier = "disk"

    def __init__(self, file: RandomAccess, header: BlockHeader, token_ids: TokenIds, file_nbytes: int) -> None:
        self.info: BlockInfo = header.info
        self.layout: Layout = header.layout
        self.token_ids: TokenIds = token_ids
        self.created = header.created
        self.file_nbytes = file_nbytes
        self._file = file
        self._header = header

    def read_into(self, index: int, rows: Sequence[np.ndarray], skip: int = 0) -> None:
        """Read and check tensors; see `kvembed._tiers._base.BlockSource.read_into`."""
        total = self.info.n_tokens
        for number, target in enumerate(rows, start=index):
            spec = self.layout.tensors[number]
            heads, n, width = target.shape
            fits = 0 <= skip <= spec.rows(total) - n
            if heads != spec.heads or width != spec.row_nbytes or target.itemsize != 1 or not fits:
                raise ConfigError(f"rows {target.shape} do not fit tensor {number} of a block of {total} tokens")
        specs = self.layout.tensors[index : index + len(rows)]
        if all(target.shape[1] == spec.rows(total) for target, spec in zip(rows, specs, strict=True)):
            self._read(
                index,
                [[t.data.cast("B")] if t.flags.c_contiguous else [head.data.cast("B") for head in t] for t in rows],
            )
            return
        # The checksum is of the whole tensor, so a part costs a read of all of it, through a buffer.
        for target, whole in zip(rows, self.read(index, len(rows)), strict=True):
            target[:] = whole[:, skip : skip + target.shape[1]]

    def read(self, index: int, count: int) -> list[np.ndarray]:
        """Read and check tensors; see `kvembed._tiers._base.BlockSource.read`."""
        n = self.info.n_tokens
        begin, end = self.layout.offset(index, n), self.layout.offset(index + count, n)
        buffer = np.empty(end - begin, np.uint8)
        parts: list[np.ndarray] = []
        for number in range(index, index + count):
            spec, at = self.layout.tensors[number], self.layout.offset(number, n) - begin
            parts.append(buffer[at : at + spec.nbytes(n)].reshape(spec.heads, spec.rows(n), spec.row_nbytes))
        self._read(index, [[part.data.cast("B")] for part in parts])
        return parts

    def _read(self, index: int, tensors: Sequence[Sequence[memoryview]]) -> None:
        """Fill the buffers of consecutive tensors and check each tensor."""
        views = [view for tensor in tensors for view in tensor]
        try:
            self._file.read_into(views, self._header.data_start + self.layout.offset(index, self.info.n_tokens))
        except OSError as error:
            raise BlockFormatError(f"tensor {index} cannot be read: {error.strerror}") from error
        for number, tensor in enumerate(tensors, start=index):
            if _checksum(tensor) != self._header.checksums[number]:
                raise BlockFormatError(f"tensor {number} does not match its checksum")

    def read_all(self) -> Block:
        """Return the whole block in host memory, every tensor checked.

        Raises:
            BlockFormatError: Some bytes are not those that were stored.
        """
        data = np.empty(self.info.nbytes, np.uint8)
        view = data.data
        at = 0
        for index, spec in enumerate(self.layout.tensors):
            end = at + spec.nbytes(self.info.n_tokens)
            self._read(index, [[view[at:end].cast("B")]])
            at = end
        return Block(self.info, self.token_ids, self.layout, data)

    def check_all(self) -> None:
        """Read and check every tensor, keeping none: a file may be larger than the memory.

        Raises:
            BlockFormatError: Some bytes are not those that were stored.
        """
        buffer = memoryview(bytearray(min(_PART, max(1, self.info.nbytes))))
        at = self._header.data_start
        for number, spec in enumerate(self.layout.tensors):
            state, left = xxhash.xxh3_64(), spec.nbytes(self.info.n_tokens)
            while left:
                part = buffer[: min(left, len(buffer))]
                try:
                    self._file.read_into([part], at)
                except OSError as error:
                    raise BlockFormatError(f"tensor {number} cannot be read: {error.strerror}") from error
                state.update(part)
                at, left = at + len(part), left - len(part)
            if state.intdigest() != self._header.checksums[number]:
                raise BlockFormatError(f"tensor {number} does not match its checksum")

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()


@contextlib.contextmanager
def _opened(
    path: Path,
    codec: Codec | None,
    *,
    portable: bool = False,
    keep: bool = False,
    max_bytes: int | None = None,
) -> Iterator[tuple[RandomAccess, BlockHeader, int]]:
    fd, size = open_regular(path)
    file = random_access(fd, portable=portable)
    try:
        if max_bytes is not None and size > max_bytes:
            raise BlockFormatError(f"the file has {size:,} bytes, more than the whole store may take")
        decoded = (codec or Codec()).decode(file, size, BLOCK_FILE)
        yield decoded.file, _read_header(decoded), size
    except BaseException:
        file.close()
        raise
    else:
        if not keep:
            file.close()


def open_block(
    path: Path, codec: Codec | None = None, *, portable: bool = False, max_bytes: int | None = None
) -> BlockFileSource:
    """Open a block file; header and token ids are checked now, the KV as it is read.

    Args:
        path: The file.
        codec: The store's.
        portable: Use the reading path that works on every system.
        max_bytes: Refuse a larger file: it may be one big hole, and say in its header that it is right.

    Raises:
        FileNotFoundError: There is no such file.
        BlockFormatError: It must not be used; the message says why.
        OSError: It cannot be opened or read now.
    """
    with _opened(path, codec, portable=portable, keep=True, max_bytes=max_bytes) as (file, header, nbytes):
        return BlockFileSource(file, header, _read_ids(file, header), nbytes)


def open_block_in(file: RandomAccess, nbytes: int, codec: Codec | None = None) -> BlockFileSource:
    """Open a block whose file is a part of another one; raises `BlockFormatError` like `open_block`.

    Args:
        file: Reads that part; closed with the source.
        nbytes: Its size.
        codec: Of the file.
    """
    decoded = (codec or Codec()).decode(file, nbytes, BLOCK_FILE)
    header = _read_header(decoded)
    return BlockFileSource(decoded.file, header, _read_ids(decoded.file, header), nbytes)


def read_header(path: Path, codec: Codec | None = None) -> BlockHeader:
    """Return the checked header of a block file; raises like `open_block`."""
    with _opened(path, codec) as (_, header, _):
        return header


def read_ids(path: Path, codec: Codec | None = None, *, max_bytes: int | None = None) -> TokenIds:
    """Return the checked token ids of a block file; raises like `open_block`."""
    with _opened(path, codec, max_bytes=max_bytes) as (file, header, _):
        return _read_ids(file, header)


def read_block(path: Path, codec: Codec | None = None) -> Block:
    """Return a whole block, every byte checked; raises like `open_block`."""
    source = open_block(path, codec)
    try:
        return source.read_all()
    finally:
        source.close()
