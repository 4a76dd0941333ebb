"""What every tier must keep, held against each of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pytest
import torch

from kvembed._catalog import Catalog
from kvembed._encryption.sealed import SealedCodec
from kvembed._errors import ConfigError
from kvembed._files import disk_usage
from kvembed._keys import probe_of
from kvembed._testing import random_block, random_chain
from kvembed._tiers.cpu import CpuTier
from kvembed._tiers.disk import DiskTier
from kvembed._tiers.gpu import GpuTier
from kvembed._transfer import Transfers
from kvembed._transfer.fake import FakeStreams
from kvembed._transfer.pinned import TorchTransfer

if TYPE_CHECKING:
    from pathlib import Path

    from kvembed._block import Block
    from kvembed._tiers._base import BlockSource, Tier

BLOCK_BYTES = 16 * 256
FILE_BYTES = disk_usage(BLOCK_BYTES + 1)  # header, KV and ids of a small block: two pages


def fake_device(device: torch.device) -> TorchTransfer:
    """Return an engine for host memory that stands for a device, whose copies run as late as they may."""
    return TorchTransfer(device, FakeStreams("late", eager=True), 1 << 15)


class MakeTier(Protocol):
    """Makes a tier with room for exactly so many blocks of 16 tokens."""

    def __call__(self, blocks: int = 100) -> Tier: ...


@pytest.fixture(params=["gpu", "cpu", "disk", "disk, encrypted"])
def make_tier(request: pytest.FixtureRequest, tmp_path: Path) -> MakeTier:
    def make(blocks: int = 100) -> Tier:
        if request.param == "gpu":
            return GpuTier(blocks * BLOCK_BYTES, Transfers(fake_device), torch.device("cpu"))
        if request.param == "cpu":
            return CpuTier(blocks * BLOCK_BYTES)
        root = tmp_path / "store"
        (root / "blocks").mkdir(parents=True)
        codec = SealedCodec(bytes(32), b"") if "encrypted" in request.param else None
        catalog = Catalog(root / "kvembed.db", create=True, codec=codec)
        request.addfinalizer(catalog.close)
        return DiskTier(root, catalog, blocks * (FILE_BYTES + 4096) + 4096)

    return make


def read(source: BlockSource) -> list[np.ndarray]:
    result = []
    for index, spec in enumerate(source.layout.tensors):
        rows = np.zeros((spec.heads, source.info.n_tokens, spec.row_nbytes), np.uint8)
        source.read_into(index, [rows])
        result.append(rows)
    return result


def assert_holds(tier: Tier, block: Block) -> None:
    source = tier.open(block.key)
    assert source is not None
    try:
        assert source.info == block.info
        assert source.layout == block.layout
        assert np.array_equal(source.token_ids, block.token_ids)
        for index, rows in enumerate(read(source)):
            assert np.array_equal(rows, block.tensor(index))
    finally:
        source.close()


def held(tier: Tier, blocks: list[Block]) -> list[bool]:
    return [info is not None for info in tier.contains([block.key for block in blocks])]


def test_what_was_put_is_read_back_bit_for_bit(make_tier: MakeTier) -> None:
    tier, chain = make_tier(), random_chain(3)
    for block in chain:
        assert tier.put(block)
    assert len(tier) == 3
    assert tier.contains([block.key for block in chain]) == [block.info for block in chain]
    assert tier.contains([bytes(32), chain[1].key]) == [None, chain[1].info]
    for block in chain:
        assert_holds(tier, block)
    assert tier.name in ("gpu", "cpu", "disk")
    assert 3 * BLOCK_BYTES <= tier.nbytes <= tier.max_bytes


def test_a_block_that_is_not_here_is_a_miss(make_tier: MakeTier) -> None:
    tier = make_tier()
    assert tier.open(bytes(32)) is None
    assert tier.contains([bytes(32)]) == [None]
    assert tier.tails(bytes(32), bytes(8)) == []
    assert tier.remove([bytes(32)]) == 0
    tier.touch([bytes(32)])


def test_rows_with_heads_apart(make_tier: MakeTier) -> None:
    tier, block = make_tier(), random_block()
    tier.put(block)
    source = tier.open(block.key)
    assert source is not None
    cache = np.full((2, 100, 32), 7, np.uint8)
    source.read_into(3, [cache[:, 40:56]])
    assert np.array_equal(cache[:, 40:56], block.tensor(3))
    assert (cache[:, :40] == 7).all()
    assert (cache[:, 56:] == 7).all()
    source.close()


@pytest.mark.parametrize(("skip", "n"), [(0, 5), (3, 13), (15, 1), (0, 16)])
def test_part_of_a_block(make_tier: MakeTier, skip: int, n: int) -> None:
    tier, block = make_tier(), random_block()
    tier.put(block)
    source = tier.open(block.key)
    assert source is not None
    rows = np.zeros((2, n, 32), np.uint8)
    source.read_into(1, [rows], skip)
    assert np.array_equal(rows, block.tensor(1)[:, skip : skip + n])
    source.close()


def test_rows_of_another_shape_are_refused(make_tier: MakeTier) -> None:
    tier, block = make_tier(), random_block()
    tier.put(block)
    source = tier.open(block.key)
    assert source is not None
    for shape, skip in (((3, 16, 32), 0), ((2, 16, 31), 0), ((2, 17, 32), 0), ((2, 5, 32), 12)):
        with pytest.raises(ConfigError, match="do not fit"):
            source.read_into(0, [np.zeros(shape, np.uint8)], skip)
    source.close()


def test_closing_twice_is_harmless(make_tier: MakeTier) -> None:
    tier, block = make_tier(), random_block()
    tier.put(block)
    source = tier.open(block.key)
    assert source is not None
    source.close()
    source.close()


def test_an_exact_block_replaces_one_that_is_not(make_tier: MakeTier) -> None:
    tier = make_tier()
    rough, exact = random_block(exact=False, seed=1), random_block(ids=random_block(seed=1).token_ids, seed=2)
    assert rough.key == exact.key
    assert tier.put(rough)
    assert tier.put(exact)
    assert_holds(tier, exact)
    assert len(tier) == 1


def test_an_exact_block_is_never_replaced_by_one_that_is_not(make_tier: MakeTier) -> None:
    tier = make_tier()
    exact, rough = random_block(seed=1), random_block(ids=random_block(seed=1).token_ids, seed=2, exact=False)
    tier.put(exact)
    assert tier.put(rough)
    assert_holds(tier, exact)


def test_the_first_of_two_equal_blocks_stays(make_tier: MakeTier) -> None:
    tier = make_tier()
    first, second = random_block(seed=1), random_block(ids=random_block(seed=1).token_ids, seed=2)
    tier.put(first)
    tier.put(second)
    assert_holds(tier, first)


def test_a_longer_tail_takes_the_place_of_a_shorter_one(make_tier: MakeTier) -> None:
    tier = make_tier()
    root = random_block()
    short, longer, other = (random_block(root.key, ids, start=16) for ids in (range(10), range(14), range(9, 19)))
    for block in (root, short, other, longer):
        tier.put(block)
    assert held(tier, [root, short, other, longer]) == [True, False, True, True]
    # Never the other way round.
    tier.put(short)
    assert held(tier, [short, longer]) == [True, True]


def test_a_tail_that_others_follow_stays(make_tier: MakeTier) -> None:
    tier = make_tier()
    short = random_block(ids=range(10))
    child = random_block(short.key, start=10)
    longer = random_block(ids=range(14))
    for block in (short, child, longer):
        tier.put(block)
    assert held(tier, [short, child, longer]) == [True, True, True]


def test_tails_are_found_by_their_first_tokens(make_tier: MakeTier) -> None:
    tier = make_tier()
    root = random_block()
    a = random_block(root.key, [*range(8), 100, 101], start=16)
    b = random_block(root.key, [*range(8), 200, 201], start=16)
    c = random_block(root.key, range(50, 60), start=16)
    elsewhere = random_block(ids=[*range(8), 100, 101], salt="other")
    for block in (root, a, b, c, elsewhere):
        tier.put(block)
    found = tier.tails(root.key, probe_of(root.key, a.token_ids))
    assert {info.key for info in found} == {a.key, b.key}
    tier.touch([a.key])
    assert tier.tails(root.key, bytes(8)) == []


def test_at_most_64_tails(make_tier: MakeTier) -> None:
    tier = make_tier(200)
    tails = [random_block(ids=[*range(8), n]) for n in range(1000, 1080)]
    for block in tails:
        tier.put(block)
    assert len(tier.tails(tails[0].info.parent, probe_of(tails[0].info.parent, tails[0].token_ids))) == 64


def test_the_longest_unused_goes_first(make_tier: MakeTier) -> None:
    tier = make_tier(3)
    a, b, c, d = (random_block(seed=n) for n in range(4))
    for block in (a, b, c):
        tier.put(block)
    tier.touch([a.key])
    assert tier.put(d)
    assert held(tier, [a, b, c, d]) == [True, False, True, True]
    assert tier.nbytes <= tier.max_bytes


def test_leaves_go_before_their_parents(make_tier: MakeTier) -> None:
    tier = make_tier(4)
    chain = random_chain(4, seed=1)
    for block in chain:
        tier.put(block)
    for number in range(3):
        assert tier.put(random_block(seed=100 + number))
    assert held(tier, chain) == [True, False, False, False]


def test_a_touched_prefix_outlives_the_rest_of_its_chain(make_tier: MakeTier) -> None:
    tier = make_tier(6)
    old, other = random_chain(3, seed=1), random_chain(3, seed=2)
    for block in old + other:
        tier.put(block)
    tier.touch([block.key for block in old])
    new = random_chain(3, seed=3)
    for block in new:
        assert tier.put(block)
    assert held(tier, old + other + new) == [True] * 3 + [False] * 3 + [True] * 3


def test_the_start_of_a_prompt_larger_than_the_budget_stays(make_tier: MakeTier) -> None:
    tier, chain = make_tier(4), random_chain(9)
    assert [tier.put(block) for block in chain] == [True] * 4 + [False] * 5
    assert held(tier, chain) == [True] * 4 + [False] * 5


def test_a_block_larger_than_the_budget_is_refused_and_evicts_nothing(make_tier: MakeTier) -> None:
    tier, small = make_tier(2), random_block()
    tier.put(small)
    assert not tier.put(random_block(ids=range(1000)))
    assert held(tier, [small]) == [True]


def test_remove_and_clear(make_tier: MakeTier) -> None:
    tier, chain = make_tier(), random_chain(4)
    for block in chain:
        tier.put(block)
    assert tier.remove([chain[3].key, bytes(32)]) == 1
    assert held(tier, chain) == [True, True, True, False]
    assert tier.put(chain[3])
    assert tier.clear() == 4
    assert (len(tier), tier.nbytes) == (0, 0)
    assert held(tier, chain) == [False] * 4
    assert tier.put(chain[0])
    assert_holds(tier, chain[0])


def test_a_source_stays_readable_when_its_block_goes(make_tier: MakeTier) -> None:
    tier, block = make_tier(1), random_block(seed=1)
    tier.put(block)
    source = tier.open(block.key)
    assert source is not None
    assert tier.put(random_block(seed=2))
    assert tier.open(block.key) is None
    for index, rows in enumerate(read(source)):
        assert np.array_equal(rows, block.tensor(index))
    source.close()


def test_several_threads_read_one_source(make_tier: MakeTier) -> None:
    tier, block = make_tier(), random_block(ids=range(500))
    tier.put(block)
    source = tier.open(block.key)
    assert source is not None
    wrong: list[int] = []

    def reader(index: int) -> None:
        rows = np.zeros((2, 500, 32), np.uint8)
        for _ in range(50):
            rows[:] = 0
            source.read_into(index, [rows])
            if not np.array_equal(rows, block.tensor(index)):
                wrong.append(index)

    threads = [threading.Thread(target=reader, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    source.close()


def test_threads_put_read_and_evict_at_once(make_tier: MakeTier) -> None:
    tier = make_tier(6)
    chains = [random_chain(5, seed=n) for n in range(4)]
    errors: list[BaseException] = []

    def work(chain: list[Block]) -> None:
        try:
            for _ in range(4):
                for block in chain:
                    tier.put(block)
                    source = tier.open(block.key)
                    if source is not None:
                        for index, rows in enumerate(read(source)):
                            assert np.array_equal(rows, block.tensor(index))
                        source.close()
                tier.touch([block.key for block in chain])
                tier.remove([chain[-1].key])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(chain,)) for chain in chains]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert tier.nbytes <= tier.max_bytes + 4 * (FILE_BYTES + 4096)
    everything = [block for chain in chains for block in chain]
    assert len(tier) == sum(held(tier, everything))
