"""`Match`: what is kept of a prompt, and in which tiers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._live import LiveSequence
    from kvembed._store import StoredBlock

__all__ = ["Match", "exact_run"]


@dataclass(frozen=True)
class Match:
    """What is kept of a prompt.

    Args:
        root: Root key of the chain.
        keys: Keys of the prompt's full blocks (those that end before its last token).
        live: A live sequence whose prefix is used, or None.
        live_tokens: Length of that prefix.
        blocks: Stored full blocks after it (from the start when there is no live sequence), without gaps.
        tail: A stored block after them that shares its first tokens, and how many.
        seconds: Time the lookup took.
    """

    root: bytes
    keys: list[bytes]
    live: LiveSequence | None
    live_tokens: int
    blocks: list[StoredBlock]
    tail: tuple[StoredBlock, int] | None
    block_size: int
    live_tier: str
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens that need not be computed."""
        return self.live_tokens + sum(n for _, n in self.stored)

    @property
    def stored(self) -> list[tuple[StoredBlock, int]]:
        """Blocks to restore, each with the tokens wanted of it."""
        wanted = [(stored, stored.info.n_tokens) for stored in self.blocks]
        return wanted if self.tail is None else [*wanted, self.tail]

    @property
    def exact_tokens(self) -> int:
        """How many of them give bit-identical results."""
        exact = 0
        if self.live is not None:
            exact = min(self.live.exact, self.live_tokens // self.block_size * self.block_size)
            if exact < self.live_tokens:
                return exact
        return exact + self.block_size * exact_run(self.blocks)

    @property
    def tokens_by_tier(self) -> dict[str, int]:
        """Tokens by the tier that will serve them."""
        counts = {self.live_tier: self.live_tokens} if self.live is not None else {}
        for stored, n in self.stored:
            counts[stored.tier] = counts.get(stored.tier, 0) + n
        return counts


def exact_run(blocks: Sequence[StoredBlock]) -> int:
    for i, stored in enumerate(blocks):
        if not stored.info.exact:
            return i
    return len(blocks)
