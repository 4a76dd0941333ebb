"""Adapters of PEFT: every change of them is noticed before the next call, and KV never crosses one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import attach, detach
from tests.families.zoo import build
from tests.model._lab import BLOCK, Lab, random_ids, run, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed import CachedModel

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    # PEFT asks transformers for a property of an older name, and dislikes names that are part of "lora_".
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Adapter name .* should not be contained in the prefix:UserWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:Position ids are not supported:UserWarning",
)

PROMPT = random_ids(5 * BLOCK + 9)
WHOLE = PROMPT.shape[1] - 1
FAMILIES = ("llama", "gemma3_text")
LINEAR = ["q_proj", "k_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> Any:
    """A LoRA whose weights are drawn, so that it changes the text from the start."""
    return peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": LINEAR, "init_lora_weights": False}
        | options
    )


def add(model: Any, name: str = "first", *, seed: int = 3, **options: Any) -> Any:
    """Add an adapter to a model, or a further one to a PEFT model."""
    torch.manual_seed(seed)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, lora(**options))
        return model.eval()
    return peft.get_peft_model(model, lora(**options), adapter_name=name).eval()


class Watched:
    """Compares a cached model with a plain run on the same model, call by call.

    Args:
        cached: The cached model.
    """

    def __init__(self, cached: CachedModel) -> None:
        self.cached = cached
        self.texts: list[list[int]] = []

    def new(self, *, same_text: bool = False, cached_first: bool = False) -> None:
        """The next call is right, of a model never seen before: nothing is reused, and only then."""
        text = self._call(cached_first)
        assert self.cached.usage.cached_tokens == 0
        assert (text in self.texts) is same_text
        self.texts.append(text)
        assert self._call() == text
        assert self.cached.usage.cached_tokens == WHOLE

    def seen(self, text: int) -> None:
        """The next call is that of a model seen before: its KV is found again."""
        assert self._call() == self.texts[text]
        assert self.cached.usage.cached_tokens == WHOLE

    def _call(self, cached_first: bool = False) -> list[int]:
        found = tokens(run(self.cached, PROMPT)) if cached_first else None
        expected = tokens(run(self.cached.hf_model, PROMPT))
        assert (found or tokens(run(self.cached, PROMPT))) == expected
        assert self.cached.usage.bypass_reason is None
        return expected


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_a_wrapped_peft_model(lab: Lab, family: str) -> None:
    model = add(build(family))
    watched = Watched(lab.wrap(model))
    watched.new()
    add(model, "second", seed=4)
    watched.new(same_text=True)  # the first is active as before, but who knows
    model.set_adapter("second")
    watched.new()
    model.base_model.set_adapter(["first", "second"])
    watched.new()
    model.set_adapter("first")
    watched.seen(0)
    with model.disable_adapter():
        watched.new()
    watched.seen(0)
    with model.disable_adapter():
        watched.seen(4)
    model.set_adapter("second")
    watched.seen(2)
    assert watched.cached.fingerprint["adapters"] == "['second']"
    model.set_adapter("first")
    model.delete_adapter("second")
    watched.seen(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_put_into_a_wrapped_base(lab: Lab, family: str) -> None:
    base = build(family)
    watched = Watched(lab.wrap(base))
    watched.new()
    model = add(base)
    watched.new()
    with model.disable_adapter():
        watched.new(same_text=True)  # the base's text, by other modules
    watched.seen(1)
    model.unload()
    watched.seen(0)
    add(base, seed=4).merge_and_unload()
    watched.new()
    assert watched.cached.fingerprint["adapters"] == "none"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrap", ["peft", "base"])
def test_merging(lab: Lab, family: str, wrap: str) -> None:
    base = build(family)
    model = add(base)
    with torch.no_grad():
        # Powers of two in few bits: adding a product of them and taking it away again leaves the very same weights.
        for name, parameter in model.named_parameters():
            bits = 16 if "lora" in name else 256
            parameter.copy_((parameter * bits).round() / bits + 0.0)  # and no zero has a sign
    watched = Watched(lab.wrap(model if wrap == "peft" else base))
    watched.new()
    model.merge_adapter()
    watched.new(same_text=True)
    assert "merged" in watched.cached.fingerprint["adapters"]
    model.unmerge_adapter()
    watched.seen(0)
    model.merge_adapter()
    watched.seen(1)
    # Disabled while it is merged: PEFT takes it out of the weights in the midst of the first forward.
    with model.disable_adapter():
        watched.new(cached_first=True)
    watched.seen(0)


def test_weights_that_unmerging_rounds_are_others(lab: Lab) -> None:
    model = add(build("llama"))
    before = copy.deepcopy(model.state_dict())
    watched = Watched(lab.wrap(model))
    watched.new()
    model.merge_adapter()
    watched.new(same_text=True)
    model.unmerge_adapter()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    watched.new(same_text=True)
    model.load_state_dict(before)
    watched.seen(0)


def edit_in_place(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1.5)


def edit_data(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1


def edit_one_layer_with_numpy(model: Any) -> None:
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.lora_A["first"].weight.detach().numpy()[:] *= 2


def scale(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("first", 2.0)


def load_weights(model: Any) -> None:
    weights = peft.get_peft_model_state_dict(model, adapter_name="first")
    peft.set_peft_model_state_dict(model, {k: v * 1.5 for k, v in weights.items()}, adapter_name="first")


def train(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("edit", [edit_in_place, edit_data, edit_one_layer_with_numpy, scale, load_weights, train])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_adapter_is_another_one(lab: Lab, family: str, edit: Callable[[Any], None]) -> None:
    model = add(build(family))
    before = copy.deepcopy(model.state_dict())
    watched = Watched(lab.wrap(model))
    watched.new()
    edit(model)
    watched.new()
    model.load_state_dict(before)
    if edit is not scale:
        watched.seen(0)


def test_the_same_adapter_loaded_again_is_the_same(lab: Lab, tmp_path: Any) -> None:
    model = add(build("llama"))
    model.save_pretrained(tmp_path / "adapter")
    store = lab.store()
    watched = Watched(lab.wrap(model, store))
    watched.new()
    again = peft.PeftModel.from_pretrained(
        build("llama"), str(tmp_path / "adapter" / "first"), adapter_name="first"
    ).eval()
    cached = lab.wrap(again, store)
    assert tokens(run(cached, PROMPT)) == watched.texts[0]
    assert cached.usage.cached_tokens == WHOLE


KINDS: dict[str, Callable[[], Any]] = {
    "dora": lambda: lora(use_dora=True),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=LINEAR, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "lokr": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=LINEAR, init_weights=False),
    "layer norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "saved modules": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_adapters(lab: Lab, kind: str) -> None:
    torch.manual_seed(3)
    model = peft.get_peft_model(build("llama"), KINDS[kind](), adapter_name="first").eval()
    watched = Watched(lab.wrap(model))
    watched.new()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    watched.new()
    with model.disable_adapter():
        watched.new(same_text=kind == "layer norms")  # they start as copies of the base's
    watched.seen(1)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "activated"])
def test_adapters_that_see_the_whole_prompt_are_passed_through(lab: Lab, kind: str) -> None:
    phrase = [7, 8, 9]
    config = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "activated": lambda: lora(alora_invocation_tokens=phrase),
    }[kind]()
    prompt = torch.cat([PROMPT[:, :50], torch.tensor([phrase]), PROMPT[:, 50:]], dim=1)
    torch.manual_seed(3)
    base = build("llama")
    plain = tokens(run(base, prompt))
    model: Any = peft.get_peft_model(base, config, adapter_name="first").eval()
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    expected = tokens(model.generate(input_ids=prompt, **arguments))
    assert expected != plain
    cached = lab.wrap(model)
    with pytest.warns(UserWarning, match="not cached"):
        assert tokens(cached.generate(input_ids=prompt, **arguments)) == expected
    assert tokens(cached.generate(input_ids=prompt, **arguments)) == expected
    assert cached.usage.bypass_reason is not None
    if kind == "activated":
        # It is looked at again at every call, so without it the model is served.
        with model.disable_adapter():
            for _ in range(2):
                assert tokens(cached.generate(input_ids=prompt, **arguments)) == plain
            assert cached.usage.cached_tokens == prompt.shape[1] - 1


def test_an_adapter_for_one_call(lab: Lab) -> None:
    model = add(add(build("llama")), "second", seed=4)
    watched = Watched(lab.wrap(model))
    watched.new()
    expected = tokens(run(model, PROMPT, adapter_names=["second"]))
    with pytest.warns(UserWarning, match="adapter_names"):
        assert tokens(run(watched.cached, PROMPT, adapter_names=["second"])) == expected
    assert expected not in watched.texts
    watched.seen(0)


@pytest.mark.parametrize("where", ["peft", "base"])
def test_attached_before_or_after(lab: Lab, where: str) -> None:
    base = build("llama")
    plain = tokens(run(base, PROMPT))
    model = add(build("llama"))
    second = add(model, "second", seed=4)
    expected = tokens(run(second, PROMPT))
    with_second = tokens(run(second, PROMPT, adapter_names=["second"]))
    assert len({tuple(text) for text in (plain, expected, with_second)}) == 3
    options: dict[str, Any] = {"store": lab.store(), "block_size": BLOCK, "progress": False}
    cached = attach(base, **options) if where == "base" else None
    assert tokens(run(base, PROMPT)) == plain
    model = add(add(base), "second", seed=4)
    cached = cached or attach(model, **options)
    try:
        for i in range(2):
            assert tokens(run(model, PROMPT)) == expected
            assert cached.usage.cached_tokens == i * WHOLE
        if where == "base":
            # PEFT takes the argument off and sets hooks that live as long as the call: kvembed sees only those.
            assert tokens(run(model, PROMPT, adapter_names=["second"])) == with_second
            assert cached.usage.cached_tokens == 0
            assert tokens(run(model, PROMPT)) == expected
            assert cached.usage.cached_tokens == WHOLE
    finally:
        detach(base if where == "base" else model)
    assert tokens(run(model, PROMPT)) == expected


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_scores_with_virtual_tokens_before_the_prompt(lab: Lab, kind: str) -> None:
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    torch.manual_seed(3)
    model: Any = peft.get_peft_model(build("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    arguments = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 3, "do_sample": False}
    greedy = model.generate(input_ids=PROMPT, **arguments)[0, -3:].tolist()
    other = [*greedy[:2], (greedy[2] + 1) % 250]
    first, second = lab.wrap(model).score(PROMPT, [greedy, other])
    assert (first.is_greedy, second.is_greedy) == (True, False)
