"""What a `KVStore` knows: the base of its verbs that look, and of the notes kept beside the blocks."""

from __future__ import annotations

import contextlib
import functools
import json
import sqlite3
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from kvembed._codec import NAMESPACE_FILE
from kvembed._codecs.names import worst
from kvembed._errors import ConfigError, StoreError
from kvembed._files import write_file
from kvembed._html import ordered_tiers
from kvembed._keys import snapshot_key
from kvembed._ledger import today
from kvembed._stats import ModelStats, StoreStats, TierStats
from kvembed._store_types import PrefixEntry

if TYPE_CHECKING:
    import threading
    from collections import OrderedDict
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from kvembed._admission import Admission
    from kvembed._block import BlockInfo
    from kvembed._catalog import Catalog
    from kvembed._hitcurve import HitCurve
    from kvembed._keys import TokenIds
    from kvembed._ledger import Ledger
    from kvembed._store_open import DiskOptions
    from kvembed._store_types import ProblemLog
    from kvembed._tiers.cpu import CpuTier
    from kvembed._tiers.disk import DiskTier
    from kvembed._tiers.gpu import GpuTier
    from kvembed._tree import KnownText, LiveTokens, PrefixTree
    from kvembed._writer import Writer

__all__ = ["StoreView", "explicit"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound="StoreView")
_SORTS = {"used": "last_used DESC", "tokens": "start + n_tokens DESC", "created": "created DESC"}


def explicit() -> Callable[[Callable[Concatenate[_S, _P], _R]], Callable[Concatenate[_S, _P], _R]]:
    """Turn the errors of catalog and disk into ours, for the verbs that do raise; used as a decorator."""

    def decorate(verb: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
        @functools.wraps(verb)
        def call(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return verb(self, *args, **kwargs)
            except sqlite3.Error as error:
                if self._catalog is not None:
                    self._catalog.note_damage(error)
                raise StoreError(f"the store's catalog failed ({error}); try again, or open the store anew") from error
            except OSError as error:
                raise StoreError(f"the store's folder failed ({error}); try again") from error

        return call

    return decorate


class StoreView:
    """Base of `KVStore`, apart only to keep each file short enough to be read at once."""

    path: Path | None
    _gpu: GpuTier | None
    _cpu: CpuTier | None
    _disk: DiskTier | None
    _catalog: Catalog | None
    _writer: Writer
    _problems: ProblemLog
    _admission: Admission | None
    _ledger: Ledger
    _options: DiskOptions
    _seconds_per_token: dict[bytes, float]
    _codec: str
    _read_only: bool
    _spaces: dict[bytes, dict[str, Any]]
    _notes: dict[tuple[bytes, str], Any]
    _memory_pins: dict[str, list[bytes]]
    _tier_hits: dict[str, list[int]]
    _lock: threading.Lock
    _ids: OrderedDict[bytes, TokenIds]

    # -- what the rest of the store provides -------------------------------------------------------

    def _enter(self) -> None:
        raise NotImplementedError

    @property
    def _memory(self) -> list[CpuTier]:
        """The tiers in memory, fastest first."""
        return [tier for tier in (self._gpu, self._cpu) if tier is not None]

    def _flush(self, timeout: float | None = None) -> bool:
        raise NotImplementedError

    def _token_ids(self, key: bytes) -> TokenIds | None:
        raise NotImplementedError

    @contextlib.contextmanager
    def _quiet(self, what: str) -> Iterator[None]:
        """Turn a failing catalog into a recorded problem: to the model it is a miss."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if self._catalog is not None:
                self._catalog.note_damage(error)
            self._problems.report(f"catalog:{what}", f"the store's catalog failed ({what}): {error}")

    # -- namespaces and notes ----------------------------------------------------------------------

    def register_namespace(self, digest: bytes, fields: dict[str, Any]) -> None:
        """Keep the readable parts of a model's fingerprint, so that a miss can be explained.

        Args:
            digest: 32-byte fingerprint.
            fields: What it was made of, as JSON values.
        """
        self._enter()
        self._spaces[digest] = dict(fields)
        disk = None if self._read_only else self._disk
        if disk is not None:
            with self._quiet("register_namespace"):
                disk.catalog.add_namespace(digest, fields)
                path = disk.root / "namespaces" / f"{disk.codec.key(digest).hex()}.json"
                text = json.dumps(fields, indent=1, sort_keys=True, default=str).encode()
                if not path.exists():
                    about = NAMESPACE_FILE + digest
                    write_file(path, disk.codec.encode([memoryview(text)], 0, len(text), about))

    def namespaces(self) -> dict[bytes, dict[str, Any]]:
        """Return the fields of every fingerprint that has blocks here, by digest."""
        self._enter()
        result: dict[bytes, dict[str, Any]] = {}
        if self._catalog is not None:
            with self._quiet("namespaces"):
                result = self._catalog.namespaces()
        return result | self._spaces

    def get_note(self, digest: bytes, name: str) -> Any | None:
        """Return a value kept for a model by `set_note`, or None."""
        self._enter()
        if self._catalog is not None:
            with self._quiet("get_note"):
                value = self._catalog.note(digest, name)
                if value is not None:
                    self._note_speed(digest, name, value)
                    return value
        return self._notes.get((digest, name))

    def set_note(self, digest: bytes, name: str, value: Any) -> None:
        """Keep a JSON value for a model: a measured speed, a verdict."""
        self._enter()
        self._notes[digest, name] = value
        self._note_speed(digest, name, value)
        if self._catalog is not None and not self._read_only:
            with self._quiet("set_note"):
                self._catalog.set_note(digest, name, value)

    def _note_speed(self, digest: bytes, name: str, value: Any) -> None:
        # Eviction in memory and the write policy weigh with it.
        if name == "prefill_tokens_per_second" and isinstance(value, int | float) and value > 0:
            self._seconds_per_token[digest] = 1.0 / value

    @property
    def encrypted(self) -> bool:
        """True when what is on disk is encrypted."""
        return self._disk is not None and self._disk.codec.encrypted

    @property
    def codec(self) -> str:
        """Name of the codec in which this store keeps blocks."""
        return self._codec

    # -- looking -----------------------------------------------------------------------------------

    @explicit()
    def stats(self) -> StoreStats:
        """Return sizes, budgets and hits of every tier, what was written, and what was saved."""
        self._enter()
        catalog, ever = self._catalog, self._ledger.sums()
        tiers: list[TierStats] = []
        sizes: dict[str, tuple[int, int, int]] = {}
        for tier in self._memory:
            sizes[tier.name] = (len(tier), tier.nbytes + tier.reserved, tier.max_bytes)
        hits = tokens = 0
        if self._disk is not None:
            self._disk.catalog.flush_touches()
            counters = self._disk.catalog.counters()
            hits, tokens = counters.hits, counters.hit_tokens
            sizes["disk"] = (counters.blocks, self._disk.nbytes, self._disk.max_bytes)
        for name, size in sizes.items():
            for_ever = (int(ever.get(f"{name}_{what}", 0)) for what in ("hits", "hit_tokens", "hit_bytes"))
            tiers.append(TierStats(name, *size, *self._tier_hits[name], *for_ever))
        today_s = self._ledger.sums(today())
        reused = {name[7:]: int(value) for name, value in ever.items() if name.startswith("reused_")}
        return StoreStats(
            path=None if self.path is None else str(self.path),
            tiers=tuple(tiers),
            hits=hits,
            hit_tokens=tokens,
            pending_writes=self._writer.pending,
            namespaces=len(self.namespaces()),
            pins=len(self.pins()),
            read_only=self._read_only,
            written_today=int(today_s.get("written_bytes", 0)),
            max_write_bytes_per_day=None if self._admission is None else self._admission.per_day,
            held_back_today=int(today_s.get("held_back_bytes", 0)),
            written_bytes=int(ever.get("written_bytes", 0)),
            write_policy=self._options.write_policy,
            ttl_s=self._options.ttl_s,
            calls=int(ever.get("calls", 0)),
            prompt_tokens=int(ever.get("prompt_tokens", 0)),
            reused_tokens=ordered_tiers(reused),
            saved_s=ever.get("saved_s", 0.0),
            saved_s_today=today_s.get("saved_s", 0.0),
            models=self._models(),
            catalog_bytes=0 if catalog is None else catalog.nbytes,
            encrypted=self.encrypted,
            codec=self.codec,
            blocks_by_codec={} if catalog is None else catalog.codecs(),
        )

    def _models(self) -> tuple[ModelStats, ...]:
        disk, admission = self._disk, self._admission
        if disk is None:
            return ()
        names = {digest: str(fields.get("name", "")) for digest, fields in self.namespaces().items()}
        models = [
            ModelStats(
                digest.hex(),
                names.get(digest, ""),
                blocks,
                nbytes,
                None if admission is None else admission.quota(digest, disk.max_bytes),
            )
            for digest, (blocks, nbytes) in disk.catalog.spaces().items()
            if blocks
        ]
        return tuple(sorted(models, key=lambda model: -model.nbytes))

    @explicit()
    def hit_curve(self) -> HitCurve:
        """Return what hit rate other disk budgets would have had, replayed from the log of calls."""
        from kvembed._hitcurve import hit_curve

        self._enter()
        return hit_curve(self._ledger.calls(), self._disk.max_bytes if self._disk is not None else None)

    @explicit()
    def recent_hit_rates(self) -> list[float]:
        """Return which part of its prompt each of the latest calls (of all processes, at most 120) did not compute."""
        self._enter()
        return [cached / prompt for prompt, cached in self._ledger.recent() if prompt]

    @explicit()
    def growth(self) -> list[tuple[float, int]]:
        """Return how the store on disk grew: seconds since 1970 and all bytes then, after each block, oldest first.

        Of the blocks that are there now: what was evicted since is missing from all of it.
        """
        self._enter()
        if self._catalog is None:
            return []
        found: list[tuple[float, int]] = []
        total = 0
        for row in self._catalog.rows("ORDER BY created"):
            total += row.file_bytes
            found.append((row.created, total))
        return found

    @explicit()
    def written_by_day(self, days: int = 30) -> dict[str, int]:
        """Return the bytes of block files written on the latest days that had any, oldest first."""
        self._enter()
        return {day: int(nbytes) for day, nbytes in self._ledger.days("written_bytes", days).items()}

    @explicit()
    def ls(self, *, limit: int | None = 50, sort: str = "used") -> list[PrefixEntry]:
        """Return the stored sequences: every block that no other follows, with what leads to it.

        Args:
            limit: At most so many; None for all.
            sort: ``"used"`` or ``"created"`` (latest first), or ``"tokens"`` (longest first).

        Raises:
            ConfigError: ``sort`` is none of these.
        """
        self._enter()
        if sort not in _SORTS:
            raise ConfigError(f"sort must be one of {', '.join(map(repr, _SORTS))}, got {sort!r}")
        in_memory = self._in_memory()
        known = dict(in_memory)
        followed = {info.parent for info in in_memory.values()}
        ends = [i for i in in_memory.values() if i.key not in followed and self._ends_a_sequence(i)]
        # Asked before the rows are read: a block that reaches the disk in between is then among them.
        on_disk = self._catalog.get([info.key for info in ends]) if self._catalog is not None else {}
        entries: list[PrefixEntry] = []
        names = self._names_by_key()
        models = {digest: str(fields.get("name", "")) for digest, fields in self.namespaces().items()}
        seen: set[bytes] = set()
        if self._catalog is not None:
            tail = f"WHERE children = 0 ORDER BY {_SORTS[sort]}" + ("" if limit is None else f" LIMIT {int(limit)}")
            for row in self._catalog.rows(tail):
                if row.info.key not in followed and self._ends_a_sequence(row.info):
                    seen.add(row.info.key)
                    entries.append(self._entry(row.info, row.last_used, in_memory, known, names, models))
        waiting = [info for info in ends if info.key not in seen and info.key not in on_disk]
        new = [self._entry(info, None, in_memory, known, names, models) for info in waiting]
        entries = new + entries
        if sort == "tokens":
            entries.sort(key=lambda entry: -entry.n_tokens)
        return entries if limit is None else entries[:limit]

    @explicit()
    def prefixes(self, texts: Iterable[KnownText] = (), live: Iterable[LiveTokens] = ()) -> PrefixTree:
        """Return what is stored as a tree, a run of blocks without a fork as one row; no text is read.

        `CachedModel.prefixes` also knows which sessions use a row, and what is still live.

        Args:
            texts: Texts whose rows are to be labelled, by their token ids.
            live: Caches of recent sequences that are still resident.
        """
        from kvembed._tree import build_tree

        self._enter()
        if self._catalog is not None:
            self._catalog.flush_touches()
        models = {digest: str(fields.get("name", "")) for digest, fields in self.namespaces().items()}
        memory = list(self._in_memory().values())
        return build_tree(self._catalog, memory, self.pins(), models, texts, live)

    def _ends_a_sequence(self, info: BlockInfo) -> bool:
        """False for a state in the middle of a sequence: tokens follow the prefix it belongs to."""
        if info.n_tokens > 1 or info.key != snapshot_key(info.parent):
            return True
        followers = self._catalog.children(info.parent) if self._catalog is not None else []
        for tier in self._memory:
            followers = [*followers, *tier.children(info.parent)]
        return all(follower.key == info.key for follower in followers)

    def _entry(
        self,
        info: BlockInfo,
        last_used: float | None,
        in_memory: dict[bytes, BlockInfo],
        known: dict[bytes, BlockInfo],
        names: dict[bytes, list[str]],
        models: dict[bytes, str],
    ) -> PrefixEntry:
        chain = self._chain(info.key, known)
        return PrefixEntry(
            key=info.key,
            n_tokens=info.start + (0 if info.key == snapshot_key(info.parent) else info.n_tokens),
            n_blocks=len(chain),
            nbytes=sum(block.nbytes for block in chain),
            tier="cpu" if info.key in in_memory else "disk",
            last_used=last_used,
            names=tuple(sorted({name for block in chain for name in names.get(block.key, ())})),
            model=models.get(info.namespace, ""),
            namespace=info.namespace,
            codec=worst(*(block.codec for block in chain)),
        )

    def _chain(self, key: bytes, known: dict[bytes, BlockInfo] | None = None) -> list[BlockInfo]:
        """Return the blocks from the root to ``key`` that are stored, root side first; ``known`` is added to."""
        if known is None:
            known = self._in_memory()
        chain: list[BlockInfo] = []
        while True:
            if key not in known and self._catalog is not None:
                known |= {info.key: info for info in self._catalog.chain(key)}
            info = known.get(key)
            if info is None:
                return chain[::-1]
            chain.append(info)
            key = info.parent

    def _in_memory(self) -> dict[bytes, BlockInfo]:
        return {info.key: info for tier in self._memory for info in tier.infos()}

    def _names_by_key(self) -> dict[bytes, list[str]]:
        result: dict[bytes, list[str]] = {}
        for name, keys in self.pins().items():
            for key in keys:
                result.setdefault(key, []).append(name)
        return result

    @explicit()
    def pins(self) -> dict[str, list[bytes]]:
        """Return the pinned keys by name, root side first where they were given so."""
        self._enter()
        return self._catalog.pins() if self._catalog is not None else {k: list(v) for k, v in self._memory_pins.items()}

    def _find(self, what: str | bytes) -> bytes:
        if isinstance(what, bytes):
            return what
        digits = what.lower()
        found: set[bytes] = set()
        if digits and len(digits) <= 64 and not digits.strip("0123456789abcdef"):
            in_memory = self._in_memory()
            followed = {info.parent for info in in_memory.values()}
            found = {key for key in in_memory if key.hex().startswith(digits)}
            if self._catalog is not None:
                found.update(self._catalog.leaves_named(digits))
            found -= followed
        if len(found) != 1:
            words = f"{len(found)} stored sequences begin" if found else "no stored sequence begins"
            raise ConfigError(f"{words} with {what!r}; `kvembed ls` shows them")
        return found.pop()
