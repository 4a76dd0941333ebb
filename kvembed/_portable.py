"""Portable files: the blocks of some texts in one file, to be taken along and imported elsewhere.

The file is an uncompressed tar archive of plain block files behind a manifest, root side first, so any ``tar`` lists
it. It is read by the few lines below and not by `tarfile`: nothing is ever extracted to a path, and the library would
follow links, names, sparse maps and extended headers of any size that an archive from elsewhere claims to have.
Every block is checked like one in a store: checksums of all bytes, token ids against its key.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed._block import Block, BlockInfo
from kvembed._blockfile import EncodedBlock, open_block_in
from kvembed._blockheader import SEALED_MAGIC
from kvembed._codec import MANIFEST_FILE, Codec
from kvembed._errors import BlockFormatError, ConfigError, ModelMismatchError, StoreFormatError, StoreKeyError
from kvembed._files import create_private, open_regular, random_access, shown, temp_path, unlink_quietly, write_all
from kvembed._keys import SNAPSHOT_IDS, block_key, snapshot_key
from kvembed._units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kvembed._files import RandomAccess
    from kvembed._store_admin import StoreAdmin

__all__ = ["ExportReport", "ImportReport", "export_blocks", "import_blocks", "refuse_other_models"]

FORMAT = 1
_MANIFEST = "kvembed.json"
_BLOCK = re.compile(r"([0-9a-f]{64})\.safetensors")
_RECORD = 512
_NOTHING = np.empty(0, np.uint8)
_MOST_MANIFEST = 2 << 20  # JSON made to be large in memory grows some 25 times when it is parsed


@dataclass(frozen=True)
class ExportReport:
    """What `KVStore.export` wrote.

    Args:
        path: The file.
        blocks: Blocks in it.
        n_tokens: Tokens of those.
        nbytes: Size of the file.
    """

    path: str
    blocks: int
    n_tokens: int
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line."""
        size = f"{format_count(self.n_tokens)} tokens, {format_bytes(self.nbytes)}"
        return f"{self.path}: {format_count(self.blocks)} blocks, {size}"


@dataclass(frozen=True)
class ImportReport:
    """What `KVStore.import_` took.

    Args:
        blocks: Blocks in the file.
        new: Those that were not here before.
        left_out: Those for which the budgets had no room.
        nbytes: Bytes of KV of the new ones.
        keys: Keys of all that are here now, root side first.
    """

    blocks: int
    new: int
    left_out: int
    nbytes: int
    keys: tuple[bytes, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {**asdict(self), "keys": [key.hex() for key in self.keys]}

    def __str__(self) -> str:
        """Return one line."""
        known = self.blocks - self.new - self.left_out
        parts = [f"{format_count(self.new)} new blocks, {format_bytes(self.nbytes)}"]
        parts += [f"{format_count(known)} were here already"] if known else []
        parts += [f"{format_count(self.left_out)} left out: no room in the budget"] if self.left_out else []
        return "; ".join(parts)


# ------------------------------------------------------------------------------------- writing


def export_blocks(
    store: StoreAdmin, path: str | os.PathLike[str], wanted: Sequence[tuple[bytes, int | None]], *, plain: bool = False
) -> ExportReport:
    """Write blocks to one file; see `KVStore.export`.

    Args:
        store: Where they are.
        path: The file; written beside it and renamed.
        wanted: Keys, each after its parent, and how many of a block's tokens to take (None for all).
        plain: Do not encrypt it, even if the store is.

    Raises:
        ConfigError: A block is not stored (any more), or cannot be read.
    """
    target = Path(path).expanduser().absolute()
    infos = [_block(store, key, cut, header_only=True).info for key, cut in wanted]
    spaces = store.namespaces()
    created = time.time()  # of the blocks too: when each was computed is nobody else's business
    manifest = {
        "format": FORMAT,
        "writer": _writer(),
        "created": created,
        "namespaces": {space.hex(): _fields(spaces.get(space, {})) for space in {info.namespace for info in infos}},
        "blocks": [info.key.hex() for info in infos],
    }
    codec = Codec() if plain or store._disk is None else store._disk.codec
    temp = temp_path(target)
    nbytes = 0
    try:
        fd = create_private(temp)
        try:
            text = json.dumps(manifest, indent=1, default=str).encode()
            nbytes += _write_member(fd, _MANIFEST, codec.encode([memoryview(text)], 0, len(text), MANIFEST_FILE))
            for key, cut in wanted:
                block = _block(store, key, cut)
                buffers = EncodedBlock(block, _writer(), created, codec).buffers()
                nbytes += _write_member(fd, f"{codec.key(block.key).hex()}.safetensors", buffers)
            end = bytes(2 * _RECORD)
            write_all(fd, [memoryview(end)])
            os.fsync(fd)
        finally:
            os.close(fd)
        temp.replace(target)
    except BaseException:
        unlink_quietly(temp)
        raise
    return ExportReport(str(target), len(wanted), sum(_tokens(info) for info in infos), nbytes + 2 * _RECORD)


def _fields(fields: Mapping[str, Any]) -> dict[str, str]:
    texts = {str(name): str(value) for name, value in fields.items()}
    return {shown(name): shown(text) for name, text in texts.items()}


def _tokens(info: BlockInfo) -> int:
    return 0 if info.key == snapshot_key(info.parent) else info.n_tokens


def _writer() -> str:
    from kvembed import __version__

    return f"kvembed {__version__}"


def _write_member(fd: int, name: str, buffers: Sequence[memoryview]) -> int:
    size = sum(view.nbytes for view in buffers)
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o600
    head = entry.tobuf(tarfile.USTAR_FORMAT)
    pad = bytes(-size % _RECORD)
    write_all(fd, [memoryview(head), *buffers, memoryview(pad)])
    return len(head) + size + len(pad)


def _block(store: StoreAdmin, key: bytes, cut: int | None, *, header_only: bool = False) -> Block:
    held = next((block for tier in store._memory if (block := tier.get(key)) is not None), None)
    if held is None and store._disk is not None:
        source = store._disk.open(key)
        if source is not None:
            try:
                info, ids = source.info, source.token_ids
                held = Block(info, ids, source.layout, _NOTHING) if header_only else source.read_all()
            except BlockFormatError as error:
                raise ConfigError(f"block {key.hex()[:12]} is damaged ({error}); nothing was exported") from error
            finally:
                source.close()
    if held is None:
        raise ConfigError(f"block {key.hex()[:12]} is not stored any more; nothing was exported")
    return held if cut is None or cut >= held.info.n_tokens else _cut(held, cut, header_only)


def _cut(block: Block, n: int, header_only: bool) -> Block:
    """Return the first tokens of a block: what came after them belongs to somebody's question."""
    info, ids = block.info, np.ascontiguousarray(block.token_ids[:n])
    data = block.data
    if not header_only:
        tensors = enumerate(block.layout.tensors)
        parts = [block.tensor(i)[:, : spec.rows(n)].reshape(-1) for i, spec in tensors]
        data = np.concatenate(parts)
    nbytes = block.layout.nbytes(n)
    cut = BlockInfo(block_key(info.parent, ids), info.parent, info.namespace, info.start, n, False, nbytes, info.codec)
    return Block(cut, ids, block.layout, data)


# ------------------------------------------------------------------------------------- reading


class _Section:
    """Part of an open file, read as if it were a file of its own."""

    def __init__(self, file: RandomAccess, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self._size = size

    def read(self, nbytes: int, offset: int) -> bytes:
        return self._file.read(max(0, min(nbytes, self._size - offset)), self._start + offset)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        if offset + sum(view.nbytes for view in buffers) > self._size:
            raise BlockFormatError("the file ends before its data does")
        self._file.read_into(buffers, self._start + offset)

    def close(self) -> None:
        """Do nothing: the whole file is closed by who opened it."""


def _members(file: RandomAccess, nbytes: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and size of every member of an archive.

    Raises:
        BlockFormatError: It has anything but plain files of sound names, or is cut off.
    """
    at = 0
    while True:
        head = file.read(_RECORD, at)
        if head == bytes(_RECORD):
            return
        try:
            entry = tarfile.TarInfo.frombuf(head, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeError, ValueError) as error:
            raise BlockFormatError(f"not an export of kvembed, or cut off ({error})") from error
        start = at + _RECORD
        if entry.type != tarfile.REGTYPE or not (entry.name == _MANIFEST or _BLOCK.fullmatch(entry.name)):
            raise BlockFormatError("it holds something other than blocks")
        if entry.size < 0 or start + entry.size > nbytes:
            raise BlockFormatError("it is cut off")
        yield entry.name, start, entry.size
        at = start + entry.size + -entry.size % _RECORD


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[RandomAccess, int]]:
    try:
        fd, nbytes = open_regular(path.resolve())
    except FileNotFoundError:
        raise ConfigError(f"no file {str(path)!r} to import") from None
    file = random_access(fd)
    try:
        yield file, nbytes
    finally:
        file.close()


def _manifest(
    file: RandomAccess, members: Iterator[tuple[str, int, int]], name: str, codec: Codec
) -> tuple[dict[bytes, Any], list[bytes], Codec]:
    """Return the namespaces and keys a file says it holds, and the codec of its members."""
    first, start, size = next(members, ("", 0, 0))
    if first != _MANIFEST or size > _MOST_MANIFEST:
        raise BlockFormatError("not an export of kvembed (no manifest)")
    section = _Section(file, start, size)
    if section.read(len(SEALED_MAGIC), 0) != SEALED_MAGIC:
        codec = Codec()
    elif not codec.encrypted:
        raise StoreKeyError(f"{name} is encrypted: give the key of the store that it was exported from")
    try:
        decoded = codec.decode(section, size, MANIFEST_FILE)
        text = decoded.file.read(decoded.nbytes, 0)
    except BlockFormatError as error:
        if not codec.encrypted:
            raise
        raise StoreKeyError(f"{name} is damaged, or encrypted with another key than this ({error})") from error
    try:
        fields = json.loads(text.decode("utf-8"))
        version = fields["format"]
        if version != FORMAT:
            raise StoreFormatError(f"{name} is an export of format {version!r}; this version of kvembed reads {FORMAT}")
        spaces = {bytes.fromhex(digest): dict(found) for digest, found in fields["namespaces"].items()}
        keys = [bytes.fromhex(key) for key in fields["blocks"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BlockFormatError(f"the manifest cannot be read ({type(error).__name__})") from error
    if not keys or any(len(digest) != 32 for digest in (*spaces, *keys)):
        raise BlockFormatError("the manifest names no blocks, or something else")
    texts = [text for found in spaces.values() for pair in found.items() for text in pair]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise BlockFormatError("the manifest describes a model in something other than text")
    return spaces, keys, codec


def import_blocks(
    store: StoreAdmin,
    path: str | os.PathLike[str],
    *,
    accept: Callable[[Mapping[bytes, Mapping[str, Any]]], None],
    root: bytes | None = None,
    codec: Codec | None = None,
) -> ImportReport:
    """Take the blocks of a file into a store; see `KVStore.import_`.

    Args:
        store: Where they go.
        path: The file.
        accept: Called with the namespaces of the file before any block is read; raises to refuse them.
        root: The root that the first blocks must follow; None for any.
        codec: Of an encrypted file; the store's when None.

    Raises:
        StoreKeyError: The file is encrypted, with another key.
        BlockFormatError: The file is damaged or no export; blocks before the damage are imported.
        StoreFormatError: It was written by another version.
    """
    source = Path(path).expanduser()
    known: list[bytes] = []
    new = left_out = nbytes = 0
    with _opened(source) as (file, size):
        try:
            members = _members(file, size)
            ours = store._disk.codec if store._disk is not None else Codec()
            spaces, keys, codec = _manifest(file, members, source.name, codec or ours)
            accept(spaces)
            wanted, seen, here = iter(keys), set[bytes](), set[bytes]()
            for name, start, length in members:
                key = next(wanted, b"")
                if name != f"{codec.key(key).hex()}.safetensors":
                    raise BlockFormatError("the blocks are not those of its manifest")
                block = _read(store, _Section(file, start, length), length, codec)
                _check(block, key, spaces, seen, root)
                seen.add(block.key)
                lost = block.info.parent in seen and block.info.parent not in here
                added = None if lost else _put(store, block)
                if added is None:
                    left_out += 1  # there was no room for it, or for what it follows
                    continue
                here.add(block.key)
                known.append(block.key)
                new += added
                nbytes += block.info.nbytes if added else 0
            if next(wanted, None) is not None:
                raise BlockFormatError("blocks of its manifest are missing")
        except BlockFormatError as error:
            raise BlockFormatError(f"{source.name} cannot be imported: {error}") from error
    return ImportReport(len(keys), new, left_out, nbytes, tuple(known))


def _read(store: StoreAdmin, section: _Section, nbytes: int, codec: Codec) -> Block:
    limit = (
        store._disk.largest_file if store._disk is not None else store._cpu.max_bytes if store._cpu is not None else 0
    )
    if nbytes > limit:
        raise BlockFormatError(f"a block of {format_bytes(nbytes)} is more than the whole store may take")
    source = open_block_in(section, nbytes, codec)
    return source.read_all()


def _check(block: Block, key: bytes, spaces: Mapping[bytes, Any], seen: set[bytes], root: bytes | None) -> None:
    info = block.info
    if info.key != key:
        raise BlockFormatError(f"{key.hex()[:12]} holds another block")
    if info.namespace not in spaces:
        raise BlockFormatError(f"{key.hex()[:12]} is of a model that the manifest does not name")
    if info.start == 0:
        if root is not None and info.parent != root:
            raise BlockFormatError("it was stored under another cache_salt")
    elif info.parent not in seen and not np.array_equal(block.token_ids, SNAPSHOT_IDS):
        raise BlockFormatError(f"{key.hex()[:12]} comes before what it follows")


def _put(store: StoreAdmin, block: Block) -> bool | None:
    """Store a block; return whether it is new, or None when there is no room for it."""
    disk, cpu = store._disk, store._cpu
    tier = disk if disk is not None else cpu
    if tier is None:
        return None
    before = tier.contains([block.key])[0]
    if before is not None and before.rank >= block.info.rank:
        tier.touch([block.key])
        return False
    if not tier.put(block):
        return None
    return before is None


def refuse_other_models(ours: Mapping[bytes, Mapping[str, Any]], theirs: Mapping[bytes, Mapping[str, Any]]) -> None:
    """Raise unless some model of ``theirs`` is one of ``ours``.

    Raises:
        ModelMismatchError: With the fields in which the nearest of ours differs.
    """
    if set(ours) & set(theirs):
        return
    best: dict[str, tuple[str, str]] | None = None
    for here in ours.values():
        for there in theirs.values():
            names = sorted((set(here) | set(there)) - {"name"})
            pairs = {name: (str(there.get(name, "?")), str(here.get(name, "?"))) for name in names}
            found = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
            if best is None or len(found) < len(best):
                best = found
    raise ModelMismatchError(best or {})
