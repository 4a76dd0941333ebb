"""Small file operations: private folders and files, whole writes, and reads at an offset.

What differs between systems is here and nowhere else. `os.writev` and `os.preadv` are missing on Windows
(and `preadv` on old macOS), so each has a portable twin, which tests call by name.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import stat
import threading
from typing import TYPE_CHECKING, Protocol

from kvembed._errors import BlockFormatError
from kvembed._paths import make_private_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = [
    "RandomAccess",
    "create_private",
    "disk_usage",
    "fsync_dir",
    "is_temp_name",
    "open_regular",
    "random_access",
    "read_small",
    "shown",
    "temp_path",
    "unlink_quietly",
    "write_all",
    "write_all_portable",
    "write_file",
]

_IOV_MAX = 1024
_FOLDER_TRIES = 20
# What opening says to a symbolic link (two systems, two answers), a socket or a device.
_NOT_A_FILE = {errno.ELOOP, getattr(errno, "EMLINK", errno.ELOOP), errno.ENXIO, errno.EISDIR}
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class RandomAccess(Protocol):
    """An open file that several threads read at offsets of their own."""

    def read(self, nbytes: int, offset: int) -> bytes:
        """Return ``nbytes`` bytes at ``offset``, fewer only at the end of the file."""
        ...

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill ``buffers`` one after the other from ``offset`` on.

        Raises:
            BlockFormatError: The file ends too early.
        """
        ...

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        ...


def _advance(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """Return what is left of ``buffers`` after their first ``nbytes`` bytes."""
    for i, view in enumerate(buffers):
        if nbytes < len(view):
            return [view[nbytes:], *buffers[i + 1 :]]
        nbytes -= len(view)
    return []


def _read_whole(read: Callable[[int, int], bytes | None], nbytes: int) -> bytes:
    """Call ``read(bytes wanted, bytes so far)`` until there is enough or the file ends.

    A read may return less than asked, on network file systems above all. Taken for the end of the file that would
    condemn a good one.
    """
    data = read(nbytes, 0) or b""
    while len(data) < nbytes:
        more = read(nbytes - len(data), len(data))
        if not more:
            break
        data += more
    return data


class _PositionalFile:
    """`RandomAccess` over ``os.preadv``: no seek, so no lock between threads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, nbytes: int, offset: int) -> bytes:
        return _read_whole(lambda n, done: os.pread(self._fd, n, offset + done), nbytes)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        left: Sequence[memoryview] = buffers
        while left:
            n = os.preadv(self._fd, left[:_IOV_MAX], offset)
            if n <= 0:
                raise BlockFormatError("the file ends before its data does")
            offset += n
            left = _advance(left, n)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # it was only read: there is nothing to lose
                os.close(fd)

    __del__ = close


class _SeekingFile:
    """`RandomAccess` with seek and readinto under a lock, for systems without ``os.preadv``."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "rb", buffering=0)
        self._lock = threading.Lock()

    def read(self, nbytes: int, offset: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return _read_whole(lambda n, _: self._file.read(n), nbytes)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._lock:
            self._file.seek(offset)
            for view in buffers:
                left = view
                while left:
                    n = self._file.readinto(left)
                    if not n:
                        raise BlockFormatError("the file ends before its data does")
                    left = left[n:]

    def close(self) -> None:
        self._file.close()

    __del__ = close


def random_access(fd: int, *, portable: bool = False) -> RandomAccess:
    """Return a reader that owns ``fd``; ``portable`` asks for the one that works on every system."""
    return _SeekingFile(fd) if portable or not hasattr(os, "preadv") else _PositionalFile(fd)


def open_regular(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Open a regular file for reading and return its descriptor and size.

    A symbolic link is refused, and a FIFO neither blocks nor is read: what lies in the folder of a store
    must not send the reader elsewhere or hang it.

    Raises:
        FileNotFoundError: There is no such file.
        BlockFormatError: It is not a regular file.
        OSError: It cannot be opened now, which says nothing about the file (too many are open ...).
    """
    flags = os.O_RDONLY | _BINARY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise BlockFormatError("not a regular file") from error
        raise
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise BlockFormatError("not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd, info.st_size


def read_small(path: str | os.PathLike[str], limit: int = 1 << 20) -> bytes:
    """Return the content of a small regular file; raises like `open_regular`, and when it is larger than ``limit``."""
    fd, size = open_regular(path)
    file = random_access(fd)
    try:
        if size > limit:
            raise BlockFormatError(f"larger than {limit:,} bytes")
        return file.read(size, 0)
    finally:
        file.close()


def shown(name: str) -> str:
    """Return a file's name as it can be printed: one with control characters or broken bytes is escaped."""
    return name if name.isprintable() else ascii(name)


def write_all_portable(fd: int, buffers: Sequence[memoryview]) -> None:
    """Write every byte of ``buffers`` with ``os.write``."""
    for view in buffers:
        left = view
        while left:
            n = os.write(fd, left)
            if n <= 0:
                raise OSError("the system wrote nothing")
            left = left[n:]


def write_all(fd: int, buffers: Sequence[memoryview]) -> None:
    """Write every byte of ``buffers``, in one call where the system can.

    ``writev`` may write less than asked (a signal, a nearly full disk, more than 2 GiB), so this loops.
    """
    if not hasattr(os, "writev"):
        write_all_portable(fd, buffers)
        return
    left: Sequence[memoryview] = [view for view in buffers if len(view)]
    while left:
        n = os.writev(fd, left[:_IOV_MAX])
        if n <= 0:
            # Not retried: a zero return that repeats would spin here for ever.
            raise OSError("the system wrote nothing")
        left = _advance(left, n)


def temp_path(path: Path) -> Path:
    """Return a name beside ``path`` that no other writer uses."""
    return path.parent / f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def is_temp_name(name: str) -> bool:
    """Return True for names made by `temp_path`."""
    return name.startswith(".") and name.endswith(".tmp")


def create_private(path: Path) -> int:
    """Create a file of mode 0600, whatever the umask is, and return its descriptor, open for writing.

    Raises:
        OSError: There is such a file, or it cannot be created.
    """
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _BINARY, 0o600)
    try:
        if os.fstat(fd).st_mode & 0o600 != 0o600 and hasattr(os, "fchmod"):
            with contextlib.suppress(PermissionError):  # file systems without modes
                os.fchmod(fd, 0o600)  # the umask has taken even the owner's rights
    except BaseException:
        os.close(fd)
        raise
    return fd


def _create(path: Path) -> tuple[int, bool]:
    """Create a private file; return its descriptor, and whether its folder had to be made."""
    for tries in itertools.count():
        try:
            return create_private(path), tries > 0
        except FileNotFoundError:
            # Also when another process has removed the folder because it was empty, at any point of this loop.
            if tries == _FOLDER_TRIES:
                raise
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            make_private_dir(path.parent)
    raise AssertionError("unreachable")


def write_file(path: Path, buffers: Sequence[memoryview], *, sync: bool = False) -> None:
    """Write a private file under a temporary name and rename it to ``path``.

    Readers see the old file or the new one, never a part. The mode is 0600 whatever the umask is.

    Args:
        path: Where the file goes; its folder is created when missing.
        buffers: The content, as byte views.
        sync: Wait until file and folder are on the device. Without it a power cut may leave a file with
            holes, which its checksums tell.

    Raises:
        OSError: The disk is full, the folder cannot be written ...; nothing is left behind.
    """
    temp = temp_path(path)
    try:
        fd, new_folder = _create(temp)
        try:
            write_all(fd, buffers)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        temp.replace(path)
    except BaseException:
        unlink_quietly(temp)
        raise
    if sync:
        with contextlib.suppress(FileNotFoundError):  # deleted by another process, and its folder with it
            fsync_dir(path.parent)
        if new_folder:
            fsync_dir(path.parent.parent)


def fsync_dir(path: Path) -> None:
    """Make renames in a folder durable, where the system knows how."""
    if os.name == "nt":
        return  # Windows cannot open folders; NTFS keeps its own journal of renames
    fd = os.open(path, os.O_RDONLY | _BINARY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unlink_quietly(path: Path) -> bool:
    """Delete a file; False when it was not there or cannot be deleted."""
    with contextlib.suppress(OSError):
        path.unlink()
        return True
    return False


def disk_usage(nbytes: int) -> int:
    """Return what a file of ``nbytes`` takes on a disk: whole pages of 4096 bytes, at least one."""
    return max(1, -(-nbytes // 4096)) * 4096
