"""Every way of generating that transformers has: how each is called, and what kvembed does with it.

`MODES` is the table of the support matrix. ``test_modes.py`` goes through it with tiny models of three kinds,
``test_real_modes.py`` with SmolLM2 and Gemma 3.
"""

from __future__ import annotations

import textwrap
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from kvembed import hf
from tests.model._lab import leave_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from kvembed import CachedModel

__all__ = ["KINDS", "MODES", "Mode", "Seen", "Setting", "check_mode", "generate"]

KINDS = {"full attention": "llama", "sliding window": "gemma3_text", "linear hybrid": "qwen3_next"}


@dataclass(frozen=True)
class Setting:
    """What a mode's arguments are made from.

    Args:
        model: The plain model.
        tokenizer: Its tokenizer.
        prompt: ``[1, n]`` ids.
        folder: An empty folder.
        pad: An id for padding.
        new: Tokens to generate.
    """

    model: Any
    tokenizer: Any
    prompt: torch.Tensor
    folder: Path
    pad: int = 256
    new: int = 8

    def ids(self, n: int, seed: int) -> torch.Tensor:
        """Return ``[1, n]`` ids of text."""
        return torch.randint(0, 250, (1, n), generator=torch.Generator().manual_seed(seed))

    @property
    def batch(self) -> torch.Tensor:
        """Two rows of equal length."""
        return torch.cat([self.prompt, self.prompt.flip(1)])

    def padded(self, where: str, n: int = 14) -> dict[str, Any]:
        """Return ids and mask of two rows, of which the second is shorter by ``n``."""
        ids, mask = self.batch.clone(), torch.ones_like(self.batch)
        hidden = slice(0, n) if where == "left" else slice(-n, None)
        ids[1, hidden], mask[1, hidden] = self.pad, 0
        return {"inputs": ids, "attention_mask": mask}

    @cached_property
    def stop_string(self) -> str:
        """What the model says as its fourth token, given the prompt."""
        ids = generate(self.model, self, max_new_tokens=4)
        return self.tokenizer.decode(ids[0, -1:])

    def with_holes(self) -> torch.Tensor:
        """Return a mask that hides the first tokens."""
        mask = torch.ones_like(self.prompt)
        mask[0, :5] = 0
        return mask


class _Allowed:
    """A constraint: only even ids."""

    def __init__(self, most: int) -> None:
        self._ids = list(range(0, most, 2))

    def __call__(self, batch: int, ids: torch.Tensor) -> list[int]:
        return self._ids


class _StopAt:
    """A stopping criterion: a length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= self._length)


class Seen:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Keep tokens."""
        self.ids += value.reshape(-1).tolist()

    def end(self) -> None:
        """Nothing to do."""


def _own_loop(model: Any, *args: Any, **kwargs: Any) -> Any:
    return type(model)._sample(model, *args, **kwargs)


_RECIPE = """
def generate(model, **kwargs):
    kwargs["max_new_tokens"] = 5
    return model.generate(**kwargs)
"""


def _recipe(s: Setting) -> str:
    folder = s.folder / "recipe"
    (folder / "custom_generate").mkdir(parents=True, exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(_RECIPE, encoding="utf-8")
    (folder / "custom_generate" / "requirements.txt").write_text("", encoding="utf-8")
    return str(folder)


# ------------------------------------------------------------------------------------- models made ready


@contextmanager
def _eager(model: Any) -> Iterator[Any]:
    model.set_attn_implementation("eager")  # the only one that returns attentions
    try:
        yield model
    finally:
        model.set_attn_implementation("sdpa")


@contextmanager
def _compiled_object(model: Any) -> Iterator[Any]:
    try:
        yield torch.compile(model, backend="eager")
    finally:
        torch._dynamo.reset()


@contextmanager
def _compiled_in_place(model: Any) -> Iterator[Any]:
    model.compile(backend="eager")
    try:
        yield model
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()


@contextmanager
def _own_defaults(model: Any) -> Iterator[Any]:
    before = model.generation_config
    model.generation_config = GenerationConfig(**{**before.to_dict(), "cache_implementation": "static"})
    try:
        yield model
    finally:
        model.generation_config = before


@contextmanager
def _one_process_of_many(model: Any) -> Iterator[Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)  # opens no socket
    try:
        yield model
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------- the table

Reason = str | tuple[str, str, str]


@dataclass(frozen=True)
class Mode:
    """One way of generating.

    Args:
        options: Makes the arguments of ``generate()``, anew for every call.
        reason: Part of the reason where it is not reused, else empty; one for all kinds, or one for each of `KINDS`.
        around: Makes a model ready, and puts it back.
        rows: Prompts in a call.
    """

    options: Callable[[Setting], dict[str, Any]] = field(default=lambda s: {})
    reason: Reason = ""
    around: Callable[[Any], Any] = nullcontext
    rows: int = 1

    def reason_for(self, kind: str) -> str:
        """Return the part of the reason for one of `KINDS`."""
        return self.reason if isinstance(self.reason, str) else self.reason[list(KINDS).index(kind)]


def _fixed(reason: Reason = "", **options: Any) -> Mode:
    return Mode(lambda s: dict(options), reason)


_UNPADDED = "only rows of equal length"
_ATTENTIONS: dict[str, Any] = {"output_attentions": True, "return_dict_in_generate": True}
_HUB = "code from the hub"

MODES: dict[str, Mode] = {
    "greedy": _fixed(),
    "sampling": _fixed(do_sample=True, temperature=0.8, top_k=40, top_p=0.95),
    "beams": _fixed(num_beams=3),
    "beams, all returned": _fixed(num_beams=3, num_return_sequences=3, early_stopping=True),
    "beam sampling": _fixed(num_beams=2, do_sample=True),
    "num_return_sequences": _fixed(num_return_sequences=3, do_sample=True),
    "prompt lookup": _fixed(prompt_lookup_num_tokens=3),
    "prompt lookup, sampled": _fixed(prompt_lookup_num_tokens=3, do_sample=True),
    "assistant_early_exit": _fixed("own first layers", assistant_early_exit=1),
    "guidance (CFG)": _fixed(guidance_scale=1.5),
    "guidance with a negative prompt": Mode(lambda s: {"guidance_scale": 2.0, "negative_prompt_ids": s.ids(7, 9)}),
    "contrastive search (penalty_alpha)": _fixed(_HUB, penalty_alpha=0.6, top_k=4),
    "DoLa (dola_layers)": _fixed(_HUB, dola_layers="low"),
    "beam groups (num_beam_groups)": _fixed(_HUB, num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    "constrained beams (force_words_ids)": _fixed(_HUB, num_beams=2, force_words_ids=[[5]]),
    "repetition and n-gram penalties": _fixed(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "min_p, typical_p and cutoffs": _fixed(
        do_sample=True, min_p=0.01, typical_p=0.95, epsilon_cutoff=3e-4, eta_cutoff=1e-3, renormalize_logits=True
    ),
    "sequence_bias and suppressed tokens": _fixed(sequence_bias=[[[7], -5.0]], suppress_tokens=[3, 4, 5]),
    "watermarking_config": Mode(
        lambda s: {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="lefthash")}
    ),
    "logits_processor": Mode(lambda s: {"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])}),
    "prefix_allowed_tokens_fn": Mode(lambda s: {"prefix_allowed_tokens_fn": _Allowed(250)}),
    "bad_words_ids": _fixed(bad_words_ids=[[5], [7, 8]]),
    "token_healing": Mode(
        lambda s: {"token_healing": True, "tokenizer": s.tokenizer, "attention_mask": None}, "token_healing"
    ),
    "min_new_tokens and eos": _fixed(min_new_tokens=3, eos_token_id=[4, 9, 44]),
    "max_length": Mode(lambda s: {"max_new_tokens": None, "max_length": s.prompt.shape[1] + 6}),
    "max_time": _fixed(max_time=600.0),
    "stopping_criteria": Mode(
        lambda s: {"stopping_criteria": StoppingCriteriaList([_StopAt(s.prompt.shape[1] + 6)])}  # pyright: ignore[reportArgumentType]
    ),
    "stop_strings": Mode(lambda s: {"stop_strings": [s.stop_string], "tokenizer": s.tokenizer}),
    "streamer": Mode(lambda s: {"streamer": Seen()}),
    "prefill_chunk_size": Mode(
        lambda s: {"prefill_chunk_size": s.prompt.shape[1] // 4}, "" if hf.CHUNKS_RESUME else "prefill_chunk_size"
    ),
    "generation_config": Mode(lambda s: {"generation_config": GenerationConfig(max_new_tokens=7, do_sample=True)}),
    "return_dict with scores and logits": _fixed(return_dict_in_generate=True, output_scores=True, output_logits=True),
    "output_attentions": Mode(lambda s: dict(_ATTENTIONS), "output_attentions", _eager),
    "output_hidden_states": _fixed("output_hidden_states", output_hidden_states=True, return_dict_in_generate=True),
    "no attention_mask": _fixed(attention_mask=None),
    "attention_mask with holes": Mode(lambda s: {"attention_mask": s.with_holes()}, "attention_mask hides tokens"),
    "position_ids, the usual ones": Mode(lambda s: {"position_ids": torch.arange(s.prompt.shape[1])[None]}),
    "position_ids, others": Mode(
        lambda s: {"position_ids": torch.arange(3, s.prompt.shape[1] + 3)[None]}, "argument 'position_ids'"
    ),
    "inputs_embeds": Mode(
        lambda s: {"inputs": None, "inputs_embeds": s.model.get_input_embeddings()(s.prompt).detach()}, "inputs_embeds"
    ),
    "batch": Mode(lambda s: {"inputs": s.batch}, rows=2),
    "batch, sampled": Mode(lambda s: {"inputs": s.batch, "do_sample": True}, rows=2),
    "batch with beams": Mode(lambda s: {"inputs": s.batch, "num_beams": 2}, rows=2),
    "batch with num_return_sequences": Mode(
        lambda s: {"inputs": s.batch, "num_return_sequences": 2, "do_sample": True}, rows=2
    ),
    "batch, left-padded": Mode(lambda s: s.padded("left"), ("", _UNPADDED, _UNPADDED), rows=2),
    "batch, right-padded": Mode(lambda s: s.padded("right"), "not padded on the left", rows=2),
    "use_cache=False": _fixed("use_cache=False", use_cache=False),
    "cache_implementation='dynamic'": _fixed(cache_implementation="dynamic"),
    "cache_implementation='hybrid'": _fixed(cache_implementation="hybrid"),
    "static cache": _fixed("cache_implementation='static'", cache_implementation="static", disable_compile=True),
    "static cache, the model's own default": Mode(
        lambda s: {"disable_compile": True}, "cache_implementation='static'", _own_defaults
    ),
    "offloaded cache": _fixed("cache_implementation='offloaded'", cache_implementation="offloaded"),
    "quantized cache": _fixed("cache_implementation='quantized'", cache_implementation="quantized"),
    "a cache of the caller's own": Mode(
        lambda s: {"past_key_values": DynamicCache(config=s.model.config)}, "caller brings a cache"
    ),
    "a static cache of the caller's own": Mode(
        lambda s: {
            "past_key_values": StaticCache(config=s.model.config, max_cache_len=s.prompt.shape[1] + 20),
            "disable_compile": True,
        },
        "caller brings a cache",
    ),
    "torch.compile(model)": Mode(around=_compiled_object),
    "model.compile()": Mode(around=_compiled_in_place),
    "custom_generate, a function": _fixed("loop of the caller's own", custom_generate=_own_loop),
    "custom_generate, a folder": Mode(
        lambda s: {"custom_generate": _recipe(s), "trust_remote_code": True}, "loop of the caller's own"
    ),
    "synced_gpus": Mode(lambda s: {"synced_gpus": True}, "synced_gpus", _one_process_of_many),
}


def generate(model: Any, setting: Setting, mode: Mode | None = None, seed: int = 1, **more: Any) -> Any:
    """Generate in a mode, with a fixed seed."""
    options = {**(mode.options(setting) if mode else {}), **more}
    ids = options.pop("inputs", setting.prompt)
    arguments = {"max_new_tokens": setting.new, "do_sample": False, **options}
    arguments.setdefault("attention_mask", torch.ones_like(setting.prompt if ids is None else ids))
    if "generation_config" in options:
        del arguments["max_new_tokens"], arguments["do_sample"]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="not cached: ")
        return model.generate(ids, **{k: v for k, v in arguments.items() if v is not None})


def _tokens_of(result: Any) -> torch.Tensor:
    """Return the ids of a result."""
    return getattr(result, "sequences", result)


def check_mode(
    setting: Setting,
    name: str,
    kind: str,
    opened: Callable[[Any], AbstractContextManager[CachedModel]],
    tiers: Sequence[str],
    around_plain: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> str:
    """Compare a mode with plain transformers in every tier; return "reused" or why not.

    Args:
        setting: What the call is made from.
        name: One of `MODES`.
        kind: One of `KINDS`.
        opened: Wraps the model, once it is ready.
        tiers: From where the calls are served, in this order; "cold" for nothing.
        around_plain: Entered for the plain call.
    """
    mode, reason = MODES[name], MODES[name].reason_for(kind)
    with mode.around(setting.model) as model:
        refused, plain = None, None
        try:
            with around_plain():
                plain = generate(model, setting, mode)
        except Exception as error:
            refused = error
        with opened(model) as cached:
            if refused is not None:
                # Through the cache it has to be refused as well, with the same words.
                with pytest.raises(type(refused)) as caught:
                    generate(cached, setting, mode)
                assert str(caught.value) == str(refused)
                verb = "refused by" if isinstance(refused, ValueError | ImportError) else "fails in"
                return textwrap.shorten(f"{verb} transformers: {refused}", 110, placeholder=" ...")
            for tier in tiers:
                leave_only(cached, tier)
                found = generate(cached, setting, mode)
                assert type(found) is type(plain)
                usage = cached.usage
                if reason:
                    assert reason in (usage.bypass_reason or ""), usage
                    assert usage.cached_tokens == 0
                else:
                    assert usage.bypass_reason is None
                    assert usage.cached_tokens == (0 if tier == "cold" else _all_but_last(setting, mode)), usage
                _compare(found, plain, to_the_bit=bool(reason))
            outcome = cached.usage.bypass_reason or "reused"
    assert not {"prepare_inputs_for_generation", "generate", "forward"} & vars(setting.model).keys()
    return outcome


def _all_but_last(setting: Setting, mode: Mode) -> int:
    """Return the tokens of all prompts of a call, but for the last one of each, which is always computed."""
    options = mode.options(setting) if mode.rows > 1 else {}
    ids = options.get("inputs", setting.prompt)
    return int(options.get("attention_mask", torch.ones_like(ids)).sum()) - len(ids)


def _compare(found: Any, plain: Any, *, to_the_bit: bool) -> None:
    """Fail unless two results have the same tokens, and whatever else they hold is the same (or equal to rounding)."""
    if isinstance(plain, torch.Tensor):
        assert torch.equal(found, plain)
        return
    assert found.keys() == plain.keys()
    assert torch.equal(found.sequences, plain.sequences)
    for name in plain.keys() - {"sequences", "past_key_values"}:
        ours, theirs = list(_tensors(found[name])), list(_tensors(plain[name]))
        assert len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            if to_the_bit:
                assert torch.equal(a, b), name
            else:
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert found.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a part of a result: a tensor, or tuples of tuples of them."""
    if isinstance(part, torch.Tensor):
        yield part
    else:
        for inner in part:
            yield from _tensors(inner)
