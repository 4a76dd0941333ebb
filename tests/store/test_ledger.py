"""What is counted for ever, the log of calls, and the curve of hit rates that is replayed from it."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from typing import TYPE_CHECKING

import pytest

from kvembed import KVStore, Usage
from kvembed._catalog import Catalog
from kvembed._hitcurve import _distances, hit_curve
from kvembed._ledger import Call, Ledger
from kvembed._testing import assert_reads, forget_memory, keys_of, put_all, random_block, random_chain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kvembed._block import Block

FILE = 8192


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "kvembed.db", create=True)
    yield catalog
    catalog.close()


def call(store: KVStore, chain: Sequence[Block]) -> None:
    put_all(store, chain)
    store.touch(keys_of(chain))


# -- sums --------------------------------------------------------------------------------------------


def test_sums_are_shared_and_last(catalog: Catalog) -> None:
    one, two = Ledger(catalog), Ledger(catalog)
    one.add_later(calls=1, saved_s=2.5)
    assert one.sums()["saved_s"] == 2.5  # what waits is counted too
    one.flush()
    two.add_later(calls=2)
    two.flush()
    assert one.sums() == {"calls": 3.0, "saved_s": 2.5}


def test_no_more_than_the_limit_is_taken(catalog: Catalog) -> None:
    ledger = Ledger(catalog)
    assert [ledger.take("x", 40, 100) for _ in range(3)] == [True, True, False]
    assert ledger.take("x", 40, None)
    ledger.take("x", -100, None)
    assert ledger.sums() == {"x": 20.0}


def test_days_are_bounded_and_the_sum_of_all_stays(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvembed._ledger._DAYS", 3)
    ledger = Ledger(catalog)
    for number in range(6):
        monkeypatch.setattr("kvembed._ledger.today", lambda n=number: f"2026-01-0{n + 1}")
        ledger.add_later(x=1)
        ledger.flush()
    assert list(ledger.days("x")) == ["2026-01-04", "2026-01-05", "2026-01-06"]
    assert ledger.sums()["x"] == 6


def test_hits_and_bytes_by_tier_for_ever(tmp_path: Path) -> None:
    chain = random_chain(2)
    with KVStore(tmp_path) as store:
        put_all(store, chain)
        assert_reads(store, chain[0], "cpu")
        forget_memory(store)
        assert_reads(store, chain[0], "disk")
        assert_reads(store, chain[1], "disk")
    with KVStore(tmp_path) as store:
        tiers = store.stats().tiers
        assert [(t.name, t.hits, t.ever_hits, t.ever_tokens, t.ever_bytes) for t in tiers] == [
            ("cpu", 0, 1, 16, 4096),
            ("disk", 0, 2, 32, 8192),
        ]


def test_what_calls_saved_is_summed_and_marked_as_an_estimate(tmp_path: Path) -> None:
    for _ in range(2):
        with KVStore(tmp_path) as store:
            store.record(Usage(prompt_tokens=100, cached_tokens_by_tier={"disk": 60, "live": 30}, saved_s=1.5))
            store.record(Usage(prompt_tokens=1000, bypass_reason="a reason"))
    with KVStore(tmp_path) as store:
        stats = store.stats()
    assert (stats.calls, stats.prompt_tokens, stats.saved_s, stats.saved_s_today) == (2, 200, 3.0, 3.0)
    assert stats.reused_tokens == {"live": 60, "disk": 120}
    for text in (repr(stats), stats._repr_html_()):
        assert "90.0 % reused (live 60 · disk 120) · saved ≈ 3.00 s (estimate)" in text
    json.dumps(stats.to_dict())


def test_a_store_in_memory_only_counts_too() -> None:
    with KVStore(max_disk_bytes=None) as store:
        store.put(random_block())
        assert_reads(store, random_block(), "cpu")
        store.record(Usage(prompt_tokens=10, cached_tokens_by_tier={"cpu": 5}, saved_s=1.0))
        stats = store.stats()
        assert (stats.tiers[0].ever_hits, stats.saved_s, stats.written_today) == (1, 1.0, 0)
        assert "written" not in repr(stats)
        assert store.hit_curve().calls == 0


def test_a_read_only_store_shows_what_was_counted(tmp_path: Path) -> None:
    with KVStore(tmp_path) as store:
        call(store, random_chain(2))
    with KVStore(tmp_path, read_only=True) as store:
        store.touch(keys_of(random_chain(2)))
        stats = store.stats()
        assert stats.written_today == 2 * FILE
        assert store.hit_curve().calls == 1


# -- the log of calls --------------------------------------------------------------------------------


def test_the_log_holds_short_digests_and_sizes_only(tmp_path: Path) -> None:
    chain = random_chain(3)
    with KVStore(tmp_path) as store:
        call(store, chain)
        store.touch([])
        store.flush()
        (entry,) = store._ledger.calls()
        assert entry.keys == tuple(key[:8] for key in keys_of(chain))
        assert entry.block_bytes == FILE
        assert store._catalog is not None
        names = [row[1] for row in store._catalog.select("PRAGMA table_info(calls)")]
        assert names == ["id", "time", "keys", "block_bytes"]


def test_the_log_is_bounded(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvembed._ledger._LOG_CALLS", 10)
    ledger = Ledger(catalog)
    for number in range(100):
        ledger.log_later([random_block(seed=number).key], FILE)
        ledger.flush()
    calls = ledger.calls()
    assert 5 <= len(calls) <= 11
    assert calls[-1].keys == (random_block(seed=99).key[:8],)
    monkeypatch.setattr("kvembed._ledger._LOG_CALLS", 10_000)
    monkeypatch.setattr("kvembed._ledger._LOG_BYTES", 4000)
    for _ in range(60):
        ledger.log_later([bytes(32)] * 20, FILE)
        ledger.flush()
    assert 8 * sum(len(entry.keys) for entry in ledger.calls()) <= 4000
    ((nbytes,),) = catalog.select("SELECT value FROM meta WHERE name = 'log_bytes'")
    assert nbytes == 8 * sum(len(entry.keys) for entry in ledger.calls())


def test_what_is_forgotten_is_cut_out_of_the_log(tmp_path: Path) -> None:
    mine, other = random_chain(3, seed=1), random_chain(3, seed=2)
    with KVStore(tmp_path) as store:
        call(store, mine)
        call(store, other)
        store.flush()
        store.pin(keys_of(mine), "doc")
        store.forget("doc")
        assert [entry.keys for entry in store._ledger.calls()] == [tuple(key[:8] for key in keys_of(other))]
        store.prune(0.0)  # by age only: the curve needs to know what was there
        assert len(store._ledger.calls()) == 1
        store.clear()
        assert store._ledger.calls() == []


def test_what_followed_a_forgotten_block_is_cut_out_too_although_it_was_evicted(tmp_path: Path) -> None:
    chain = random_chain(4)
    with KVStore(tmp_path) as store:
        call(store, chain)
        store.flush()
        assert store._cpu is not None
        assert store._disk is not None
        store._cpu.remove([chain[3].key])
        store._disk.remove([chain[3].key], "evicted")
        store.pin(keys_of(chain[:1]), "beginning")
        assert store.forget(keys_of(chain[:3])) == 2
        assert [entry.keys for entry in store._ledger.calls()] == [(chain[0].key[:8],)]


def test_many_keys_are_cut_out_at_once(catalog: Catalog) -> None:
    ledger = Ledger(catalog)
    chain = keys_of(random_chain(80))
    ledger.log_later(chain, FILE)
    ledger.forget(chain[1:])
    assert [entry.keys for entry in ledger.calls()] == [(chain[0][:8],)]
    ((nbytes,),) = catalog.select("SELECT value FROM meta WHERE name = 'log_bytes'")
    assert nbytes == 8


# -- the curve ---------------------------------------------------------------------------------------


def random_calls(rng: random.Random, n: int) -> list[Call]:
    """Calls over a tree of prompts that share beginnings, as chained keys have it, of two block sizes."""
    calls: list[Call] = []
    for _ in range(n):
        root = rng.randrange(3)
        path, keys = (root,), []
        for _ in range(rng.randrange(1, 6)):
            path = (*path, rng.randrange(2))
            keys.append(repr(path).encode().ljust(8)[-24:])
        calls.append(Call(0.0, tuple(keys), (1 + root) * 4096))
    return calls


def simulate(calls: list[Call], budget: int) -> list[bool]:
    """Replay calls on an LRU stack, the simple way: the most recent ``budget`` bytes are what is there."""
    stack: OrderedDict[bytes, int] = OrderedDict()  # oldest first
    hits: list[bool] = []
    for entry in calls:
        held: set[bytes] = set()
        total = 0
        for key in reversed(stack):
            total += stack[key]
            if total > budget:
                break
            held.add(key)
        prefix = True
        for key in entry.keys:
            prefix = prefix and key in held
            hits.append(prefix)
        for key in reversed(entry.keys):
            stack[key] = entry.block_bytes
            stack.move_to_end(key)
    return hits


@pytest.mark.parametrize("seed", range(8))
def test_one_pass_answers_as_a_simulation_for_every_size(seed: int) -> None:
    calls = random_calls(random.Random(seed), 60)
    distances, working_set = _distances(calls)
    for budget in range(4096, working_set + 8192, 4096):
        assert [bool(d <= budget) for d in distances] == simulate(calls, budget), budget


def test_the_curve_rises_to_what_a_store_without_limit_has() -> None:
    calls = random_calls(random.Random(1), 200)
    curve = hit_curve(calls, budget=5 * 4096)
    assert list(curve.hit_rates) == sorted(curve.hit_rates)
    assert curve.budgets[-1] == curve.working_set
    everything = simulate(calls, curve.working_set)
    assert curve.best == sum(everything) / len(everything)
    now = simulate(calls, 5 * 4096)
    assert curve.hit_rate == sum(now) / len(now)
    assert curve.hit_rate is not None
    text = str(curve)
    assert "200 calls" in text
    assert f"now 20.0 KiB: {100 * curve.hit_rate:.1f} %" in text
    assert len(curve.sparkline()) == len(curve.budgets)
    json.dumps(curve.to_dict())


def test_without_calls_there_is_no_curve() -> None:
    assert hit_curve([]).best == 0.0
    assert "No calls" in str(hit_curve([]))
