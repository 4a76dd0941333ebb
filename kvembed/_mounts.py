"""Whether a folder lies on a network file system, where locks and shared memory are promises nobody has to keep."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["network_filesystem"]

# fmt: off
_NETWORK = frozenset((
    "9p", "afpfs", "afs", "beegfs", "ceph", "cifs", "davfs", "gfs", "gfs2", "glusterfs", "gpfs", "lustre",
    "macfuse", "nfs", "nfs3", "nfs4", "ocfs2", "orangefs", "osxfuse", "panfs", "smb", "smb2", "smb3", "smbfs",
    "sshfs", "webdav",
    "fuse.ceph", "fuse.cifs", "fuse.davfs2", "fuse.gcsfuse", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs",
    "fuse.smbnetfs", "fuse.sshfs",
))
# fmt: on
_ESCAPED = re.compile(r"\\([0-7]{3})")
_MAC_LINE = re.compile(r".* on (/.*) \((\w+)[,)]")
_MAC_TIMEOUT_S = 2.0
_DRIVE_REMOTE = 4


def network_filesystem(path: str | os.PathLike[str], table: str | None = None) -> str | None:
    """Return the type of the network file system ``path`` lies on, or None.

    Linux is asked through ``/proc/self/mountinfo``, macOS through ``mount``, Windows by the type of the drive. Where
    none of that answers, the folder counts as local: a wrong warning on every run would be worse than none.

    Args:
        path: A folder or file; links in it are followed.
        table: The system's mount table to look it up in (mountinfo, or what macOS's ``mount`` prints); None asks the
            system.
    """
    real = os.path.realpath(path)
    if table is None and sys.platform == "win32":
        return _windows_share(real)
    kind = _longest_match(real, _mounts(_read_table() if table is None else table))
    return kind if kind in _NETWORK else None


def _read_table() -> str:
    try:
        if sys.platform == "darwin":
            return subprocess.run(["/sbin/mount"], capture_output=True, text=True, timeout=_MAC_TIMEOUT_S).stdout
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return ""


def _mounts(table: str) -> list[tuple[str, str]]:
    """Return (mount point, type) of every line, in order."""
    result: list[tuple[str, str]] = []
    for line in table.splitlines():
        # 36 35 98:0 /root /mount/point rw,noatime shared:1 - nfs4 server:/export rw,vers=4.2
        left, dash, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ", 1)[0]
        if dash and len(fields) > 5 and kind:
            point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), fields[4])
            result.append((point, kind.lower()))
        elif found := _MAC_LINE.match(line):
            result.append((found[1], found[2].lower()))
    return result


def _longest_match(path: str, mounts: list[tuple[str, str]]) -> str | None:
    best, kind = -1, None
    for point, name in mounts:
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # Of two file systems mounted on one point the later hides the earlier.
        if inside and len(point) >= best:
            best, kind = len(point), name
    return kind


def _windows_share(path: str) -> str | None:
    if path.startswith("\\\\") and not path.startswith(("\\\\?\\", "\\\\.\\")):
        return "smb"
    import ctypes

    root = os.path.splitdrive(path)[0] + "\\"
    windll = getattr(ctypes, "windll", None)
    return "smb" if windll is not None and windll.kernel32.GetDriveTypeW(root) == _DRIVE_REMOTE else None
