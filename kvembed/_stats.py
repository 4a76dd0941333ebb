"""`StoreStats`: how full a store is, what it has written and what it has saved, as text and as HTML."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvembed._codecs.names import LOSSLESS
from kvembed._html import bar_html, mimebundle, panel, table_html, text_html
from kvembed._units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["ModelStats", "StoreStats", "TierStats"]


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
        hit_bytes: Bytes of those.
        ever_hits: Blocks ever read from it, by all processes.
        ever_tokens: Tokens of those.
        ever_bytes: Bytes of those.
    """

    name: str
    blocks: int
    nbytes: int
    max_bytes: int
    hits: int
    hit_tokens: int
    hit_bytes: int = 0
    ever_hits: int = 0
    ever_tokens: int = 0
    ever_bytes: int = 0


@dataclass(frozen=True)
class ModelStats:
    """The blocks of one model on disk.

    Args:
        digest: Its fingerprint, in hexadecimal digits.
        name: Its name, empty when it is not known.
        blocks: Number of blocks.
        nbytes: Bytes on disk.
        quota: Most that it may take, or None.
    """

    digest: str
    name: str
    blocks: int
    nbytes: int
    quota: int | None


@dataclass(frozen=True)
class StoreStats:
    """State of a `KVStore`.

    Args:
        path: Its folder, or None for a store in memory only.
        tiers: Fastest first.
        hits: Blocks ever read from the disk tier and still there, by all processes.
        hit_tokens: Tokens of those.
        pending_writes: Blocks that still wait for the disk.
        namespaces: Number of models (more exactly fingerprints) with blocks here.
        pins: Number of pinned names.
        read_only: The folder is not written to.
        written_today: Bytes of block files written today (local time), by all processes.
        max_write_bytes_per_day: Most that may be written in a day, or None.
        held_back_today: Bytes not written today because that was spent.
        written_bytes: Bytes of block files ever written.
        write_policy: What is written: ``"always"``, ``"worth"`` or ``"seen-twice"``.
        ttl_s: Seconds after which unused blocks are dropped, or None.
        calls: Calls counted, by all processes.
        prompt_tokens: Tokens of their prompts.
        reused_tokens: Those of the prompts that did not have to be computed, by tier; ``live`` is the cache of a
            recent sequence.
        saved_s: Estimate of the seconds of prefill that reuse saved: reused tokens at the measured prefill speed,
            less the time of reading them.
        saved_s_today: The same of today.
        models: The models with blocks on disk, largest first.
        catalog_bytes: Bytes of the catalog, which are not part of the budget.
        encrypted: What is on disk is encrypted.
        codec: How this store keeps blocks.
        blocks_by_codec: Blocks on disk by the least faithful codec that they have been through.
    """

    path: str | None
    tiers: tuple[TierStats, ...]
    hits: int
    hit_tokens: int
    pending_writes: int
    namespaces: int
    pins: int
    read_only: bool
    written_today: int = 0
    max_write_bytes_per_day: int | None = None
    held_back_today: int = 0
    written_bytes: int = 0
    write_policy: str = "always"
    ttl_s: float | None = None
    calls: int = 0
    prompt_tokens: int = 0
    reused_tokens: dict[str, int] | None = None
    saved_s: float = 0.0
    saved_s_today: float = 0.0
    models: tuple[ModelStats, ...] = ()
    catalog_bytes: int = 0
    encrypted: bool = False
    codec: str = LOSSLESS
    blocks_by_codec: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("tier", "blocks", "used", "budget", "full", "hits", "read", "tokens")]
        for t in self.tiers:
            full = f"{100 * t.nbytes / t.max_bytes:.0f} %" if t.max_bytes else "off"
            sizes = (format_bytes(t.nbytes), format_bytes(t.max_bytes))
            reads = (format_count(t.ever_hits), format_bytes(t.ever_bytes), format_count(t.ever_tokens))
            rows.append((t.name, format_count(t.blocks), *sizes, full, *reads))
        return rows

    def _model_rows(self) -> list[tuple[str, ...]]:
        rows = [("model", "blocks", "on disk", "quota")]
        for m in self.models:
            quota = "" if m.quota is None else format_bytes(m.quota)
            rows.append(
                (f"{m.name or 'unknown'} {m.digest[:8]}", format_count(m.blocks), format_bytes(m.nbytes), quota)
            )
        return rows

    def _lines(self) -> list[str]:
        head = [
            f"{self.path or 'in memory'}{' (read-only)' if self.read_only else ''}"
            f"{' (encrypted)' if self.encrypted else ''}",
            f"{self.namespaces} model{'' if self.namespaces == 1 else 's'}",
            f"{self.pins} pinned",
            f"{self.pending_writes} waiting for the disk",
        ]
        lines = [" · ".join(head)]
        if self.path is not None:
            limit = self.max_write_bytes_per_day
            share = f" of {format_bytes(limit)} a day" if limit is not None else ", no daily limit"
            parts = [f"written today {format_bytes(self.written_today)}{share}"]
            if self.held_back_today:
                parts.append(f"{format_bytes(self.held_back_today)} held back")
            parts.append(f"ever {format_bytes(self.written_bytes)}")
            parts.append(f"policy {self.write_policy}")
            if self.ttl_s is not None:
                parts.append(f"dropped when unused for {format_seconds(self.ttl_s)}")
            parts.append(f"catalog {format_bytes(self.catalog_bytes)}")
            lines.append(" · ".join(parts))
        found = self.blocks_by_codec or {}
        if self.codec != LOSSLESS or any(name != LOSSLESS for name in found):
            here = " · ".join(f"{name} {format_count(n)}" for name, n in found.items())
            lines.append(f"codec {self.codec}{f' · blocks on disk: {here}' if here else ''}")
        if self.calls:
            reused = self.reused_tokens or {}
            tiers = " · ".join(f"{name} {format_count(n)}" for name, n in reused.items() if n)
            share = 100 * sum(reused.values()) / max(1, self.prompt_tokens)
            lines.append(
                f"{format_count(self.calls)} calls · {format_count(self.prompt_tokens)} prompt tokens, "
                f"{share:.1f} % reused{f' ({tiers})' if tiers else ''} · saved ≈ {format_seconds(self.saved_s)} "
                f"(estimate), today ≈ {format_seconds(self.saved_s_today)}"
            )
        return lines

    def __repr__(self) -> str:
        """Return a table as text."""
        lines = [*self._lines(), *_aligned(self._rows())]
        if len(self.models) > 1 or any(m.quota is not None for m in self.models):
            lines += _aligned(self._model_rows())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return tables for notebooks: inline styles, no scripts, the page's own colours."""
        title, *lines = self._lines()
        parts = [text_html(line) for line in lines]
        reused = self.reused_tokens or {}
        if self.prompt_tokens:
            parts.append(bar_html(reused, self.prompt_tokens - sum(reused.values())))
        header, *rows = self._rows()
        parts.append(table_html(rows, header, right=True))
        if len(self.models) > 1 or any(m.quota is not None for m in self.models):
            header, *rows = self._model_rows()
            parts.append(table_html(rows, header, right=True))
        return panel(title, *parts)

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        """Return both forms; the front end chooses."""
        return mimebundle(repr(self), self._repr_html_(), include, exclude)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
