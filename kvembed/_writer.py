"""The background writer: one thread that puts blocks on disk while the model goes on computing.

Blocks waiting for the disk live inside the budget of the cpu tier. When it has no room for one more, `put`
waits, so a slow disk slows storing down instead of filling the memory.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import os
import sqlite3
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

from kvembed._errors import BlockFormatError, StoreClosedError
from kvembed._units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvembed._admission import Admission
    from kvembed._block import Block
    from kvembed._tiers.cpu import CpuTier
    from kvembed._tiers.disk import DiskTier

__all__ = ["Writer"]

_PAUSE_S = 30.0
_TOUCH_DELAY_S = 2.0
_NICENESS = 10
_HOUSE_EVERY_S = 900.0


def _close_at_exit(reference: weakref.ref[Writer]) -> None:
    writer = reference()
    if writer is not None:
        writer.close()


class Writer:
    """Writes blocks behind the caller's back, in the order in which they were put.

    The thread starts with the first job, not before. It is a daemon, so a crash elsewhere cannot hang the
    interpreter; what is left at a normal exit is written by an `atexit` hook.

    Args:
        cpu: Tier holding the blocks that wait, or None.
        disk: Tier they go to, or None.
        writable: False reads from ``disk`` only.
        report: Called with a kind and a message when something is wrong.
        housekeeping: Makes work for the thread when it has nothing else to do, in small steps; called again
            now and then.
        admission: What the policy has written.
    """

    def __init__(
        self,
        cpu: CpuTier | None,
        disk: DiskTier | None,
        report: Callable[[str, str], None],
        *,
        writable: bool = True,
        housekeeping: Callable[[], Iterator[None]] | None = None,
        admission: Admission | None = None,
    ) -> None:
        self._cpu = cpu
        self._disk = disk
        self._writable = writable and disk is not None
        self._report = report
        self._chores = housekeeping
        self._admission = admission
        self._paused_until = 0.0
        self._stop = False
        self._at_exit: Callable[[], None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        # Entered by its lock: see `Connections`.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        # True: the block is not in the cpu tier, this queue alone holds it.
        self._blocks: collections.deque[tuple[Block, bool]] = collections.deque()
        self._promotions: collections.deque[bytes] = collections.deque()
        self._touches_due: float | None = None
        self._busy = False
        self._writing = False
        self._housekeeping: Iterator[None] | None = None
        self._house_due = 0.0
        self._thread: threading.Thread | None = None

    def after_fork(self) -> None:
        """Start empty in a forked child: writing what waits is the parent's work."""
        self._reset()

    # -- jobs --------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Number of blocks that wait for the disk."""
        with self._lock:
            return len(self._blocks) + self._writing

    def put(self, block: Block) -> None:
        """Queue ``block``; waits while neither the cpu tier nor the writer can take it."""
        cpu, info = self._cpu, block.info
        if cpu is not None:
            here = cpu.contains([info.key])[0]
            if here is not None and here.rank >= info.rank:
                cpu.touch([info.key])
                return
        writable = self._writable and (self._admission is None or self._admission.wants(info))
        with self._lock:
            while True:
                if not writable or self._stop or time.monotonic() < self._paused_until:
                    if cpu is not None and not cpu.put(block) and info.nbytes > cpu.max_bytes:
                        self._report(
                            "budget:cpu",
                            f"the memory budget of {format_bytes(cpu.max_bytes)} is too small for one block "
                            f"(needs {format_bytes(info.nbytes)}); raise max_cpu_bytes",
                        )
                    return
                if cpu is not None and cpu.put(block, dirty=True):
                    self._blocks.append((block, False))
                    break
                if not self._blocks and not self._busy:
                    self._blocks.append((block, True))
                    break
                self._start()
                if self._thread is None or not self._thread.is_alive():
                    self._drain_here()
                else:
                    # Polled too: a thread that dies would never say so.
                    self._changed.wait(1.0)
            self._start()
            self._changed.notify_all()

    def write_again(self, keys: Iterable[bytes]) -> None:
        """Queue blocks of the cpu tier that were not written when they were put."""
        if self._cpu is None or not self._writable:
            return
        with self._lock:
            if self._stop or time.monotonic() < self._paused_until:
                return
            for key in keys:
                block = self._cpu.take_for_disk(key)
                if block is not None:
                    self._blocks.append((block, False))
            if self._blocks:
                self._start()
                self._changed.notify_all()

    def promote(self, keys: Iterable[bytes]) -> None:
        """Copy blocks from disk into the cpu tier, root side first, as far as they fit."""
        if self._cpu is None or self._disk is None:
            return
        with self._lock:
            waiting = set(self._promotions)
            self._promotions.extend(key for key in keys if key not in waiting)
            if self._promotions:
                self._start()
                self._changed.notify_all()

    def note_touches(self) -> None:
        """Have the catalog's pending touches written soon."""
        if not self._writable:
            return
        with self._lock:
            if self._touches_due is None:
                self._touches_due = time.monotonic() + _TOUCH_DELAY_S
                self._start()
                self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            False when time ran out.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            if self._touches_due is not None:
                self._touches_due = 0.0
                self._changed.notify_all()
            while self._blocks or self._promotions or self._busy or self._touches_due is not None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                if self._thread is None or not self._thread.is_alive():
                    self._drain_here()
                    continue
                self._changed.wait(1.0 if left is None else min(left, 1.0))
        return True

    def close(self) -> None:
        """Write what is left, end the thread; harmless when repeated."""
        with self._lock:
            self._stop = True
            if self._touches_due is not None:
                self._touches_due = 0.0
            self._promotions.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self.flush()
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit = None

    def request_stop(self) -> None:
        """Let the thread finish what is queued and end, without waiting for it."""
        with self._lock:
            self._stop = True
            self._changed.notify_all()

    # -- the thread --------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        if self._at_exit is None:
            # Weak: the hook must not keep the store of a long notebook alive.
            reference: weakref.ref[Writer] = weakref.ref(self)
            self._at_exit = lambda: _close_at_exit(reference)
            atexit.register(self._at_exit)
        thread = threading.Thread(target=self._run, name="kvembed-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return  # the interpreter is ending and starts no threads; flush() does the work itself
        self._thread = thread

    def _run(self) -> None:
        if sys.platform == "linux":
            # On Linux this is the priority of one thread: the model's threads go first.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while self._step():
            pass

    def _step(self) -> bool:
        """Do one job; False when the thread is to end."""
        with self._lock:
            job = self._next_job()
            while job is None:
                if self._stop:
                    return False
                due = self._touches_due
                self._changed.wait(None if due is None else max(0.0, due - time.monotonic()))
                job = self._next_job()
            # Housekeeping does not count: flush() need not wait for it.
            self._busy = job != self._keep_house
        self._do(job)
        with self._lock:
            self._busy = False
            self._changed.notify_all()
        return True

    def _drain_here(self) -> None:
        """Do the jobs in the calling thread, which holds the lock."""
        while (job := self._next_job()) is not None and job != self._keep_house:
            self._do(job)

    def _next_job(self) -> Callable[[], None] | None:
        if self._blocks:
            block, outside = self._blocks.popleft()
            return lambda: self._write(block, outside)
        if self._touches_due is not None and time.monotonic() >= self._touches_due:
            self._touches_due = None
            return self._flush_touches
        if self._promotions:
            key = self._promotions.popleft()
            return lambda: self._promote(key)
        if self._stop or self._chores is None:
            return None
        if self._housekeeping is None and time.monotonic() >= self._house_due:
            # After other work only: a thread that sleeps is not woken for it.
            self._house_due = time.monotonic() + _HOUSE_EVERY_S
            self._housekeeping = self._chores()
        return self._keep_house if self._housekeeping is not None else None

    def _keep_house(self) -> None:
        steps = self._housekeeping
        try:
            if steps is None or next(steps, self) is not self:
                return
        except (OSError, sqlite3.Error) as error:
            self._report("housekeeping", f"cleaning up the store failed: {error}")
        self._housekeeping = None

    def _do(self, job: Callable[[], None]) -> None:
        try:
            job()
        except StoreClosedError:
            pass
        except (OSError, sqlite3.Error) as error:
            if self._disk is not None:
                self._disk.catalog.note_damage(error)
            self._paused_until = time.monotonic() + _PAUSE_S
            self._report(
                "write",
                f"blocks are kept in memory only, writing to disk failed: {error}; tried again in {_PAUSE_S:.0f} s",
            )
        except Exception as error:  # a bug here must not end the thread, and with it all storing
            self._report("writer", f"the background writer failed: {type(error).__name__}: {error}")

    def _write(self, block: Block, outside: bool) -> None:
        cpu, disk = self._cpu, self._disk
        if disk is None:
            return
        if not outside and cpu is not None and not cpu.is_dirty(block):
            return  # removed, or replaced by a better one, while it waited
        self._writing = True
        stored = False
        try:
            if time.monotonic() >= self._paused_until:
                stored = disk.put(block)
        finally:
            self._writing = False
            if cpu is not None:
                cpu.mark_clean(block, on_disk=stored)
        if outside and cpu is not None:
            cpu.put(block, on_disk=stored)

    def _flush_touches(self) -> None:
        if self._disk is not None:
            self._disk.catalog.flush_touches()
        if self._admission is not None:
            self._admission.flush()

    def _promote(self, key: bytes) -> None:
        cpu, disk = self._cpu, self._disk
        if cpu is None or disk is None or cpu.get(key) is not None:
            return
        source = disk.open(key)
        if source is None:
            return
        if source.info.nbytes > cpu.max_bytes:
            source.close()
            return
        try:
            block = source.read_all()
        except BlockFormatError as error:
            disk.quarantine(key, str(error))
            return
        finally:
            source.close()
        if not cpu.put(block, on_disk=True):
            # What follows in the chain would fit even less; reading it would be for nothing.
            with self._lock:
                self._promotions.clear()
