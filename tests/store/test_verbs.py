"""The verbs for people: ls, pin, prune, remove, forget, clear, stats and verify."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from kvembed import ConfigError, KVStore
from kvembed._testing import (
    FINGERPRINT,
    block_path,
    forget_memory,
    keys_of,
    put_all,
    random_block,
    random_chain,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvembed._block import Block


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    with KVStore(tmp_path / "store", max_cpu_bytes="1MiB", max_disk_bytes="16MiB") as store:
        yield store
        if not store.closed:
            assert store.verify().problems == ()
            assert store.take_problems() == []


def test_ls_shows_sequences(store: KVStore) -> None:
    store.register_namespace(FINGERPRINT, {"name": "tiny"})
    shared = random_chain(2)
    a = random_block(shared[1].key, range(10), start=32)
    b = random_block(shared[1].key, range(50, 62), start=32)
    put_all(store, [*shared, a, b])
    store.flush()
    store.pin(keys_of([*shared, a]), "doc")
    entries = {entry.key: entry for entry in store.ls()}
    assert set(entries) == {a.key, b.key}
    entry = entries[a.key]
    assert (entry.n_tokens, entry.n_blocks, entry.tier, entry.model) == (42, 3, "cpu", "tiny")
    assert entry.nbytes == (32 + 10) * 256
    assert entry.names == ("doc",)
    assert entry.id in str(entry)
    assert "42 tokens" in str(entry)
    assert json.loads(json.dumps(entry.to_dict()))["id"] == entry.id
    forget_memory(store)
    assert {entry.tier for entry in store.ls()} == {"disk"}
    assert len(store.ls(limit=1)) == 1
    assert [entry.n_tokens for entry in store.ls(sort="tokens")] == [44, 42]
    with pytest.raises(ConfigError, match="sort"):
        store.ls(sort="size")


def test_ls_shows_what_is_not_on_disk_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVStore(tmp_path) as store:
        chain = random_chain(3)
        put_all(store, chain[:2])
        store.flush()
        monkeypatch.setattr(store._writer, "_write", lambda *_: None)
        store.put(chain[2])
        assert [(entry.key, entry.last_used) for entry in store.ls()] == [(chain[2].key, None)]


def test_pin_by_digits_pins_the_whole_sequence(store: KVStore) -> None:
    chain = random_chain(3)
    put_all(store, chain)
    store.flush()
    name = store.pin(chain[2].key.hex()[:10])
    assert store.pins() == {name: keys_of(chain)}
    assert store.pin(chain[1].key, "first two") == "first two"
    assert store.pins()["first two"] == keys_of(chain[:2])
    assert store.unpin(name) == 3
    assert store.unpin("no such name") == 0
    for bad in ("ffffffffff", ""):
        with pytest.raises(ConfigError, match="no stored sequence"):
            store.pin(bad)
    with pytest.raises(ConfigError, match="no keys"):
        store.pin([])


def test_digits_that_fit_several_sequences(store: KVStore) -> None:
    blocks = [random_block(seed=n) for n in range(40)]
    put_all(store, blocks)
    first = [block.key.hex()[0] for block in blocks]
    (digit,) = [d for d in set(first) if first.count(d) > 1][:1]
    for flush in (False, True):
        with pytest.raises(ConfigError, match=f"{first.count(digit)} stored sequences begin with '{digit}'"):
            store.pin(digit)
        assert store.pin(blocks[0].key.hex().upper()) == blocks[0].key.hex()[:12]
        if not flush:
            forget_memory(store)
    for odd in ("xyz", "'", "%", "a" * 65):
        with pytest.raises(ConfigError, match="no stored sequence"):
            store.remove(odd)


def test_prune_by_age_spares_what_is_pinned_and_what_leads_to_it(store: KVStore) -> None:
    old, pinned, new = (random_chain(3, seed=n) for n in range(3))
    put_all(store, old + pinned)
    store.flush()
    store.pin([pinned[1].key], "keep")
    time.sleep(0.2)
    put_all(store, new)
    store.flush()
    plan = store.prune(older_than_s=0.15, dry_run=True)
    assert (plan.blocks, plan.dry_run) == (4, True)
    assert [len(store.lookup(keys_of(chain))) for chain in (old, pinned, new)] == [3, 3, 3]
    report = store.prune(older_than_s=0.15)
    assert (report.blocks, report.nbytes, report.dry_run) == (plan.blocks, plan.nbytes, False)
    assert "deleted 4 blocks" in str(report)
    assert [len(store.lookup(keys_of(chain))) for chain in (old, pinned, new)] == [0, 2, 3]
    assert store.why_missing(old[0].key) == "removed"
    assert store.prune(older_than_s=0, unpinned_only=False).blocks == 5


def test_prune_to_a_size(store: KVStore) -> None:
    chains = [random_chain(4, seed=n) for n in range(3)]
    for chain in chains:
        put_all(store, chain)
    store.flush()
    store.touch(keys_of(chains[0]))
    assert store.prune().blocks == 0
    assert store.prune(max_bytes="40KiB").blocks == 7
    assert [len(store.lookup(keys_of(chain))) for chain in chains] == [4, 0, 1]


def test_remove_a_sequence_leaves_what_others_need(store: KVStore) -> None:
    shared = random_chain(2)
    a, b = random_block(shared[1].key, range(10), start=32), random_block(shared[1].key, range(50, 62), start=32)
    put_all(store, [*shared, a, b])
    store.flush()
    assert store.remove(a.key.hex()[:12]) == 1
    assert len(store.lookup(keys_of([*shared, b]))) == 3
    assert store.remove(b.key) == 3
    assert store.ls() == []
    assert store.remove([b.key]) == 0


def test_forget_erases_the_text_and_what_was_asked_about_it(store: KVStore) -> None:
    system = random_chain(1)[0]
    document = [random_block(system.key, start=16, seed=1)]
    end = random_block(document[0].key, range(12), start=32)
    question = random_block(document[0].key, [*range(12), 900, 901], start=32)
    follow_up = random_block(question.key, start=46, seed=3)
    other = random_block(system.key, start=16, seed=9)
    variant = random_block(document[0].key, range(200, 212), start=32)
    put_all(store, [system, *document, end])
    store.pin(keys_of([system, *document, end]), "doc")
    put_all(store, [question, follow_up, other])
    store.flush()
    assert store.forget("doc") == 4
    for block in (*document, end, question, follow_up):
        assert store.lookup([block.key]) == []
        assert not block_path(store, block).exists()
    assert len(store.lookup(keys_of([system, other]))) == 2
    assert store.pins() == {}
    with pytest.raises(ConfigError, match="nothing is pinned"):
        store.forget("doc")
    # A text that begins alike but goes on otherwise keeps the common beginning.
    put_all(store, [*document, end, variant])
    store.pin(keys_of([system, *document, end]), "doc")
    store.flush()
    assert store.forget("doc") == 1
    assert len(store.lookup(keys_of([system, *document, variant]))) == 3


def test_forget_spares_what_other_names_hold(store: KVStore) -> None:
    chain = random_chain(4)
    put_all(store, chain)
    store.pin(keys_of(chain), "all")
    store.pin(keys_of(chain[:2]), "half")
    assert store.forget("all") == 2
    assert len(store.lookup(keys_of(chain))) == 2
    assert store.forget("half") == 2


def test_forget_empties_the_quarantine_of_it(tmp_path: Path) -> None:
    chain = random_chain(2)
    with KVStore(tmp_path) as store:
        put_all(store, chain)
        store.pin(keys_of(chain), "doc")
        store.flush()
        store.discard(chain[1].key, "test")
        assert len(list((tmp_path / "quarantine").iterdir())) == 2
        store.forget("doc")
        assert list((tmp_path / "quarantine").iterdir()) == []
        assert list((tmp_path / "blocks").rglob("*.safetensors")) == []


def test_forget_of_a_text_whose_end_is_lost_spares_its_neighbours(tmp_path: Path) -> None:
    system = random_chain(1)[0]
    document, other = random_block(system.key, start=16, seed=1), random_block(system.key, start=16, seed=2)
    question = random_block(document.key, start=32, seed=3)
    with KVStore(tmp_path) as store:
        put_all(store, [system, document, other, question])
        store.pin(keys_of([system, document]), "doc")
        store.flush()
        store.discard(document.key, "test")
        assert store.forget("doc") == 1
        assert store.lookup([question.key]) == []
        assert len(store.lookup(keys_of([system, other]))) == 2


def test_a_pinned_end_is_kept_when_a_longer_one_comes_before_it_is_written(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, longer, unpinned = random_block(ids=range(12)), random_block(ids=range(15)), random_block(ids=range(9))
    assert store._disk is not None
    put, gate = store._disk.put, threading.Event()
    monkeypatch.setattr(store._disk, "put", lambda block: (gate.wait(10), put(block))[1])
    store.pin([end.key], "doc")
    put_all(store, [unpinned, end, longer])
    gate.set()
    store.flush()
    assert [len(store.lookup([b.key])) for b in (unpinned, end, longer)] == [0, 1, 1]


def test_forget_takes_a_document_or_keys(store: KVStore) -> None:
    @dataclass
    class Document:
        name: str

    a, b = random_chain(2, seed=1), random_chain(2, seed=2)
    put_all(store, a + b)
    store.pin(keys_of(a), "report")
    assert store.forget(Document("report")) == 2
    assert store.forget(keys_of(b)) == 2
    assert store.forget([]) == 0
    with pytest.raises(ConfigError, match="'report'"):
        store.forget(Document("report"))


def test_remove_by_a_pinned_name_forgets_it(store: KVStore) -> None:
    chain = random_chain(2)
    put_all(store, chain)
    store.pin(keys_of(chain), "doc")
    assert store.remove("doc") == 2
    assert store.pins() == {}


def test_clear(store: KVStore) -> None:
    chain = random_chain(5)
    put_all(store, chain)
    store.pin(keys_of(chain), "doc")
    assert store.clear() == 5
    assert store.lookup(keys_of(chain)) == []
    assert store.pins() == {}
    assert store.path is not None
    assert list((store.path / "blocks").iterdir()) == []
    put_all(store, chain)
    store.flush()
    assert len(store.lookup(keys_of(chain))) == 5


def test_stats_print_themselves(store: KVStore) -> None:
    put_all(store, random_chain(3))
    store.flush()
    stats = store.stats()
    assert (stats.tiers[0].blocks, stats.tiers[1].blocks) == (3, 3)
    assert "cpu" in repr(stats)
    assert "disk" in repr(stats)
    page = stats._repr_mimebundle_()["text/html"]
    assert page.count("<tr") == 3
    assert "<script" not in page
    assert json.loads(json.dumps(stats.to_dict()))["tiers"][1]["blocks"] == 3


def test_a_path_with_markup_is_escaped(tmp_path: Path) -> None:
    with KVStore(tmp_path / "<b>x", max_cpu_bytes=None) as store:
        assert "<b>" not in store.stats()._repr_html_()


def damage(root: Path, store: KVStore, chain: list[Block]) -> None:
    """Do one of each: wrong bytes, no file, no row, left-over, stray, open modes."""
    assert store._disk is not None
    path = block_path(store, chain[0])
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    block_path(store, chain[1]).unlink()
    store._disk.catalog.delete([chain[2].key])
    left = path.parent / ".x.1.abcd.tmp"
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    left.chmod(0o600)
    (path.parent / "notes.txt").write_text("mine")
    (path.parent / "notes.txt").chmod(0o600)
    block_path(store, chain[3]).chmod(0o644)


@pytest.mark.skipif(os.name == "nt", reason="modes are a POSIX matter")
def test_verify_finds_and_fixes_everything(tmp_path: Path) -> None:
    chain = [random_block(seed=n) for n in range(6)]
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        put_all(store, chain)
        store.flush()
        assert store.verify().problems == ()
        damage(tmp_path, store, chain)
        steps: list[tuple[int, int]] = []
        report = store.verify(on_progress=lambda done, total: steps.append((done, total)))
        text = str(report)
        for words in ("does not match", "file is gone", "missing in the catalog", "cut off", "left alone", "mode 644"):
            assert words in text
        assert (len(report.problems), report.fixed, report.ok) == (6, 0, False)
        assert steps[-1][0] == steps[-1][1] == len(steps)
        assert len(store.verify().problems) == 6  # looking changes nothing
        report = store.verify(fix=True)
        assert (len(report.problems), report.fixed) == (6, 5)
        report = store.verify()
        assert [problem.split(":")[0] for problem in report.problems] == ["notes.txt"]
        assert report.blocks == 4
        assert len(store.lookup([chain[2].key])) == 1
        assert json.loads(json.dumps(report.to_dict()))["ok"] is False


def test_verify_corrects_a_row_that_says_something_else(tmp_path: Path) -> None:
    block = random_block()
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        store.put(block)
        store.flush()
        assert store._catalog is not None
        with store._catalog.connection() as db:
            db.execute("UPDATE blocks SET exact = 0, file_bytes = 4096")
        assert "something else" in str(store.verify())
        assert store.verify(fix=True).ok
        assert store.lookup([block.key])[0].info == block.info
        assert store.verify().problems == ()


def test_a_warning_is_raised_once_by_the_opening_not_by_each_use(tmp_path: Path) -> None:
    with KVStore(tmp_path) as store:
        store.put(random_block())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with KVStore(tmp_path) as store:
            store.lookup([bytes(32)])
