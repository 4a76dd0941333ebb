"""The marker of an encrypted store: that it is one, and how to tell whether a key is the right one."""

from __future__ import annotations

import hmac
import itertools
import json
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvembed._blockheader import SEALED_MAGIC
from kvembed._codec import BLOCK_FILE, MARKER_NAME, Codec, marker_stamp
from kvembed._encryption.sealed import SealedCodec
from kvembed._encryption.sources import ENV, from_environment, resolve_key
from kvembed._errors import BlockFormatError, StoreFormatError, StoreKeyError
from kvembed._files import open_regular, random_access, read_small, unlink_quietly, write_file
from kvembed._rebuild import CATALOG_NAME, block_files, has_blocks, locked

if TYPE_CHECKING:
    from pathlib import Path

    from kvembed._encryption.sources import Key

__all__ = ["Marker", "codec_for", "read_marker"]

_FORMAT = 1
_LOOKED_AT = 20  # block files, when a marker is missing


@dataclass(frozen=True)
class Marker:
    """What ``encryption.json`` says.

    Args:
        salt: For the check.
        check: What the right key gives with that salt.
    """

    salt: bytes
    check: str


def read_marker(root: Path) -> Marker | None:
    """Return the marker of a store, or None when it is not encrypted.

    Raises:
        StoreFormatError: It is of another version, or damaged.
    """
    path = root / MARKER_NAME
    try:
        fields = json.loads(read_small(path, 1 << 16))
        version = fields["format"]
        marker = Marker(bytes.fromhex(fields["salt"]), str(fields["check"])) if version == _FORMAT else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, BlockFormatError) as error:
        raise StoreFormatError(
            f"{path} cannot be read ({type(error).__name__}); delete it and open the store with its key, which makes "
            "it again"
        ) from error
    if marker is None:
        raise StoreFormatError(f"{path} is of format {version!r}, this version of kvembed reads {_FORMAT}")
    return marker


def codec_for(root: Path, key: Key | None, *, read_only: bool) -> Codec:
    """Return the codec of a store's folder, which becomes an encrypted one if it is empty and a key is given.

    Args:
        root: The folder.
        key: As for `kvembed.KVStore`.
        read_only: Nothing may be written.

    Raises:
        StoreKeyError: The key is missing or wrong, or the store is there and not encrypted.
        ConfigError: The key is none, or cannot be got.
    """
    marker = read_marker(root)
    if marker is None:
        if key is None:
            return Codec()
        return _begin(root, resolve_key(key), read_only)
    master = from_environment() if key is None else resolve_key(key)
    if master is None:
        raise StoreKeyError(
            f'{root} is encrypted: pass key= to KVStore (32 bytes, a function, "env" or "keyring"), or set {ENV} to '
            "the key, or to `keyring`"
        )
    return _checked(root, marker, master)


def _checked(root: Path, marker: Marker, master: bytes) -> Codec:
    codec = SealedCodec(master, marker.salt, marker_stamp(root))
    if not hmac.compare_digest(codec.mark, marker.check):
        raise StoreKeyError(f"this is not the key of {root}; nothing was changed")
    return codec


def _begin(root: Path, master: bytes, read_only: bool) -> Codec:
    """Make a new or empty store an encrypted one, or put back the marker of one that has lost it."""
    salt = secrets.token_bytes(32)
    codec = SealedCodec(master, salt)
    if read_only:
        if not (root / CATALOG_NAME).is_file():
            return codec  # no store at all, which is said when it is opened
        raise StoreKeyError(f"{root} is not encrypted; open it without a key")
    with locked(root):
        marker = read_marker(root)
        if marker is not None:
            return _checked(root, marker, master)
        if has_blocks(root):
            _refuse_unless_lost(root, codec)
        else:
            _clear_away(root)
        text = json.dumps({"format": _FORMAT, "cipher": "AES-256-GCM", "salt": salt.hex(), "check": codec.mark})
        # Flushed whatever the durability is: without it the store would look like one that is not encrypted.
        write_file(root / MARKER_NAME, [memoryview(text.encode())], sync=True)
    codec.stamp = marker_stamp(root)
    return codec


def _refuse_unless_lost(root: Path, codec: Codec) -> None:
    """Raise unless the block files are encrypted ones that the key opens."""
    sealed = 0
    for entry in itertools.islice(block_files(root), _LOOKED_AT):
        with suppress(OSError, BlockFormatError):
            fd, size = open_regular(entry.path)
            file = random_access(fd)
            try:
                sealed += file.read(len(SEALED_MAGIC), 0) == SEALED_MAGIC
                codec.decode(file, size, BLOCK_FILE).file.read(8, 0)
                return
            finally:
                file.close()
    if sealed:
        raise StoreKeyError(f"this is not the key of {root}; nothing was changed")
    raise StoreKeyError(
        f"{root} holds blocks that are not encrypted, and a store has either: give another folder, or empty this one "
        "first (`kvembed rm --all`)"
    )


def _clear_away(root: Path) -> None:
    """Delete what a store without blocks still says in the clear: its catalog, models, and what is in quarantine."""
    for suffix in ("", "-wal", "-shm", ".damaged"):
        unlink_quietly(root / f"{CATALOG_NAME}{suffix}")
    for folder in ("namespaces", "quarantine"):
        for left in (root / folder).glob("*"):
            unlink_quietly(left)
