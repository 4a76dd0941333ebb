"""Every way of generating, on three kinds of models: the result of plain transformers, reused or passed through."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor, StoppingCriteriaList

from kvembed import CacheBypassWarning, CachedModel, KVStore, hf

from .zoo import build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ._record import Record

BLOCK = 16
KINDS = {"full attention": "llama", "sliding window": "gemma3_text", "linear hybrid": "qwen3_next"}


def random_ids(n: int, seed: int = 0) -> torch.Tensor:
    """Return ``[1, n]`` ids."""
    return torch.randint(0, 250, (1, n), generator=torch.Generator().manual_seed(seed))


PROMPT = random_ids(4 * BLOCK + 12, seed=3)
HALF = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones(1, PROMPT.shape[1] - 5, dtype=torch.long)], dim=1)
BATCH = torch.cat([PROMPT, PROMPT.flip(1)])
PADDED = torch.cat([PROMPT, torch.cat([torch.full((1, 9), 256), PROMPT[:, 9:]], dim=1)])
LEFT = torch.cat([torch.ones_like(PROMPT), torch.cat([torch.zeros(1, 9, dtype=torch.long), HALF[:, 5:-4]], dim=1)])


class _Allowed:
    """A constraint: only even ids."""

    def __call__(self, batch: int, ids: torch.Tensor) -> list[int]:
        return list(range(0, 250, 2))


class _StopAt:
    """A stopping criterion: six new tokens."""

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= PROMPT.shape[1] + 6)


class _Seen:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Keep tokens."""
        self.ids += value.reshape(-1).tolist()

    def end(self) -> None:
        """Nothing to do."""


_STATE = "not every layer is full attention"
# Options; then, where it is not reused, a part of the reason (a pair: stateless models, hybrid models).
MODES: dict[str, tuple[dict[str, Any], str | tuple[str, str, str]]] = {
    "greedy": ({}, ""),
    "sampling": ({"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95}, ""),
    "beams": ({"num_beams": 3}, ""),
    "beams, all returned": ({"num_beams": 3, "num_return_sequences": 3, "early_stopping": True}, ""),
    "beam sampling": ({"num_beams": 2, "do_sample": True}, ""),
    "num_return_sequences": ({"num_return_sequences": 3, "do_sample": True}, ""),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, ("", "", "drafts")),
    "prompt lookup, sampled": ({"prompt_lookup_num_tokens": 3, "do_sample": True}, ("", "", "drafts")),
    "guidance (CFG)": ({"guidance_scale": 1.5}, ""),
    "guidance with a negative prompt": ({"guidance_scale": 2.0, "negative_prompt_ids": random_ids(7, seed=9)}, ""),
    "repetition and n-gram penalties": ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, ""),
    "logits_processor": ({"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])}, ""),
    "prefix_allowed_tokens_fn": ({"prefix_allowed_tokens_fn": _Allowed()}, ""),
    "bad_words_ids": ({"bad_words_ids": [[5], [7, 8]]}, ""),
    "min_new_tokens and eos": ({"min_new_tokens": 3, "eos_token_id": [4, 9, 44]}, ""),
    "max_length": ({"max_new_tokens": None, "max_length": PROMPT.shape[1] + 6}, ""),
    "max_time": ({"max_time": 60.0}, ""),
    "stopping_criteria": ({"stopping_criteria": StoppingCriteriaList([_StopAt()])}, ""),  # pyright: ignore[reportArgumentType]
    "prefill_chunk_size": ({"prefill_chunk_size": 16}, "" if hf.CHUNKS_RESUME else "prefill_chunk_size"),
    "generation_config": ({"generation_config": GenerationConfig(max_new_tokens=7, do_sample=True)}, ""),
    "return_dict with scores and logits": (
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        "",
    ),
    "no attention_mask": ({"attention_mask": None}, ""),
    "batch": ({"inputs": BATCH, "attention_mask": torch.ones_like(BATCH)}, ("", _STATE, _STATE)),
    "batch, left-padded": ({"inputs": PADDED, "attention_mask": LEFT}, ("", _STATE, _STATE)),
    "batch, sampled": (
        {"inputs": BATCH, "attention_mask": torch.ones_like(BATCH), "do_sample": True},
        ("", _STATE, _STATE),
    ),
    "batch, right-padded": (
        {"inputs": PADDED.flip(1), "attention_mask": LEFT.flip(1)},
        ("not padded on the left", _STATE, _STATE),
    ),
    "batch with beams": (
        {"inputs": BATCH, "attention_mask": torch.ones_like(BATCH), "num_beams": 2},
        ("with beams", _STATE, _STATE),
    ),
    "attention_mask with holes": ({"attention_mask": HALF}, "attention_mask hides tokens"),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, "cache_implementation='static'"),
    "use_cache=False": ({"use_cache": False}, "use_cache=False"),
    "output_hidden_states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states",
    ),
    "position_ids": ({"position_ids": torch.arange(PROMPT.shape[1])[None]}, "argument 'position_ids'"),
}


def generate(model: Any, seed: int, **options: Any) -> Any:
    """Generate with a fixed seed."""
    torch.manual_seed(seed)
    ids = options.pop("inputs", PROMPT)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, **options}
    if "generation_config" in options:
        del arguments["max_new_tokens"], arguments["do_sample"]
    return model.generate(ids, **{k: v for k, v in arguments.items() if v is not None})


@pytest.fixture(autouse=True)
def _no_padding_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=CacheBypassWarning)
        yield


def leave_only(cached: CachedModel, tier: str) -> None:
    """Make ``tier`` the fastest one that holds anything."""
    if tier in ("cold", "live"):
        return
    cached.drop_live()
    if tier == "disk":
        cached.store.flush()
        assert cached.store._cpu is not None
        cached.store._cpu.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_result_as_plain_transformers(kind: str, mode: str, tmp_path: Path, record: Record) -> None:
    options, reasons = MODES[mode]
    reason = reasons if isinstance(reasons, str) else reasons[list(KINDS).index(kind)]
    model = build(KINDS[kind])
    try:
        plain = generate(model, 1, **options)
    except ValueError as error:
        # transformers itself refuses; through the cache it has to as well, with the same words.
        with KVStore(tmp_path / "store") as store:
            cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
            with pytest.raises(ValueError, match="only supports|not support|requires|crop|assisted"):
                generate(cached, 1, **options)
        record.mode(mode).outcomes[kind] = f"refused by transformers: {str(error)[:60]}"
        return
    with KVStore(tmp_path / "store", max_cpu_bytes=64 << 20) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        for tier in ("cold", "live", "cpu", "disk"):
            leave_only(cached, tier)
            found = generate(cached, 1, **options)
            assert type(found) is type(plain)
            assert torch.equal(getattr(found, "sequences", found), getattr(plain, "sequences", plain)), tier
            if reason:
                assert reason in (cached.usage.bypass_reason or ""), cached.usage
            else:
                assert cached.usage.bypass_reason is None
                rows = getattr(found, "sequences", found).shape[0] if "inputs" in options else 1
                assert tier == "cold" or cached.usage.cached_tokens >= rows * 4 * BLOCK
        record.mode(mode).outcomes[kind] = cached.usage.bypass_reason or "reused"
        cached.close()
    assert vars(model).get("prepare_inputs_for_generation") is None


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_cache_have_the_usual_shape(kind: str, tmp_path: Path) -> None:
    model = build(KINDS[kind])
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        generate(cached, 0)
        full = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
        for options in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            plain = generate(model, 2, **full, **options)
            found = generate(cached, 2, **full, **options)
            assert cached.usage.cached_tokens >= 4 * BLOCK
            assert torch.equal(found.sequences, plain.sequences)
            for a, b in zip(found.scores, plain.scores, strict=True):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
            assert found.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
        cached.close()


@pytest.mark.parametrize("kind", ["full attention", "sliding window"])
def test_an_assistant(kind: str, tmp_path: Path, record: Record) -> None:
    model = build(KINDS[kind])
    plain = generate(model, 0)
    # The model itself drafts well, another one badly: accepted and rejected drafts both happen.
    for number, assistant in enumerate((build(KINDS[kind]), build(KINDS[kind], seed=1))):
        with KVStore(tmp_path / str(number)) as store:
            cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
            for _ in range(2):
                assert torch.equal(generate(cached, 0, assistant_model=assistant), plain)
                assert cached.usage.bypass_reason is None
            assert cached.usage.cached_tokens >= 4 * BLOCK
            # What is kept afterwards is right too.
            longer = torch.cat([plain, random_ids(6, seed=8)], dim=1)
            assert torch.equal(generate(cached, 0, inputs=longer), generate(model, 0, inputs=longer))
            cached.close()
    record.mode("assistant_model").outcomes[kind] = "reused"


def test_modes_in_turns_share_what_is_stored(tmp_path: Path) -> None:
    model = build("llama")
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        modes = ["beams", "greedy", "prompt lookup", "num_return_sequences", "guidance (CFG)", "batch, left-padded"]
        for seed, mode in enumerate([*modes, "greedy", "beam sampling"]):
            options = MODES[mode][0]
            assert torch.equal(generate(cached, seed, **options), generate(model, seed, **options)), mode
            assert seed == 0 or cached.usage.cached_tokens >= 4 * BLOCK
        cached.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamer_sees_everything(kind: str, tmp_path: Path) -> None:
    model = build(KINDS[kind])
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        for _ in range(2):
            plain, ours = _Seen(), _Seen()
            generate(model, 0, streamer=plain)
            generate(cached, 0, streamer=ours)
            assert ours.ids == plain.ids
        cached.close()


def test_chunks_of_a_model_that_starts_over(tmp_path: Path) -> None:
    # transformers is wrong there, and a drop-in has to give the same text.
    model = build("jamba")
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        for _ in range(2):
            assert torch.equal(generate(cached, 0, prefill_chunk_size=8), generate(model, 0, prefill_chunk_size=8))
            assert "prefill_chunk_size" in (cached.usage.bypass_reason or "")
        cached.close()
