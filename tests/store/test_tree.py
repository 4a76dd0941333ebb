"""The tree of prefixes, and what people do with its rows: pin, evict, verify, forget."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvembed import ConfigError, KVStore, StoreReadOnlyError, Usage
from kvembed._block import Block, BlockInfo
from kvembed._keys import SNAPSHOT_IDS, as_token_ids, root_key, snapshot_key
from kvembed._sessions.db import SessionDB
from kvembed._sessions.messages import Message
from kvembed._sessions.streams import known_texts
from kvembed._testing import (
    FINGERPRINT,
    SMALL_LAYOUT,
    block_path,
    forget_memory,
    keys_of,
    put_all,
    random_block,
    random_chain,
)
from kvembed._tree import KnownText, LiveTokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvembed._tree import PrefixTree


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    with KVStore(tmp_path / "store", max_cpu_bytes="1MiB", max_disk_bytes="16MiB") as store:
        store.register_namespace(FINGERPRINT, {"name": str(tmp_path / "models" / "tiny")})
        yield store
        if not store.closed:
            assert store.verify().problems == ()


def shape(tree: PrefixTree) -> list[tuple[int, int, int]]:
    return [(row.depth, row.start, row.end) for row in tree.rows]


def forked(store: KVStore) -> tuple[list[Block], list[Block], list[Block]]:
    """Three blocks, and two ways to go on: two blocks, and one of 10 tokens."""
    shared = random_chain(3)
    first = random_block(shared[2].key, start=48, seed=8)
    longer = [first, random_block(first.key, start=64, seed=9)]
    shorter = [random_block(shared[2].key, range(10), start=48, exact=False)]
    put_all(store, [*shared, *longer, *shorter])
    store.flush()
    return shared, longer, shorter


def test_a_run_without_a_fork_is_one_row(store: KVStore) -> None:
    shared, longer, shorter = forked(store)
    other = random_chain(2, seed=5)
    put_all(store, other)
    store.flush()
    tree = store.prefixes()
    assert sorted(shape(tree)) == [(0, 0, 32), (0, 0, 48), (1, 48, 58), (1, 48, 80)]
    trunk = next(row for row in tree.rows if row.end == 48)
    assert (trunk.key, trunk.keys, trunk.n_blocks, trunk.exact) == (shared[2].key, tuple(keys_of(shared)), 3, True)
    assert trunk.blocks == {"cpu": 3, "disk": 3}
    assert trunk.nbytes["cpu"] == 3 * 16 * 256
    assert trunk.nbytes["disk"] >= 3 * 16 * 256
    assert (trunk.tier, trunk.model_name, trunk.namespace, trunk.names) == ("cpu", "tiny", FINGERPRINT, ())
    tail = next(row for row in tree.rows if row.end == 58)
    assert (tail.exact, tree.chain(tail)) == (False, keys_of([*shared, *shorter]))
    assert {row.key for row in tree.below(trunk)} == {longer[1].key, shorter[0].key}
    assert tree.find(tail.id) == [tail]
    known = json.loads(json.dumps(tree.to_dict()))
    assert {row["parent"] for row in known} == {None, trunk.id}
    forget_memory(store)
    assert {row.tier for row in store.prefixes().rows} == {"disk"}


def test_an_empty_store_has_an_empty_tree(store: KVStore) -> None:
    assert store.prefixes().rows == ()


def test_what_is_in_memory_only_is_in_the_tree(tmp_path: Path) -> None:
    with KVStore(None, max_cpu_bytes="1MiB", max_disk_bytes=None) as store:
        forked(store)
        rows = store.prefixes().rows
        assert len(rows) == 3
        assert all(row.nbytes.keys() == {"cpu"} and row.last_used is None for row in rows)


def test_the_latest_used_comes_first(store: KVStore) -> None:
    chains = [random_chain(1, seed=seed) for seed in (1, 2, 3)]
    for chain in chains:
        put_all(store, chain)
    store.flush()
    assert store._catalog is not None
    for when, chain in zip((200.0, 300.0, 100.0), chains, strict=True):
        with store._catalog.transaction() as db:
            db.execute("UPDATE blocks SET last_used = ? WHERE key = ?", (when, chain[0].key))
    assert [row.last_used for row in store.prefixes().rows] == [300.0, 200.0, 100.0]


def test_a_row_ends_where_a_pinned_part_ends(store: KVStore) -> None:
    chain = random_chain(5)
    put_all(store, chain)
    store.flush()
    store.pin(keys_of(chain[:2]), "report")
    assert [(row.end, row.names, row.pinned) for row in store.prefixes().rows] == [
        (32, ("report",), True),
        (80, (), False),
    ]


def test_a_state_belongs_to_its_prefix_and_is_no_fork(store: KVStore) -> None:
    chain = random_chain(3)
    key = snapshot_key(chain[1].key)
    info = BlockInfo(key, chain[1].key, FINGERPRINT, 32, 1, True, SMALL_LAYOUT.nbytes(1))
    state = Block(info, SNAPSHOT_IDS, SMALL_LAYOUT, np.zeros(SMALL_LAYOUT.nbytes(1), np.uint8))
    put_all(store, [*chain, state])
    store.flush()
    (row,) = store.prefixes().rows
    assert (row.end, row.n_blocks, row.states) == (48, 3, 1)
    assert row.nbytes["cpu"] == 3 * 16 * 256 + SMALL_LAYOUT.nbytes(1)


def test_what_lost_its_beginning_is_out_of_reach(store: KVStore) -> None:
    chain = random_chain(3)
    put_all(store, chain)
    store.flush()
    store.remove([chain[0].key])
    (row,) = store.prefixes().rows
    assert (row.start, row.reachable) == (16, False)


def test_a_catalog_whose_blocks_go_in_a_circle(store: KVStore) -> None:
    chain = random_chain(3)
    put_all(store, chain)
    forget_memory(store)
    assert store._catalog is not None
    with store._catalog.transaction() as db:
        db.execute("UPDATE blocks SET parent = ? WHERE key = ?", (chain[2].key, chain[0].key))
    assert [row.reachable for row in store.prefixes().rows] == [True]
    with store._catalog.transaction() as db:
        db.execute("UPDATE blocks SET parent = ? WHERE key = ?", (chain[0].info.parent, chain[0].key))


def test_texts_are_found_by_their_ids(store: KVStore) -> None:
    shared, _longer, shorter = forked(store)
    ids = np.concatenate([block.token_ids for block in shared])
    whole = as_token_ids(np.concatenate([ids, shorter[0].token_ids, [1, 2, 3]]))
    texts = [KnownText("trip", whole), KnownText("start", as_token_ids(ids[:20])), KnownText("other", whole[::-1])]
    live = LiveTokens("live", root_key(FINGERPRINT), as_token_ids(ids[:32]), 100)
    rows = {row.end: row for row in store.prefixes(texts, [live]).rows}
    # A row ends where a session ends, so that each is used by the same ones from end to end.
    assert {end: row.users for end, row in rows.items()} == {
        16: ("start", "trip"),
        48: ("trip",),
        58: ("trip",),
        80: (),
    }
    assert rows[16].nbytes["live"] == 16 * 100
    assert rows[48].blocks["live"] == 1
    assert "live" not in rows[80].nbytes
    assert rows[16].tier == "live"


def test_a_session_knows_its_blocks_without_a_tokenizer(store: KVStore, tmp_path: Path) -> None:
    chain = random_chain(3)
    put_all(store, chain)
    store.flush()
    ids = as_token_ids(np.concatenate([block.token_ids for block in chain]))
    db = SessionDB(tmp_path / "sessions.db")
    db.open("trip")
    first = Message(0, None, "assistant", "x", ids_rest=ids[:20].tobytes())
    second = Message(0, None, "assistant", "y", ids_kept=10, ids_rest=ids[10:48].tobytes())
    head = db.add("trip", [Message(0, None, "user", "a"), first], None)
    db.add("trip", [Message(0, None, "user", "b"), second], head)
    texts = known_texts(db)
    assert [(text.label, text.ids.tolist()) for text in texts] == [("trip", ids.tolist())]
    assert [row.users for row in store.prefixes(texts).rows] == [("trip",)]
    db.close()


def test_streams_of_every_branch_each_once(tmp_path: Path) -> None:
    db = SessionDB(tmp_path / "sessions.db")
    db.open("trip")

    def reply(kept: int, rest: list[int]) -> Message:
        return Message(0, None, "assistant", "x", ids_kept=kept, ids_rest=as_token_ids(rest).tobytes())

    first = db.add("trip", [Message(0, None, "user", "a"), reply(0, [1, 2, 3])], None)
    db.add("trip", [Message(0, None, "user", "b"), reply(3, [4, 5])], first)
    db.add("trip", [Message(0, None, "user", "c"), reply(2, [9])], first)  # its template changed a token
    db.open("empty")
    found = sorted((text.label, text.ids.tolist()) for text in known_texts(db))
    assert found == [("trip", [1, 2, 3, 4, 5]), ("trip", [1, 2, 9])]
    db.close()


# --- evict ---------------------------------------------------------------------------------------------


def test_evict_takes_what_follows_too(store: KVStore) -> None:
    shared, longer, _shorter = forked(store)
    tree = store.prefixes()
    report = store.evict(next(row for row in tree.rows if row.end == 80).keys)
    assert (report.blocks, report.spared) == (2, 0)
    assert shape(store.prefixes()) == [(0, 0, 58)]
    assert not block_path(store, longer[0]).exists()
    assert store.why_missing(longer[0].key) == "removed"
    assert store.evict([shared[0].key]).blocks == 4
    assert store.prefixes().rows == ()


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_evict_from_one_tier(store: KVStore, tier: str) -> None:
    shared, _, _ = forked(store)
    store.evict([shared[1].key], tier)
    other = "disk" if tier == "cpu" else "cpu"
    for row in store.prefixes().rows:
        if row.start:
            assert set(row.blocks) == {other}
        else:
            assert row.blocks[tier] == 1
            assert row.blocks[other] == 3
    found = store.lookup(keys_of(shared))
    assert [block.tier for block in found] == (["cpu", "disk", "disk"] if tier == "cpu" else ["cpu"] * 3)


def test_evict_spares_what_is_pinned_and_what_leads_to_it(store: KVStore) -> None:
    shared, longer, shorter = forked(store)
    store.pin(keys_of([*shared, longer[0]]), "report")
    report = store.evict([shared[0].key], "disk")
    assert (report.blocks, report.spared) == (2, 4)
    assert "4 spared" in str(report)
    assert store.known(keys_of([*shared, *longer, *shorter])) != [None] * 6
    assert all(block_path(store, block).exists() for block in [*shared, longer[0]])
    # In memory they may go: they are on disk.
    assert store.evict([shared[0].key], "cpu").spared == 0


def test_what_was_evicted_from_disk_is_written_again_when_it_is_pinned(store: KVStore) -> None:
    chain = random_chain(2)
    put_all(store, chain)
    store.flush()
    store.evict(keys_of(chain), "disk")
    assert not block_path(store, chain[0]).exists()
    store.pin(keys_of(chain), "report")
    store.flush()
    assert block_path(store, chain[0]).exists()


def test_evict_leaves_in_memory_what_is_pinned_nowhere_else(tmp_path: Path) -> None:
    with KVStore(None, max_cpu_bytes="1MiB", max_disk_bytes=None) as store:
        chain = random_chain(3)
        put_all(store, chain)
        store.pin(keys_of(chain[:2]), "report")
        assert store.evict(keys_of(chain)).blocks == 1
        assert len(store.lookup(keys_of(chain))) == 2


def test_evict_refuses(store: KVStore) -> None:
    with pytest.raises(ConfigError, match="remote"):
        store.evict([], "remote")
    with KVStore(store.path, read_only=True) as reader, pytest.raises(StoreReadOnlyError):
        reader.evict([])


# --- verify, and the latest calls ----------------------------------------------------------------------


def test_verify_of_some_blocks(store: KVStore) -> None:
    shared, longer, _ = forked(store)
    done: list[tuple[int, int]] = []
    report = store.verify(keys=keys_of(longer), on_progress=lambda at, of: done.append((at, of)))
    assert (report.blocks, report.ok, done) == (2, True, [(1, 2), (2, 2)])
    path = block_path(store, longer[1])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not store.verify(keys=keys_of(longer)).ok
    assert store.verify(keys=keys_of(shared)).ok
    fixed = store.verify(fix=True, keys=keys_of(longer))
    assert (fixed.fixed, len(fixed.problems), path.exists()) == (1, 1, False)
    block_path(store, longer[0]).unlink()
    lost = store.verify(fix=True, keys=keys_of(longer))
    assert "its file is gone" in lost.problems[0]
    forget_memory(store)
    assert [row.end for row in store.prefixes().rows] == [58]


def test_recent_hit_rates_are_shared_and_bounded(tmp_path: Path) -> None:
    with KVStore(tmp_path / "store") as store:
        store.record(Usage(prompt_tokens=100, cached_tokens_by_tier={"cpu": 75}))
        assert store.recent_hit_rates() == [0.75]  # before it is written
        store.record(Usage(prompt_tokens=100, bypass_reason="x"))
        store.flush()
        with KVStore(tmp_path / "store") as other:
            other.record(Usage(prompt_tokens=10, cached_tokens_by_tier={"disk": 5}))
            assert other.recent_hit_rates() == [0.75, 0.5]
        assert store.recent_hit_rates() == [0.75, 0.5]
        for _ in range(200):
            store.record(Usage(prompt_tokens=10))
        store.flush()
        assert store.recent_hit_rates() == [0.0] * 120
        assert store._catalog is not None
        store._catalog.select("UPDATE meta SET value = 'xyz' WHERE name = 'recent_calls'")
        assert store.recent_hit_rates() == []
    with KVStore(None, max_disk_bytes=None) as memory:
        memory.record(Usage(prompt_tokens=4, cached_tokens_by_tier={"live": 3}))
        assert memory.recent_hit_rates() == [0.75]
