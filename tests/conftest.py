"""Fixtures that every test may use: an isolated home, tiny random models, and real ones made once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

# Before anything imports transformers or huggingface_hub: both read these at import.
_REPO = Path(__file__).resolve().parent.parent
_TEST_CACHE = Path(os.environ.get("KVEMBED_TEST_CACHE", _REPO / ".cache"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HOME"] = str(_TEST_CACHE / "hf")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # silences its warning in tests that fork

import pytest  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from kvembed import CachedModel
    from tests.cuda_ext._mock import Kit


class ModelFactory(Protocol):
    """Makes a fresh tiny model; equal arguments make equal weights."""

    def __call__(self, *, seed: int = 0, **config: Any) -> PreTrainedModel: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support-matrix", choices=["check", "write"], default="check", help="write the support matrix anew"
    )


def pytest_report_header() -> str:
    return f"kvembed test cache: {_TEST_CACHE}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _isolated_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not tmp_path: tests list the contents of that one.
    home = tmp_path_factory.mktemp("kvembed-home")
    monkeypatch.setenv("KVEMBED_HOME", str(home))
    monkeypatch.setenv("KVEMBED_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("KVEMBED_MODELS_DIR", str(_TEST_CACHE / "models"))
    monkeypatch.delenv("KVEMBED_DISABLE", raising=False)


@pytest.fixture(scope="session")
def cuda_kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """kvembed-cuda's library and a driver without a GPU, compiled; skips where there is no compiler."""
    from tests.cuda_ext._mock import build_kit

    return build_kit(tmp_path_factory.mktemp("kvembed-cuda"))


# ------------------------------------------------------------------------------------- tiny models

TINY_VOCAB = 272
"""256 bytes, five special tokens, and a few ids that no text uses."""

TINY_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, special tokens 256-260, a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|pad|>", "<|bos|>", "<|im_end|>", "<|im_start|>", "<|sep|>"])  # ids 256-260
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|sep|>"],
    )
    tokenizer.chat_template = TINY_TEMPLATE
    tokenizer.model_max_length = 8192
    return tokenizer


def _tiny(config: Any, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    # A fork of the generator, so that building a model does not change what a test draws afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


_COMMON: dict[str, Any] = {
    "vocab_size": TINY_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "bos_token_id": 257,
    "eos_token_id": None,  # generation runs to max_new_tokens unless a test sets it
    "pad_token_id": 256,
    # Larger than the usual 0.02, so that random weights make peaked logits, and greedy decoding does
    # not hang on rounding.
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def tiny_llama() -> ModelFactory:
    """Full attention, grouped queries, 3 layers."""

    def make(*, seed: int = 0, **config: Any) -> PreTrainedModel:
        from transformers import LlamaConfig

        options: dict[str, Any] = {**_COMMON, "num_hidden_layers": 3, **config}
        return _tiny(LlamaConfig(**options), seed)

    return make


@pytest.fixture(scope="session")
def tiny_mistral() -> ModelFactory:
    """A sliding window of 24 tokens in all of its 3 layers."""

    def make(*, seed: int = 0, **config: Any) -> PreTrainedModel:
        from transformers import MistralConfig

        options: dict[str, Any] = {**_COMMON, "num_hidden_layers": 3, "sliding_window": 24, **config}
        return _tiny(MistralConfig(**options), seed)

    return make


@pytest.fixture(scope="session")
def tiny_gemma3() -> ModelFactory:
    """Gemma 3 text: 4 layers, sliding (24 tokens) but for every second one, which is full."""

    def make(*, seed: int = 0, **config: Any) -> PreTrainedModel:
        from transformers import Gemma3TextConfig

        options: dict[str, Any] = {
            **_COMMON,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            # Gemma ties them, but with random weights that makes it repeat its last token for ever.
            "tie_word_embeddings": False,
            **config,
        }
        return _tiny(Gemma3TextConfig(**options), seed)

    return make


@pytest.fixture
def tiny_cached(tiny_llama: ModelFactory, tiny_tokenizer: Any, tmp_path: Path) -> Iterator[CachedModel]:
    """A tiny Llama over a store of its own, in blocks of 16 tokens."""
    from kvembed import CachedModel, KVStore

    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(tiny_llama(), tiny_tokenizer, store=store, block_size=16, progress=False)
        yield cached
        cached.close()


# ------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, downloaded and converted once by the alias's own path."""
    return _real("smollm2")


@pytest.fixture(scope="session")
def gemma3_270m() -> Path:
    """Folder of Gemma 3 270M, made like `smollm2`."""
    return _real("gemma3-270m")


def _real(alias: str) -> Path:
    from kvembed._loading import resolve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVEMBED_MODELS_DIR", str(_TEST_CACHE / "models"))
        return Path(resolve(alias).path_or_id)
