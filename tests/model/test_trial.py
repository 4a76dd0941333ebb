"""The trial when a model is wrapped: what cannot be reused is refused by name, and passed through right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvembed import CacheBypassWarning, _wrapped

from ._lab import BLOCK, Lab, assert_close, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = random_ids(4 * BLOCK + 9)


class RestartsPositions(LlamaForCausalLM):
    """Continues every forward at position 0: right in one go, wrong with a cache."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        positions: Any = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, position_ids=positions, **kwargs)


class ForgetsKeys(LlamaForCausalLM):
    """Looks at no key from before this forward: right in one go, wrong with a cache."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past_key_values is not None and before:
            for layer in past_key_values.layers:
                layer.keys[:, :, :before] = 0
        return super().forward(input_ids, past_key_values=past_key_values, **kwargs)


class CountsOnABuffer(LlamaForCausalLM):
    """Keeps how much it has seen on itself: no cache can bring that back."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.seen += input_ids.shape[1]
        return super().forward(input_ids, **kwargs)


class KeepsTheLastForward(LlamaForCausalLM):
    """Mixes in what it saw in the forward before, kept in a plain attribute."""

    last: Any = None

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        embeddings = self.get_input_embeddings()(input_ids)
        mean = embeddings.mean(1, keepdim=True)
        if self.last is not None:
            embeddings = embeddings + self.last
        self.last = mean
        return super().forward(inputs_embeds=embeddings, **kwargs)


class FillsTheCacheTwice(LlamaForCausalLM):
    """Appends everything to the cache twice."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        result = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            for layer in past_key_values.layers:
                layer.update(layer.keys[:, :, -input_ids.shape[1] :], layer.values[:, :, -input_ids.shape[1] :])
        return result


class SpoilsARow(LlamaForCausalLM):
    """Leaves a wrong key for the last token but one, which no logits of this forward show."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        result = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and before and input_ids.shape[1] > 1:
            past_key_values.layers[-1].keys[:, :, -2] += 0.1
        return result


class RefusesSeveralTokens(LlamaForCausalLM):
    """Takes one token at a time once the cache is filled."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if past_key_values is not None and past_key_values.get_seq_length() and input_ids.shape[1] > 1:
            raise ValueError("one token at a time, please")
        return super().forward(input_ids, past_key_values=past_key_values, **kwargs)


class TakesNoCache(LlamaForCausalLM):
    """Knows no ``past_key_values``."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        kwargs.pop("past_key_values", None)
        kwargs["use_cache"] = False
        return super().forward(input_ids, attention_mask, **kwargs)


BROKEN = {
    RestartsPositions: "continuing in blocks gives other logits",
    ForgetsKeys: "continuing in blocks gives other logits",
    CountsOnABuffer: "keeps state on its modules",
    KeepsTheLastForward: "continuing in blocks gives other logits",
    SpoilsARow: "continuing in blocks gives other logits",
    FillsTheCacheTwice: "continuing in blocks gives other logits",
    RefusesSeveralTokens: "the trial failed (ValueError: one token at a time",
    TakesNoCache: "filled no cache layer",
}


def build(kind: type[LlamaForCausalLM], llama: Any) -> Any:
    model = kind(llama.config).eval()
    model.load_state_dict(llama.state_dict(), strict=False)
    return model


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_model_that_continues_wrongly_is_refused(lab: Lab, llama: Any, kind: type[LlamaForCausalLM]) -> None:
    cached = lab.wrap(build(kind, llama))
    assert cached.support is not None
    assert BROKEN[kind] in cached.support
    # A fresh one for the plain run: some of them remember.
    expected = run(build(kind, llama), PROMPT, 6, use_cache=kind is not FillsTheCacheTwice and kind is not TakesNoCache)
    with pytest.warns(CacheBypassWarning):
        found = run(cached, PROMPT, 6, use_cache=kind is not FillsTheCacheTwice and kind is not TakesNoCache)
    if kind is not KeepsTheLastForward:  # whose text depends on what was run before, here the trial
        assert tokens(found) == tokens(expected)
    assert cached.usage.bypass_reason is not None
    assert len(cached.store.ls()) == 0


def test_what_the_trial_costs(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model = makers["llama"]()
    fed: list[tuple[int, int]] = []
    model.lm_head.register_forward_hook(lambda module, args, output: fed.append((len(ids[-1]), output.shape[1])))
    ids: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: ids.append(args[0][0]))
    lab.wrap(model)
    # Tokens fed, and logits made: the shape of the cache, then one forward, and the same in two pieces.
    assert fed == [(1, 0), (11, 1), (8, 0), (3, 1)]


def test_a_refused_model_is_not_tried_at_every_call(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CountsOnABuffer, llama)
    cached = lab.wrap(model)
    monkeypatch.setattr(_wrapped, "run_oracle", None)
    with pytest.warns(CacheBypassWarning):
        run(cached, PROMPT, 2)
    before = int(model.seen)
    run(cached, PROMPT, 2)
    assert int(model.seen) == before + PROMPT.shape[1] + 1
    assert len(cached.store.namespaces()) == 1


def test_nan_is_refused(lab: Lab, makers: dict[str, Callable[..., Any]]) -> None:
    model = makers["llama"]()
    model.model.norm.weight.data[3] = float("nan")
    assert "relative error nan" in str(lab.wrap(model).support)


def test_the_verdict_is_kept_in_the_store(
    lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch, tiny_gemma3: Any
) -> None:
    runs: list[Any] = []
    original = _wrapped.run_oracle
    monkeypatch.setattr(_wrapped, "run_oracle", lambda model, *args: runs.append(model) or original(model, *args))
    store = lab.store()
    first = lab.wrap(llama, store)
    assert runs == [llama]
    second = lab.wrap(llama, store)
    assert runs == [llama]
    assert second._engine.wrapped.verdict == first._engine.wrapped.verdict
    first.close()
    store.close()
    lab.wrap(llama, lab.store())  # as another process would
    assert runs == [llama]
    gemma = tiny_gemma3()
    lab.wrap(gemma, lab.store())
    assert runs == [llama, gemma]
    # A refusal is kept too.
    broken = [build(RestartsPositions, llama) for _ in range(2)]
    reasons = [lab.wrap(model, lab.store()).support for model in broken]
    assert runs[2:] == broken[:1]
    assert reasons[0] == reasons[1] is not None


def test_a_trial_that_raised_is_made_again(lab: Lab, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise MemoryError("not now")

    store = lab.store()
    with monkeypatch.context() as patch:
        patch.setattr(_wrapped, "run_oracle", fail)
        assert "MemoryError: not now" in str(lab.wrap(llama, store).support)
    assert lab.wrap(llama, store).support is None


class Spy:
    """Counts calls of an attention function, and may change its output."""

    def __init__(self, original: Callable[..., Any], error: float = 0.0) -> None:
        self.original = original
        self.error = error
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        output, weights = self.original(*args, **kwargs)
        return output + self.error, weights


@pytest.fixture
def grouped(lab: Lab, llama: Any) -> Callable[..., Any]:
    """The grouped attention function; wrapping a model has registered it."""
    lab.wrap(llama, lab.store("first"))
    return ALL_ATTENTION_FUNCTIONS["kvembed_sdpa"]


def test_the_grouped_path_is_used_where_it_is_right(
    lab: Lab, model: Any, plain: Callable[..., Any], grouped: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(grouped)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "kvembed_sdpa", spy)  # pyright: ignore[reportArgumentType]
    cached = lab.wrap(model)
    assert cached._engine.wrapped.switch.enabled
    spy.calls = 0
    run(model, PROMPT)
    assert spy.calls == 0
    assert_close(run_full(cached, PROMPT), plain(model, PROMPT))
    assert spy.calls > 0
    assert model.config._attn_implementation == "sdpa"


def test_the_grouped_path_is_left_where_more_than_rounding_differs(
    lab: Lab, model: Any, plain: Callable[..., Any], grouped: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(grouped, error=1e-3)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "kvembed_sdpa", spy)  # pyright: ignore[reportArgumentType]
    cached = lab.wrap(model)
    assert cached.support is None
    assert not cached._engine.wrapped.switch.enabled
    spy.calls = 0
    assert_close(run_full(cached, PROMPT), plain(model, PROMPT))
    assert spy.calls == 0
    # And so it is for whoever reads the verdict.
    assert not lab.wrap(model, cached.store)._engine.wrapped.switch.enabled


@pytest.mark.parametrize("error", [0.0, 4e-3])
def test_in_half_precision_the_grouped_path_has_to_have_the_bits(
    lab: Lab, makers: dict[str, Callable[..., Any]], grouped: Any, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    # One unit in the last place of bfloat16: in a comparison to rounding nobody would see it.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "kvembed_sdpa", Spy(grouped, error=error))  # pyright: ignore[reportArgumentType]
    cached = lab.wrap(makers["llama"]().to(torch.bfloat16))
    assert cached.support is None
    assert cached._engine.wrapped.switch.enabled is (error == 0.0)


def test_eager_attention_stays_eager(lab: Lab, makers: dict[str, Callable[..., Any]], grouped: Any) -> None:
    model = makers["llama"](attn_implementation="eager")
    cached = lab.wrap(model)
    seen = set()
    model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, output: seen.add(module.config._attn_implementation)
    )
    assert tokens(run(cached, PROMPT)) == tokens(run(model, PROMPT))
    assert seen == {"eager"}


def test_the_models_class_may_keep_its_own_forward_signature(lab: Lab, llama: Any) -> None:
    class Narrow(LlamaForCausalLM):
        def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, input_ids: Any = None, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
        ) -> Any:
            return super().forward(input_ids, attention_mask, past_key_values=past_key_values, **kwargs)

    model = build(Narrow, llama)
    cached = lab.wrap(model)
    assert cached.support is None
    for _ in range(2):
        assert_close(run_full(cached, PROMPT), run_full(model, PROMPT))
    assert cached.usage.cached_tokens >= 4 * BLOCK
