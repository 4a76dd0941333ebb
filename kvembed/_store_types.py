"""What a `KVStore` answers with: small frozen dataclasses that print themselves."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvembed._codecs.names import LOSSLESS
from kvembed._units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from kvembed._block import BlockInfo

__all__ = ["EvictReport", "PrefixEntry", "ProblemLog", "PruneReport", "StoredBlock", "VerifyReport"]


@dataclass(frozen=True)
class StoredBlock:
    """A block that was found, and the fastest tier that has it."""

    info: BlockInfo
    tier: str


@dataclass(frozen=True)
class PrefixEntry:
    """A stored sequence: a last block and everything before it.

    Args:
        key: Key of its last block; the first digits name it in `KVStore.remove` and `KVStore.pin`.
        n_tokens: Tokens from the start of the sequence.
        n_blocks: Number of blocks.
        nbytes: Bytes of their KV; blocks shared with other sequences count in each.
        tier: Fastest tier that has its last block.
        last_used: Unix time, None when it was never on disk.
        names: Names it is pinned under.
        model: Name of the model that computed it.
        namespace: Fingerprint digest of that model.
        codec: The least faithful codec that some of it has been through.
    """

    key: bytes
    n_tokens: int
    n_blocks: int
    nbytes: int
    tier: str
    last_used: float | None
    names: tuple[str, ...]
    model: str
    namespace: bytes
    codec: str = LOSSLESS

    @property
    def id(self) -> str:
        """The key's first 12 hexadecimal digits."""
        return self.key.hex()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self) | {"id": self.id, "key": self.key.hex(), "namespace": self.namespace.hex()}

    def __str__(self) -> str:
        """Return one line."""
        used = "" if self.last_used is None else f"  used {format_seconds(time.time() - self.last_used)} ago"
        names = f"  pinned: {', '.join(self.names)}" if self.names else ""
        size = f"{format_count(self.n_tokens)} tokens  {format_bytes(self.nbytes)}"
        codec = "" if self.codec == LOSSLESS else f"  {self.codec}"
        return f"{self.id}  {size}{codec}  {self.tier}  {self.model}{used}{names}"


@dataclass(frozen=True)
class PruneReport:
    """What `KVStore.prune` deleted, or would delete.

    Args:
        blocks: Number of blocks.
        nbytes: Bytes on disk.
        dry_run: Nothing was deleted.
    """

    blocks: int
    nbytes: int
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line."""
        return f"{'would delete' if self.dry_run else 'deleted'} {self.blocks} blocks, {format_bytes(self.nbytes)}"


@dataclass(frozen=True)
class EvictReport:
    """What `KVStore.evict` dropped.

    Args:
        blocks: Blocks dropped from at least one tier, states included.
        nbytes: Bytes of their KV.
        spared: Blocks that stay in a tier they were to leave: pinned, before such a block, or waiting for the disk.
    """

    blocks: int
    nbytes: int
    spared: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line."""
        kept = f", {format_count(self.spared)} spared (pinned, or in use)" if self.spared else ""
        return f"evicted {format_count(self.blocks)} blocks, {format_bytes(self.nbytes)}{kept}"


@dataclass(frozen=True)
class VerifyReport:
    """What `KVStore.verify` found.

    Args:
        blocks: Block files read from end to end.
        nbytes: Bytes of those.
        problems: One line each.
        fixed: How many of the problems were repaired.
    """

    blocks: int
    nbytes: int
    problems: tuple[str, ...] = field(default=())
    fixed: int = 0

    @property
    def ok(self) -> bool:
        """True when nothing was wrong, or everything was repaired."""
        return self.fixed == len(self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        """Return a summary and the problems."""
        head = f"{format_count(self.blocks)} blocks, {format_bytes(self.nbytes)} checked: "
        if not self.problems:
            return head + "all good"
        return "\n".join([head + f"{len(self.problems)} problems, {self.fixed} fixed", *self.problems])


class ProblemLog:
    """Problems that were met in the background, each kind once, until somebody asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._new: list[str] = []

    def report(self, kind: str, message: str) -> None:
        """Record a problem; a second one of the same ``kind`` is dropped."""
        with self._lock:
            if kind not in self._seen:
                self._seen.add(kind)
                self._new.append(message)

    def take(self) -> list[str]:
        """Return what is new since the last call."""
        with self._lock:
            new, self._new = self._new, []
            return new

    def after_fork(self) -> None:
        """Make the log usable in a forked child."""
        self._lock = threading.Lock()
