"""KV of one model never serves another, however the other came about; the same model is always recognised."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ._lab import BLOCK, Lab, assert_close, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = random_ids(5 * BLOCK + 9)
WHOLE = PROMPT.shape[1] - 1


def projection(model: Any) -> torch.nn.Parameter:
    return model.model.layers[1].self_attn.k_proj.weight


def in_place(model: Any) -> None:
    with torch.no_grad():
        projection(model).add_(0.05)


def through_data(model: Any) -> None:
    projection(model).data += 0.05  # how adapters are merged: no version counter sees it


def through_numpy(model: Any) -> None:
    projection(model).detach().numpy()[:] *= 1.1


def load_state_dict(model: Any) -> None:
    model.load_state_dict({name: t * 1.05 for name, t in model.state_dict().items()})


def replace_parameter(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.weight = torch.nn.Parameter(projection(model).detach() * 1.1)


def replace_module(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    model.model.layers[1].self_attn.layer_idx = 1


def optimizer_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()


def other_dtype(model: Any) -> None:
    model.to(torch.bfloat16)


def more_theta(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 20000.0
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def config_only(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3  # read by nobody after construction, but nobody can know


def buffer_only(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(1.1)


def add_hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output.roll(1, -1))


def add_pre_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.1,))


def patch_forward(model: Any) -> None:
    layer = model.model.layers[1].mlp
    original = layer.forward
    layer.forward = lambda x: original(x) * 1.1


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


EDITS = [
    in_place,
    through_data,
    through_numpy,
    load_state_dict,
    replace_parameter,
    replace_module,
    optimizer_step,
    other_dtype,
    more_theta,
    config_only,
    buffer_only,
    add_hook,
    add_pre_hook,
    patch_forward,
    eager,
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_another_one(
    lab: Lab, makers: dict[str, Callable[..., Any]], edit: Callable[[Any], None]
) -> None:
    model = makers["llama"]()
    cached = lab.wrap(model)
    before = tokens(run(cached, PROMPT))
    edit(model)
    expected = run_full(model, PROMPT)
    found = run_full(cached, PROMPT)
    assert cached.usage.bypass_reason is None
    assert cached.usage.cached_tokens == 0
    assert_close(found, expected, atol=1e-4 if model.dtype == torch.float32 else 0.5)
    if edit not in (config_only, eager):
        assert tokens(expected) != before  # or the edit proves nothing
    # It is a model of its own, whose KV is reused in turn; the other one's is still there, and explains itself.
    cached.drop_live()
    assert tokens(run(cached, PROMPT)) == tokens(expected)
    assert cached.usage.cached_tokens_by_tier == {"cpu": WHOLE}


def test_the_old_weights_find_their_kv_again(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model = makers["gemma3"]()
    saved = {name: t.clone() for name, t in model.state_dict().items()}
    cached = lab.wrap(model)
    before = tokens(run(cached, PROMPT))
    in_place(model)
    assert tokens(run(cached, PROMPT)) != before
    model.load_state_dict(saved)
    assert tokens(run(cached, PROMPT)) == before
    assert cached.usage.cached_tokens_by_tier == {"cpu": WHOLE}
    # The same with a switch of the attention implementation.
    model.set_attn_implementation("eager")
    run(cached, PROMPT)
    assert cached.usage.cached_tokens == 0
    model.set_attn_implementation("sdpa")
    run(cached, PROMPT)
    assert cached.usage.cached_tokens_by_tier == {"cpu": WHOLE}


def test_a_single_element_needs_a_refresh(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    # The documented limit of the scan before each call: too few elements for the sample, past the version counter.
    model = makers["llama"]()
    cached = lab.wrap(model)
    run(cached, PROMPT)
    weight = model.model.embed_tokens.weight
    np.asarray(weight.detach())[int(PROMPT[0, 3]), 5] += 1.0
    cached.refresh()
    assert_close(run_full(cached, PROMPT), run_full(model, PROMPT))
    assert cached.usage.cached_tokens == 0


def test_what_does_not_change_the_model_is_no_change(
    lab: Lab, makers: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    model = makers["llama"]()
    cached = lab.wrap(model)
    run(cached, PROMPT)
    digest = cached.fingerprint
    model.generation_config.max_new_tokens = 33
    model.requires_grad_(False)
    model.save_pretrained(tmp_path / "saved")
    model(input_ids=PROMPT, output_hidden_states=True)
    run(model, PROMPT, output_attentions=False)
    with torch.no_grad():
        model.model.layers[0].mlp(torch.zeros(1, 1, 64))
    assert cached.fingerprint == digest
    run(cached, PROMPT)
    assert cached.usage.cached_tokens_by_tier == {"live": WHOLE}


def test_the_same_weights_from_another_folder(lab: Lab, makers: dict[str, Callable[..., Any]], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = makers["llama"]()
    store = lab.store()
    run(lab.wrap(model, store), PROMPT)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        cached = lab.wrap(loaded, store)
        assert tokens(run(cached, PROMPT)) == tokens(run(model, PROMPT))
        assert cached.usage.cached_tokens_by_tier == {"cpu": WHOLE}
        assert cached.fingerprint["name"].endswith(name)


def test_a_copy_is_the_same_model(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model = makers["mistral"]()
    store = lab.store()
    run(lab.wrap(model, store), PROMPT)
    twin = lab.wrap(copy.deepcopy(model), store)
    run(twin, PROMPT)
    assert twin.usage.cached_tokens_by_tier == {"cpu": WHOLE}


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    "layers": {"num_hidden_layers": 2},
    "eps": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("name", [*OTHERS, "dtype", "block size", "salt"])
def test_another_model_never_hits(lab: Lab, makers: dict[str, Callable[..., Any]], llama: Any, name: str) -> None:
    store = lab.store()
    run(lab.wrap(llama, store), PROMPT)
    options: dict[str, Any] = {}
    if name == "dtype":
        other = makers["llama"]().to(torch.bfloat16)
    elif name in OTHERS:
        other = makers["llama"](**OTHERS[name])
    else:
        other = llama
        options = {"block size": {"block_size": 32}, "salt": {"cache_salt": "x"}}[name]
    cached = lab.wrap(other, store, **options)
    assert cached.lookup(PROMPT).num_tokens == 0
    explanation = cached.explain(PROMPT)
    assert tokens(run(cached, PROMPT)) == tokens(run(other, PROMPT))
    assert cached.usage.cached_tokens == 0
    if name == "salt":
        assert explanation.kind == "never_seen"  # a salt does not even tell that there is something
        return
    assert explanation.kind == "other_model"
    # At least: the tail of the prompt may be stored under another parent.
    assert explanation.nearest_tokens >= 5 * BLOCK
    field = {
        "seed": "weights",
        "rope": "config",
        "layers": "cache",
        "eps": "config",
        "dtype": "dtype",
        "block size": "block_size",
    }[name]
    assert field in explanation.differences
    was, now = explanation.differences[field]
    assert was != now
    assert field in explanation.hint


def test_two_models_interleaved_in_one_store(lab: Lab, makers: dict[str, Callable[..., Any]], plain: Any) -> None:
    store = lab.store()
    models = [makers["llama"](seed=s) for s in range(2)]
    wrapped = [lab.wrap(m, store, max_live=1) for m in models]
    for step in range(10):
        which = step % 2
        prompt = random_ids(60 + 3 * (step // 2), seed=5)[:, : 60 + 3 * (step // 2)]
        assert_close(run_full(wrapped[which], prompt), plain(models[which], prompt))
        assert (wrapped[which].usage.cached_tokens > 0) == (step >= 2)


def test_training_mode_is_another_model(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model = makers["llama"](attention_dropout=0.5)
    cached = lab.wrap(model)
    before = tokens(run(cached, PROMPT))
    model.train()
    torch.manual_seed(1)
    expected = tokens(run(model, PROMPT))
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="not cached"):
        assert tokens(run(cached, PROMPT)) == expected
    assert cached.support is not None  # dropout makes every forward another one: the trial refuses it
    model.eval()
    assert tokens(run(cached, PROMPT)) == before
    assert cached.usage.cached_tokens_by_tier == {"cpu": WHOLE}
    assert cached.support is None


def test_a_model_wrapped_in_training_mode(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model = makers["llama"](attention_dropout=0.5).train()
    cached = lab.wrap(model)
    assert cached.support is not None
    model.eval()
    assert cached.lookup(PROMPT).num_tokens == 0
    run(cached, PROMPT)
    run(cached, PROMPT)
    assert cached.usage.cached_tokens_by_tier == {"live": WHOLE}


def test_hooks_serve_no_other_model(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    # Two hooks of one function, that do different things: nothing outside can tell them apart.
    store = lab.store()
    results = []
    for factor in (1.1, 1.3):
        model = makers["llama"]()
        model.model.layers[0].register_forward_hook(lambda module, args, output, f=factor: output * f)
        cached = lab.wrap(model, store)
        results.append(tokens(run(cached, PROMPT)))
        assert cached.usage.cached_tokens == 0
        assert results[-1] == tokens(run(model, PROMPT))
    assert results[0] != results[1]
