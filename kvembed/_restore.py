"""Restore: fill a cache from blocks, layer by layer, ahead of the compute that reads it.

Readers take layers in order. Each layer of the cache waits at its first ``update()`` until its own rows are
complete, so the first layers compute while the last ones are still being read. Every tensor is checked against its
checksum as it arrives; a bad one stops the forward with `RestoreError` before any token exists, and the call
starts again without that block.

Rows in host memory are read into where they are. Rows on a device are read into staging memory and copied on by the
device's transfer engine: disk, staging and device all work at once, and what a layer waits for is that its copies were
issued; for their end only the device waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._errors import KVEmbedError
from kvembed._tiers.cpu import MemorySource
from kvembed._tiers.gpu import DeviceSource
from kvembed._transfer import Strip, Transfers
from kvembed._transfer.plain import PlainTransfer
from kvembed._transfer.streams import note_use

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvembed._tiers._base import BlockSource
    from kvembed._transfer import Mark, Ticket, TransferEngine

__all__ = ["Piece", "Restore", "RestoreError"]

_INLINE_BYTES = 2 << 20
_READERS = 2


class RestoreError(KVEmbedError):
    """A block could not be read back; the call is repeated without it. Never leaves the package.

    Args:
        key: The block, or None when it is not to blame: then the call is repeated without restoring anything.
        reason: What happened.
    """

    def __init__(self, key: bytes | None, reason: str) -> None:
        super().__init__(reason)
        self.key = key
        self.reason = reason


@dataclass(frozen=True)
class Piece:
    """Part of a block to be restored: its first ``n_tokens`` tokens, at their own positions."""

    source: BlockSource
    n_tokens: int

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.source.info.start

    @property
    def end(self) -> int:
        """Position after the last token restored."""
        return self.start + self.n_tokens


class Restore:
    """One restore into one cache.

    Args:
        cache: A cache of ours: empty, or (without sliding layers) holding the tokens before the first piece.
        pieces: What to read, in order of position, without gaps.
        block_size: Tokens of a full block.
        transfers: Engines of the devices the layers are on; plain ones when None.
        behind: The tokens before the first piece are computed meanwhile, in the same rows (full attention only, in a
            cache with room for all): no layer waits, and none shows what is read until `finish`.
    """

    def __init__(
        self,
        cache: Any,
        pieces: Sequence[Piece],
        block_size: int,
        transfers: Transfers | None = None,
        *,
        behind: bool = False,
    ) -> None:
        transfers = transfers or Transfers(PlainTransfer)
        self._layers = hf.layers_of(cache)
        self._pieces = list(pieces)
        self._length = self._pieces[-1].end
        self._behind = behind
        if behind:
            if any(layer.capacity < self._length for layer in self._layers):
                raise ValueError("no room to read behind a computation")  # growing would move the rows
            self._firsts = [self._pieces[0].start for _ in self._layers]
        else:
            self._firsts = [
                layer.begin_restore(self._length, self._length // block_size * block_size) for layer in self._layers
            ]
        self._engines = [transfers.of(layer.device) for layer in self._layers]
        self._marks: dict[TransferEngine, Mark | None] = {}
        self._resident: list[list[tuple[list[torch.Tensor], DeviceSource, int]]] = [[] for _ in self._layers]
        self._tickets: list[Ticket | None] = [None for _ in self._layers]  # the last of each: see `TransferEngine`
        self._filled = 0
        self._ready = [threading.Event() for _ in self._layers]
        self._lock = threading.Lock()
        self._next = 0
        self._error: RestoreError | None = None
        self._threads: list[threading.Thread] = []
        self._began = time.perf_counter()
        self.seconds = 0.0
        """Wall time from the start to the last byte (it overlaps with the compute)."""

    @property
    def nbytes(self) -> int:
        """Bytes to be read, as they are stored."""
        infos = ((piece.source.info, piece.n_tokens) for piece in self._pieces)
        return sum(info.nbytes * n // info.n_tokens for info, n in infos)

    @property
    def kinds(self) -> set[tuple[str, str]]:
        """Tiers they come from, and codecs they are in."""
        return {(piece.source.tier, piece.source.info.codec) for piece in self._pieces}

    @property
    def length(self) -> int:
        """Tokens the cache holds when the restore is complete."""
        return self._length

    def start(self) -> None:
        """Begin reading; small restores finish here, larger ones in the background.

        Called by the thread that computes: what it has queued so far may still use the memory of the rows.
        """
        self._marks = {engine: engine.mark() for engine in set(self._engines) if not engine.direct}
        if not self._behind:
            for layer in self._layers:
                layer.hold(self)
        if self.nbytes <= _INLINE_BYTES and not self._behind:
            self._read_layers()
            return
        self._threads = [
            threading.Thread(target=self._read_layers, name="kvembed-restore", daemon=True) for _ in range(_READERS)
        ]
        for thread in self._threads:
            thread.start()

    def _read_layers(self) -> None:
        layers = self._layers
        while True:
            with self._lock:
                index, self._next = self._next, self._next + 1
            if index >= len(layers) or self._error is not None:
                break
            self._read_layer(index)
        self.seconds = max(self.seconds, time.perf_counter() - self._began)

    def _read_layer(self, index: int) -> None:
        first = self._firsts[index]
        try:
            for piece in self._pieces:
                start = max(piece.start, first)
                if start < piece.end:  # else outside this layer's window
                    self._read_rows(index, piece, start)
            with self._lock:
                self._filled += 1
        except RestoreError as error:
            self._fail(error)
        except Exception as error:  # whatever it is, these rows must not be used
            self._fail(RestoreError(None, f"{type(error).__name__}: {error}"))
        finally:
            self._ready[index].set()

    def _fail(self, error: RestoreError) -> None:
        self._error = self._error or error
        for event in self._ready:
            event.set()

    def _read_rows(self, index: int, piece: Piece, start: int) -> None:
        """Fill the rows of one layer from one block, from position ``start`` on."""
        layer, engine, skip = self._layers[index], self._engines[index], start - piece.start
        if engine.direct:
            with _blaming(piece):
                layer.load_rows(piece.source, 2 * index, start, piece.end, skip)
            return
        targets = [rows[0] for rows in layer.rows(start, piece.end)]
        if isinstance(piece.source, DeviceSource):
            self._resident[index].append((targets, piece.source, skip))
            return
        if isinstance(piece.source, MemorySource):
            hosts = [piece.source.view(2 * index + i, t.shape[1], skip) for i, t in enumerate(targets)]
            if all(engine.is_pinned(host) for host in hosts):
                strips = [Strip(host, target) for host, target in zip(hosts, targets, strict=True)]
                self._tickets[index] = engine.to_device(strips, self._marks[engine])
                return
        sizes = [target.numel() * target.element_size() for target in targets]
        staging = engine.staging(sum(sizes))
        try:
            parts = staging.array[: sizes[0]], staging.array[sizes[0] :]
            hosts = [part.reshape(*target.shape[:2], -1) for part, target in zip(parts, targets, strict=True)]
            with _blaming(piece):
                piece.source.read_into(2 * index, hosts, skip)
            strips = [Strip(host, target) for host, target in zip(hosts, targets, strict=True)]
            self._tickets[index] = engine.to_device(strips, self._marks[engine], staging)
        finally:
            staging.release()  # unless it was handed over

    def wait(self, layer: int) -> None:
        """Return when the rows of ``layer`` are complete, or will be before the device computes anything more.

        Raises:
            RestoreError: Some block could not be read.
        """
        self._ready[layer].wait()
        if self._error is not None:
            raise self._error
        self._arrive(layer)

    @property
    def complete(self) -> bool:
        """True when every layer's rows were filled: a cache of which that is not true must not be kept."""
        return self._filled == len(self._layers)

    def _arrive(self, layer: int) -> None:
        """Have the calling thread's computations find the rows of a layer; called by the thread that computes."""
        ticket = self._tickets[layer]
        if ticket is not None:
            ticket.wait_compute()
        resident, self._resident[layer] = self._resident[layer], []
        for targets, source, skip in resident:
            # On the device already: a copy among others that compute queues, in order with them.
            for i, target in enumerate(targets):
                tensor = source.on_device(2 * layer + i, target.shape[1], skip)
                note_use(tensor)
                target.view(torch.uint8).copy_(tensor, non_blocking=True)

    def _wait_compute(self) -> None:
        for layer in range(len(self._layers)):
            self._arrive(layer)

    def finish(self) -> None:
        """Wait for the readers and release the blocks; raises `RestoreError` like `wait`."""
        try:
            for thread in self._threads:
                thread.join()
        finally:
            self.close()
        if self._error is not None:
            raise self._error
        self._wait_compute()
        if self._behind:
            for layer in self._layers:
                layer.set_length(self._length)
            self._behind = False

    def cancel(self) -> None:
        """Stop reading (the call is being abandoned) and release the blocks."""
        with self._lock:
            self._next = len(self._layers)
        for thread in self._threads:
            thread.join()
        if not self.complete:
            self._fail(RestoreError(None, "the restore was cancelled"))  # who still waits must not wait for ever
        self._wait_compute()  # the rows that were filled, and those of others once this memory is theirs
        self.close()

    def close(self) -> None:
        """Release the blocks."""
        for piece in self._pieces:
            piece.source.close()


@contextlib.contextmanager
def _blaming(piece: Piece) -> Iterator[None]:
    """Say of an error which block it is of."""
    try:
        yield
    except Exception as error:
        raise RestoreError(piece.source.info.key, f"{type(error).__name__}: {error}") from error
