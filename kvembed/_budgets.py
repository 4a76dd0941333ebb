"""Budgets of the tiers: what the user wrote, or a share of what the machine has."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

from kvembed._units import parse_bytes

__all__ = ["cpu_budget", "disk_budget", "physical_memory"]

_AUTO_CPU = 4 << 30
_AUTO_DISK = 20 << 30
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def physical_memory() -> int:
    """Return the bytes of memory this process may count on: the machine's, or its container's when less."""
    total = 8 << 30  # only where nothing can be asked
    if sys.platform == "win32":
        total = _windows_memory() or total
    elif hasattr(os, "sysconf"):
        with contextlib.suppress(OSError, ValueError):
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in _CGROUP_LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def _windows_memory() -> int | None:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "b", "c", "d", "e", "f")),
        )

    status = Status(length=ctypes.sizeof(Status))
    call = getattr(ctypes, "windll").kernel32.GlobalMemoryStatusEx  # noqa: B009 - exists on Windows only
    return int(status.total) if call(ctypes.byref(status)) else None


def cpu_budget(value: int | float | str | None) -> int:
    """Return the bytes of the cpu tier; 0 turns it off.

    Args:
        value: Bytes, text such as ``"4GiB"`` or ``"10%"`` (of memory), ``"auto"``, or None for no tier.

    Raises:
        ConfigError: It cannot be read.
    """
    if value is None:
        return 0
    memory = physical_memory()
    if value == "auto":
        return min(_AUTO_CPU, memory // 4)
    return parse_bytes(value, of=memory, name="max_cpu_bytes")


def disk_budget(value: int | float | str | None, folder: Path, used: int) -> int:
    """Return the bytes of the disk tier; 0 turns it off.

    Args:
        value: Bytes, text such as ``"50GiB"`` or ``"10%"`` (of what is free), ``"auto"``, or None for no tier.
        folder: An existing folder on the disk in question.
        used: Bytes the store takes already. They count as free: the budget is for the store as a whole,
            and must not shrink each time a full one is opened.

    Raises:
        ConfigError: It cannot be read.
    """
    if value is None:
        return 0
    free = shutil.disk_usage(folder).free + used
    if value == "auto":
        return min(_AUTO_DISK, free // 4)
    return parse_bytes(value, of=free, name="max_disk_bytes")
