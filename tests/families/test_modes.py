"""Every way of generating, on three kinds of models: the result of plain transformers, reused or passed through."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import CachedModel, KVStore
from kvembed._bypass import bypass_reason
from tests.model._lab import leave_only, random_ids

from .modes import KINDS, MODES, Seen, Setting, check_mode, generate
from .zoo import build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ._record import Record

BLOCK = 16


PROMPT = random_ids(4 * BLOCK + 12, seed=3)


@pytest.fixture
def setting(tiny_tokenizer: Any, tmp_path: Path) -> Setting:
    """A setting without a model."""
    return Setting(None, tiny_tokenizer, PROMPT, tmp_path)


def with_model(setting: Setting, kind: str) -> Setting:
    """Return the setting with one of `KINDS`."""
    return Setting(build(KINDS[kind]), setting.tokenizer, setting.prompt, setting.folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODES)
def test_the_same_result_as_plain_transformers(kind: str, name: str, setting: Setting, record: Record) -> None:
    @contextmanager
    def opened(model: Any) -> Iterator[CachedModel]:
        with (
            KVStore(setting.folder / "store", max_cpu_bytes="512MiB") as store,
            CachedModel(model, store=store, block_size=BLOCK, progress=False) as cached,
        ):
            yield cached

    outcome = check_mode(with_model(setting, kind), name, kind, opened, ("cold", "live", "cpu", "disk"))
    record.mode(name).outcomes[kind] = outcome


REFUSED = {
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "force_words_ids": [[5]],
    "constraints": [],
    "use_mtp": True,
    "speculation_type": "dflash",
    "assistant_early_exit": 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_may_refuse_first_has_a_reason_too(name: str) -> None:
    model = build("llama")
    mask = torch.ones_like(PROMPT)
    assert bypass_reason(model, PROMPT, None, {"attention_mask": mask}) is None
    reason = bypass_reason(model, PROMPT, None, {"attention_mask": mask, name: REFUSED[name]})
    assert (reason or "").startswith(name)
    assert ": " in (reason or "")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_cache_have_the_usual_shape(kind: str, setting: Setting) -> None:
    setting = with_model(setting, kind)
    model = setting.model
    with KVStore(setting.folder / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        generate(cached, setting)
        full = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
        several: dict[str, Any] = {"num_return_sequences": 2, "do_sample": True}
        ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, several, {"inputs": setting.batch}]
        for options in ways:
            plain = generate(model, setting, seed=2, **full, **options)
            found = generate(cached, setting, seed=2, **full, **options)
            assert cached.usage.cached_tokens >= 4 * BLOCK
            assert torch.equal(found.sequences, plain.sequences)
            for a, b in zip(found.scores, plain.scores, strict=True):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
            assert found.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
        cached.close()


def test_modes_in_turns_share_what_is_stored(setting: Setting) -> None:
    setting = with_model(setting, "full attention")
    model = setting.model
    with KVStore(setting.folder / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        names = ["beams", "greedy", "prompt lookup", "num_return_sequences", "guidance (CFG)", "batch, left-padded"]
        for seed, name in enumerate([*names, "greedy", "beam sampling"]):
            found = generate(cached, setting, MODES[name], seed)
            assert torch.equal(found, generate(model, setting, MODES[name], seed)), name
            assert seed == 0 or cached.usage.cached_tokens >= 4 * BLOCK
        cached.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamer_sees_everything(kind: str, setting: Setting) -> None:
    setting = with_model(setting, kind)
    with KVStore(setting.folder / "store") as store:
        cached = CachedModel(setting.model, store=store, block_size=BLOCK, progress=False)
        for _ in range(2):
            plain, ours = Seen(), Seen()
            generate(setting.model, setting, streamer=plain)
            generate(cached, setting, streamer=ours)
            assert ours.ids == plain.ids
        cached.close()


def test_chunks_of_a_model_that_starts_over(setting: Setting) -> None:
    # transformers is wrong there, and a drop-in has to give the same text.
    setting = Setting(build("jamba"), setting.tokenizer, PROMPT, setting.folder)
    with KVStore(setting.folder / "store") as store:
        cached = CachedModel(setting.model, store=store, block_size=BLOCK, progress=False)
        for _ in range(2):
            found = generate(cached, setting, prefill_chunk_size=8)
            assert torch.equal(found, generate(setting.model, setting, prefill_chunk_size=8))
            assert "prefill_chunk_size" in (cached.usage.bypass_reason or "")
        cached.close()


@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "falcon_h1", "mamba", "jamba", "lfm2", "olmo_hybrid"])
def test_rows_of_equal_length_have_hits_of_their_own(family: str, setting: Setting) -> None:
    setting = Setting(build(family), setting.tokenizer, PROMPT, setting.folder)
    model = setting.model
    other = torch.cat([PROMPT[:, : 2 * BLOCK], random_ids(PROMPT.shape[1] - 2 * BLOCK, seed=5)], dim=1)
    batch = torch.cat([PROMPT, other, random_ids(PROMPT.shape[1], seed=6)])
    with KVStore(setting.folder / "store", max_cpu_bytes="64MiB") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        generate(cached, setting)
        found = generate(cached, setting, inputs=batch)
        assert torch.equal(found, generate(model, setting, inputs=batch))
        first = cached.usage.cached_tokens
        # The first row was a call of its own; how much of it the second one finds depends on where states were kept.
        assert PROMPT.shape[1] - 1 <= first < 2 * PROMPT.shape[1]
        for tier in ("live", "cpu", "disk"):
            leave_only(cached, tier)
            assert torch.equal(generate(cached, setting, inputs=batch), found), tier
            assert cached.usage.cached_tokens == 3 * (PROMPT.shape[1] - 1)
        # And each row serves a single call.
        for row in batch:
            assert torch.equal(generate(cached, setting, inputs=row[None]), generate(model, setting, inputs=row[None]))
            assert cached.usage.cached_tokens == PROMPT.shape[1] - 1
        cached.close()
