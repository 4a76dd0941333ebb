"""Assisted generation: the main model's prompt is reused, and so is the assistant's, from blocks of its own."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import CacheBypassWarning, CachedModel, KVStore, attach, attached, detach
from tests.model._lab import leave_only

from .modes import Setting, generate
from .zoo import build

if TYPE_CHECKING:
    from pathlib import Path

    from ._record import Record

BLOCK = 16
KINDS = {"full attention": "llama", "sliding window": "gemma3_text"}
PROMPT = torch.randint(0, 250, (1, 4 * BLOCK + 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of models that transformers can verify drafts with."""
    return request.param


def setting_of(family: str, folder: Path) -> Setting:
    """Return a setting with a new model of the family."""
    return Setting(build(family), None, PROMPT, folder, new=12)


def wrap(model: Any, store: KVStore, **options: Any) -> CachedModel:
    """Wrap a model, in small blocks."""
    return CachedModel(model, store=store, block_size=BLOCK, progress=False, **options)


def test_a_plain_assistant(kind: str, tmp_path: Path, record: Record) -> None:
    setting = setting_of(KINDS[kind], tmp_path)
    plain = generate(setting.model, setting)
    # The model itself drafts well, another one badly: accepted and rejected drafts both happen.
    for number, assistant in enumerate((build(KINDS[kind]), build(KINDS[kind], seed=1))):
        with KVStore(tmp_path / str(number)) as store:
            cached = wrap(setting.model, store)
            for _ in range(2):
                assert torch.equal(generate(cached, setting, assistant_model=assistant), plain)
                assert cached.usage.bypass_reason is None
            assert cached.usage.cached_tokens >= 4 * BLOCK
            # What is kept afterwards is right too.
            longer = torch.cat([plain, setting.ids(6, 8)], dim=1)
            assert torch.equal(
                generate(cached, setting, inputs=longer), generate(setting.model, setting, inputs=longer)
            )
            cached.close()
    record.mode("assistant_model").outcomes[kind] = "reused"


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_assistant_with_blocks_of_its_own(
    kind: str, seed: int, sampled: bool, tmp_path: Path, record: Record
) -> None:
    family = KINDS[kind]
    setting = setting_of(family, tmp_path)
    options = {"do_sample": sampled, "temperature": 0.7} if sampled else {}
    plain = generate(setting.model, setting, assistant_model=build("mistral", seed), **options)
    full = PROMPT.shape[1] - 1
    for opened in range(2):  # the second time with other objects, and a store that was read from disk
        with KVStore(tmp_path / "store", max_cpu_bytes="64MiB") as store, warnings.catch_warnings():
            warnings.simplefilter("error", CacheBypassWarning)
            cached, assistant = wrap(build(family), store), wrap(build("mistral", seed), store)
            for tier in ("cold", "live", "cpu", "disk"):
                for model in (cached, assistant):
                    leave_only(model, tier)
                found = generate(cached, setting, assistant_model=assistant, **options)
                assert torch.equal(found, plain), tier
                assert assistant.usage.prompt_tokens == cached.usage.prompt_tokens == PROMPT.shape[1]
                cold = not opened and tier == "cold"
                assert assistant.usage.cached_tokens == (0 if cold else full)
                assert cached.usage.cached_tokens >= (0 if cold else 4 * BLOCK)
                assert "generate" not in vars(assistant.hf_model)
            # The assistant's blocks serve it as a model like any other, and are its own.
            assert assistant.lookup(PROMPT).num_tokens == full
            assert assistant.fingerprint != cached.fingerprint
            assert torch.equal(generate(assistant, setting), generate(assistant.hf_model, setting))
            cached.close()
            assistant.close()
    record.mode("assistant_model, a CachedModel").outcomes[kind] = "reused, the assistant's prompt too"


def test_an_attached_assistant(kind: str, tmp_path: Path) -> None:
    setting = setting_of(KINDS[kind], tmp_path)
    helper = build("mistral")
    plain = generate(setting.model, setting, assistant_model=helper)
    with KVStore(tmp_path / "store", max_cpu_bytes="64MiB") as store:
        cached = wrap(setting.model, store)
        own = attach(helper, store=store, block_size=BLOCK, progress=False)
        # Of a cached model, and of one that knows nothing of kvembed.
        for call, main in enumerate((cached, cached, setting.model)):
            assert torch.equal(generate(main, setting, assistant_model=helper), plain)
            assert own.usage.cached_tokens == (PROMPT.shape[1] - 1 if call else 0)
            assert attached(helper) is own
        detach(helper)
        cached.close()


def test_a_model_that_drafts_for_itself(tmp_path: Path) -> None:
    setting = setting_of("llama", tmp_path)
    plain = generate(setting.model, setting, assistant_model=setting.model)
    with KVStore(tmp_path / "store") as store:
        cached = wrap(setting.model, store)
        for assistant in (cached, setting.model, cached):
            assert torch.equal(generate(cached, setting, assistant_model=assistant), plain)
        assert cached.usage.cached_tokens == PROMPT.shape[1] - 1
        assert cached.usage.prompt_tokens == PROMPT.shape[1]
        cached.close()


def test_an_assistant_with_a_state_is_passed_through(tmp_path: Path) -> None:
    setting = setting_of("llama", tmp_path)
    helper = build("lfm2")
    plain = generate(setting.model, setting, assistant_model=helper)
    with KVStore(tmp_path / "store") as store:
        cached, assistant = wrap(setting.model, store), wrap(helper, store)
        for _ in range(2):
            assert torch.equal(generate(cached, setting, assistant_model=assistant), plain)
            assert "rolled back" in (assistant.usage.bypass_reason or "")
        assert cached.usage.cached_tokens == PROMPT.shape[1] - 1
        cached.close()
        assistant.close()


def test_a_bad_block_of_the_assistant_is_a_miss(tmp_path: Path) -> None:
    setting = setting_of("llama", tmp_path)
    plain = generate(setting.model, setting)
    with KVStore(tmp_path / "main") as store, KVStore(tmp_path / "own", max_cpu_bytes=0) as own:
        cached, assistant = wrap(setting.model, store), wrap(build("mistral"), own)
        generate(cached, setting, assistant_model=assistant)
        own.flush()
        files = sorted((tmp_path / "own" / "blocks").rglob("*.safetensors"))
        assert len(files) >= 5
        for file in files:
            data = bytearray(file.read_bytes())
            data[-200] ^= 1
            file.write_bytes(data)
        with pytest.warns(UserWarning, match="quarantine|checksum|block"):
            found = generate(cached, setting, assistant_model=assistant)
        assert torch.equal(found, plain)
        assert cached.usage.cached_tokens == PROMPT.shape[1] - 1
        cached.close()
        assistant.close()
