"""The verbs of `KVStore` for people that change it: what stays, what goes, and whether it is sound."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from kvembed._errors import ConfigError, StoreReadOnlyError
from kvembed._eviction import choose
from kvembed._forget import Eraser, ForgetReport
from kvembed._store_types import EvictReport, PruneReport, VerifyReport
from kvembed._store_view import StoreView, explicit
from kvembed._units import parse_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    from kvembed._encryption.sources import Key
    from kvembed._portable import ExportReport, ImportReport


__all__ = ["StoreAdmin"]


class Named(Protocol):
    """Something that was pinned under its name."""

    @property
    def name(self) -> str:
        """The name."""
        ...


@runtime_checkable
class Forgettable(Protocol):
    """Something that is more than its blocks, and erases all of itself: a session."""

    def forget_in(self, store: StoreAdmin) -> ForgetReport:
        """Erase it; ConfigError where it is not of this store."""
        ...


class StoreAdmin(StoreView):
    """Base of `KVStore`, apart only to keep each file short enough to be read at once."""

    def _begin_change(self) -> None:
        """Get ready for a verb that changes what is stored."""
        self._enter()
        if self._read_only:
            raise StoreReadOnlyError(f"{self.path} is open read-only; open it with read_only=False to change it")
        # What is in flight would land after the deletion.
        self._flush()

    # -- pins --------------------------------------------------------------------------------------

    @explicit()
    def pin(self, what: str | bytes | Iterable[bytes], name: str | None = None) -> str:
        """Keep blocks from being evicted until `unpin`.

        Args:
            what: Keys; or one sequence, by its last key or by the first digits of it that `ls` shows, which
                pins the blocks before it too.
            name: Name to unpin it by; the sequence's digits when None.

        Returns:
            The name.

        Raises:
            ConfigError: Nothing, or more than one sequence, goes by these digits.
            StoreReadOnlyError: The store was opened read-only.
        """
        self._enter()
        if self._read_only:
            raise StoreReadOnlyError(f"{self.path} is open read-only; open it with read_only=False to pin")
        keys = [info.key for info in self._chain(self._find(what))] if isinstance(what, str | bytes) else list(what)
        if not keys:
            raise ConfigError("nothing to pin: no keys were given")
        name = name or keys[-1].hex()[:12]
        if self._catalog is not None:
            self._catalog.pin(name, keys)
            # What today's write budget or the policy held back is to be kept now.
            self._writer.write_again(keys)
        else:
            held = self._memory_pins.setdefault(name, [])
            held.extend(key for key in keys if key not in held)
            self._pin_in_memory()
        return name

    @explicit()
    def unpin(self, name: str) -> int:
        """Let the blocks of a name be evicted again; return how many it held."""
        self._enter()
        if self._catalog is not None:
            if self._read_only:
                raise StoreReadOnlyError(f"{self.path} is open read-only; open it with read_only=False to unpin")
            return self._catalog.unpin(name)
        count = len(self._memory_pins.pop(name, ()))
        self._pin_in_memory()
        return count

    def _pin_in_memory(self) -> None:
        # With a disk tier a pinned block is safe there; only without one must memory spare it.
        for tier in self._memory:
            tier.set_pinned(key for keys in self._memory_pins.values() for key in keys)

    # -- deleting ----------------------------------------------------------------------------------

    @explicit()
    def prune(
        self,
        older_than_s: float | None = None,
        max_bytes: int | str | None = None,
        *,
        unpinned_only: bool = True,
        dry_run: bool = False,
    ) -> PruneReport:
        """Delete what has not been used for long, ends of sequences before their beginnings.

        Args:
            older_than_s: Delete blocks unused for more than so many seconds.
            max_bytes: Then delete the longest unused ones until the blocks on disk take no more than this; bytes
                or text such as ``"10GiB"``.
            unpinned_only: Spare pinned blocks.
            dry_run: Only count.
        """
        self._enter()
        if not dry_run:
            self._begin_change()
        if self._disk is None:
            return PruneReport(0, 0, dry_run)
        self._disk.catalog.flush_touches()
        rows = list(self._disk.catalog.rows())
        limit = None if max_bytes is None else parse_bytes(max_bytes, name="max_bytes")
        before = None if older_than_s is None else time.time() - older_than_s
        chosen = choose(rows, before, limit, unpinned_only)
        nbytes = sum(row.file_bytes for row in chosen)
        if not dry_run:
            # The log keeps them: pruned by age is not forgotten on purpose, and the curve of hit rates needs it.
            self._erase([row.info.key for row in chosen], traces=False)
        return PruneReport(len(chosen), nbytes, dry_run)

    @explicit()
    def evict(self, keys: Iterable[bytes], tier: str | None = None) -> EvictReport:
        """Drop blocks and everything that follows them from one tier or from all, ends first.

        Pinned blocks stay, and what leads to them. From memory alone nothing goes that waits for the disk; what is
        pinned and nowhere else stays there too. Blocks that a call is reading stay readable to it.

        Args:
            keys: The blocks, such as those of a row of `prefixes`.
            tier: ``"gpu"``, ``"cpu"`` or ``"disk"``; None for all.

        Raises:
            ConfigError: There is no such tier.
            StoreReadOnlyError: The store was opened read-only.
        """
        if tier not in (None, "gpu", "cpu", "disk"):
            raise ConfigError(f"blocks lie in the tiers 'gpu', 'cpu' and 'disk', not in {tier!r}")
        self._begin_change()
        keys = list(keys)
        dropped: dict[bytes, int] = {}
        spared = set[bytes]()
        if self._disk is not None and tier in (None, "disk"):
            infos = {info.key: info for info in self._disk.catalog.subtree(keys)}
            gone = self._disk.evict(infos)
            dropped |= {key: infos[key].nbytes for key in gone}
            spared |= infos.keys() - set(gone)
            if self._cpu is not None:
                self._cpu.left_disk(gone)
        for memory in self._memory:
            if tier not in (None, memory.name):
                continue
            infos = {info.key: info for info in memory.subtree(keys)}
            pinned = {key for held in self.pins().values() for key in held} & infos.keys()
            safe = self._disk.catalog.get(list(pinned)) if self._disk is not None else {}
            gone = memory.evict(infos, pinned - safe.keys())
            dropped |= {key: infos[key].nbytes for key in gone}
            spared |= infos.keys() - set(gone)
        return EvictReport(len(dropped), sum(dropped.values()), len(spared))

    @explicit()
    def remove(self, what: str | bytes | Iterable[bytes]) -> int:
        """Delete a sequence and the blocks before it that nothing else needs.

        Args:
            what: A pinned name; the last key of a sequence, or its first digits; or exactly the keys to delete.

        Returns:
            Number of blocks deleted.
        """
        self._begin_change()
        if isinstance(what, str) and what in self.pins():
            return self.forget(what)
        if not isinstance(what, str | bytes):
            return self._erase(list(what))
        eraser = Eraser(self)
        eraser.chain([info.key for info in self._chain(self._find(what))])
        return eraser.blocks

    def forget(self, what: str | Iterable[bytes] | Named | Forgettable) -> int:
        """Erase a text: unpin it and erase every block that only its text needed, what was asked about it included.

        Blocks before it that lead to other sequences, and blocks pinned under other names, stay.

        Args:
            what: The name it is pinned under, something with that ``name`` (a document), a session of this store
                (its words go too, see `Session.forget`), or its keys; keys are given root side first, here and when
                they were pinned.

        Returns:
            Number of blocks erased.

        Raises:
            ConfigError: Nothing is pinned under this name, or it is a session of another store.
        """
        return (what.forget_in(self) if isinstance(what, Forgettable) else self._forget(what)).blocks

    @explicit()
    def _forget(self, what: str | Iterable[bytes] | Named) -> ForgetReport:
        """Erase as `forget` does, and say what a scan of the folder found afterwards."""
        self._begin_change()
        keys: list[bytes]
        if isinstance(what, str) or isinstance(getattr(what, "name", None), str):
            name = what if isinstance(what, str) else str(getattr(what, "name", ""))
            keys = self.pins().get(name, [])
            if not keys:
                raise ConfigError(f"nothing is pinned under {name!r}; pass keys to forget what is not pinned")
            self.unpin(name)
        else:
            keys = list(cast("Iterable[bytes]", what))
        if not keys:
            return ForgetReport()
        eraser = Eraser(self)
        eraser.sequence(keys)
        return eraser.report()

    def _erase(self, keys: list[bytes], *, traces: bool = True) -> int:
        """Delete blocks in every tier, and with ``traces`` what the log of calls says of them."""
        here = set[bytes]()
        if traces:
            self._ledger.forget(keys)
            if self._admission is not None:
                self._admission.forget(keys)
        for tier in self._memory:
            here.update(info.key for info in tier.contains(keys) if info is not None)
            tier.remove(keys)
        if self._disk is not None:
            here.update(self._disk.catalog.get(keys))
            self._disk.remove(keys)
            self._disk.empty_quarantine(keys)
        return len(here)

    @explicit()
    def clear(self) -> int:
        """Delete every block in every tier, pinned ones too; return how many there were."""
        self._begin_change()
        for name in self.pins():
            self.unpin(name)
        keys = set(self._in_memory())
        for tier in self._memory:
            tier.clear()
        self._ledger.forget(None)
        if self._admission is not None:
            self._admission.forget(None)
        if self._disk is not None:
            keys.update(row.info.key for row in self._disk.catalog.rows())
            self._disk.clear()
            self._disk.empty_quarantine(None)
        return len(keys)

    # -- taking along ------------------------------------------------------------------------------

    @explicit()
    def export(
        self, path: str | os.PathLike[str], what: str | bytes | Iterable[bytes] | Named, *, plain: bool = False
    ) -> ExportReport:
        """Write the blocks of a sequence to one file that another store can import.

        The file of an encrypted store is encrypted with the same key. Any other holds the text's token ids and KV in
        the clear, whoever has it has the text.

        Args:
            path: The file; replaced when it is there, mode 0600.
            what: A pinned name, or something with that ``name`` (a document); the last key of a sequence, or its
                first digits; or keys, each after the one it follows.
            plain: Do not encrypt the file, even if the store is.

        Raises:
            ConfigError: Nothing goes by this name, or it is not stored (any more).
        """
        from kvembed._portable import export_blocks

        self._enter()
        self._flush()
        name = what if isinstance(what, str) else getattr(what, "name", None)
        if isinstance(name, str) and name in self.pins():
            keys = self.pins()[name]
        elif isinstance(what, str | bytes):
            keys = [info.key for info in self._chain(self._find(what))]
        elif isinstance(name, str):
            raise ConfigError(f"nothing is pinned under {name!r}; export it with CachedModel.export")
        else:
            keys = list(cast("Iterable[bytes]", what))
        if not keys:
            raise ConfigError("nothing to export: no keys were given")
        return export_blocks(self, path, [(key, None) for key in keys], plain=plain)

    @explicit()
    def import_(
        self,
        path: str | os.PathLike[str],
        *,
        pin: str | None = None,
        any_model: bool = False,
        key: Key | None = None,
    ) -> ImportReport:
        """Take in the blocks of a file that `export` wrote, each checked to its last byte, within the budgets.

        What cannot be checked is whether the KV is really what the model computes: import only what you trust, or
        compute it again with `CachedModel.recheck`.

        Args:
            path: The file.
            pin: Name to pin them under.
            any_model: Take blocks of a model that this store knows nothing of; otherwise only an empty store does.
            key: Of an encrypted file, as for `KVStore`; the store's own when None.

        Raises:
            ModelMismatchError: Only other models have blocks here; says what differs from the nearest.
            BlockFormatError: The file is damaged, or no export.
            StoreFormatError: It was written by another version.
            StoreKeyError: It is encrypted, with another key.
        """
        from kvembed._portable import refuse_other_models

        ours = self.namespaces()

        def accept(theirs: Mapping[bytes, Mapping[str, Any]]) -> None:
            if ours and not any_model:
                refuse_other_models(ours, theirs)
            for digest in theirs.keys() - ours.keys():
                self.register_namespace(digest, dict(theirs[digest]))

        return self._take_in(path, accept, None, pin, key)

    @explicit()
    def _take_in(
        self,
        path: str | os.PathLike[str],
        accept: Callable[[Mapping[bytes, Mapping[str, Any]]], None],
        root: bytes | None,
        pin: str | None,
        key: Key | None = None,
    ) -> ImportReport:
        from kvembed._portable import import_blocks

        self._begin_change()
        codec = None
        if key is not None:
            from kvembed._encryption.sealed import SealedCodec
            from kvembed._encryption.sources import resolve_key

            codec = SealedCodec(resolve_key(key), b"")
        report = import_blocks(self, path, accept=accept, root=root, codec=codec)
        if pin is not None and report.keys:
            self.pin(report.keys, pin)
        return report

    # -- checking ----------------------------------------------------------------------------------

    @explicit()
    def verify(
        self,
        fix: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        keys: Iterable[bytes] | None = None,
    ) -> VerifyReport:
        """Check the folder: every file read to its end, files against catalog and catalog against files.

        Args:
            fix: Repair what is wrong: bad files are quarantined, rows without files deleted, files without
                rows entered, left-over temporary files deleted, modes made private.
            on_progress: Called with files done and files in all.
            keys: Check these blocks only.
        """
        self._enter()
        if fix:
            self._begin_change()
        else:
            self._flush()
        if self._disk is None or self.path is None:
            return VerifyReport(0, 0)
        from kvembed._verify import verify_blocks, verify_folder

        if keys is not None:
            return verify_blocks(self._disk, list(keys), fix, on_progress)
        return verify_folder(self._disk, fix, on_progress)
