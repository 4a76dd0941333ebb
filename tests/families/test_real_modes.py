"""Every way of generating, with SmolLM2 and Gemma 3 in float32 on real text: see `modes`, and `test_modes`."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import CachedModel, KVStore
from tests.model._lab import cut_texts, leave_only

from .modes import MODES, Mode, Setting, check_mode, generate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._record import Record

pytestmark = [pytest.mark.model, pytest.mark.slow]

REAL = {
    "SmolLM2 135M": ("smollm2", "full attention", 300),
    "Gemma 3 270M": ("gemma3_270m", "sliding window", 540),  # its window is of 512
}
"""Fixture of the folder, kind of model, and tokens of the prompt."""

FROM_NOTHING = {
    "greedy",
    "beams",
    "num_return_sequences",
    "prompt lookup",
    "guidance (CFG)",
    "prefill_chunk_size",
    "batch, left-padded",
    "model.compile()",
}
"""Modes that are also tried on an empty store: in each, the prompt's KV is captured in another way."""


class FirstForwards:
    """Lets a plain model compute each prompt once: what its first forward gave is kept, and given again as a copy.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: dict[Any, tuple[type, torch.Tensor, list[Any]]] = {}
        self.given = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Keep, and give again, what is computed meanwhile."""
        inner = self._model.forward

        @functools.wraps(inner)
        def forward(*args: Any, **arguments: Any) -> Any:
            cache = arguments.get("past_key_values")
            if args or cache is None or cache.get_seq_length():
                return inner(*args, **arguments)
            key = tuple((name, _frozen(value)) for name, value in sorted(arguments.items()) if value is not cache)
            if key not in self._kept:
                found = inner(**arguments)
                self._kept[key] = type(found), found.logits.clone(), copy.deepcopy(cache.layers)
                return found
            self.given += 1
            kind, logits, layers = self._kept[key]
            cache.layers = copy.deepcopy(layers)
            return kind(logits=logits.clone(), past_key_values=cache)

        self._model.forward = forward
        try:
            yield
        finally:
            del self._model.forward


def _frozen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.numpy().tobytes()
    # Else an object that lives on: generate() hands even the tokenizer to forward().
    return value if value is None or isinstance(value, bool | int | str) else id(value)


class Real:
    """A real model, a store that knows its prompts, and the calls to compare.

    Args:
        name: A key of `REAL`.
        setting: What calls are made from.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting
        self.kind = REAL[name][1]
        self.first = FirstForwards(setting.model)
        # What passes through costs two whole prompts, and how long they are changes nothing.
        self.short = replace(setting, prompt=setting.prompt[:, :40])
        self.store = KVStore(setting.folder / "store", max_cpu_bytes="1GiB", max_disk_bytes="2GiB")
        self.cached = self.wrap(setting.model)
        generate(self.cached, setting, inputs=setting.batch)

    def wrap(self, model: Any, **options: Any) -> CachedModel:
        """Wrap a model."""
        return CachedModel(model, store=self.store, progress=False, **options)

    @contextmanager
    def opened(self, model: Any, salt: str) -> Iterator[CachedModel]:
        """Wrap the model for one mode, if it is not the usual one, or is to find nothing."""
        if model is self.setting.model and not salt:
            yield self.cached
        else:
            with self.wrap(model, cache_salt=salt) as cached:
                yield cached

    def check(self, name: str) -> str:
        """Compare one mode; return "reused" or why not."""
        mode, cold = MODES[name], name in FROM_NOTHING
        setting = self.short if mode.reason_for(self.kind) else self.setting
        if name == "model.compile()":  # compiling takes its time by the layer
            setting = replace(setting, model=with_first_layers(setting.model, 6))
        opened = functools.partial(self.opened, salt=name if cold else "")
        around = self.first.active if mode.around is nullcontext and not mode.reason_for(self.kind) else nullcontext
        return check_mode(setting, name, self.kind, opened, ["cold"] * cold + ["live", "disk"], around)


@pytest.fixture(params=REAL, scope="module")
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """Each real model in turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fixture, _, length = REAL[request.param]
    folder = request.getfixturevalue(fixture)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (text,) = cut_texts(tokenizer, [length])
    setting = Setting(model, tokenizer, text, tmp_path_factory.mktemp("real"), tokenizer.pad_token_id, new=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVEMBED_HOME", str(setting.folder / "home"))
        found = Real(request.param, setting)
        yield found
        found.cached.close()
        assert found.store.verify().problems == ()
        assert found.store.take_problems() == []
        found.store.close()


@pytest.mark.parametrize("name", MODES)
def test_the_same_result_as_plain_transformers(name: str, real: Real, record: Record) -> None:
    record.real_mode(name).outcomes[real.name] = real.check(name)


def test_a_kept_first_forward_is_that_of_plain_transformers(real: Real) -> None:
    """Of the tests above: what they compare with has the bits of a model that computes every prompt anew."""
    everything: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    plain = generate(real.setting.model, real.short, **everything)
    first = FirstForwards(real.setting.model)
    for given in range(2):
        with first.active():
            found = generate(real.setting.model, real.short, **everything)
        assert first.given == given
        assert torch.equal(found.sequences, plain.sequences)
        assert all(map(torch.equal, found.logits, plain.logits))


def with_first_layers(model: Any, layers: int) -> Any:
    """Return a model that is made of the first layers of another, and shares their weights."""
    small = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    small.config.num_hidden_layers = layers
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = small.config.layer_types[:layers]
    small.model.layers = small.model.layers[:layers]
    return small


def test_assistants(real: Real, record: Record) -> None:
    setting, full = real.setting, real.setting.prompt.shape[1] - 1
    small = with_first_layers(setting.model, 6)
    plain = generate(setting.model, setting, assistant_model=small)
    with real.wrap(setting.model, cache_salt="assisted") as cached, real.wrap(small) as helper:
        for tier in ("cold", "live", "disk"):
            leave_only(cached, tier)
            assert torch.equal(generate(cached, setting, assistant_model=small), plain)
            assert cached.usage.cached_tokens == (0 if tier == "cold" else full)
        for tier in ("cold", "live", "disk"):
            leave_only(cached, tier)
            leave_only(helper, tier)
            assert torch.equal(generate(cached, setting, assistant_model=helper), plain)
            assert cached.usage.cached_tokens == full
            assert helper.usage.cached_tokens == (0 if tier == "cold" else full)
    record.real_mode("assistant_model").outcomes[real.name] = "reused"
    record.real_mode("assistant_model, a CachedModel").outcomes[real.name] = "reused, the assistant's prompt too"


TO_THE_BIT = {
    "sampling": MODES["sampling"],
    "beams": Mode(lambda s: {"num_beams": 2}),
    "guidance (CFG)": MODES["guidance (CFG)"],
    "batch": MODES["batch"],
}


@pytest.mark.parametrize("name", TO_THE_BIT)
def test_warm_has_the_bits_of_cold(name: str, real: Real) -> None:
    everything: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    edge = real.setting.prompt.shape[1] // 256 * 256
    with real.wrap(real.setting.model, deterministic=True, cache_salt=f"bits of {name}") as cached:
        cold = generate(cached, real.setting, TO_THE_BIT[name], **everything)
        assert cached.usage.cached_tokens == 0
        leave_only(cached, "disk")
        warm = generate(cached, real.setting, TO_THE_BIT[name], **everything)
        assert cached.usage.cached_tokens_by_tier == {"disk": TO_THE_BIT[name].rows * edge}
    assert torch.equal(warm.sequences, cold.sequences)
    assert all(map(torch.equal, warm.logits, cold.logits))
    assert all(map(torch.equal, warm.scores, cold.scores))
