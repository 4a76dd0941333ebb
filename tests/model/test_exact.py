"""The same tokens, logits and KV as a call that never cached, from every tier; the same bits on block edges."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ._lab import (
    BLOCK,
    Lab,
    assert_close,
    assert_equal_bits,
    bits,
    environment_of_a_child,
    random_ids,
    run,
    run_full,
    tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = random_ids(5 * BLOCK + 9)
FOLLOW_UP = torch.cat([PROMPT, random_ids(9, seed=1)], dim=1)  # 6 blocks and 2 tokens


def test_a_cold_call_is_what_transformers_does(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    cached = lab.wrap(model)
    assert_close(run_full(cached, PROMPT), plain(model, PROMPT))
    assert cached.usage.cached_tokens == 0
    assert cached.usage.computed_tokens == PROMPT.shape[1]
    assert cached.usage.bypass_reason is None


@pytest.mark.parametrize("tier", ["live", "cpu", "disk"])
def test_a_warm_call_is_equal_to_rounding(lab: Lab, model: Any, plain: Callable[..., Any], tier: str) -> None:
    cached = lab.wrap(model)
    run(cached, PROMPT)
    lab.leave_only(cached, tier)
    assert_close(run_full(cached, FOLLOW_UP), plain(model, FOLLOW_UP))
    assert cached.usage.cached_tokens_by_tier == {tier: PROMPT.shape[1]}


@pytest.mark.parametrize("tier", ["live", "cpu", "disk"])
def test_a_warm_call_has_the_bits_of_a_cold_one(lab: Lab, model: Any, plain: Callable[..., Any], tier: str) -> None:
    cold = lab.wrap(model, lab.store("cold"), deterministic=True)
    expected = run_full(cold, FOLLOW_UP)
    assert cold.usage.cached_tokens == 0
    assert_close(expected, plain(model, FOLLOW_UP))

    warm = lab.wrap(model, lab.store("warm"), deterministic=True)
    run(warm, PROMPT)
    lab.leave_only(warm, tier)
    found = run_full(warm, FOLLOW_UP)
    assert warm.usage.cached_tokens_by_tier == {tier: 5 * BLOCK}
    assert warm.usage.deterministic
    assert_equal_bits(found, expected)


def test_bits_from_a_store_opened_again(lab: Lab, model: Any) -> None:
    first = lab.wrap(model, lab.store())
    expected = run_full(first, FOLLOW_UP)
    first.close()
    first.store.close()
    again = lab.wrap(model, lab.store(), deterministic=True)
    assert_equal_bits(run_full(again, FOLLOW_UP), expected)
    assert again.usage.cached_tokens_by_tier == {"disk": 6 * BLOCK}


def test_a_reply_is_not_mistaken_for_a_prefill(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    # The KV of decoded tokens is not bit for bit what a prefill makes, so a deterministic call computes it again.
    warm = lab.wrap(model, deterministic=True)
    reply = run(warm, PROMPT, new=3 * BLOCK)
    longer = torch.cat([reply, random_ids(5, seed=2)], dim=1)
    expected = run_full(lab.wrap(model, lab.store("cold")), longer)
    for tier in ("live", "cpu", "disk"):
        lab.leave_only(warm, tier)
        assert warm.lookup(longer).num_tokens == 5 * BLOCK
        assert_equal_bits(run_full(warm, longer), expected)
        assert warm.usage.cached_tokens == 5 * BLOCK
        warm.store.clear()
        run(warm, PROMPT, new=3 * BLOCK)
    assert_close(expected, plain(model, longer))


def test_blocks_of_a_reply_become_exact_when_a_prefill_computes_them(lab: Lab, model: Any) -> None:
    warm = lab.wrap(model, deterministic=True)
    longer = torch.cat([run(warm, PROMPT, new=3 * BLOCK), random_ids(5, seed=2)], dim=1)
    first = run_full(warm, longer)
    warm.drop_live()
    second = run_full(warm, longer)
    assert warm.usage.cached_tokens_by_tier == {"cpu": (longer.shape[1] - 1) // BLOCK * BLOCK}
    assert_equal_bits(second, first)


CHILD = """
import json, sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from kvembed import CachedModel, KVStore

folder, store, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
cached = CachedModel(model, store=KVStore(store), block_size=16, deterministic=True, progress=False)
ids = torch.tensor([json.loads(ids)])
result = cached.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                         return_dict_in_generate=True, output_logits=True)
kv = [t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)]
np.savez(out, *[t.numpy() for t in [result.sequences, torch.stack(result.logits), *kv]])
print(json.dumps(cached.usage.cached_tokens_by_tier))
"""


@pytest.mark.multiprocess
def test_bits_from_disk_in_another_process(lab: Lab, llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama.save_pretrained(tmp_path / "model")
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    cached = lab.wrap(here)
    expected = run_full(cached, FOLLOW_UP)
    cached.close()
    cached.store.close()
    arguments = [tmp_path / "model", tmp_path / "store", json.dumps(FOLLOW_UP[0].tolist()), tmp_path / "out.npz"]
    environment = environment_of_a_child(PYTHONHASHSEED="7", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"disk": 6 * BLOCK}
    with np.load(tmp_path / "out.npz") as found:
        parts = [found[name] for name in found.files]
    for x, y in zip(parts, bits(expected), strict=True):
        assert np.array_equal(x, y.numpy())


@pytest.mark.parametrize("which", ["k", "v"])
def test_the_comparison_sees_the_restored_kv(lab: Lab, model: Any, plain: Callable[..., Any], which: str) -> None:
    """The control of all tests above: one wrong byte pattern in one restored tensor changes the result."""
    cached = lab.wrap(model)
    run(cached, PROMPT)
    cached.drop_live()
    cached.store.flush()  # what is on disk stays sound
    assert cached.store._cpu is not None
    # The last whole block before the question, which no window leaves out.
    block = next(e.block for e in cached.store._cpu._entries.values() if e.block.info.start == 4 * BLOCK)
    tensor = next(i for i, spec in enumerate(block.layout.tensors) if spec.name == which)
    block.tensor(tensor)[:] = block.tensor(tensor)[:, ::-1].copy()  # its tokens in reverse
    found = run_full(cached, FOLLOW_UP)
    assert cached.usage.cached_tokens == PROMPT.shape[1]
    expected = plain(model, FOLLOW_UP)
    assert tokens(found)[: FOLLOW_UP.shape[1]] == tokens(expected)[: FOLLOW_UP.shape[1]]
    assert not torch.allclose(found.logits[0], expected.logits[0], atol=1e-3)
