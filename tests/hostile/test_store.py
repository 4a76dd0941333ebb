"""A whole store with something in it that nobody's kvembed put there: misses and warnings, no crash, hang or spike."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvembed import KVStore, StoreError, StoreWarning, _blockheader
from kvembed._block import Block, BlockInfo, Layout, TensorSpec
from kvembed._blockfile import read_header
from kvembed._testing import FINGERPRINT, assert_reads, block_path, keys_of, put_all, random_block, random_chain
from kvembed._tiers.disk import _BELIEVABLE

from ._mutate import MUTATIONS
from .fuzz import fuzz, read_as_a_restore

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX files")
CHAIN = random_chain(4, seed=1)


def make(root: Path, blocks: list[Block] = CHAIN) -> None:
    with KVStore(root, max_cpu_bytes=None) as store:
        store.register_namespace(FINGERPRINT, {"name": "tiny"})
        put_all(store, blocks)


def served(store: KVStore, blocks: list[Block]) -> int:
    """Return how many of ``blocks`` a restore gets; what it gets must be right."""
    count = 0
    for block in blocks:
        if store.lookup([block.key]):
            answer = read_as_a_restore(store, block)
            assert answer in ("right", "miss"), answer
            count += answer == "right"
    return count


# ------------------------------------------------------------------------------------------ the fuzzer


@pytest.mark.slow
def test_files_that_were_tampered_with(tmp_path: Path) -> None:
    counts, wrong, peak = fuzz(tmp_path, 1500, seed=0)
    assert wrong == []
    assert peak < 48 << 20
    # Every kind of damage was met, and nearly all of it mattered.
    assert {name.partition(": ")[2] for name in counts} >= {name.split(",")[0] for name in MUTATIONS}
    assert sum(n for name, n in counts.items() if name.startswith("miss")) > 1200


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KVStore, bytes]]:
    with KVStore(tmp_path_factory.mktemp("fuzz"), max_cpu_bytes=None) as store:
        put_all(store, CHAIN)
        store.flush()
        yield store, block_path(store, CHAIN[1]).read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_edits_that_hypothesis_finds(shared: tuple[KVStore, bytes], data: st.DataObject) -> None:
    store, good = shared
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(at, min(len(content), at + 64)))
        content[at:end] = data.draw(st.binary(max_size=64))
    if not store.lookup([CHAIN[1].key]):
        store.put(CHAIN[1])
        store.flush()
    block_path(store, CHAIN[1]).write_bytes(content)
    answer = read_as_a_restore(store, CHAIN[1])
    same = header_without_spaces(bytes(content)) == header_without_spaces(good)
    assert answer == ("right" if same else "miss")


def header_without_spaces(content: bytes) -> tuple[bytes, bytes] | bytes:
    # White space after the header is all that two files with the same block may differ in.
    length = int.from_bytes(content[:8], "little")
    if 8 + length > len(content):
        return content
    return content[8 : 8 + length].rstrip(b" \t\r\n"), content[8 + length :]


# ------------------------------------------------------------------------------- things in odd places


@posix
@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "socket", "device"])
def test_something_else_in_place_of_a_block(tmp_path: Path, kind: str) -> None:
    make(tmp_path)
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        path = block_path(store, CHAIN[3])
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(block_path(store, CHAIN[0]))
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            os.mknod(path, stat.S_IFSOCK | 0o600)
        assert served(store, CHAIN) == 3
        (problem,) = store.take_problems()
        assert path.name in problem
        assert "not a regular file" in problem
        assert not os.path.lexists(path)
        assert store.verify(fix=True).ok
        assert store.verify().problems == ()


@posix
def test_odd_names_are_left_alone_and_can_be_printed(tmp_path: Path) -> None:
    make(tmp_path)
    folder = next((tmp_path / "blocks").iterdir())
    odd = [b"\xff\xfe.safetensors", "ü\n\x1b[31mred".encode(), b"a" * 64 + b".safetensors", b"..safetensors", b" "]
    key = CHAIN[0].key.hex().encode()
    odd += [key.upper() + b".safetensors", key + b".safetensors.bak", b"." + key + b".tmp~"]
    for name in odd:
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(b"x")
    (tmp_path / "blocks" / "\n").mkdir(mode=0o700)
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        assert served(store, CHAIN) == 4
        report = store.verify(fix=True)
        text = str(report)
        assert text.encode()  # no broken half of a character
        assert "\x1b" not in text
        assert len([p for p in report.problems if "not a file of the store" in p]) >= 6
        assert served(store, CHAIN) == 4
    (tmp_path / "kvembed.db").unlink()
    with pytest.warns(StoreWarning, match="made again from 4 block files"):
        store = KVStore(tmp_path, max_cpu_bytes=None)
    with store:
        assert served(store, CHAIN) == 4


@posix
@pytest.mark.parametrize("what", ["kvembed.db", "kvembed.db-wal", "namespaces/x"])
@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_something_else_in_place_of_the_catalog(tmp_path: Path, what: str, kind: str) -> None:
    # In a process of its own, so that a hang is a failure and not the end of the tests.
    make(tmp_path / "s")
    path = tmp_path / "s" / what
    if what.startswith("namespaces"):
        path = tmp_path / "s" / "namespaces" / f"{bytes(32).hex()}.json"
        (tmp_path / "s" / "kvembed.db").unlink()
    path.unlink(missing_ok=True)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(victim)
    else:
        path.mkdir()
    code = (
        "import sys, warnings\nwarnings.simplefilter('ignore')\nfrom kvembed import KVStore, StoreError\n"
        "from kvembed._testing import *\nchain = random_chain(4, seed=1)\n"
        "try:\n"
        "    with KVStore(sys.argv[1], max_cpu_bytes=None) as store:\n"
        "        [assert_reads(store, block, 'disk') for block in chain]\n"
        "        print(len(store.lookup(keys_of(chain))), store.verify(fix=True).ok, store.verify().ok)\n"
        "except StoreError as error:\n    print('StoreError', error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if what != "kvembed.db-wal":
        assert done.stdout.strip() == "4 True True"
    else:
        # SQLite itself decides; whatever it says, it is said as our error or it works.
        assert done.stdout.startswith(("4 True True", "StoreError")), done.stdout
    assert victim.read_bytes() == b"precious"


# ---------------------------------------------------------------------------------- swapped catalogs


def test_the_catalog_of_another_store(tmp_path: Path) -> None:
    other = random_chain(5, seed=2)
    make(tmp_path / "a")
    make(tmp_path / "b", other)
    shutil.copy(tmp_path / "b" / "kvembed.db", tmp_path / "a" / "kvembed.db")
    with KVStore(tmp_path / "a", max_cpu_bytes=None) as store:
        assert served(store, other) == 0  # rows without files
        assert store.lookup(keys_of(other)) == []
        report = store.verify(fix=True)
        assert report.ok
        assert len([p for p in report.problems if "missing in the catalog" in p]) == 4
        assert served(store, CHAIN) == 4
        assert store.verify().problems == ()


def test_a_catalog_that_says_exact_of_a_block_that_is_not(tmp_path: Path) -> None:
    rough = [random_block(seed=n, exact=False) for n in range(2)]
    make(tmp_path, rough)
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        assert store._catalog is not None
        with store._catalog.connection() as db:
            db.execute("UPDATE blocks SET exact = 1")
        assert len(store.lookup([rough[0].key], exact_only=True)) == 1
        assert store.open(rough[0].key, exact_only=True) is None
        # The row was put right, so that an exact block can take the place.
        assert store.lookup([rough[0].key], exact_only=True) == []
        assert store.lookup([rough[0].key])[0].info.exact is False


@pytest.mark.parametrize("seed", range(4))
def test_the_log_of_another_catalog(tmp_path: Path, seed: int) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", random_chain(3 + 20 * seed, seed=2))
    db = sqlite3.connect(tmp_path / "b" / "kvembed.db")
    db.execute("UPDATE blocks SET hits = hits + 1")
    db.execute("INSERT INTO notes VALUES (x'00', 'n', ?)", ("x" * 3000 * (seed + 1),))
    db.commit()
    shutil.copy(tmp_path / "b" / "kvembed.db-wal", tmp_path / "a" / "kvembed.db-wal")
    db.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        with KVStore(tmp_path / "a", max_cpu_bytes=None) as store:
            served(store, CHAIN)
            with suppress(StoreError):
                store.verify(fix=True)
        # The second opening has mended whatever the log broke.
        with KVStore(tmp_path / "a", max_cpu_bytes=None) as store:
            assert store.verify(fix=True).ok
            assert served(store, CHAIN) == 4
            assert store.verify().problems == ()


# --------------------------------------------------------------------------------------------- memory


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is kept on Linux only")
def test_files_made_to_fill_the_memory(tmp_path: Path) -> None:
    make(tmp_path / "s")
    with KVStore(tmp_path / "s", max_cpu_bytes=None) as store:
        paths = [block_path(store, block) for block in CHAIN]
    # One that is mostly a hole, ...
    with paths[1].open("r+b") as file:
        file.truncate(1 << 40)
    # ... one whose header is JSON that grows in memory, and one that says its header is of the largest size.
    bomb = b'{"__metadata__":[' + b"{}," * ((2 << 20) // 3 - 10)
    paths[2].write_bytes(len(bomb).to_bytes(8, "little") + bomb + bytes(100))
    with paths[3].open("wb") as file:
        file.write((2 << 20).to_bytes(8, "little") + b'{"0000.k":')
        file.truncate(3 << 30)
    code = (
        "import resource, sys\nfrom kvembed import KVStore\nfrom kvembed._testing import *\n"
        "store = KVStore(sys.argv[1], max_cpu_bytes='16MiB')\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + (160 << 20),) * 2)\n"
        "chain = random_chain(4, seed=1)\nstore.promote(keys_of(chain))\nstore.flush()\n"
        "print([store.open(block.key) is not None for block in chain], len(store.take_problems()))\n"
        "print(store.verify(fix=True).ok, store.verify().ok)\nstore.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[True, False, False, False] 3", "True True"], done.stdout


@pytest.mark.skipif(os.name == "nt", reason="no sparse files by truncate")
def test_a_file_that_is_one_big_hole_is_not_read(tmp_path: Path) -> None:
    make(tmp_path)
    old = CHAIN[1]
    # Its header is right in everything: shapes, offsets, size, checksums of the metadata.
    layout = Layout((TensorSpec(0, "k", 1 << 20, 1024, "F32"),))
    nbytes = layout.nbytes(16)
    assert nbytes > _BELIEVABLE
    info = BlockInfo(old.key, old.info.parent, FINGERPRINT, 16, 16, True, nbytes)

    class Hole:  # stands in for 64 GiB of zeros
        nbytes = layout.nbytes(16)
        data = memoryview(b"")

    header = _blockheader.build_header(Block(info, old.token_ids, layout, Hole()), 0.0, "x")  # type: ignore[arg-type]
    with KVStore(tmp_path, max_cpu_bytes=None, max_disk_bytes=1 << 20) as store:
        path = block_path(store, old)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + nbytes)
            file.seek(0, 2)
            file.write(old.token_ids.tobytes())
        assert read_header(path).info == info  # the header is believed
        assert store.open(old.key) is None
        (problem,) = store.take_problems()
        assert "more than the whole store may take" in problem
        assert_reads(store, CHAIN[0], "disk")
