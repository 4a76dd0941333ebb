"""`KVStore`: the tiers, their budgets and the catalog behind one object, shared by models and processes."""

from __future__ import annotations

import functools
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from kvembed._budgets import check_gpu_budget, cpu_budget, free_gpu_memory, gpu_budget
from kvembed._codecs.names import LOSSLESS, check_codec
from kvembed._errors import ConfigError, KVEmbedError, StoreClosedError, StoreWarning
from kvembed._html import mimebundle, panel
from kvembed._ledger import Ledger
from kvembed._stats import StoreStats
from kvembed._store_finder import StoreFinder
from kvembed._store_types import PrefixEntry, ProblemLog, PruneReport, StoredBlock, VerifyReport
from kvembed._tiers.cpu import CpuTier
from kvembed._writer import Writer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    import torch

    from kvembed._admission import Admission
    from kvembed._block import Block
    from kvembed._catalog import Catalog
    from kvembed._encryption.sources import Key
    from kvembed._keys import TokenIds
    from kvembed._tiers.disk import DiskTier
    from kvembed._tiers.gpu import GpuTier
    from kvembed._transfer import Transfers
    from kvembed._usage import Usage

__all__ = ["KVStore", "PrefixEntry", "PruneReport", "StoreStats", "StoredBlock", "VerifyReport"]


class KVStore(StoreFinder):
    """Where blocks are kept: in host memory and in a folder on disk.

    Any number of stores, in any number of processes, may use one folder at the same time. Opening is
    cheap, and nothing runs in the background until the first block is put.

    Args:
        path: Folder on disk; the default is the ``store`` folder in kvembed's cache folder.
        max_cpu_bytes: Budget in host memory: bytes, ``"4GiB"``, ``"10%"`` of memory, or None for none. ``"auto"``
            is 4 GiB, at most a quarter of the memory.
        max_gpu_bytes: Budget on the devices that models compute on, live caches and blocks together: as above,
            percentages are of what is free once the first model is there. ``"auto"`` is half of that, and nothing
            without a GPU.
        max_disk_bytes: Budget on disk as `du` counts it; as above, percentages are of the free space. ``"auto"``
            is 20 GiB, at most a quarter of the free space. Shares follow the free space as it changes. None keeps
            everything in memory.
        max_write_bytes_per_day: Most that is written to disk in a day, by all processes; as above, percentages are
            of the disk's size. ``"auto"`` is a tenth of it, 8 to 200 GiB. None for no limit. What is pinned is written
            all the same; see ``docs/howto/budgets.md``.
        max_namespace_bytes: Most that the blocks of one model take on disk: one size for all, or sizes by the
            model's name or its fingerprint's first digits, ``"*"`` for the others; percentages are of the disk budget.
        write_policy: What is written to disk: ``"always"`` everything; ``"worth"`` what takes longer to compute than
            to write and read, as far as measured; ``"seen-twice"`` what a second call uses.
        ttl: Drop blocks on disk that were not used for so long: seconds, or text such as ``"30d"``.
        durability: ``"fast"`` survives a crash of the process; ``"safe"`` also waits for the device at every
            block, so that a power cut loses at most the newest one.
        key: Encrypts what is on disk (``pip install 'kvembed[encryption]'``): 32 bytes, a function that returns them,
            ``"env"`` for the variable ``KVEMBED_KEY``, or ``"keyring"`` (``"keyring:name"``) for the keyring of the
            operating system. A new or empty folder becomes an encrypted store, which is opened with the same key from
            then on; None takes ``KVEMBED_KEY`` for one that is encrypted. See ``docs/howto/encryption.md``.
        codec: How keys and values are stored in host memory and on disk: ``"lossless"``, or smaller with a small error:
            ``"bf16"`` (for models in float32), ``"k16v8"``, ``"int8"``, ``"fp8"``. A store reads what is stored at
            least as faithfully as its codec does it, so a lossless one never reads a lossy block. What a call computes
            on top of lossy KV is stored as lossy too, and ``usage.lossy`` names the codec.
        read_only: True never writes to the folder. None finds out: a store in a folder that cannot be
            written is opened read-only, with a `StoreWarning`.

    Raises:
        ConfigError: A budget, the path, the codec or the key cannot work.
        StoreKeyError: The store is encrypted, and this is not its key; or it is not, and has blocks.
        StoreReadOnlyError: The folder cannot be written and holds no store.
        StoreFormatError: The store was written by a newer kvembed.
    """

    _made_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_cpu_bytes: int | str | None = "auto",
        max_gpu_bytes: int | str | None = "auto",
        max_disk_bytes: int | str | None = "auto",
        max_write_bytes_per_day: int | str | None = "auto",
        max_namespace_bytes: int | str | Mapping[str, int | str] | None = None,
        write_policy: str = "always",
        ttl: int | float | str | None = None,
        durability: str = "fast",
        key: Key | None = None,
        codec: str = LOSSLESS,
        read_only: bool | None = None,
    ) -> None:
        from kvembed._store_open import DiskOptions, chores, open_disk, open_folder

        check_gpu_budget(max_gpu_bytes)
        self._gpu: GpuTier | None = None
        self._gpu_value = max_gpu_bytes
        self._options = options = DiskOptions(
            max_disk_bytes, max_write_bytes_per_day, max_namespace_bytes, write_policy, ttl, durability, key
        )
        self._codec = check_codec(codec)
        self._closed = False
        self._pid = os.getpid()
        self._problems = ProblemLog()
        self._lock = threading.Lock()
        self._ids: OrderedDict[bytes, TokenIds] = OrderedDict()
        self._spaces: dict[bytes, dict[str, Any]] = {}
        self._notes: dict[tuple[bytes, str], Any] = {}
        self._memory_pins: dict[str, list[bytes]] = {}
        self._tier_hits: dict[str, list[int]] = {name: [0, 0, 0] for name in ("gpu", "cpu", "disk")}
        # What tiers and writer call must not be methods of the store: they would keep it alive.
        self._seconds_per_token: dict[bytes, float] = {}
        memory = cpu_budget(max_cpu_bytes)
        self._cpu: CpuTier | None = CpuTier(memory, self._seconds_per_token.get) if memory else None
        self._disk: DiskTier | None = None
        self._catalog: Catalog | None = None
        self._admission: Admission | None = None
        self._ledger = Ledger(None)
        self._read_only = bool(read_only)
        self.path: Path | None = None
        housekeeping = None
        if options.on:
            opened = open_folder(path, read_only, sync=durability == "safe", key=key)
            self.path, self._catalog, self._read_only = opened.path, opened.catalog, opened.read_only
            if opened.catalog is not None:
                try:
                    disk, self._ledger, self._admission = open_disk(
                        opened, opened.catalog, options, self._problems.report, self._seconds_per_token.get
                    )
                except BaseException:
                    opened.catalog.close()
                    raise
                self._disk = disk
                if not opened.read_only:
                    cpu, ttl_s = self._cpu, options.ttl_s
                    housekeeping = lambda: chores(disk, cpu, ttl_s)  # noqa: E731 - a def would be Optional to pyright
            for message in opened.warnings:
                warnings.warn(message, StoreWarning, stacklevel=2)
        self._writer = Writer(
            self._cpu,
            self._disk,
            self._problems.report,
            writable=not self._read_only,
            housekeeping=housekeeping,
            admission=None if self._read_only else self._admission,
        )
        # When the store is dropped without close() the thread finishes its queue and ends.
        weakref.finalize(self, self._writer.request_stop).atexit = False

    def __new__(cls, *args: Any, **kwargs: Any) -> KVStore:
        """Remember how the store was made, for `__reduce__`."""
        store = super().__new__(cls)
        store._made_with = args[1:], kwargs
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the same folder in the process that unpickles this: what a spawned process is handed."""
        if self.path is None:
            raise ConfigError("a store in memory only cannot be handed to another process; give it a path")
        args, kwargs = self._made_with
        return functools.partial(type(self), **{**kwargs, "path": self.path}), args

    # -- guards ------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Check that the store may be used; every public method begins with this."""
        if self._closed:
            raise StoreClosedError("this store is closed; open it again with KVStore(path)")
        self._check_fork()

    def _check_fork(self) -> None:
        if self._pid != os.getpid():
            # Threads and locks do not survive fork(), and SQLite connections must not.
            self._pid = os.getpid()
            self._lock = threading.Lock()
            self._problems.after_fork()
            self._writer.after_fork()
            if self._catalog is not None:
                self._catalog.after_fork()
            if self._cpu is not None:
                self._cpu.after_fork()
            self._gpu = None  # no driver lets a forked child use the parent's device
            self._ledger.after_fork()
            if self._admission is not None:
                self._admission.after_fork()

    def _writable(self) -> DiskTier | None:
        return None if self._read_only else self._disk

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    @property
    def max_cpu_bytes(self) -> int:
        """Budget in host memory, 0 when the tier is off."""
        return self._cpu.max_bytes if self._cpu is not None else 0

    @property
    def max_gpu_bytes(self) -> int:
        """Budget on the devices, 0 when the tier is off or no model is on one yet."""
        return self._gpu.max_bytes if self._gpu is not None else 0

    @property
    def max_disk_bytes(self) -> int:
        """Budget on disk, 0 when the tier is off."""
        return self._disk.max_bytes if self._disk is not None else 0

    # -- writing -----------------------------------------------------------------------------------

    def put(self, block: Block) -> None:
        """Keep a block in the store's codec: in memory now, on disk soon after.

        It waits when blocks come faster than the disk takes them and memory is full. Trouble with the
        disk does not raise; see `take_problems`.
        """
        self._enter()
        if self._codec != LOSSLESS:
            from kvembed._codecs.blocks import encoded_block

            block = encoded_block(block, self._codec)
        with self._quiet("put"):
            self._writer.put(block)

    def promote(self, keys: Iterable[bytes]) -> None:
        """Have blocks on disk copied into host memory in the background, as far as they fit."""
        self._enter()
        self._writer.promote(keys)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Mark the whole blocks of a call (root side first) as used now; they will be evicted later than others."""
        self._enter()
        keys = list(keys)
        here = self._cpu.contains(keys[:1])[0] if self._cpu is not None and keys else None
        for tier in self._memory:
            tier.touch(keys)
        disk = self._writable()
        if disk is not None:
            disk.touch(keys)
            self._ledger.log_later(keys, here.nbytes if here is not None else 0)
            self._writer.note_touches()
            if self._admission is not None:
                with self._quiet("touch"):
                    again = self._admission.used(keys)
                    if again:
                        self._writer.write_again(again)

    def record(self, usage: Usage) -> None:
        """Count what a call reused and saved; one that went to transformers untouched is not counted."""
        self._enter()
        if usage.bypass_reason is not None:
            return
        reused = {f"reused_{tier}": n for tier, n in usage.cached_tokens_by_tier.items()}
        self._ledger.note_call(usage.prompt_tokens, usage.cached_tokens)
        self._ledger.add_later(calls=1, prompt_tokens=usage.prompt_tokens, saved_s=usage.saved_s or 0.0, **reused)
        if self._writable() is not None:
            self._writer.note_touches()

    def discard(self, key: bytes, reason: str) -> None:
        """Drop a block that turned out to be wrong; its file is kept aside as evidence."""
        self._enter()
        for tier in self._memory:
            tier.remove([key])
        if self._disk is not None:
            with self._quiet("discard"):
                self._disk.quarantine(key, reason)
        else:
            self._problems.report(f"bad:{key.hex()}", f"block {key.hex()[:12]} was dropped: {reason}")

    def reserve(self, owner: str, nbytes: int, *, on_device: bool = False) -> None:
        """Count bytes of a live cache against the budget of host memory, or of devices; 0 gives them back."""
        self._enter()
        tier = self._gpu if on_device else self._cpu
        if tier is not None:
            tier.reserve(owner, nbytes)

    def use_devices(self, transfers: Transfers, devices: Sequence[torch.device]) -> None:
        """Make the gpu tier, for a model that computes on ``devices``; its budget is set by the first such model."""
        self._enter()
        if self._gpu is not None or not devices:
            return
        budget = gpu_budget(self._gpu_value, free_gpu_memory(devices))
        if budget:
            from kvembed._tiers.gpu import GpuTier, keeper

            keep = keeper(self._cpu, self._disk)
            self._gpu = GpuTier(budget, transfers, devices[0], keep, self._seconds_per_token.get)

    def put_on_device(self, block: Block) -> bool:
        """Keep a block in the memory of its device too; False when there is no room, or no such tier."""
        self._enter()
        return self._gpu is not None and self._gpu.put(block)

    def on_device(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks the gpu tier has."""
        return [info is not None for info in self._gpu.contains(keys)] if self._gpu is not None else [False] * len(keys)

    def report_problem(self, kind: str, message: str) -> None:
        """Note something that the user should be told once; see `take_problems`."""
        self._problems.report(kind, message)

    def take_problems(self) -> list[str]:
        """Return what went wrong since the last call, each kind of problem once; also after `close`."""
        self._check_fork()
        return self._problems.take()

    # -- end ---------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything put so far is on disk.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            False when time ran out.
        """
        self._enter()
        return self._flush(timeout)

    def _flush(self, timeout: float | None = None) -> bool:
        done = self._writer.flush(timeout)
        if self._catalog is not None and not self._read_only:
            with self._quiet("flush"):
                self._catalog.flush_touches()
                self._ledger.flush()
        return done

    def close(self) -> None:
        """Write what is left and release everything; harmless when repeated."""
        if self._closed:
            return
        self._enter()
        self._writer.close()
        self._flush()
        self._closed = True
        if self._catalog is not None:
            self._catalog.close()
        for tier in self._memory:
            tier.clear()

    def __enter__(self) -> KVStore:
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    def __repr__(self) -> str:
        """Return one line."""
        where = "memory only" if self.path is None else repr(str(self.path))
        states = {
            self._codec: self._codec != LOSSLESS,
            "encrypted": self.encrypted,
            "read-only": self._read_only,
            "closed": self._closed,
        }
        return f"KVStore({', '.join([where, *(state for state, is_so in states.items() if is_so)])})"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        """Return `stats` for a notebook, or one line when they cannot be read."""
        try:
            markup = self.stats()._repr_html_()
        except KVEmbedError:
            markup = panel(repr(self))
        return mimebundle(repr(self), markup, include, exclude)
