"""Audited hits: a stored block that is wrong, checksum and all, is found by computing it again."""

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import ConfigError, StoreWarning
from kvembed._block import Block
from tests.families.zoo import build

from ._lab import BLOCK, random_ids, run, tokens

if TYPE_CHECKING:
    from kvembed import CachedModel

    from ._lab import Lab

PROMPT = random_ids(6 * BLOCK + 5)


def falsify(cached: CachedModel, number: int, by: float = 0.5) -> bytes:
    """Put another block in place of a stored one: right in every way but its values. Return its key."""
    ids = np.asarray(PROMPT[0], dtype="<i4")
    found = cached._engine.match(ids, deterministic=False)
    info = found.blocks[number].info
    cpu = cached.store._cpu
    assert cpu is not None
    block = cpu.get(info.key)
    assert block is not None
    data = block.data.copy()
    values = data.view(np.float32)
    values += np.random.default_rng(0).normal(0, by, values.shape).astype(np.float32)
    cpu.remove([info.key])
    cpu.put(Block(info, block.token_ids, block.layout, data))
    return info.key


def in_memory(lab: Lab, model: Any, **options: Any) -> CachedModel:
    """Wrap a model over a store without a disk, and let it see the prompt."""
    cached = lab.wrap(model, lab.store("memory", max_disk_bytes=0), **options)
    run(cached, PROMPT)
    cached.drop_live()
    return cached


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_wrong_block_is_found_and_not_used(lab: Lab, model: Any, number: int) -> None:
    lab.expect_sound = False
    cached = in_memory(lab, model, audit=1.0)
    key = falsify(cached, number)
    plain = run(model, PROMPT)
    # Which block is looked at is drawn: at the latest the one that is wrong, or one computed on top of it.
    cached._runner._stages._auditor._random.seed(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(40):
            run(cached, PROMPT)
            cached.drop_live()
            if seen:
                break
    assert isinstance(seen[0].message, StoreWarning)
    assert f"block {key.hex()[:12]} was dropped: differs from what the model computes" in str(seen[0].message)
    assert tokens(run(cached, PROMPT)) == tokens(plain)
    assert cached.usage.audited


def test_a_call_that_finds_something_answers_from_what_is_right(lab: Lab, model: Any) -> None:
    lab.expect_sound = False
    cached = in_memory(lab, model, audit=1.0)
    plain = tokens(run(model, PROMPT))
    falsify(cached, 2)
    cached._runner._stages._auditor._random = _Always()
    with pytest.warns(StoreWarning, match="differs from what the model computes"):
        assert tokens(run(cached, PROMPT)) == plain
    assert cached.usage.audited
    assert cached.usage.cached_tokens <= 2 * BLOCK


class _Always(random.Random):
    """Draws the third block every time."""

    def random(self) -> float:
        """Always below any share."""
        return 0.0

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        """Two, where there are so many."""
        return min(2, start - 1)


def test_without_an_audit_the_wrong_block_is_used(lab: Lab, llama: Any) -> None:
    # The control: what is found above really changes something.
    lab.expect_sound = False
    cached = in_memory(lab, llama)
    plain = tokens(run(llama, PROMPT))
    falsify(cached, 2, by=5.0)
    assert tokens(run(cached, PROMPT)) != plain
    assert not cached.usage.audited


def test_right_blocks_pass(lab: Lab, model: Any) -> None:
    cached = in_memory(lab, model, audit=1.0)
    for _ in range(4):
        run(cached, PROMPT)
        assert cached.usage.audited
        assert cached.usage.cached_tokens >= 6 * BLOCK
        cached.drop_live()


def test_a_part_of_the_calls(lab: Lab, llama: Any) -> None:
    cached = in_memory(lab, llama, audit=0.3)
    cached._runner._stages._auditor._random.seed(0)
    audited = 0
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in range(40):
        run(cached, PROMPT, 1)
        audited += cached.usage.audited
        cached.drop_live()
    assert 4 <= audited <= 20
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "gemma3_text"])
def test_states_are_compared_too(lab: Lab, name: str) -> None:
    model = build(name)
    cached = in_memory(lab, model, audit=1.0)
    run(cached, PROMPT)
    assert cached.usage.audited
    assert cached.usage.cached_tokens >= 6 * BLOCK


def test_a_whole_store(lab: Lab, model: Any) -> None:
    lab.expect_sound = False
    cached = in_memory(lab, model)
    other = torch.cat([PROMPT[:, : 3 * BLOCK], random_ids(2 * BLOCK + 9, seed=7)], dim=1)
    run(cached, other)
    cached.drop_live()
    report = cached.recheck()
    assert report.ok
    assert report.blocks >= 8
    assert report.largest < 1e-3
    key = falsify(cached, 1)
    steps: list[tuple[int, int]] = []
    report = cached.recheck(lambda done, total: steps.append((done, total)))
    assert [found for found, _ in report.bad] == [key.hex()]
    assert key.hex()[:16] in str(report)
    assert steps[-1][0] <= steps[-1][1]
    assert cached.store.lookup([key]) == []
    assert cached.recheck().ok


def test_a_part_that_is_none(llama: Any, lab: Lab) -> None:
    with pytest.raises(ConfigError, match="audit"):
        lab.wrap(llama, audit=1.5)
