"""Block files: what is written, what reads it, and the paths that only some systems take."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors import safe_open

from kvembed import _files
from kvembed._block import Layout, TensorSpec
from kvembed._blockfile import EncodedBlock, open_block, read_block, read_header, read_ids
from kvembed._errors import BlockFormatError, ConfigError
from kvembed._testing import SMALL_LAYOUT, random_block, random_chain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvembed._block import Block

MIXED = Layout((TensorSpec(0, "k", 3, 5, "F32"), TensorSpec(0, "v", 1, 7, "I32"), TensorSpec(11, "state", 2, 3, "U8")))


@pytest.fixture
def block() -> Block:
    return random_chain(2)[1]


@pytest.fixture
def path(tmp_path: Path, block: Block) -> Path:
    path = tmp_path / "blocks" / f"{block.key.hex()}.safetensors"
    EncodedBlock(block, "kvembed test").write(path)
    return path


def test_any_safetensors_reader_sees_the_same_tensors(path: Path, block: Block) -> None:
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == {"0000.k", "0000.v", "0001.k", "0001.v", "token_ids"}
        assert np.array_equal(file.get_tensor("token_ids"), block.token_ids)
        for index, spec in enumerate(block.layout.tensors):
            tensor = file.get_tensor(f"{spec.layer:04d}.{spec.name}")
            assert tensor.dtype == np.float32
            assert tensor.shape == (spec.heads, 16, spec.width)
            assert tensor.tobytes() == block.tensor(index).tobytes()
        assert set(file.metadata()) == {"kvembed", "kvembed_xxh3"}


@pytest.mark.parametrize("tokens", [1, 8, 255])
def test_odd_shapes_and_dtypes(tmp_path: Path, tokens: int) -> None:
    block = random_block(ids=range(tokens), layout=MIXED, exact=False, start=77)
    path = tmp_path / "a.safetensors"
    EncodedBlock(block, "kvembed test").write(path)
    again = read_block(path)
    assert again.info == block.info
    assert again.layout == MIXED
    assert np.array_equal(again.data, block.data)
    with safe_open(path, "numpy") as file:
        assert file.get_tensor("0011.state").tobytes() == block.tensor(2).tobytes()
        assert np.array_equal(file.get_tensor("token_ids"), block.token_ids)


def test_kv_begins_on_a_multiple_of_64(path: Path) -> None:
    header = read_header(path)
    assert header.data_start % 64 == 0
    assert header.file_nbytes == path.stat().st_size


def test_the_kv_of_the_file_is_the_bytes_of_the_block(path: Path, block: Block) -> None:
    header = read_header(path)
    assert path.read_bytes()[header.data_start :] == block.data.tobytes() + block.token_ids.tobytes()


def test_equal_layouts_are_one_object(tmp_path: Path) -> None:
    headers = []
    for number, block in enumerate(random_chain(2)):
        EncodedBlock(block, "kvembed test").write(tmp_path / f"{number}")
        headers.append(read_header(tmp_path / f"{number}"))
    assert headers[0].layout is headers[1].layout
    assert headers[0].layout == SMALL_LAYOUT


def test_the_size_is_known_before_writing(tmp_path: Path, block: Block) -> None:
    encoded = EncodedBlock(block, "kvembed test")
    encoded.write(tmp_path / "a")
    assert (tmp_path / "a").stat().st_size == encoded.file_nbytes
    assert encoded.disk_nbytes % 4096 == 0
    assert encoded.file_nbytes <= encoded.disk_nbytes < encoded.file_nbytes + 4096


def test_a_block_that_does_not_fit_its_layout_is_refused(block: Block) -> None:
    short = type(block)(block.info, block.token_ids, block.layout, block.data[:-1])
    with pytest.raises(ConfigError, match="do not fit"):
        EncodedBlock(short, "kvembed test")


@pytest.mark.parametrize("portable", [False, True])
def test_whole_and_part_of_every_tensor(path: Path, block: Block, portable: bool) -> None:
    source = open_block(path, portable=portable)
    assert np.array_equal(source.token_ids, block.token_ids)
    for index in range(4):
        cache = np.zeros((2, 64, 32), np.uint8)
        source.read_into(index, [cache[:, 8:24]])
        assert np.array_equal(cache[:, 8:24], block.tensor(index))
        source.read_into(index, [cache[:, 30:35]], skip=4)
        assert np.array_equal(cache[:, 30:35], block.tensor(index)[:, 4:9])
        assert not cache[:, :8].any()
        assert not cache[:, 35:].any()
    source.close()
    source.close()


def test_the_portable_reader_serves_several_threads(path: Path, block: Block) -> None:
    source = open_block(path, portable=True)
    wrong: list[int] = []

    def reader(index: int) -> None:
        rows = np.zeros((2, 16, 32), np.uint8)
        for _ in range(100):
            source.read_into(index, [rows])
            if not np.array_equal(rows, block.tensor(index)):
                wrong.append(index)

    threads = [threading.Thread(target=reader, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.close()
    assert wrong == []


def test_reading_more_heads_than_one_call_takes(tmp_path: Path) -> None:
    layout = Layout((TensorSpec(0, "k", 2500, 1, "F32"),))
    block = random_block(ids=range(3), layout=layout)
    EncodedBlock(block, "kvembed test").write(tmp_path / "a")
    cache = np.zeros((2500, 5, 4), np.uint8)
    source = open_block(tmp_path / "a")
    source.read_into(0, [cache[:, 1:4]])
    source.close()
    assert np.array_equal(cache[:, 1:4], block.tensor(0))


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")
def test_short_reads_are_continued(path: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, 0

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        return real(fd, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", short)
    source = open_block(path)
    cache = np.zeros((2, 40, 32), np.uint8)
    source.read_into(2, [cache[:, 3:19]])
    source.close()
    assert np.array_equal(cache[:, 3:19], block.tensor(2))
    assert calls > 100


@pytest.mark.parametrize("portable", [False, True])
def test_a_short_read_of_the_header_is_not_the_end_of_the_file(
    path: Path, block: Block, monkeypatch: pytest.MonkeyPatch, portable: bool
) -> None:
    if portable:
        real = _files.os.fdopen

        class Slow:
            def __init__(self, file: Any) -> None:
                self._file = file

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def read(self, n: int) -> bytes:
                return self._file.read(min(n, 1000))

        monkeypatch.setattr(os, "fdopen", lambda *args, **kwargs: Slow(real(*args, **kwargs)))
    elif hasattr(os, "pread"):
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 1000), at))
    source = open_block(path, portable=portable)
    assert np.array_equal(source.read_all().data, block.data)
    source.close()


@pytest.mark.skipif(not hasattr(os, "writev"), reason="this system has no writev")
def test_short_writes_are_continued(tmp_path: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(fd: int, buffers: Sequence[memoryview]) -> int:
        return os.write(fd, buffers[0][:1000])

    monkeypatch.setattr(os, "writev", short)
    EncodedBlock(block, "kvembed test").write(tmp_path / "a")
    assert np.array_equal(read_block(tmp_path / "a").data, block.data)


def test_the_portable_writer_writes_the_same_bytes(
    tmp_path: Path, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    EncodedBlock(block, "kvembed test", created=1.0).write(tmp_path / "a")
    monkeypatch.setattr(_files, "write_all", _files.write_all_portable)
    EncodedBlock(block, "kvembed test", created=1.0).write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_system_that_writes_nothing_is_an_error_not_a_loop(
    tmp_path: Path, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "writev", lambda *_: 0, raising=False)
    with pytest.raises(OSError, match="nothing"):
        EncodedBlock(block, "kvembed test").write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "writev"), reason="this system has no writev")
@pytest.mark.parametrize("step", ["writev", "fsync", "close", "replace"])
def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, block: Block, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real_close = os.close

    def fail(*args: Any) -> None:
        if step == "close":
            real_close(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace" if step == "replace" else f"os.{step}", fail)
    with pytest.raises(OSError, match="No space"):
        EncodedBlock(block, "kvembed test").write(tmp_path / "a", sync=True)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_safe_durability_waits_for_file_and_folder(
    tmp_path: Path, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(fd).st_mode))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    EncodedBlock(block, "kvembed test").write(tmp_path / "a")
    assert synced == []
    EncodedBlock(block, "kvembed test").write(tmp_path / "b", sync=True)
    assert synced == ([False] if os.name == "nt" else [False, True])


@pytest.mark.parametrize("moment", ["mkdir", "chmod"])
def test_a_folder_that_others_remove_as_empty_is_made_again(
    tmp_path: Path, block: Block, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path, left = tmp_path / "ab" / "a", [3]
    real = getattr(Path, moment)

    def remove(self: Path, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if left[0]:
            left[0] -= 1
            self.rmdir()

    monkeypatch.setattr(Path, moment, remove)
    EncodedBlock(block, "kvembed test").write(path, sync=True)
    assert left == [0]
    assert read_block(path).info == block.info
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_never_stays_is_an_error(tmp_path: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr("kvembed._files.make_private_dir", made.append)
    with pytest.raises(FileNotFoundError):
        EncodedBlock(block, "kvembed test").write(tmp_path / "ab" / "a")
    assert 3 < len(made) < 100


def test_a_block_deleted_with_its_folder_before_the_flush_is_no_failed_write(
    tmp_path: Path, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        result = real(self, target)
        target.unlink()
        target.parent.rmdir()
        return result

    monkeypatch.setattr(Path, "replace", replace)
    EncodedBlock(block, "kvembed test").write(tmp_path / "ab" / "a", sync=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.mark.skipif(os.name == "nt", reason="modes are a POSIX matter")
@pytest.mark.usefixtures("no_umask")
def test_modes_are_private_even_under_umask_0(tmp_path: Path, block: Block) -> None:
    path = tmp_path / "new" / "a"
    EncodedBlock(block, "kvembed test").write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_open_source_outlives_its_file(path: Path, block: Block) -> None:
    source = open_block(path)
    EncodedBlock(random_block(), "kvembed test").write(path)
    path.unlink()
    rows = np.zeros((2, 16, 32), np.uint8)
    source.read_into(0, [rows])
    source.close()
    assert np.array_equal(rows, block.tensor(0))


def test_a_dropped_source_closes_its_file(path: Path) -> None:
    source: Any = open_block(path)
    fd = source._file._fd
    del source
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_read_ids(path: Path, block: Block) -> None:
    assert np.array_equal(read_ids(path), block.token_ids)


def test_a_missing_file_is_not_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_block(tmp_path / "none")


def test_a_file_cut_while_it_is_open(path: Path) -> None:
    source = open_block(path)
    os.truncate(path, 2000)
    with pytest.raises(BlockFormatError, match="ends before"):
        source.read_into(3, [np.zeros((2, 16, 32), np.uint8)])
    source.close()
