"""`KVStore` as the model side uses it: what is found, read and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvembed import KVStore
from kvembed._keys import as_token_ids
from kvembed._testing import (
    FINGERPRINT,
    assert_reads,
    forget_memory,
    keys_of,
    put_all,
    random_block,
    random_chain,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    with KVStore(tmp_path / "store", max_cpu_bytes="1MiB", max_disk_bytes="16MiB") as store:
        yield store
        if not store.closed:
            assert store.verify().problems == ()
            assert store.take_problems() == []


def test_the_longest_run_from_the_first_block(store: KVStore) -> None:
    chain = random_chain(5)
    put_all(store, [chain[0], chain[1], chain[2], chain[4]])
    found = store.lookup(keys_of(chain))
    assert [stored.info for stored in found] == [block.info for block in chain[:3]]
    assert {stored.tier for stored in found} == {"cpu"}
    assert store.lookup(keys_of(chain[3:])) == []
    assert store.lookup([]) == []


def test_each_block_is_found_in_its_fastest_tier(store: KVStore) -> None:
    chain = random_chain(4)
    put_all(store, chain)
    forget_memory(store)
    store.put(chain[0])
    store.promote([chain[2].key])
    store.flush()
    assert [stored.tier for stored in store.lookup(keys_of(chain))] == ["cpu", "disk", "cpu", "disk"]
    for block, tier in zip(chain, ["cpu", "disk", "cpu", "disk"], strict=True):
        assert_reads(store, block, tier)


def test_exact_only_stops_at_the_first_block_that_is_not(store: KVStore) -> None:
    chain = random_chain(2)
    third = random_block(chain[1].key, start=32, exact=False)
    fourth = random_block(third.key, start=48)
    put_all(store, [*chain, third, fourth])
    everything = keys_of([*chain, third, fourth])
    assert len(store.lookup(everything)) == 4
    assert len(store.lookup(everything, exact_only=True)) == 2


def test_an_exact_copy_on_disk_counts_when_the_one_in_memory_is_not(tmp_path: Path) -> None:
    exact, rough = random_block(seed=1), random_block(ids=random_block(seed=1).token_ids, seed=2, exact=False)
    with KVStore(tmp_path) as mine, KVStore(tmp_path) as other:
        mine.put(rough)
        mine.flush()
        other.put(exact)
        other.flush()
        assert [s.tier for s in mine.lookup([exact.key])] == ["cpu"]
        assert [s.tier for s in mine.lookup([exact.key], exact_only=True)] == ["disk"]
        source = mine.open(exact.key, exact_only=True)
        assert source is not None
        assert source.info.exact
        source.close()


def test_the_tail_that_shares_most(store: KVStore) -> None:
    root = random_chain(1)[0]
    a = random_block(root.key, [*range(8), 1, 2, 3], start=16)
    b = random_block(root.key, [*range(8), 1, 2, 9, 9, 9], start=16)
    c = random_block(root.key, [*range(8), 7], start=16)
    put_all(store, [root, a, b, c])
    for _ in ("from memory", "from disk", "remembered ids"):
        found = store.find_tail(root.key, as_token_ids([*range(8), 1, 2, 9, 5]))
        assert found is not None
        assert (found[0].info.key, found[1]) == (b.key, 11)
        forget_memory(store)
    found = store.find_tail(root.key, as_token_ids([*range(8), 7, *range(500)]))
    assert found is not None
    assert (found[0].info.key, found[1]) == (c.key, 9)


def test_a_whole_block_can_serve_as_a_tail(store: KVStore) -> None:
    chain = random_chain(2)
    put_all(store, chain)
    wanted = as_token_ids([*chain[1].token_ids[:12], 1, 2])
    found = store.find_tail(chain[0].key, wanted)
    assert found is not None
    assert (found[0].info.key, found[1]) == (chain[1].key, 12)


def test_tails_too_short_or_different_are_none(store: KVStore) -> None:
    block = random_block(ids=range(20))
    store.put(block)
    parent = block.info.parent
    assert store.find_tail(parent, as_token_ids(range(7))) is None
    assert store.find_tail(parent, as_token_ids([*range(7), 99])) is None
    assert store.find_tail(bytes(32), as_token_ids(range(20))) is None
    found = store.find_tail(parent, as_token_ids(range(8)))
    assert found is not None
    assert found[1] == 8


def test_among_equal_tails_the_exact_one_is_chosen(store: KVStore) -> None:
    shared = list(range(10))
    rough = random_block(ids=[*shared, 1, 1], exact=False)
    exact = random_block(ids=[*shared, 2, 2])
    put_all(store, [exact, rough])
    found = store.find_tail(exact.info.parent, as_token_ids([*shared, 3]))
    assert found is not None
    assert (found[0].info.key, found[1]) == (exact.key, 10)


def test_children_and_token_ids(store: KVStore) -> None:
    root = random_chain(1)[0]
    a, b = random_block(root.key, range(9), start=16), random_block(root.key, range(20, 30), start=16)
    put_all(store, [root, a, b])
    for _ in range(2):
        assert {info.key for info in store.children(root.key)} == {a.key, b.key}
        ids = store.token_ids(a.key)
        assert ids is not None
        assert ids.tolist() == list(range(9))
        forget_memory(store)
    assert store.token_ids(bytes(32)) is None
    assert store.children(b.key) == []


def test_a_new_store_on_the_folder_finds_everything(tmp_path: Path) -> None:
    chain = random_chain(4)
    with KVStore(tmp_path) as store:
        put_all(store, chain)
        store.register_namespace(FINGERPRINT, {"name": "tiny", "rope": "x"})
        store.set_note(FINGERPRINT, "prefill", {"rate": 351.5})
    with KVStore(tmp_path) as store:
        assert [s.tier for s in store.lookup(keys_of(chain))] == ["disk"] * 4
        for block in chain:
            assert_reads(store, block, "disk")
        assert store.namespaces() == {FINGERPRINT: {"name": "tiny", "rope": "x"}}
        assert store.get_note(FINGERPRINT, "prefill") == {"rate": 351.5}
        assert store.get_note(FINGERPRINT, "other") is None
        assert store.get_note(bytes(32), "prefill") is None


def test_a_store_in_memory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVEMBED_CACHE_DIR", str(tmp_path / "cache"))
    chain = random_chain(3)
    with KVStore(max_cpu_bytes="1MiB", max_disk_bytes=None) as store:
        put_all(store, chain)
        store.touch(keys_of(chain))
        store.promote(keys_of(chain))
        assert store.flush()
        assert [s.tier for s in store.lookup(keys_of(chain))] == ["cpu"] * 3
        store.register_namespace(FINGERPRINT, {"name": "tiny"})
        store.set_note(FINGERPRINT, "n", 1)
        assert store.get_note(FINGERPRINT, "n") == 1
        assert store.namespaces() == {FINGERPRINT: {"name": "tiny"}}
        assert store.path is None
        assert [entry.n_tokens for entry in store.ls()] == [48]
        assert store.why_missing(bytes(32)) is None
        assert store.prune(max_bytes=0).blocks == 0
        assert store.verify().ok
        store.pin(keys_of(chain), "doc")
        assert store.pins() == {"doc": keys_of(chain)}
        assert store.forget("doc") == 3
        assert "in memory" in repr(store.stats())
    assert list(tmp_path.iterdir()) == []


def test_pins_spare_blocks_in_a_store_in_memory_only() -> None:
    keep, others = random_chain(2, seed=1), [random_block(seed=n) for n in range(10, 20)]
    with KVStore(max_cpu_bytes=4 * 4096, max_disk_bytes=None) as store:
        put_all(store, keep)
        store.pin(keys_of(keep), "doc")
        put_all(store, others)
        assert len(store.lookup(keys_of(keep))) == 2
        store.unpin("doc")
        put_all(store, [random_block(seed=n) for n in range(30, 40)])
        assert store.lookup(keys_of(keep)) == []


def test_without_a_cpu_tier_everything_goes_to_disk(tmp_path: Path) -> None:
    chain = random_chain(6)
    with KVStore(tmp_path, max_cpu_bytes=None) as store:
        put_all(store, chain)
        store.flush()
        assert [s.tier for s in store.lookup(keys_of(chain))] == ["disk"] * 6
        store.promote(keys_of(chain))
        store.reserve("live", 1 << 20)
        assert store.max_cpu_bytes == 0


def test_both_tiers_off_keeps_nothing_and_works() -> None:
    with KVStore(max_cpu_bytes=None, max_disk_bytes=None) as store:
        block = random_block()
        store.put(block)
        assert store.lookup([block.key]) == []
        assert store.open(block.key) is None
        assert store.stats().tiers == ()


def test_hits_are_counted_by_tier_and_for_ever(tmp_path: Path) -> None:
    chain = random_chain(2)
    with KVStore(tmp_path) as store:
        put_all(store, chain)
        assert_reads(store, chain[0], "cpu")
        forget_memory(store)
        assert_reads(store, chain[0], "disk")
        assert_reads(store, chain[1], "disk")
        stats = store.stats()
        assert [(t.name, t.hits, t.hit_tokens) for t in stats.tiers] == [("cpu", 1, 16), ("disk", 2, 32)]
        assert (stats.hits, stats.hit_tokens) == (2, 32)
    with KVStore(tmp_path) as store:
        stats = store.stats()
        assert (stats.hits, stats.tiers[1].hits) == (2, 0)


def test_reserved_memory_evicts_blocks(store: KVStore) -> None:
    put_all(store, [random_block(seed=n) for n in range(100)])
    store.flush()
    assert len(store._cpu or ()) == 100
    store.reserve("a", (1 << 20) - 10 * 4096)
    assert len(store._cpu or ()) == 10
    assert store.stats().tiers[0].nbytes <= 1 << 20
    store.reserve("a", 0)
    store.reserve("b", 2 << 20)  # more than there is: counted all the same
    assert store.stats().tiers[0].nbytes == 2 << 20
    store.reserve("b", 0)
