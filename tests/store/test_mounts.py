"""Network file systems are noticed and said; folders that cannot be written are opened read-only."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from kvembed import KVStore, StoreWarning
from kvembed._mounts import network_filesystem
from kvembed._testing import assert_reads, forget_memory, keys_of, put_all, random_block, random_chain

LINUX = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 21 0:40 / /home rw,relatime shared:2 master:1 - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/me/fast rw - xfs /dev/nvme0n1 rw
32 21 0:42 / /mnt/win\040share rw - cifs //server/share rw
33 21 0:43 / /mnt/ssh rw - fuse.sshfs me@there: rw
34 21 0:44 / /mnt/c rw - 9p drvfs rw
35 21 0:45 / /mnt/local rw - fuse.ntfs-3g /dev/sdb1 rw
36 21 0:46 / /mnt/two rw - nfs server:/two rw
37 21 8:2 / /mnt/two rw - btrfs /dev/sdc rw
a line of some other kind
"""

MAC = """
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
map auto_home on /System/Volumes/Data/home (autofs, automounted, nobrowse)
//me@server/share on /Volumes/share (smbfs, nodev, nosuid, mounted by me)
/dev/disk4s1 on /Volumes/a disk on a shelf (hfs, local, journaled)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX paths")
@pytest.mark.parametrize(
    ("path", "table", "expected"),
    [
        ("/var/cache", LINUX, None),
        ("/home/me/.cache/kvembed/store", LINUX, "nfs4"),
        ("/home", LINUX, "nfs4"),
        ("/homestead", LINUX, None),
        ("/home/me/fast/store", LINUX, None),
        ("/home/me/faster", LINUX, "nfs4"),
        ("/mnt/win share/x", LINUX, "cifs"),
        ("/mnt/ssh/x", LINUX, "fuse.sshfs"),
        ("/mnt/c/Users", LINUX, "9p"),
        ("/mnt/local/x", LINUX, None),
        ("/mnt/two/x", LINUX, None),
        ("/Volumes/share/x", MAC, "smbfs"),
        ("/Volumes/a disk on a shelf/x", MAC, None),
        ("/Users/me", MAC, None),
        ("/anything", "", None),
    ],
)
def test_mount_tables(path: str, table: str, expected: str | None) -> None:
    assert network_filesystem(path, table) == expected


def test_links_are_followed(tmp_path: Path) -> None:
    real = Path(os.path.realpath(tmp_path))
    table = f"1 1 8:1 / / rw - ext4 x rw\n2 1 0:2 / {real / 'net'} rw - nfs4 server:/ rw\n"
    (tmp_path / "net").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "net")
    assert network_filesystem(tmp_path / "link" / "store", table) == "nfs4"
    assert network_filesystem(tmp_path, table) is None


def test_this_machine_is_asked(tmp_path: Path) -> None:
    # Whatever it answers, it answers; on Linux by the table that lies there.
    answer = network_filesystem(tmp_path)
    if sys.platform == "linux":
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        assert answer == network_filesystem(tmp_path, table)


def test_a_store_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("_store_open", "_connections"):
        monkeypatch.setattr(f"kvembed.{module}.network_filesystem", lambda path: "nfs4")
    with pytest.warns(StoreWarning, match=r"network file system \(nfs4\)") as caught:
        store = KVStore(tmp_path)
    assert len(caught) == 1
    with store:
        put_all(store, random_chain(3))
        forget_memory(store)
        for block in random_chain(3):
            assert_reads(store, block, "disk")
        assert store._catalog is not None
        with store._catalog.connection() as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert not (tmp_path / "kvembed.db-shm").exists()
        with pytest.warns(StoreWarning):
            other = KVStore(tmp_path, max_cpu_bytes=None)
        with other:
            assert len(other.lookup(keys_of(random_chain(3)))) == 3
            other.put(random_block(seed=9))
        assert len(store.lookup([random_block(seed=9).key])) == 1
        assert store.verify().problems == ()
    # The folder is used locally again: the journal of a local store, and no warning.
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with KVStore(tmp_path) as store:
            assert store._catalog is not None
            with store._catalog.connection() as db:
                assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.multiprocess
@pytest.mark.skipif(os.name == "nt", reason="modes are a POSIX matter")
@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_that_really_cannot_be_written(killed: bool) -> None:
    # Root may write anywhere, so the reader is somebody else: hence not under tmp_path, which is root's alone.
    with tempfile.TemporaryDirectory() as top:
        root = Path(top) / "store"
        code = (
            "import sys, os\nfrom kvembed import KVStore\nfrom kvembed._testing import *\n"
            "store = KVStore(sys.argv[1], max_cpu_bytes=None)\nput_all(store, random_chain(3))\nstore.flush()\n"
            f"{'os._exit(0)' if killed else 'store.close()'}\n"
        )
        subprocess.run([sys.executable, "-c", code, str(root)], check=True)
        paths = [Path(top), root, *root.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        read = (
            "import sys, warnings\nfrom kvembed import KVStore\nfrom kvembed._testing import *\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    warnings.simplefilter('always')\n    store = KVStore(sys.argv[1])\n"
            "print(len(caught), 'opened read-only' in str(caught[0].message))\n"
            "for block in random_chain(3): assert_reads(store, block, 'disk')\n"
            "store.put(random_block(seed=8)); print(len(store.lookup([random_block(seed=8).key])))\n"
            "print(store.verify().blocks, store.take_problems())\nstore.close()\n"
        )
        # Both folders of the package may be closed to others; what is imported is read before the user changes.
        drop = "import os, kvembed, kvembed._testing, kvembed._store, kvembed._rebuild, kvembed._verify, filelock\n"
        drop += "import sqlite3, json, platformdirs\n"
        drop += "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        try:
            command = [sys.executable, "-c", drop + read, str(root)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        finally:
            for path in paths:
                path.chmod(0o700)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[:2] == ["1 True", "1"]
        if not killed:
            assert lines[2] == "3 []"
