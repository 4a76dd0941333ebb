"""Which blocks go first: what a block is worth, and the order of a large clean-up.

Both tiers evict by GreedyDual-Size (P. Cao, S. Irani: Cost-Aware WWW Proxy Caching Algorithms, USENIX 1997) among
the blocks that no other block follows, and that are neither pinned nor in use. A block's priority is ``age +
cost / bytes``, set whenever it is used; the lowest goes first, and ``age`` becomes the priority of what went. So a
dear block stays longer than a cheap one of the same last use, but not for ever: the age overtakes everything that
is not used again. With equal costs and sizes it is LRU.

The cost is the time to compute the block again: ``seconds a token x n x (1 + p / 8192)`` for ``n`` tokens around
position ``p``. Seconds a token were measured for the model. The second factor is attention: its work grows
with the position, and at ``p = parameters / (2 x layers x heads x head size)`` it equals that of all weights. That is
2,000 to 3,000 for a model of 135 M parameters and 30,000 for one of 8 G; 8,192 stands for all of them, since it only
has to tell the end of a long prompt from its beginning.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from kvembed._keys import snapshot_key

if TYPE_CHECKING:
    from kvembed._block import BlockInfo
    from kvembed._catalog import BlockRow

__all__ = ["SECONDS_PER_TOKEN", "choose", "work", "worth"]

SECONDS_PER_TOKEN = 0.001
"""Until a prefill of a model was measured. It only matters beside models that were."""

_ATTENTION_EVEN = 8192.0
_SNAPSHOT_TOKENS = 2048
_LEAST_TOKEN_BYTES = 16 << 10


def _tokens(info: BlockInfo) -> int:
    """Return the tokens a block stands for.

    A snapshot of state stands for those since the one before it. They are not recorded; at most eight blocks of 256
    lie between two.
    """
    if info.n_tokens == 1 and info.key == snapshot_key(info.parent):
        return max(1, min(info.start, _SNAPSHOT_TOKENS))
    return info.n_tokens


def work(info: BlockInfo) -> float:
    """Return the work to compute a block again, in tokens at the start of a prompt."""
    return _tokens(info) * (1.0 + (info.start + info.n_tokens / 2.0) / _ATTENTION_EVEN)


def worth(info: BlockInfo, nbytes: int) -> float:
    """Return the work that each byte of a block saves.

    A token counts as 16 KiB at least. A state or a block of few bytes would otherwise outlive thousands of
    others and, being the end of a sequence, keep everything before it from eviction too.

    Args:
        info: The block.
        nbytes: What it takes in its tier.
    """
    return work(info) / max(nbytes, _LEAST_TOKEN_BYTES * _tokens(info))


def choose(rows: list[BlockRow], before: float | None, max_bytes: int | None, unpinned_only: bool) -> list[BlockRow]:
    """Return the rows to prune, in an order that never deletes a block before those that follow it.

    Args:
        rows: All blocks.
        before: Choose those last used before this Unix time; None for no limit of age.
        max_bytes: Then choose the longest unused until the others take no more than this on disk.
        unpinned_only: Spare pinned blocks, and so what leads to them.
    """
    children: dict[bytes, int] = {}
    by_key = {row.info.key: row for row in rows}
    for row in rows:
        children[row.info.parent] = children.get(row.info.parent, 0) + 1
    heap = [(r.last_used, -r.info.start, r.info.key) for r in rows if not children.get(r.info.key)]
    heapq.heapify(heap)
    total = sum(row.file_bytes for row in rows)
    chosen: list[BlockRow] = []
    while heap:
        used, _, key = heapq.heappop(heap)
        row = by_key[key]
        old = before is not None and used < before
        large = max_bytes is not None and total > max_bytes
        if not old and not large:
            # The heap is in order of use, but a parent may be older than its child (it is entered late).
            continue
        if unpinned_only and row.pins:
            continue
        chosen.append(row)
        total -= row.file_bytes
        parent = by_key.get(row.info.parent)
        if parent is not None:
            children[parent.info.key] -= 1
            if not children[parent.info.key]:
                heapq.heappush(heap, (parent.last_used, -parent.info.start, parent.info.key))
    return chosen
