"""Several blocks in one forward: the bits of one forward each, or not used at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import hf
from kvembed._wrapped import WrappedModel

from ._lab import Lab, assert_equal_bits, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from kvembed import CachedModel

SIZE = 256
PROMPT = random_ids(5 * SIZE + 40, seed=11)


def widths(model: Any) -> list[int]:
    """Return a list that gets the length of every forward."""
    seen: list[int] = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(_length(kwargs)), with_kwargs=True)
    return seen


def _length(kwargs: dict[str, Any]) -> int:
    ids = kwargs.get("input_ids")
    return (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]


def kv(cached: CachedModel) -> list[torch.Tensor]:
    sequence = cached._engine.live.of_root(cached._engine.root)[0]
    return [t[:, :, : 5 * SIZE].clone() for layer in hf.layers_of(sequence.cache) for t in layer.rows(0, 5 * SIZE)]


def test_the_bits_of_single_blocks(lab: Lab, makers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = makers["llama"]()
    seen = widths(model)
    cached = lab.wrap(model, lab.store("wide"), block_size=SIZE)
    seen.clear()
    expected = tokens(run(cached, PROMPT, 4))
    # Four blocks, the check of the last of them, one block, the rest of the prompt, three tokens.
    assert seen == [1024, 256, 256, 40, 1, 1, 1]
    wide = kv(cached)
    monkeypatch.setattr("kvembed._prefill._WIDE_STEP", SIZE)
    single = lab.wrap(model, lab.store("single"), block_size=SIZE)
    seen.clear()
    assert tokens(run(single, PROMPT, 4)) == expected == tokens(run(model, PROMPT, 4))
    assert seen[:5] == [256] * 5
    assert all(torch.equal(a, b) for a, b in zip(wide, kv(single), strict=True))


def test_the_check_is_made_once(lab: Lab, makers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = makers["llama"]()
    seen: list[int] = []
    original = WrappedModel.forward
    # Not a hook on the model: that would make it another model.
    monkeypatch.setattr(
        WrappedModel, "forward", lambda self, ids, *a, **k: seen.append(ids.shape[1]) or original(self, ids, *a, **k)
    )
    store = lab.store()
    for number in range(2):
        cached = lab.wrap(model, store, block_size=SIZE, max_live=0)
        seen.clear()
        run(cached, random_ids(4 * SIZE + 1, seed=number), 1)
        assert seen == ([1024, 256] if number == 0 else [1024])
        assert cached._engine.wrapped.wide_steps is True


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_warm_calls_that_end_inside_a_wide_step_have_the_bits_of_a_cold_one(lab: Lab, makers: Any, cut: int) -> None:
    model = makers["llama"]()
    cold = lab.wrap(model, lab.store("cold"), block_size=SIZE)
    reference = run_full(cold, PROMPT, 4)
    warm = lab.wrap(model, lab.store("warm"), block_size=SIZE, deterministic=True)
    warm.prefill(PROMPT[:, : cut * SIZE])
    lab.leave_only(warm, "disk")
    found = run_full(warm, PROMPT, 4)
    assert warm.usage.cached_tokens == cut * SIZE
    assert_equal_bits(found, reference)


def test_a_model_whose_bits_differ_is_computed_block_by_block(lab: Lab, makers: Any) -> None:
    model = makers["llama"]()
    seen = widths(model)

    def nudge(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        # A matrix product whose rounding depends on how many rows it is given.
        return output * (1 + 1e-6 * (output.shape[1] == 1024))

    model.model.layers[0].mlp.register_forward_hook(nudge)
    cached = lab.wrap(model, block_size=SIZE)
    seen.clear()
    reference = run_full(cached, PROMPT, 4)
    assert seen == [1024, 256, *[256] * 5, 40, 1, 1, 1]
    assert cached._engine.wrapped.wide_steps is False
    warm = lab.wrap(model, lab.store("warm"), block_size=SIZE, deterministic=True)
    warm.prefill(PROMPT[:, : 2 * SIZE])
    seen.clear()
    assert_equal_bits(run_full(warm, PROMPT, 4), reference)
    assert warm.usage.cached_tokens == 2 * SIZE


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_are_computed_block_by_block(lab: Lab, makers: Any, name: str) -> None:
    model = makers[name]()
    seen = widths(model)
    cached = lab.wrap(model, block_size=SIZE)
    seen.clear()
    run(cached, PROMPT, 2)
    assert max(seen) == SIZE


def test_a_slow_machine_gets_short_steps(lab: Lab, makers: Any) -> None:
    model = makers["llama"]()
    seen = widths(model)
    cached = lab.wrap(model, block_size=SIZE)
    cached._engine.wrapped.note_prefill_rate(20.0)
    seen.clear()
    run(cached, PROMPT, 2)
    assert max(seen) == SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_chunks_attend_like_one_call(dtype: torch.dtype, kv_heads: int) -> None:
    from kvembed._attention import _RUNNING, _Running, grouped_attention_forward

    torch.manual_seed(0)
    past, q = 70, 90
    query = torch.randn(1, 4, q, 16, dtype=dtype)
    key, value = (torch.randn(1, kv_heads, past + q, 16, dtype=dtype) for _ in range(2))
    causal = torch.ones(q, past + q, dtype=torch.bool).tril(past)[None, None]
    window = causal & ~torch.ones(q, past + q, dtype=torch.bool).tril(past - 30)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 4 // kv_heads  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    for mask in (causal, window):
        token = _RUNNING.set(_Running(32))
        try:
            with torch.no_grad():
                found, _ = grouped_attention_forward(module, query, key, value, mask)
        finally:
            _RUNNING.reset(token)
        repeated = (t.repeat_interleave(4 // kv_heads, 1).double() for t in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *repeated, attn_mask=mask)
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        np.testing.assert_allclose(
            found.double().numpy(), expected.transpose(1, 2).numpy(), atol=tolerance, rtol=tolerance
        )
