"""Stores written by every earlier format open, and another program can read what the page of the format describes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvembed import KVStore, StoreFormatError
from kvembed._blockheader import FORMAT_VERSION
from kvembed._encryption.sealed import SEALED_VERSION
from kvembed._keys import as_token_ids, root_key
from kvembed._schema import SCHEMA_VERSION
from kvembed._testing import FINGERPRINT, block_path, keys_of, put_all, random_block, random_chain

FIXTURES = sorted(path for path in (Path(__file__).parent / "fixtures").iterdir() if "-catalog" in path.name)
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "explanation" / "file-format.md"


def versions(fixture: Path) -> tuple[str, int, int]:
    match = re.fullmatch(r"(blocks|sealed)(\d+)-catalog(\d+)", fixture.name)
    assert match is not None
    return match[1], int(match[2]), int(match[3])


def reopened(folder: Path, expected: dict[str, Any], **options: Any) -> KVStore:
    key = expected.get("key")
    return KVStore(folder, key=None if key is None else bytes.fromhex(key), **options)


@pytest.fixture(params=FIXTURES, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a store of some version, and what is in it."""
    copy = shutil.copytree(request.param, tmp_path / "store")
    expected = json.loads((copy / "expected.json").read_text(encoding="utf-8"))
    (copy / "expected.json").unlink()
    # Git keeps no modes but one, and no empty folders.
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    return copy, expected


def assert_holds(store: KVStore, expected: dict[str, Any]) -> None:
    for key, block in expected["blocks"].items():
        source = store.open(bytes.fromhex(key))
        assert source is not None, key
        assert source.tier == "disk"
        info = source.info
        assert (info.parent.hex(), info.start, info.exact) == (block["parent"], block["start"], block["exact"])
        assert source.token_ids.tolist() == block["token_ids"]
        data = b""
        for index, spec in enumerate(source.layout.tensors):
            rows = np.empty((spec.heads, info.n_tokens, spec.row_nbytes), np.uint8)
            source.read_into(index, [rows])
            data += rows.tobytes()
        assert hashlib.sha256(data).hexdigest() == block["sha256"]
        source.close()
    chain = [bytes.fromhex(key) for key in next(iter(expected["pins"].values()))]
    assert len(store.lookup(chain)) == len(chain)
    tail = expected["blocks"][chain[-1].hex()]
    found = store.find_tail(bytes.fromhex(tail["parent"]), as_token_ids([*tail["token_ids"], 7]))
    assert found is not None
    assert (found[0].info.key, found[1]) == (chain[-1], len(tail["token_ids"]))
    assert {name: [key.hex() for key in keys] for name, keys in store.pins().items()} == expected["pins"]
    assert store.get_note(FINGERPRINT, "longest_tokens") == 60
    assert store.namespaces()[FINGERPRINT]["name"] == "fixture"
    assert store.why_missing(bytes.fromhex(expected["removed"])) == "removed"
    assert store.stats().tiers[-1].blocks == len(expected["blocks"])


def test_every_version_before_this_one_has_a_fixture() -> None:
    made = [versions(path) for path in FIXTURES]
    assert {number for kind, number, _ in made if kind == "blocks"} >= set(range(1, FORMAT_VERSION))
    assert {number for kind, number, _ in made if kind == "sealed"} >= set(range(1, SEALED_VERSION + 1))
    assert {catalog for _, _, catalog in made} >= set(range(1, SCHEMA_VERSION))


def test_a_store_of_another_version_opens_with_all_that_is_in_it(old: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = old
    for _ in ("migrated", "migrated before"):
        with reopened(folder, expected, max_cpu_bytes=None) as store:
            assert_holds(store, expected)
            assert store.verify().problems == ()
    with reopened(folder, expected) as store:
        # And goes on being used: eviction, pins, new blocks.
        put_all(store, random_chain(2, seed=5))
        store.flush()
        assert store.prune(max_bytes=0).blocks == 3
        store.unpin("a pinned text")
        store.prune(max_bytes=0)
        assert store.ls() == []
        assert store.verify().problems == ()


def contents(folder: Path) -> dict[Path, bytes]:
    # What SQLite makes beside the database to read it is no change.
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "kvembed.db-" not in path.name}


def test_a_store_of_another_version_is_read_without_changing_it(old: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = old
    before = {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "kvembed.db-" not in path.name
    }
    with reopened(folder, expected, read_only=True, max_cpu_bytes=None) as store:
        assert_holds(store, expected)
    assert contents(folder) == before


def tables(path: Path) -> set[tuple[str, str]]:
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    db.close()
    return {(name, re.sub(r"\s+", " ", sql)) for name, sql in rows}


def columns(path: Path) -> dict[str, set[tuple[Any, ...]]]:
    with sqlite3.connect(path) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {name: {row[1:] for row in db.execute(f"PRAGMA table_info({name})")} for name in names}
    db.close()
    return found


def test_migrated_tables_are_those_of_a_new_store(old: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    reopened(*old).close()
    KVStore(tmp_path / "new").close()
    migrated, new = old[0] / "kvembed.db", tmp_path / "new" / "kvembed.db"
    assert {name for name, _ in tables(migrated)} == {name for name, _ in tables(new)}
    assert columns(migrated) == columns(new)


def test_a_catalog_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    with KVStore(tmp_path) as store:
        put_all(store, random_chain(2))
    with sqlite3.connect(tmp_path / "kvembed.db") as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    for read_only in (None, True):
        with pytest.raises(StoreFormatError, match="newer kvembed"):
            KVStore(tmp_path, read_only=read_only)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


# ------------------------------------------------------------------------------------- another program


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """What the document's own examples define."""
    code = "".join(
        re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    )
    assert "import kvembed" not in code
    assert "from kvembed" not in code
    names: dict[str, Any] = {}
    exec(compile(code, DOCUMENT.name, "exec"), names)
    return names


def test_the_documents_example_reads_what_a_store_wrote(reader: dict[str, Any], tmp_path: Path) -> None:
    chain = random_chain(3)
    tail = random_block(chain[2].key, range(9), start=48, exact=False)
    with KVStore(tmp_path) as store:
        put_all(store, [*chain, tail])
        store.flush()
        for block in [*chain, tail]:
            fields, ids, tensors = reader["read_block"](block_path(store, block))
            assert ids.tolist() == block.token_ids.tolist()
            assert fields["exact"] is block.info.exact
            assert b"".join(tensor.tobytes() for tensor in tensors.values()) == block.data.tobytes()
            assert [f"{s.layer:04d}.{s.name}" for s in block.layout.tensors] == list(tensors)
        ids = reader["read_sequence"](tmp_path, tail.key.hex())
        assert ids.tolist() == np.concatenate([b.token_ids for b in [*chain, tail]]).tolist()


@pytest.mark.parametrize("at", [30, 700, -200, -3])
def test_the_documents_example_notices_damage(reader: dict[str, Any], tmp_path: Path, at: int) -> None:
    block = random_block()
    with KVStore(tmp_path) as store:
        store.put(block)
        store.flush()
        path = block_path(store, block)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)
    with pytest.raises((AssertionError, ValueError)):
        reader["read_block"](path)


def test_the_documents_example_reads_an_encrypted_store(reader: dict[str, Any], tmp_path: Path) -> None:
    chain, master = random_chain(2), bytes(range(7, 39))
    with KVStore(tmp_path / "s", key=master) as store:
        store.register_namespace(FINGERPRINT, {"name": "tiny"})
        put_all(store, chain)
        store.flush()
        paths = {block: block_path(store, block) for block in chain}
    (fields,) = (tmp_path / "s" / "namespaces").iterdir()
    assert json.loads(reader["decrypt"](fields, master, b"namespace" + FINGERPRINT)) == {"name": "tiny"}
    assert fields.stem == reader["name_of"](master, FINGERPRINT)
    for block, path in paths.items():
        assert path.stem == reader["name_of"](master, block.key)
        plain = tmp_path / f"{block.key.hex()}.safetensors"
        plain.write_bytes(reader["decrypt"](path, master))
        _, ids, tensors = reader["read_block"](plain)
        assert ids.tolist() == block.token_ids.tolist()
        assert b"".join(tensor.tobytes() for tensor in tensors.values()) == block.data.tobytes()
        with pytest.raises(Exception):
            reader["decrypt"](path, master, b"manifest")


def test_the_documents_names_are_those_of_the_code(tmp_path: Path) -> None:
    import blake3

    salted = b"kvembed/root/1" + FINGERPRINT + "söl".encode()
    assert root_key(FINGERPRINT, "söl") == blake3.blake3(salted).digest()
    assert keys_of(random_chain(1))[0].hex()  # the example above checks those of blocks
