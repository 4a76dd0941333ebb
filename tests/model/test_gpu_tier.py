"""Blocks that stay on the device, and blocks that leave it behind the compute; on a device that is none."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import ConfigError, KVStore
from kvembed._tiers.gpu import DeviceBlock, GpuTier
from kvembed._transfer.offload import ArrivingBlock, PinnedPool

from ._device import pretend_device
from ._lab import BLOCK, Lab, assert_equal_bits, cat, leave_only, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed._block import Block

PROMPT = random_ids(6 * BLOCK + 5)


def test_live_caches_and_blocks_share_the_budget(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_device(monkeypatch)
    cached = lab.wrap(llama, lab.store(max_gpu_bytes="50%"), max_live=1)
    assert cached.store.max_gpu_bytes == 32 << 20
    assert cached._engine.live.max_bytes == 16 << 20
    run(cached, PROMPT)
    (gpu, cpu, _) = cached.store.stats().tiers
    assert (gpu.name, gpu.blocks, gpu.nbytes) == ("gpu", 0, cached._engine.live.nbytes)
    assert cpu.name == "cpu"
    run(cached, PROMPT)
    assert cached.usage.cached_tokens_by_tier == {"gpu": PROMPT.shape[1] - 1}
    # The live cache makes room for another one, and its blocks stay on the device.
    run(cached, random_ids(40, seed=9))
    gpu = cached.store.stats().tiers[0]
    assert gpu.blocks == 7  # six and the reply's
    assert gpu.nbytes == cached._engine.live.nbytes + 7 * BLOCK * cached.kv_bytes_per_token
    assert [tier.name for tier in cached.tiers()] == ["live", "gpu", "cpu", "disk"]
    assert cached.lookup(PROMPT).tokens_by_tier == {"gpu": 6 * BLOCK}


@pytest.mark.parametrize("order", ["late", "early", "random"])
def test_blocks_on_the_device_give_the_bits_of_a_cold_call(
    lab: Lab, model: Any, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    plain = lab.wrap(model, lab.store("plain"), deterministic=True)
    cold = run_full(plain, PROMPT)
    pretend_device(monkeypatch, order)
    cached = lab.wrap(model, lab.store("other"), deterministic=True, max_live=1)
    # Room in windows for all blocks: what has left a window cannot stay on the device.
    run(cached, PROMPT, 1)
    run(cached, random_ids(40, seed=9))
    found = run_full(cached, PROMPT)
    assert_equal_bits(found, cold)
    if model.config.model_type == "llama":
        assert cached.usage.cached_tokens_by_tier == {"gpu": 6 * BLOCK}
    else:
        assert sum(cached.usage.cached_tokens_by_tier.values()) == 6 * BLOCK


def test_a_budget_without_a_gpu_is_an_error(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvembed._budgets.has_gpu", lambda: False)
    with pytest.raises(ConfigError, match=r"max_gpu_bytes='1GiB' is for blocks on a GPU, and torch finds none"):
        lab.store(max_gpu_bytes="1GiB")
    with pytest.raises(ConfigError, match="max_gpu_bytes"):
        lab.store(max_gpu_bytes="much")
    for value in ("auto", None, 0):
        with KVStore(lab.folder / "x", max_gpu_bytes=value) as store:
            assert [tier.name for tier in store.stats().tiers] == ["cpu", "disk"]
            assert store.max_gpu_bytes == 0


def test_a_tier_that_is_turned_off(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_device(monkeypatch)
    cached = lab.wrap(llama, lab.store(max_gpu_bytes=None))
    run(cached, PROMPT)
    assert len(cached._engine.live) == 0
    assert tokens(run(cached, PROMPT)) == tokens(run(llama, PROMPT))
    assert set(cached.usage.cached_tokens_by_tier) == {"cpu"}


def test_what_is_evicted_from_the_device_is_in_host_memory(
    lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = run_full(lab.wrap(llama, lab.store("plain"), deterministic=True), PROMPT)
    pretend_device(monkeypatch)
    cached = lab.wrap(llama, lab.store(max_disk_bytes=None, max_gpu_bytes="1MiB"), max_live=1, deterministic=True)
    for prompt in (PROMPT, random_ids(40, seed=9)):
        run(cached, prompt)
    store = cached.store
    assert store._gpu is not None
    assert store._cpu is not None
    held = [block for info in store._gpu.infos() if isinstance(block := store._gpu.get(info.key), DeviceBlock)]
    assert len(held) == 7
    store._cpu.clear()
    assert cached.lookup(PROMPT).tokens_by_tier == {"gpu": 6 * BLOCK}
    store._gpu.reserve("somebody", 1 << 20)
    assert len(store._gpu) == 0
    assert len(store._cpu) == 7
    cached.drop_live()
    assert_equal_bits(run_full(cached, PROMPT), cold)
    assert cached.usage.cached_tokens_by_tier == {"cpu": 6 * BLOCK}


def test_a_device_without_room_is_a_miss(
    lab: Lab, llama: Any, plain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_device(monkeypatch)
    cached = lab.wrap(llama, max_live=1)

    def fail(self: GpuTier, block: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(GpuTier, "_taken_in", fail)
    for prompt in (PROMPT, random_ids(40, seed=9), PROMPT):
        assert tokens(run(cached, prompt)) == tokens(plain(llama, prompt))
    assert cached.store.stats().tiers[0].blocks == 0


def test_forgotten_blocks_leave_the_device_too(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_device(monkeypatch)
    cached = lab.wrap(llama, max_live=1)
    for prompt in (PROMPT, random_ids(40, seed=9)):
        run(cached, prompt)
    store = cached.store
    assert store._gpu is not None
    keys = cached._engine.match(PROMPT[0].numpy().astype("int32"), deterministic=True).keys
    assert sum(store.on_device(keys)) == 6
    assert store._cpu is not None
    store._cpu.clear()
    assert store.forget(keys) >= 6
    assert not any(store.on_device(keys))
    store.clear()
    assert len(store._gpu) == 0


# ------------------------------------------------------------------ blocks that leave the device


@pytest.mark.parametrize("order", ["late", "early", "random"])
def test_blocks_arrive_behind_the_compute(lab: Lab, model: Any, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    # Windows move, and a live cache is cut back and overwritten, while copies still wait: nobody looks before the end.
    plain = lab.wrap(model, lab.store("plain", max_disk_bytes=None))
    first = random_ids(9 * BLOCK + 5)
    prompts = [first, cat(first[:, : 8 * BLOCK + 9], random_ids(60, seed=4)), random_ids(12 * BLOCK, seed=5)]
    for prompt in prompts:
        run(plain, prompt, 40)
    pretend_device(monkeypatch, order)
    cached = lab.wrap(model, lab.store("other", max_disk_bytes=None))
    for prompt in prompts:
        run(cached, prompt, 40)
    expected, found = blocks_of(plain), blocks_of(cached)
    assert expected.keys() == found.keys()
    for key, block in expected.items():
        assert block.info == found[key].info
        assert np.array_equal(block.data, found[key].data)


def blocks_of(cached: Any) -> dict[bytes, Block]:
    return {info.key: cached.store._cpu.get(info.key) for info in cached.store._cpu.infos()}


def test_capturing_does_not_wait(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = pretend_device(monkeypatch)
    cached = lab.wrap(llama, lab.store(max_disk_bytes=None))
    run(cached, PROMPT)
    assert cached.store._cpu is not None
    blocks = [cached.store._cpu.get(info.key) for info in cached.store._cpu.infos()]
    assert all(isinstance(block, ArrivingBlock) and not block.arrived for block in blocks)
    assert engines[0]._streams.copies == 0  # pyright: ignore[reportAttributeAccessIssue]
    leave_only(cached, "cpu")
    assert tokens(run(cached, PROMPT)) == tokens(run(llama, PROMPT))


def test_pinned_buffers_are_bounded_and_reused(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = pretend_device(monkeypatch)
    monkeypatch.setattr("kvembed._transfer.offload._MOST_BLOCKS", 4)
    cached = lab.wrap(llama)
    (engine,) = engines
    streams: Any = engine._streams
    offload = cached._engine._devices._offload
    before = streams.allocated
    for seed in range(6):
        prompt = random_ids(5 * BLOCK + 3, seed=seed)
        assert tokens(run(cached, prompt)) == tokens(run(llama, prompt))
        cached.store.flush()
    assert streams.allocated == before
    assert offload._pool is not None
    assert offload._pool.slots == 4
    for thread in threading.enumerate():
        if thread.name == "kvembed-offload":
            thread.join(30)
    assert cached.store.verify().problems == ()


def test_a_buffer_goes_back_with_its_last_view() -> None:
    pool = PinnedPool(np.zeros(1000, np.uint8), 400)
    first, second = pool.take(400), pool.take(10)
    assert pool.take(1) is None
    assert first is not None
    assert second is not None
    view = first[100:200]
    del first
    gc.collect()
    assert pool.free == 0
    del view
    gc.collect()
    assert pool.free == 1
    assert pool.take(401) is None
