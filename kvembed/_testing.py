"""Blocks of random bytes, for tests and benchmarks of the store that need no model.

In the package, not beside the tests: tests that start other processes, and the benchmarks, import it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvembed._block import Block, BlockInfo, Layout, TensorSpec
from kvembed._keys import TokenIds, as_token_ids, block_key, root_key

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kvembed._store import KVStore

__all__ = [
    "FINGERPRINT",
    "SMALL_LAYOUT",
    "assert_reads",
    "block_path",
    "forget_memory",
    "keys_of",
    "put_all",
    "random_block",
    "random_chain",
]

FINGERPRINT = bytes(range(32))
"""Namespace of the blocks made here."""

SMALL_LAYOUT = Layout(tuple(TensorSpec(layer, name, 2, 8, "F32") for layer in range(2) for name in ("k", "v")))
"""Two layers, two heads: 256 bytes a token."""


def random_block(
    parent: bytes | None = None,
    ids: TokenIds | list[int] | range | None = None,
    *,
    start: int = 0,
    exact: bool = True,
    layout: Layout = SMALL_LAYOUT,
    seed: int = 0,
    salt: str = "",
) -> Block:
    """Return a block with random KV.

    Args:
        parent: Key of the block before it; the root when None.
        ids: Token ids; 16 random ones when None.
        start: Position of the first token.
        exact: Its mark.
        layout: Its tensors.
        seed: Chooses the bytes (and the ids, when none are given).
        salt: Chooses the root.
    """
    rng = np.random.default_rng(seed)
    tokens = as_token_ids(rng.integers(0, 50_000, 16) if ids is None else np.asarray(ids))
    parent = root_key(FINGERPRINT, salt) if parent is None else parent
    nbytes = layout.nbytes(len(tokens))
    info = BlockInfo(block_key(parent, tokens), parent, FINGERPRINT, start, len(tokens), exact, nbytes)
    return Block(info, tokens, layout, rng.integers(0, 256, nbytes, dtype=np.uint8))


def random_chain(
    length: int, *, seed: int = 0, salt: str = "", tokens: int = 16, layout: Layout = SMALL_LAYOUT
) -> list[Block]:
    """Return ``length`` blocks of ``tokens`` tokens, each following the one before."""
    rng = np.random.default_rng(seed)
    chain: list[Block] = []
    parent: bytes | None = None
    for number in range(length):
        ids = as_token_ids(rng.integers(0, 50_000, tokens))
        block = random_block(
            parent, ids, start=number * tokens, layout=layout, seed=seed * 1000 + number + 1, salt=salt
        )
        chain.append(block)
        parent = block.key
    return chain


def keys_of(blocks: Iterable[Block]) -> list[bytes]:
    """Return the keys of blocks."""
    return [block.key for block in blocks]


def put_all(store: KVStore, blocks: Iterable[Block]) -> None:
    """Put blocks one after the other."""
    for block in blocks:
        store.put(block)


def forget_memory(store: KVStore) -> None:
    """Write what waits, then empty the cpu tier, so that reads come from disk."""
    store.flush()
    if store._cpu is not None:
        store._cpu.clear()


def block_path(store: KVStore, block: Block) -> Path:
    """Return where the file of a block lies."""
    assert store._disk is not None
    return store._disk.path(block.key)


def assert_reads(store: KVStore, block: Block, tier: str) -> None:
    """Check that a block is read from ``tier``, every bit as it was put."""
    source = store.open(block.key)
    assert source is not None
    try:
        assert source.tier == tier
        assert source.info == block.info
        for index, spec in enumerate(source.layout.tensors):
            rows = np.zeros((spec.heads, block.info.n_tokens, spec.row_nbytes), np.uint8)
            source.read_into(index, [rows])
            assert np.array_equal(rows, block.tensor(index))
    finally:
        source.close()
