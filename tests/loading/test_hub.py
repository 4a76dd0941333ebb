"""Folders, names, and the hub and its cache."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvembed import ModelNotFoundError
from kvembed._loading import ALIASES, Alias, hub, resolve

from .conftest import without_pip

# ---------------------------------------------------------------------------------------------- folders and names


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
