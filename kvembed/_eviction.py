"""Which blocks to delete when many are to go: ends of sequences first, so that no beginning is missing."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvembed._catalog import BlockRow

__all__ = ["choose"]


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
