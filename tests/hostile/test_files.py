"""Files that must not be used: every one is refused with `BlockFormatError`, quickly, and nothing else."""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvembed._blockfile import EncodedBlock, open_block, read_block, read_header
from kvembed._errors import BlockFormatError
from kvembed._testing import random_block, random_chain

from ._mutate import rewritten

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Change = Callable[[dict[str, Any], dict[str, Any]], object]

BLOCK = random_chain(2, seed=5)[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "a"
    EncodedBlock(BLOCK, "kvembed test").write(path)
    return path.read_bytes()


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(BlockFormatError) as caught:
        read_block(path)
    return str(caught.value)


def test_rewriting_without_a_change_is_accepted(good: bytes, tmp_path: Path) -> None:
    # Or the tests below would pass for the wrong reason.
    (tmp_path / "a").write_bytes(rewritten(good, lambda header, identity: None))
    assert np.array_equal(read_block(tmp_path / "a").data, BLOCK.data)


def test_every_flipped_byte_is_noticed(good: bytes, tmp_path: Path) -> None:
    header_end = 8 + int.from_bytes(good[:8], "little")
    text_end = len(good[:header_end].rstrip(b" "))
    places = [*range(8), *range(8, text_end, 3), *range(header_end, len(good), 97), len(good) - 1]
    path = tmp_path / "a"
    for at in places:
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        refused(path, bytes(bad))


def test_padding_is_all_that_may_differ(good: bytes, tmp_path: Path) -> None:
    header_end = 8 + int.from_bytes(good[:8], "little")
    if good[header_end - 1 : header_end] != b" ":
        pytest.skip("this header needs no padding")
    bad = bytearray(good)
    bad[header_end - 1] = ord("x")
    refused(tmp_path / "a", bytes(bad))


def test_truncated_anywhere(good: bytes, tmp_path: Path) -> None:
    header_end = 8 + int.from_bytes(good[:8], "little")
    cuts = {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(good) - 1, len(good) - 64}
    for cut in cuts | set(range(0, len(good), 211)):
        refused(tmp_path / "a", good[:cut])


def test_longer_than_it_says(good: bytes, tmp_path: Path) -> None:
    assert "bytes, not the" in refused(tmp_path / "a", good + b"\0")


@pytest.mark.parametrize("length", [0, 1, 1 << 25, 1 << 40, (1 << 64) - 1])
def test_impossible_header_lengths(good: bytes, tmp_path: Path, length: int) -> None:
    assert "length" in refused(tmp_path / "a", length.to_bytes(8, "little") + good[8:])


def test_another_version_is_named(good: bytes, tmp_path: Path) -> None:
    message = refused(tmp_path / "a", rewritten(good, lambda h, i: i.update(format=3)))
    assert "format 3" in message
    assert "reads up to 2" in message


CHANGES: dict[str, Change] = {
    "hole": lambda h, i: h["0001.v"].update(
        data_offsets=[h["0001.v"]["data_offsets"][0] + 4, h["0001.v"]["data_offsets"][1]]
    ),
    "overlap": lambda h, i: h["0001.k"].update(data_offsets=h["0000.k"]["data_offsets"]),
    "negative offset": lambda h, i: h["0000.k"].update(data_offsets=[-4, 1020]),
    "huge shape": lambda h, i: h["0000.k"].update(shape=[1 << 60, 16, 8]),
    "zero heads": lambda h, i: h["0000.k"].update(shape=[0, 16, 8]),
    "float shape": lambda h, i: h["0000.k"].update(shape=[2.0, 16, 8]),
    "true as a number": lambda h, i: h["0000.k"].update(shape=[True, 16, 8]),
    "two axes": lambda h, i: h["0000.k"].update(shape=[32, 8]),
    "other row count": lambda h, i: h["0000.k"].update(shape=[4, 8, 8]),
    "unknown dtype": lambda h, i: h["0000.k"].update(dtype="F31"),
    "dtype of another size": lambda h, i: h["0000.k"].update(dtype="F16"),
    "dtype that is a list": lambda h, i: h["0000.k"].update(dtype=["F32"]),
    "odd name": lambda h, i: h.update({"../../x": h.pop("0000.k")}),
    "no ids": lambda h, i: h.pop("token_ids"),
    "ids of another dtype": lambda h, i: h["token_ids"].update(dtype="F32"),
    "no tensors": lambda h, i: [h.pop(k) for k in list(h) if k[0] == "0"],
    "entry is a number": lambda h, i: h.update({"0000.k": 3}),
    "extra field in an entry": lambda h, i: h["0000.k"].update(extra=1),
    "another n_tokens": lambda h, i: i.update(n_tokens=17),
    "n_tokens of a million millions": lambda h, i: i.update(n_tokens=10**12),
    "negative start": lambda h, i: i.update(start=-1),
    "start as text": lambda h, i: i.update(start="0"),
    "exact as a number": lambda h, i: i.update(exact=1),
    "created as text": lambda h, i: i.update(created="now"),
    "short key": lambda h, i: i.update(key="ab"),
    "key that is no hex": lambda h, i: i.update(key="zz" * 32),
    "key in capitals": lambda h, i: i.update(key=i["key"].upper()),
    "key that is a number": lambda h, i: i.update(key=7),
    "foreign key": lambda h, i: i.update(key="ab" * 32),
    "foreign parent": lambda h, i: i.update(parent="ab" * 32),
    "missing field": lambda h, i: i.pop("namespace"),
    "missing checksum": lambda h, i: i["checksums"].pop(),
    "checksum that is no hex": lambda h, i: i["checksums"].__setitem__(0, "x" * 16),
    "signed checksum": lambda h, i: i["checksums"].__setitem__(0, "-" + "0" * 15),
    "wrong checksum": lambda h, i: i["checksums"].__setitem__(2, "0" * 16),
    "wrong checksum of the ids": lambda h, i: i.update(ids_checksum="0" * 16),
    "more metadata": lambda h, i: h["__metadata__"].update(more="x"),
    "version as text": lambda h, i: i.update(format="1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_headers_that_lie(good: bytes, tmp_path: Path, name: str) -> None:
    refused(tmp_path / "a", rewritten(good, CHANGES[name]))


def test_a_change_without_its_checksum(good: bytes, tmp_path: Path) -> None:
    def change(header: dict[str, Any], _: dict[str, Any]) -> None:
        header["__metadata__"]["kvembed"] = header["__metadata__"]["kvembed"].replace('"exact":true', '"exact":false')

    assert "checksum" in refused(tmp_path / "a", rewritten(good, change, checksums=False))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe{\x00}\x00",
        b'{"__metadata__":{}}',
        b'{"__metadata__":null}',
        b'{"__metadata__":[]}',
        b'{"__metadata__":{"kvembed":1,"kvembed_xxh3":2}}',
        b'{"__metadata__":{"kvembed":"\\ud800","kvembed_xxh3":""}}',
        b'{"__metadata__":{"kvembed":"{}","kvembed_xxh3":"x"}',
        b'{"__metadata__":' + b"[" * 100_000,
        b'{"a":' + b'{"a":' * 100_000 + b'"__metadata__":',
        b'{"__metadata__":' + b"9" * 10_000 + b"}",
        b'{"__metadata__":{"kvembed":"a","kvembed":"b"}}',
    ],
    ids=range(15),
)
def test_headers_that_are_no_header(good: bytes, tmp_path: Path, header: bytes) -> None:
    refused(tmp_path / "a", len(header).to_bytes(8, "little") + header + good[-2000:])


def test_a_name_given_twice(good: bytes, tmp_path: Path) -> None:
    length = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + length].rstrip()
    section = header[1 : header.index(b'"__metadata__"')]
    entry = section[: section.index(b"},") + 2]
    twice = header.replace(section, entry + section, 1)
    new = xxhash.xxh3_64_hexdigest(entry + section)
    identity = json.loads(json.loads(header)["__metadata__"]["kvembed"]) | {"tensors": new}
    text = json.dumps(identity, separators=(",", ":"))
    meta = json.dumps({"kvembed": text, "kvembed_xxh3": xxhash.xxh3_64_hexdigest(text.encode())}, separators=(",", ":"))
    twice = twice[: twice.index(b'"__metadata__"')] + b'"__metadata__":' + meta.encode() + b"}"
    assert "twice" in refused(tmp_path / "a", len(twice).to_bytes(8, "little") + twice + good[8 + length :])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    began = time.monotonic()
    with pytest.raises(BlockFormatError, match="not a regular file"):
        open_block(tmp_path / "a")
    assert time.monotonic() - began < 2


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_symbolic_link_is_not_followed(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(good)
    (tmp_path / "a").symlink_to(tmp_path / "real")
    with pytest.raises(BlockFormatError, match="not a regular file"):
        open_block(tmp_path / "a")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(BlockFormatError, match="not a regular file"):
        open_block(tmp_path / "a")


def test_nothing_large_is_allocated_before_the_header_is_believed(tmp_path: Path) -> None:
    # Says 2 MB of header in a sparse file of 1 GB.
    with (tmp_path / "a").open("wb") as file:
        file.write((2 << 20).to_bytes(8, "little") + b'{"0000.k":')
        file.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(BlockFormatError):
        open_block(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_opening_closes_the_file_when_it_is_bad(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(good[:-1])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH112, PTH208
    for _ in range(20):
        with pytest.raises(BlockFormatError):
            open_block(path)
    after = len(os.listdir("/proc/self/fd")) if before else 0  # noqa: PTH208
    assert after == before


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 20))
def test_random_damage(good: bytes, tmp_path: Path, seed: int, flips: int) -> None:
    rng = random.Random(seed)
    bad = bytearray(good)
    header_end = 8 + int.from_bytes(good[:8], "little")
    for _ in range(flips):
        bad[rng.randrange(header_end if rng.random() < 0.8 else len(bad))] = rng.randrange(256)
    path = tmp_path / "a"
    path.write_bytes(bytes(bad))
    try:
        block = read_block(path)
    except BlockFormatError:
        return
    # Only a change of nothing, or of white space, may pass: then everything is as it was.
    assert block.info == BLOCK.info
    assert np.array_equal(block.data, BLOCK.data)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400))
def test_random_bytes(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "a", content)


def test_header_alone_says_enough_to_find_the_block(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(good)
    header = read_header(tmp_path / "a")
    assert header.info == BLOCK.info
    assert header.info.key == random_block(BLOCK.info.parent, BLOCK.token_ids, start=16).key
