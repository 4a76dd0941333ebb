"""What a `KVStore` answers with: small frozen dataclasses that print themselves, as text and as HTML."""

from __future__ import annotations

import html
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvembed._units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from kvembed._block import BlockInfo

__all__ = ["PrefixEntry", "ProblemLog", "PruneReport", "StoreStats", "StoredBlock", "TierStats", "VerifyReport"]


@dataclass(frozen=True)
class StoredBlock:
    """A block that was found, and the fastest tier that has it."""

    info: BlockInfo
    tier: str


@dataclass(frozen=True)
class TierStats:
    """One tier of a store.

    Args:
        name: ``"cpu"`` or ``"disk"``.
        blocks: Number of blocks.
        nbytes: Bytes in use, live caches and file system overhead included.
        max_bytes: Budget.
        hits: Blocks read from it since the store was opened.
        hit_tokens: Tokens of those.
    """

    name: str
    blocks: int
    nbytes: int
    max_bytes: int
    hits: int
    hit_tokens: int


@dataclass(frozen=True)
class StoreStats:
    """State of a `KVStore`.

    Args:
        path: Its folder, or None for a store in memory only.
        tiers: Fastest first.
        hits: Blocks ever read from the disk tier, by all processes.
        hit_tokens: Tokens of those.
        pending_writes: Blocks that still wait for the disk.
        namespaces: Number of models (more exactly fingerprints) with blocks here.
        pins: Number of pinned names.
        read_only: The folder is not written to.
    """

    path: str | None
    tiers: tuple[TierStats, ...]
    hits: int
    hit_tokens: int
    pending_writes: int
    namespaces: int
    pins: int
    read_only: bool

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("tier", "blocks", "used", "budget", "full", "hits", "tokens reused")]
        for t in self.tiers:
            full = f"{100 * t.nbytes / t.max_bytes:.0f} %" if t.max_bytes else "off"
            sizes = (format_bytes(t.nbytes), format_bytes(t.max_bytes))
            rows.append(
                (t.name, format_count(t.blocks), *sizes, full, format_count(t.hits), format_count(t.hit_tokens))
            )
        return rows

    def _summary(self) -> str:
        parts = [f"{self.path or 'in memory'}{' (read-only)' if self.read_only else ''}"]
        parts.append(f"{self.namespaces} model{'' if self.namespaces == 1 else 's'}")
        parts.append(f"{self.pins} pinned")
        parts.append(f"{self.pending_writes} waiting for the disk")
        parts.append(f"{format_count(self.hit_tokens)} tokens reused from disk ever")
        return " · ".join(parts)

    def __repr__(self) -> str:
        """Return a table as text."""
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        return "\n".join([self._summary(), *lines])

    def _repr_html_(self) -> str:
        """Return a table for notebooks: inline styles, no scripts, the page's own colours."""
        cell = "padding:2px 10px;text-align:right;border-bottom:1px solid rgba(127,127,127,.3)"
        head, *rows = self._rows()

        def line(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f'<{tag} style="{cell}">{html.escape(c)}</{tag}>' for c in cells) + "</tr>"

        table = line(head, "th") + "".join(line(row, "td") for row in rows)
        style = "border-collapse:collapse;color:currentColor;background:transparent"
        return f'<div>{html.escape(self._summary())}</div><table style="{style}">{table}</table>'

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return both forms; the front end chooses."""
        return {"text/plain": repr(self), "text/html": self._repr_html_()}


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
        return f"{self.id}  {size}  {self.tier}  {self.model}{used}{names}"


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
