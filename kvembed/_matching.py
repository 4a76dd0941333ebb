"""What is kept of a prompt, in which tiers, and how much of it to use."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvembed._keys import PROBE_TOKENS, block_key, chain_keys
from kvembed._spans import tiers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._cachespec import CacheSpec
    from kvembed._keys import TokenIds
    from kvembed._live import LivePool, LiveSequence
    from kvembed._states import Snapshots
    from kvembed._store import KVStore, StoredBlock

__all__ = ["Match", "Matcher", "exact_run", "is_takeover"]

_WORTH_RESTORING = 64
"""Tokens a stored prefix must be ahead of a live one before all of it is restored in its place."""

_STEPS_FOR_PREFIX = 8
"""Where a suffix has to be computed token by token: the prefix must be this many times as long to be worth it."""


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
        block_size: Tokens of a full block.
        live_tier: What the tier of live sequences is called.
        seconds: Time the lookup took.
        snapshot: The state at the end of the stored prefix, for models that have one.
        without_state: Tokens whose rows are stored, but after the last state that is.
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
    snapshot: StoredBlock | None = None
    without_state: int = 0

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
    def runs(self) -> list[tuple[str, int]]:
        """Which tier has which part, in the order of the prompt."""
        live = [] if self.live is None else [(self.live_tier, self.live_tokens)]
        return [*live, *((stored.tier, n) for stored, n in self.stored)]

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
        return tiers_of(self.runs)


def exact_run(blocks: Sequence[StoredBlock]) -> int:
    for i, stored in enumerate(blocks):
        if not stored.info.exact:
            return i
    return len(blocks)


def is_takeover(live: LiveSequence, live_tokens: int) -> bool:
    """True when a call takes the live cache itself; otherwise it gets a copy of the part it shares."""
    return 2 * live_tokens >= len(live.ids)


class Matcher:
    """Finds the longest usable prefix.

    Args:
        store: Where blocks are.
        live: Recent sequences.
        live_tier: What their tier is called.
    """

    def __init__(self, store: KVStore, live: LivePool, live_tier: str) -> None:
        self._store = store
        self._live = live
        self._live_tier = live_tier

    def match(
        self,
        root: bytes,
        spec: CacheSpec,
        snapshots: Snapshots,
        ids: TokenIds,
        *,
        deterministic: bool,
        stepwise: bool = False,
    ) -> Match:
        """Find the longest usable prefix of ``ids``; at least one token is left to compute.

        Args:
            root: Root of the key chain.
            spec: Shape of the cache.
            snapshots: Where states are found.
            ids: The prompt.
            deterministic: Use only what gives a cold call's bits.
            stepwise: Whether what is missing has to be computed token by token.
        """
        began = time.perf_counter()
        size, wanted = spec.block_size, ids[:-1]
        live, live_tokens = self._live.best(root, wanted, exact_only=deterministic, block_size=size)
        keys = chain_keys(root, wanted, size)
        blocks: list[StoredBlock] = []
        tail = snapshot = None
        if live_tokens < len(wanted):
            blocks, tail = self._stored(root, keys, wanted, spec, deterministic)
        reach = len(blocks) * size + (tail[1] if tail else 0)
        if spec.has_state:
            blocks, tail, snapshot = self._up_to_snapshot(
                root, keys, wanted, snapshots, blocks, tail, size, reach, deterministic
            )
        stored_tokens = len(blocks) * size + (tail[1] if tail else 0)
        gain = stored_tokens - live_tokens
        if live is None or gain <= 0:
            blocks, tail = (blocks, tail) if live is None else ([], None)
        elif is_takeover(live, live_tokens) and spec.extendable:
            # What is live stays where it is; only the blocks after it are read.
            live_tokens = live_tokens // size * size
            blocks = blocks[live_tokens // size :]
        elif gain >= _WORTH_RESTORING or spec.has_state:
            live, live_tokens = None, 0
        else:
            blocks, tail = [], None
        if not blocks and tail is None:
            snapshot = None
        seconds = time.perf_counter() - began
        without_state = max(0, reach - max(stored_tokens, live_tokens)) if spec.has_state else 0
        found = Match(
            root, keys, live, live_tokens, blocks, tail, size, self._live_tier, seconds, snapshot, without_state
        )
        if stepwise and _STEPS_FOR_PREFIX * (len(ids) - found.tokens) > len(ids):
            return Match(root, keys, None, 0, [], None, size, self._live_tier, time.perf_counter() - began)
        return found

    def _stored(
        self, root: bytes, keys: list[bytes], wanted: TokenIds, spec: CacheSpec, deterministic: bool
    ) -> tuple[list[StoredBlock], tuple[StoredBlock, int] | None]:
        """Return the stored full blocks from the start, and the block after them that shares the most tokens."""
        blocks = self._store.lookup(keys, exact_only=deterministic)
        rest = wanted[len(blocks) * spec.block_size :]
        if deterministic or not len(rest):
            return blocks, None
        parent = keys[len(blocks) - 1] if blocks else root
        tail = self._store.find_tail(parent, rest) if len(rest) >= PROBE_TOKENS else None
        if tail is None and spec.has_state:
            # Shorter than what tails are found by: by their names.
            short = [block_key(parent, rest[:n]) for n in range(1, min(PROBE_TOKENS, len(rest) + 1))]
            found = [(stored, n) for n, stored in enumerate(self._store.known(short), start=1) if stored is not None]
            tail = found[-1] if found else None
        return blocks, tail

    @staticmethod
    def _up_to_snapshot(
        root: bytes,
        keys: list[bytes],
        wanted: TokenIds,
        snapshots: Snapshots,
        blocks: list[StoredBlock],
        tail: tuple[StoredBlock, int] | None,
        size: int,
        reach: int,
        deterministic: bool,
    ) -> tuple[list[StoredBlock], tuple[StoredBlock, int] | None, StoredBlock | None]:
        """Cut what is stored, ``reach`` tokens, back to the last snapshot in it."""
        found = snapshots.find(root, keys, wanted, reach, exact_only=deterministic)
        if found is None:
            return [], None, None
        position, snapshot = found
        whole, rest = divmod(position, size)
        if rest:
            last = blocks[whole] if whole < len(blocks) else tail[0] if tail else None
            tail = (last, rest) if last is not None else None
        else:
            tail = None
        return blocks[:whole], tail, snapshot
