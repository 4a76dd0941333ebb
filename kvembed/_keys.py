"""Names of blocks: a chain of BLAKE3-256 digests over the fingerprint, the salt and the token ids.

A block's key depends on everything before it, so equal keys mean equal prefixes. The chain starts from
the *root*, which is made from the model fingerprint and the caller's ``cache_salt``: the same text under
another model, dtype, adapter or salt has other keys. Python's ``hash()`` is never used: it differs
between processes, which cost peers every hit after a restart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import blake3
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "PROBE_TOKENS",
    "SNAPSHOT_IDS",
    "TokenIds",
    "as_token_ids",
    "block_key",
    "chain_keys",
    "common_prefix",
    "probe_of",
    "root_key",
    "snapshot_key",
]

TokenIds = np.ndarray  # one-dimensional, int32, C-contiguous

PROBE_TOKENS = 8
"""Tail blocks are found by their first 8 tokens; shorter tails are not stored."""


def as_token_ids(ids: Sequence[int] | np.ndarray) -> TokenIds:
    """Return ``ids`` as a contiguous one-dimensional little-endian int32 array."""
    return np.ascontiguousarray(ids, dtype="<i4").reshape(-1)


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Return how many leading tokens two id arrays share."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def root_key(fingerprint: bytes, salt: str = "") -> bytes:
    """Return the 32-byte parent of every first block under this fingerprint and salt."""
    return blake3.blake3(b"kvembed/root/1" + fingerprint + salt.encode("utf-8", "surrogatepass")).digest()


def block_key(parent: bytes, ids: TokenIds, media: bytes = b"") -> bytes:
    """Return the key of the block holding ``ids`` right after ``parent``.

    Args:
        parent: Key of the block before this one, or the root.
        ids: Token ids of the block, int32.
        media: Digest of media content inside the block, if any.
    """
    return blake3.blake3(parent + ids.tobytes() + media).digest()


def chain_keys(root: bytes, ids: TokenIds, block_size: int) -> list[bytes]:
    """Return the keys of all *full* blocks of ``ids``, first to last."""
    keys: list[bytes] = []
    key = root
    for start in range(0, len(ids) - block_size + 1, block_size):
        key = block_key(key, ids[start : start + block_size])
        keys.append(key)
    return keys


def probe_of(parent: bytes, ids: TokenIds) -> bytes:
    """Return 8 bytes that stand for ``parent`` and the first `PROBE_TOKENS` tokens after it.

    The catalog indexes children by this value, so that finding the tails worth comparing costs one
    indexed query however many children a block has, and no token id is written to the catalog.
    """
    return blake3.blake3(b"probe" + parent + ids[:PROBE_TOKENS].tobytes()).digest(length=8)


SNAPSHOT_IDS: TokenIds = as_token_ids([-1])
"""Stands where a block has its token ids in a snapshot of state; no token has a negative id."""


def snapshot_key(prefix_key: bytes) -> bytes:
    """Return the key of the snapshot of the state after the prefix named by ``prefix_key``, its only parent."""
    return block_key(prefix_key, SNAPSHOT_IDS)
