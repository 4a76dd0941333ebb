"""Forgetting a text: what goes, what stays for others, and that nothing of it is found in any byte of the folder."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import CachedModel, ConfigError, KVStore, PromptError, SessionDB, StoreReadOnlyError
from kvembed._forget import Eraser
from kvembed._keys import as_token_ids, block_key, root_key, snapshot_key
from kvembed._rebuild import CATALOG_NAME
from kvembed._testing import FINGERPRINT, block_path, forget_memory, keys_of, put_all, random_block, random_chain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvembed._block import Block
    from kvembed._forget import ForgetReport

BLOCK = 16
ROOT = root_key(FINGERPRINT)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    with KVStore(tmp_path / "store", max_cpu_bytes="4MiB", max_disk_bytes="64MiB") as store:
        yield store


def ids_of(*blocks: Block) -> Any:
    return as_token_ids(np.concatenate([block.token_ids for block in blocks]))


def forget(store: KVStore, ids: Any, root: bytes = ROOT) -> ForgetReport:
    store._begin_change()
    eraser = Eraser(store)
    eraser.text(root, ids, BLOCK)
    return eraser.report()


def raw_scan(folder: Path, blocks: list[Block]) -> list[str]:
    """Look for keys, ids and KV of blocks in every byte of every file, by nothing but ``in``."""
    found = []
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        for block in blocks:
            wanted = {
                "key": block.key,
                "hex": block.key.hex().encode(),
                "digits of the log": block.key[:8],
                "ids": block.token_ids.tobytes(),
                "KV": block.data[: len(block.data) // 2].tobytes(),
                "end of the KV": block.data[-64:].tobytes(),
            }
            found += [f"{path.name}: {name}" for name, needle in wanted.items() if needle in data]
            if block.key.hex() in path.name:
                found.append(f"{path.name}: its name")
    return found


@pytest.mark.parametrize("state", ["fresh", "on disk", "evicted before", "reopened"])
def test_nothing_of_a_forgotten_text_is_left_in_any_byte(tmp_path: Path, store: KVStore, state: str) -> None:
    text = random_chain(3, seed=1)
    tail = random_block(text[2].key, range(700, 710), start=48)
    question = random_block(text[2].key, [*range(700, 710), 5, 6, 7, 8, 9, 1], start=48)
    answer = random_block(question.key, range(300, 309), start=64)
    other = random_chain(4, seed=2)
    mine = [*text, tail, question, answer]
    put_all(store, [*text, tail])
    store.pin(keys_of([*text, tail]), "kept for later")
    put_all(store, [question, answer, *other])
    store.flush()
    store.touch(keys_of(mine))
    assert raw_scan(tmp_path / "store", mine) != []  # or the scan could not fail
    if state != "fresh":
        forget_memory(store)
    if state == "evicted before":
        store.remove([answer.key, tail.key])
        store.discard(question.key, "test")
    store.unpin("kept for later")
    if state == "reopened":
        store.close()
        store = KVStore(tmp_path / "store")
    report = forget(store, ids_of(*text, tail))
    assert report.ok
    assert report.blocks == {"evicted before": 3}.get(state, 6)
    assert raw_scan(tmp_path / "store", mine) == []
    assert store.lookup(keys_of(text)) == []
    assert store.find_tail(text[2].key, tail.token_ids) is None
    assert [store.why_missing(block.key) for block in mine] == [None] * 6
    assert all(store.token_ids(block.key) is None for block in mine)
    # What is not of this text is all there.
    assert len(store.lookup(keys_of(other))) == 4
    assert store.verify().problems == ()
    store.close()
    assert raw_scan(tmp_path / "store", mine) == []


def test_what_other_texts_share_stays(store: KVStore) -> None:
    system = random_chain(2, seed=1)
    a, b = (random_block(system[1].key, start=32, seed=n) for n in (5, 6))
    a2, b2 = random_block(a.key, range(9), start=48), random_block(b.key, range(9), start=48)
    put_all(store, [*system, a, a2, b, b2])
    report = forget(store, ids_of(*system, a, a2))
    assert (report.blocks, report.kept) == (2, 2)
    assert len(store.lookup(keys_of([*system, b, b2]))) == 4
    assert store.lookup([a.key]) == []
    report = forget(store, ids_of(*system, b, b2))
    assert (report.blocks, report.kept) == (4, 0)
    assert store.ls() == []


def test_what_a_name_pins_stays(store: KVStore) -> None:
    chain = random_chain(4, seed=1)
    put_all(store, chain)
    store.flush()
    store.pin(keys_of(chain[:2]), "half")
    report = forget(store, ids_of(*chain))
    assert (report.blocks, report.kept) == (2, 2)
    assert report.ok
    assert len(store.lookup(keys_of(chain))) == 2


def test_shorter_beginnings_of_the_text_go_unless_another_text_begins_so(store: KVStore) -> None:
    head = list(range(10))
    short, longer = random_block(ids=head), random_block(ids=[*head, 77, 78])
    mine = random_block(ids=[*head, 1, 2, 3, 4])
    store._begin_change()
    disk = store._disk
    assert disk is not None
    # Straight to the disk: a block drops the shorter ones it covers, as long as nothing holds them.
    store.pin([short.key, longer.key], "held")
    for block in (short, longer, mine):
        disk.put(block)
    store.unpin("held")
    report = forget(store, mine.token_ids)
    assert (report.blocks, report.kept) == (1, 1)
    assert [bool(store.lookup([block.key])) for block in (short, longer, mine)] == [True, True, False]
    report = forget(store, longer.token_ids)
    assert report.blocks == 2
    assert store.ls() == []


def test_states_go_with_the_text_they_belong_to(store: KVStore) -> None:
    text = random_chain(2, seed=1)
    inner = block_key(text[0].key, text[1].token_ids[:5])
    states = [
        random_block(text[0].key, [-1], start=16),
        random_block(text[1].key, [-1], start=32),
        random_block(inner, [-1], start=21),
    ]
    assert states[2].key == snapshot_key(inner)
    put_all(store, [*text, *states])
    store.flush()
    report = forget(store, ids_of(*text))
    assert report.blocks == 5
    assert store.stats().tiers[1].blocks == 0


def test_a_state_of_a_shared_prefix_stays(store: KVStore) -> None:
    system = random_chain(1, seed=1)[0]
    state = random_block(system.key, [-1], start=16)
    a, b = (random_block(system.key, start=16, seed=n) for n in (5, 6))
    put_all(store, [system, state, a, b])
    assert forget(store, ids_of(system, a)).blocks == 1
    assert len(store.known([system.key, state.key, b.key])) == 3
    assert forget(store, ids_of(system, b)).blocks == 3


def test_another_salt_is_not_touched_but_told(store: KVStore) -> None:
    mine, theirs = random_chain(2, seed=1), random_chain(2, seed=1, salt="b")
    put_all(store, [*mine, *theirs])
    store.flush()
    report = forget(store, ids_of(*mine))
    assert (report.blocks, report.elsewhere, report.ok) == (2, 2, True)
    assert "elsewhere" in str(report)
    assert len(store.lookup(keys_of(theirs))) == 2
    assert report.to_dict()["ok"] is True


def test_files_that_crashes_left_go_too(tmp_path: Path, store: KVStore) -> None:
    text = random_chain(3, seed=1)
    put_all(store, text)
    store.flush()
    disk = store._disk
    assert disk is not None
    disk.catalog.delete([text[2].key])  # a file whose row was never written
    whole = block_path(store, text[1]).read_bytes()
    half = block_path(store, text[1]).parent / f".{text[1].key.hex()}.1.ab12cd34.tmp"
    half.write_bytes(whole[: len(whole) // 2])
    named_otherwise = disk.root / "quarantine" / "kvembed.db.20260101-000000"
    named_otherwise.write_bytes(b"x" * 100 + text[0].key + b"y" * 100)
    assert forget(store, ids_of(*text)).ok
    assert raw_scan(tmp_path / "store", text) == []
    assert not half.exists()
    assert not named_otherwise.exists()


def test_traces_that_stay_are_told(tmp_path: Path, store: KVStore) -> None:
    text = random_chain(1, seed=1)
    put_all(store, text)
    store.flush()
    (tmp_path / "store" / "notes.bin").write_bytes(b"abc" + text[0].key)
    (tmp_path / "store" / "dump").write_bytes(b"12345" + text[0].token_ids.tobytes())
    (tmp_path / "store" / "blocks" / "kv").write_bytes(b"1" + text[0].data.tobytes())
    report = forget(store, ids_of(*text))
    assert not report.ok
    assert sorted(trace.split(":")[0] for trace in report.traces) == ["dump", "kv", "notes.bin"]


def test_old_rows_in_free_pages_of_the_catalog_are_found_and_cleared(tmp_path: Path, store: KVStore) -> None:
    text, others = random_chain(60, seed=1), random_chain(200, seed=2)
    put_all(store, [*text, *others])
    store.flush()
    forget_memory(store)
    catalog = store._catalog
    assert catalog is not None
    # As an earlier version deleted: without zeroing.
    with catalog.connection() as db:
        db.execute("PRAGMA secure_delete = OFF").fetchall()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        keys = [(block.key,) for block in text]
        db.executemany("DELETE FROM blocks WHERE key = ?", keys)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        db.execute("PRAGMA secure_delete = ON").fetchall()
    raw = (tmp_path / "store" / "kvembed.db").read_bytes()
    assert any(block.key in raw for block in text)
    assert forget(store, ids_of(*text)).ok
    raw = (tmp_path / "store" / "kvembed.db").read_bytes()
    assert not any(block.key in raw for block in text)
    assert len(store.lookup(keys_of(others))) == 200


def test_a_reader_in_the_way_is_told_and_the_next_time_it_is_clean(tmp_path: Path, store: KVStore) -> None:
    text, other = random_chain(2, seed=1), random_chain(2, seed=2)
    put_all(store, [*text, *other])
    store.flush()
    reader = sqlite3.connect(tmp_path / "store" / "kvembed.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM blocks").fetchone()
    try:
        report = forget(store, ids_of(*text))
    finally:
        reader.close()
    assert report.blocks == 2
    assert {trace.split(":")[0] for trace in report.traces} <= {"kvembed.db", "kvembed.db-wal"}
    assert not report.ok
    assert forget(store, ids_of(*text)).ok
    assert raw_scan(tmp_path / "store", text) == []


# ------------------------------------------------------------------------------------- with a model

TEXT = "The lighthouse keeper counts the ships at dusk. " * 4
OTHER = "Quite another report, about the price of salt. " * 4


@pytest.fixture(scope="module")
def model(tiny_llama: Any) -> Any:
    return tiny_llama()


def wrap(model: Any, store: KVStore, tokenizer: Any, **options: Any) -> CachedModel:
    return CachedModel(model, tokenizer, store=store, block_size=BLOCK, progress=False, **options)


def blocks_of(store: KVStore) -> list[Block]:
    """Return every stored block."""
    disk = store._disk
    assert disk is not None
    found = []
    for row in list(disk.catalog.rows()):
        source = disk.open(row.info.key)
        assert source is not None
        found.append(source.read_all())
        source.close()
    return found


@pytest.mark.parametrize("pinned", [False, True])
def test_a_document_with_all_that_was_asked(
    model: Any, tiny_tokenizer: Any, store: KVStore, tmp_path: Path, pinned: bool
) -> None:
    cached = wrap(model, store, tiny_tokenizer)
    document, other = cached.document(TEXT, pin=pinned), cached.document(OTHER)
    document.ask("How many ships?", max_new_tokens=20)
    document.ask("And at dawn?", max_new_tokens=3)
    other.ask("How much?", max_new_tokens=3)
    store.flush()
    before = {block.key: block for block in blocks_of(store)}
    report = document.forget()
    assert report.ok
    after = {block.key for block in blocks_of(store)}
    gone = [block for key, block in before.items() if key not in after]
    assert report.blocks == len(gone) > len(document.prefix_ids) // BLOCK
    assert raw_scan(tmp_path / "store", gone) == []
    assert store.pins() == {}
    assert cached.lookup(document.prompt_ids("How many ships?")).num_tokens < BLOCK  # the head of the template
    assert cached.lookup(other.prompt_ids("How much?")).num_tokens >= len(other.prefix_ids)
    # And computing it again gives what a store that never saw it gives.
    plain: Any = cached.hf_model
    ids = torch.from_numpy(document.prompt_ids("How many ships?").astype(np.int64))[None]
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    answer = document.ask("How many ships?", max_new_tokens=5)
    assert answer.token_ids.tolist() == expected[0, ids.shape[1] :].tolist()


def test_a_text_is_found_as_a_prompt_and_as_a_document(model: Any, tiny_tokenizer: Any, store: KVStore) -> None:
    cached = wrap(model, store, tiny_tokenizer)
    cached.document(TEXT).ask("What?", max_new_tokens=2)
    list(cached.stream(TEXT + "And then", max_new_tokens=2))
    cached.document(OTHER)
    assert len(cached._engine.live) == 3
    report = cached.forget(TEXT)
    assert report.ok
    assert cached.lookup(TEXT).num_tokens == 0
    assert cached.lookup(cached.document(TEXT, prefill=False).prefix_ids).num_tokens < BLOCK
    assert len(cached._engine.live) == 1
    assert cached.lookup(cached.document(OTHER, prefill=False).prefix_ids).num_tokens > BLOCK
    assert cached.forget(TEXT).blocks == 0


def test_ids_and_messages(model: Any, tiny_tokenizer: Any, store: KVStore) -> None:
    cached = wrap(model, store, tiny_tokenizer, max_live=0)
    messages = [{"role": "user", "content": TEXT}]
    cached.prefill(messages)
    cached.prefill([*range(100), 7])
    assert cached.forget(messages).blocks > 0
    assert cached.forget(torch.arange(50)).blocks == 101 // BLOCK
    assert store.ls() == []


def test_a_session_with_the_branches_it_left(
    model: Any, tiny_tokenizer: Any, store: KVStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVEMBED_HOME", str(tmp_path / "home"))
    cached = wrap(model, store, tiny_tokenizer)
    with cached.session("one") as session, cached.session("two") as other:
        session.send("How many ships came by at dusk, and how many at dawn?", max_new_tokens=20)
        session.send("And tomorrow?", max_new_tokens=20)
        session.edit(1, "What about the next day, then?", max_new_tokens=20)
        other.send("Quite another matter: what is the price of salt?", max_new_tokens=20)
        store.flush()
        before = {block.key: block for block in blocks_of(store)}
        kept = cached.lookup(other.streams()[0]).num_tokens
        report = session.forget()
        assert report.ok
        after = {block.key for block in blocks_of(store)}
        gone = [block for key, block in before.items() if key not in after]
        assert raw_scan(tmp_path / "store", gone) == []
        left = [block for block in before.values() if block.key in after]
        words = [tiny_tokenizer.decode(block.token_ids.tolist()) for block in left]
        assert not any(part in word for word in words for part in ("ships", "dawn", "tomor", "next day"))
        assert cached.lookup(other.streams()[0]).num_tokens == kept
        assert report.messages == 6
        with pytest.raises(ConfigError, match="no session"):
            _ = session.turns


LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
    except OSError:
        print("held")
"""


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")
def test_the_scan_leaves_the_locks_of_open_databases(
    model: Any, tiny_tokenizer: Any, store: KVStore, tmp_path: Path
) -> None:
    # SQLite holds this range in its shared mode. Without it another process takes itself for the last user, and
    # deletes the log.
    def held(path: Path) -> bool:
        done = subprocess.run([sys.executable, "-c", LOCK, path], capture_output=True, text=True, check=True)
        return done.stdout == "held\n"

    cached = wrap(model, store, tiny_tokenizer)
    with SessionDB(tmp_path / "sessions.db") as db:
        files = [db.path, tmp_path / "store" / CATALOG_NAME]
        with SessionDB(db.path):  # a second one, which is opened and closed
            session = cached.session("one", db=db)
            session.send(TEXT, max_new_tokens=3)
        store.flush()
        assert [held(path) for path in files] == [True, True]
        assert session.forget().ok
        assert [held(path) for path in files] == [True, True]


def test_only_the_own_salt(model: Any, tiny_tokenizer: Any, store: KVStore) -> None:
    mine, theirs = (wrap(model, store, tiny_tokenizer, cache_salt=salt, max_live=0) for salt in "ab")
    mine.prefill(TEXT)
    theirs.prefill(TEXT)
    report = mine.forget(TEXT)
    assert report.elsewhere > 0
    assert mine.lookup(TEXT).num_tokens == 0
    assert theirs.lookup(TEXT).num_tokens > BLOCK


def test_what_cannot_be_forgotten_is_said(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with KVStore(tmp_path / "a") as store:
        cached = wrap(model, store, tiny_tokenizer)
        with pytest.raises(PromptError, match="empty"):
            cached.forget("")
        with pytest.raises(PromptError, match="a prompt is"):
            cached.forget([1.5])
        cached.prefill(TEXT)
    with KVStore(tmp_path / "a", read_only=True) as store, pytest.raises(StoreReadOnlyError):
        wrap(model, store, tiny_tokenizer).forget(TEXT)
    with KVStore(max_disk_bytes=None) as store:
        cached = wrap(model, store, tiny_tokenizer, max_live=0)
        cached.prefill(TEXT)
        assert cached.forget(TEXT).blocks > 0
        assert store.ls() == []
