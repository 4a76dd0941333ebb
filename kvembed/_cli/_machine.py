"""What kind of machine this is: cores, file system, and how fast bytes move."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

__all__ = ["cores", "disk_rates", "existing_parent", "file_system", "is_network", "is_writable", "memcpy_rate"]

_NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb2", "smb3", "smbfs", "virtiofs"}
_NETWORK_FUSE = {
    "fuse.sshfs",
    "fuse.glusterfs",
    "fuse.cephfs",
    "fuse.s3fs",
    "fuse.gcsfuse",
    "fuse.rclone",
    "fuse.juicefs",
}

_COPY_BYTES = 64 * 2**20
_DISK_BYTES = 64 * 2**20


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def existing_parent(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    return next((p for p in (path, *path.parents) if p.exists()), Path(path.anchor or "."))


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Return the kind of file system a path is on, or None where this cannot be told."""
    place = os.path.realpath(existing_parent(path))
    best, kind = "", None
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        left, _, right = line.partition(" - ")
        if not right:
            continue
        point = left.split()[4].replace("\\040", " ")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        # Not only longer ones: a later mount on the same point hides the earlier.
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def is_network(kind: str | None) -> bool:
    """Return True for file systems shared over a network, where SQLite's WAL mode is not safe."""
    return kind in _NETWORK or kind in _NETWORK_FUSE


def is_writable(path: Path) -> bool:
    """Return True when files can be made in a folder, or in the nearest existing one above it."""
    folder = existing_parent(path)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def memcpy_rate(seconds: float = 0.2) -> float:
    """Return how fast memory is copied, in bytes a second (one thread, blocks larger than the caches)."""
    import numpy as np

    source, target = np.ones(_COPY_BYTES, np.uint8), np.ones(_COPY_BYTES, np.uint8)
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        np.copyto(target, source)
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= until:
            return _COPY_BYTES / best


def disk_rates(folder: Path) -> tuple[float, float] | None:
    """Return how fast a file is written to disk and read back, in bytes a second; None when it cannot be written.

    The write is synced, so it is the disk's own speed. The read comes from the page cache, as most reads of a
    recently used store do: dropping the cache needs rights that a user does not have.
    """
    data = os.urandom(2**20) * (_DISK_BYTES // 2**20)
    try:
        with tempfile.TemporaryFile(dir=existing_parent(folder), buffering=0) as file:
            began = time.perf_counter()
            view = memoryview(data)
            while view:
                view = view[file.write(view) or 0 :]
            os.fsync(file.fileno())
            written = time.perf_counter() - began
            file.seek(0)
            target = memoryview(bytearray(_DISK_BYTES))
            began, at = time.perf_counter(), 0
            while at < _DISK_BYTES:
                got = file.readinto(target[at:])
                if not got:
                    return None
                at += got
            return _DISK_BYTES / written, _DISK_BYTES / (time.perf_counter() - began)
    except OSError:
        return None
