"""The contract every tier keeps. ``tests/tiers/test_conformance.py`` holds each of them to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

    from kvembed._block import Block, BlockInfo, Layout
    from kvembed._keys import TokenIds

__all__ = ["BlockSource", "Tier"]


class BlockSource(Protocol):
    """A block opened for reading. It stays readable even when its tier evicts it meanwhile.

    Sources are used by one restore at a time, but by several threads of it, each reading another tensor.
    """

    info: BlockInfo
    token_ids: TokenIds
    layout: Layout
    tier: str

    def read_into(self, index: int, rows: Sequence[np.ndarray], skip: int = 0) -> None:
        """Read tensors of the block from number ``index`` on, one for each array of ``rows``, and check them.

        Several at once, because a layer's keys and values lie side by side: one system call for both.

        Args:
            index: Position of the first in ``layout.tensors``.
            rows: uint8 arrays ``[heads, n, row_nbytes]``; their last two axes are contiguous, heads may
                lie apart. ``n`` tokens are read, starting with token ``skip`` of the block.
            skip: First token of the block to read.

        Raises:
            BlockFormatError: The bytes are not those that were stored; ``rows`` must not be used.
        """
        ...

    def read(self, index: int, count: int) -> list[np.ndarray]:
        """Return ``count`` whole tensors from number ``index`` on, checked: uint8 ``[heads, rows, row_nbytes]`` each.

        They may be the block's own memory, which must not be written to.

        Raises:
            BlockFormatError: The bytes are not those that were stored.
        """
        ...

    def close(self) -> None:
        """Release what the source holds (a file descriptor); harmless when repeated."""
        ...


class Tier(Protocol):
    """One place where blocks live.

    All methods may be called from several threads. A tier never returns wrong bytes and never raises
    for a block it has lost: that is a miss.
    """

    name: str
    max_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        ...

    def __len__(self) -> int:
        """Number of blocks."""
        ...

    def contains(self, keys: Sequence[bytes]) -> list[BlockInfo | None]:
        """Return, for each key, what is known of the block, or None when it is not here."""
        ...

    def tails(self, parent: bytes, probe: bytes) -> list[BlockInfo]:
        """Return children of ``parent`` whose first tokens hash to ``probe``, latest first, at most 64."""
        ...

    def put(self, block: Block) -> bool:
        """Keep ``block``; False when it does not fit or may not be stored.

        A block replaces one with the same key and a lesser `BlockInfo.rank` (an exact one replaces one that is not, a
        lossless one a lossy one), never the other way round.
        A tail whose tokens are the start of ``block``'s (same parent) is dropped.
        """
        ...

    def open(self, key: bytes) -> BlockSource | None:
        """Open a block for reading, or None when it is not here or cannot be trusted."""
        ...

    def touch(self, keys: Iterable[bytes]) -> None:
        """Mark a prefix (root side first) as used now."""
        ...

    def remove(self, keys: Iterable[bytes]) -> int:
        """Delete blocks; return how many were here."""
        ...

    def clear(self) -> int:
        """Delete every block; return how many there were."""
        ...
