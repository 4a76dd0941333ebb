"""On a real GPU: what `test_pipeline` and `test_gpu_tier` show on a device that is none. Nobody has run it yet."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed._transfer.offload import ArrivingBlock

from ._lab import BLOCK, Lab, assert_equal_bits, cat, leave_only, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.cuda

PROMPT = random_ids(9 * BLOCK + 5)


def to(device: str | int, ids: torch.Tensor) -> torch.Tensor:
    return ids.to(device)


@pytest.fixture(params=["llama", "mistral", "gemma3"])
def model(request: pytest.FixtureRequest, makers: dict[str, Callable[..., Any]]) -> Any:
    return makers[request.param]().to("cuda")


@pytest.fixture
def llama(makers: dict[str, Callable[..., Any]]) -> Any:
    return makers["llama"]().to("cuda")


def leave_on(cached: Any, tier: str) -> None:
    """Make ``tier`` the fastest that holds the prompt."""
    if tier == "gpu":
        run(cached, to("cuda", random_ids(40, seed=9)))
    elif tier != "live":
        cached.drop_live()
        if cached.store._gpu is not None:
            cached.store._gpu.clear()
        leave_only(cached, tier)


@pytest.mark.parametrize("tier", ["live", "gpu", "cpu", "disk"])
@pytest.mark.parametrize("engine", ["auto", "torch", "plain"])
def test_every_tier_gives_the_bits_of_a_cold_call(
    lab: Lab, model: Any, monkeypatch: pytest.MonkeyPatch, tier: str, engine: str
) -> None:
    monkeypatch.setenv("KVEMBED_TRANSFER", engine)
    prompt = to("cuda", PROMPT)
    cold = run_full(lab.wrap(model, lab.store("plain"), deterministic=True), prompt)
    cached = lab.wrap(model, lab.store("other"), deterministic=True, max_live=1)
    run(cached, prompt, 1)
    leave_on(cached, tier)
    assert_equal_bits(run_full(cached, prompt), cold)
    assert sum(cached.usage.cached_tokens_by_tier.values()) == 9 * BLOCK


def test_greedy_tokens_are_those_of_transformers(lab: Lab, model: Any) -> None:
    prompt = to("cuda", PROMPT)
    expected = tokens(run(model, prompt, 40))
    cached = lab.wrap(model)
    for tier in ("live", "gpu", "cpu", "disk"):
        assert tokens(run(cached, prompt, 40)) == expected
        leave_on(cached, tier)
        assert tokens(run(cached, prompt, 40)) == expected


def test_on_a_stream_of_the_callers(lab: Lab, llama: Any) -> None:
    prompt = to("cuda", PROMPT)
    cached = lab.wrap(llama, deterministic=True)
    cold = run_full(cached, prompt)
    side = torch.cuda.Stream()
    for tier in ("cpu", "disk"):
        leave_on(cached, tier)
        with torch.cuda.stream(side):
            found = run_full(cached, prompt)
        side.synchronize()
        assert_equal_bits(found, cold)


def test_blocks_arrive_as_they_were_captured(lab: Lab, model: Any) -> None:
    first = to("cuda", PROMPT)
    turns = [first, cat(first[:, : 8 * BLOCK + 9], to("cuda", random_ids(60, seed=4)))]
    cached = lab.wrap(model, lab.store(max_disk_bytes=None), deterministic=True)
    for turn in turns:
        run(cached, turn, 40)
    assert cached.store._cpu is not None
    blocks = [cached.store._cpu.get(info.key) for info in cached.store._cpu.infos()]
    assert any(isinstance(block, ArrivingBlock) for block in blocks)
    # Whatever was overwritten meanwhile, a call that restores them computes what a cold one does.
    colds = [run_full(lab.wrap(model, lab.store(f"plain {i}"), deterministic=True), t) for i, t in enumerate(turns)]
    for turn, cold in zip(turns, colds, strict=True):
        leave_on(cached, "cpu")
        assert_equal_bits(run_full(cached, turn), cold)


def test_device_memory_stays_within_the_budget(lab: Lab, llama: Any) -> None:
    cached = lab.wrap(llama, lab.store(max_gpu_bytes="8MiB"), max_live=2)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for seed in range(12):
        run(cached, to("cuda", random_ids(20 * BLOCK, seed=seed)))
    gc.collect()
    gpu = cached.store.stats().tiers[0]
    assert gpu.name == "gpu"
    assert gpu.blocks > 0
    assert gpu.nbytes <= 8 << 20
    assert torch.cuda.memory_allocated() - before <= gpu.nbytes + (1 << 20)


def test_a_bad_last_layer_is_a_miss(lab: Lab, llama: Any) -> None:
    lab.expect_sound = False
    prompt = to("cuda", PROMPT)
    cached = lab.wrap(llama)
    run(cached, prompt)
    leave_on(cached, "disk")
    assert cached.store.path is not None
    for path in cached.store.path.glob("blocks/*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-150] ^= 0x40
        path.write_bytes(data)
    with pytest.warns(match="dropped"):
        found = run(cached, prompt)
    assert tokens(found) == tokens(run(llama, prompt))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_devices(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    from accelerate import dispatch_model

    model = makers["llama"]()
    last = len(model.model.layers) - 1
    places: dict[str, str | int | torch.device] = {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.norm": 1,
        "lm_head": 1,
    }
    places |= {f"model.layers.{i}": int(i == last) for i in range(last + 1)}
    model = dispatch_model(model, device_map=places)
    prompt = to("cuda", PROMPT)
    cold = run_full(lab.wrap(model, lab.store("plain"), deterministic=True), prompt)
    cached = lab.wrap(model, lab.store("other"), deterministic=True, max_live=1)
    for tier in ("live", "gpu", "cpu", "disk"):
        run(cached, prompt, 1)
        leave_on(cached, tier)
        assert_equal_bits(run_full(cached, prompt), cold)
    assert {layer.device.index for layer in cached._engine.new_sequence(16).cache.layers} == {0, 1}
