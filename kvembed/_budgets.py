"""Budgets of the tiers: what the user wrote, or a share of what the machine has."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError
from kvembed._units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

__all__ = [
    "DiskBudget",
    "NamespaceQuotas",
    "check_gpu_budget",
    "cpu_budget",
    "disk_budget",
    "free_gpu_memory",
    "gpu_budget",
    "has_gpu",
    "physical_memory",
    "write_budget",
]

_AUTO_CPU = 4 << 30
_AUTO_DISK = 20 << 30
_AUTO_WRITES = (8 << 30, 200 << 30)
_LOOK_AGAIN_S = 10.0
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


def has_gpu() -> bool:
    """True when torch finds a device beside the CPU."""
    import torch

    return torch.accelerator.is_available()


def free_gpu_memory(devices: Iterable[torch.device]) -> int:
    """Return the free bytes of some devices together; 0 where that cannot be asked."""
    import torch

    free = 0
    for device in devices:
        module: Any = torch.get_device_module(device)
        with contextlib.suppress(RuntimeError, AttributeError):
            if device.type == "mps":
                free += module.recommended_max_memory() - module.driver_allocated_memory()
            else:
                free += module.mem_get_info(device)[0]
    return max(0, free)


def check_gpu_budget(value: int | float | str | None) -> None:
    """Raise unless a budget for devices can be read, and there is a device to have one.

    Raises:
        ConfigError: It cannot work.
    """
    if value is None or value == "auto" or parse_bytes(value, of=1, name="max_gpu_bytes") == 0 == value:
        return
    if not has_gpu():
        raise ConfigError(
            f"max_gpu_bytes={value!r} is for blocks on a GPU, and torch finds none here: leave it out, or install a "
            "build of torch for your device"
        )


def gpu_budget(value: int | float | str | None, free: int) -> int:
    """Return the bytes of the gpu tier; 0 turns it off.

    Args:
        value: Bytes, text such as ``"8GiB"`` or ``"50%"`` (of what is free), ``"auto"``, or None for no tier.
        free: Free bytes of the devices, once the model is on them.

    Raises:
        ConfigError: It cannot be read.
    """
    if value is None:
        return 0
    return free // 2 if value == "auto" else parse_bytes(value, of=free, name="max_gpu_bytes")


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


class DiskBudget:
    """The budget of the disk tier, worked out again as the disk fills.

    A share of what is free shrinks when other programs take space; the store then gives up blocks with its
    next write, and takes the space again when it is free again. Bytes stay what they are.

    Args:
        value: See `disk_budget`.
        folder: An existing folder on the disk in question.
        used: Bytes the store takes already.

    Raises:
        ConfigError: It cannot be read.
    """

    def __init__(self, value: int | float | str | None, folder: Path, used: int) -> None:
        self._value = value
        self._folder = folder
        self._share = isinstance(value, str) and (value == "auto" or value.strip().endswith("%"))
        self._bytes = disk_budget(value, folder, used)
        self._looked = time.monotonic()

    def now(self, used: Callable[[], int]) -> int:
        """Return the bytes of the budget; ``used`` is called when it is time to look at the disk again."""
        if self._share and abs(time.monotonic() - self._looked) >= _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError):
                self._bytes = disk_budget(self._value, self._folder, used())
        return self._bytes


def write_budget(value: int | float | str | None, folder: Path) -> int | None:
    """Return the bytes that may be written to disk in a day; None for no limit.

    ``"auto"`` is a tenth of the disk's size, at least 8 GiB and at most 200 GiB. Consumer SSDs are rated to be
    written over about 600 times (150 TB for 250 GB, 600 TB for 1 TB) in five years, which is a third of their size
    a day; so at most a third of that wear is the store's.

    Args:
        value: Bytes, text such as ``"50GB"`` or ``"5%"`` (of the disk's size), ``"auto"``, or None.
        folder: An existing folder on the disk in question.

    Raises:
        ConfigError: It cannot be read.
    """
    if value is None:
        return None
    size = shutil.disk_usage(folder).total
    if value == "auto":
        return min(max(size // 10, _AUTO_WRITES[0]), _AUTO_WRITES[1])
    return parse_bytes(value, of=size, name="max_write_bytes_per_day")


class NamespaceQuotas:
    """How much of the disk the blocks of one model may take.

    Args:
        value: One size for every model, or sizes by model: by its name, by the first 8 or more hexadecimal digits
            of its fingerprint, and ``"*"`` for all others. Percentages are of the disk budget. None for no quotas.

    Raises:
        ConfigError: A size or a key cannot be read.
    """

    def __init__(self, value: int | float | str | Mapping[str, int | float | str] | None) -> None:
        self._sizes: dict[str, int | float | str] = {}
        if isinstance(value, int | float | str):
            self._sizes["*"] = value
        elif value is not None:
            self._sizes.update(value)
        for name, size in self._sizes.items():
            if not isinstance(name, str) or not name:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigError(f'max_namespace_bytes: keys are names of models, digits or "*", got {name!r}')
            parse_bytes(size, of=1 << 40, name="max_namespace_bytes")

    def __bool__(self) -> bool:
        """Return True when there is any."""
        return bool(self._sizes)

    def of(self, digest: bytes, name: str, budget: int) -> int | None:
        """Return the bytes of one model, or None for no quota.

        Args:
            digest: Its fingerprint.
            name: Its name.
            budget: Bytes of the disk tier.
        """
        digits = digest.hex()
        by_digits = [key for key in self._sizes if len(key) >= 8 and digits.startswith(key.lower())]
        for key in (*sorted(by_digits, key=len, reverse=True), name, "*"):
            if key in self._sizes:
                return parse_bytes(self._sizes[key], of=budget, name="max_namespace_bytes")
        return None
