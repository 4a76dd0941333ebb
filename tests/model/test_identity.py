"""KV of one model never serves another, however the other came about; the same model is always recognised."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed._weights import WeightsWatch, weights_checksum

from ._lab import BLOCK, Lab, assert_close, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = random_ids(5 * BLOCK + 9)
WHOLE = PROMPT.shape[1] - 1


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


class _SavingChangesIt(torch.nn.Linear):
    """As 4-bit layers of bitsandbytes on some processors."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.weight.data *= 2
        super()._save_to_state_dict(*args, **kwargs)


def test_wrapping_and_calling_save_nothing(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model = makers["llama"]()
    layer = model.model.layers[1].mlp.down_proj
    layer.__class__ = _SavingChangesIt
    before = layer.weight.clone()
    cached = lab.wrap(model)
    digest = cached.fingerprint
    for _ in range(2):
        run(cached, PROMPT)
    cached.refresh()
    assert torch.equal(layer.weight, before)
    assert cached.fingerprint == digest
    assert cached.usage.cached_tokens == WHOLE


def test_what_cannot_be_looked_into_serves_this_process_only() -> None:
    plain, closed = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    closed.register_buffer("mask", torch.eye(3).to_sparse())
    for module, same in ((plain, True), (closed, False)):
        assert weights_checksum([("", module)], "a") == weights_checksum([("", module)], "a")
        assert (weights_checksum([("", module)], "a") == weights_checksum([("", module)], "b")) is same


class _Keeps(torch.nn.Linear):
    """Keeps scales where only it knows, and says so by how it is saved."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.meta = {"scale": torch.ones(3), "axis": 1, "zeros": [torch.zeros(3)]}

    def get_extra_state(self) -> Any:
        raise AssertionError("nothing is saved here")


@pytest.mark.parametrize("kind", ["in place", "replaced", "setting", "more", "less", "in a list"])
def test_what_a_layer_keeps_beside_its_weights(kind: str) -> None:
    module = _Keeps()
    modules = [("", module)]
    watch, before = WeightsWatch(modules), weights_checksum(modules, "")
    assert not watch.changed()
    if kind == "in place":
        module.meta["scale"].mul_(2)
    elif kind == "replaced":
        module.meta["scale"] = torch.full((3,), 2.0)
    elif kind == "setting":
        module.meta["axis"] = 0
    elif kind == "more":
        module.meta["shift"] = torch.ones(3)
    elif kind == "less":
        del module.meta["zeros"]
    else:
        module.meta["zeros"].append(torch.zeros(3))
    assert watch.changed()
    assert weights_checksum(modules, "") != before
