"""``forget``, ``export`` and ``import``, with a tiny model of random weights in a folder."""

from __future__ import annotations

import base64
import sys
import types
from typing import TYPE_CHECKING, Any

from kvembed import KVStore
from kvembed._testing import keys_of, put_all, random_chain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    Run = Callable[..., Any]

TEXT = "The lighthouse keeper counts the ships at dusk. " * 10


def test_forget_a_file(run: Run, run_json: Run, tiny_folder: Path, tmp_path: Path) -> None:
    file, other, store = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "store"
    file.write_text(TEXT, encoding="utf-8")
    other.write_text(TEXT[::-1], encoding="utf-8")
    options = ("--model", tiny_folder, "--dir", store)
    run_json("warm", file, "--pin", *options)
    run_json("warm", other, *options)
    before = run_json("stats", "--dir", store)["tiers"][1]["blocks"]
    assert "--yes" in run("forget", file, *options, status=1).stderr
    report = run_json("forget", file, "-y", *options)
    assert report["ok"]
    assert report["blocks"] == before // 2
    assert report["scanned"] > 0
    assert run_json("stats", "--dir", store)["pins"] == 0
    assert "nothing of it is left" in run("forget", "--text", TEXT[::-1], "-y", *options).stdout
    assert run_json("ls", "--dir", store) == []


def test_forget_needs_a_store_and_one_text(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT, encoding="utf-8")
    for args in ([], [file, "--text", "x"]):
        assert "--text" in run("forget", *args, status=1).stderr
    assert "no store" in run("forget", file, "--dir", tmp_path / "none", status=1).stderr
    run("forget", tmp_path / "absent.txt", "--dir", tmp_path, status=2)


def test_traces_are_an_error(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    file, store = tmp_path / "a.txt", tmp_path / "store"
    file.write_text(TEXT, encoding="utf-8")
    options = ("--model", tiny_folder, "--dir", store)
    run("warm", file, *options)
    copy = next(store.rglob("*.safetensors")).read_bytes()
    (store / "copy.bin").write_bytes(copy)
    assert "copy.bin" in run("forget", file, "-y", *options, status=1).stdout


def test_export_and_import(run: Run, run_json: Run, filled: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "report.kvembed", tmp_path / "other"
    assert "2 blocks" in run("export", "report", file, "--dir", filled).stdout
    assert run_json("import", file, "--dir", other)["new"] == 2
    assert "2 were here already" in run("import", file, "--pin", "again", "--dir", other).stdout
    assert [entry["names"] for entry in run_json("ls", "--dir", other)] == [["again"]]
    target = next(entry["id"] for entry in run_json("ls", "--dir", filled) if not entry["names"])
    assert run_json("export", target, file, "--dir", filled)["blocks"] == 3
    assert "no stored sequence" in run("export", "ffffffffffff", file, "--dir", filled, status=1).stderr
    assert "no store" in run("export", "report", file, "--dir", tmp_path / "none", status=1).stderr


def test_import_refuses_another_model_in_words(run: Run, run_json: Run, tiny_folder: Path, tmp_path: Path) -> None:
    text, file, store = tmp_path / "a.txt", tmp_path / "a.kvembed", tmp_path / "store"
    text.write_text(TEXT, encoding="utf-8")
    run("warm", text, "--pin", "--model", tiny_folder, "--dtype", "float32", "--dir", store)
    run("export", "a.txt", file, "--dir", store)
    options = ("--model", tiny_folder, "--dir", tmp_path / "other")
    error = run("import", file, *options, "--dtype", "bfloat16", status=1).stderr
    assert "dtype is 'float32' there, 'bfloat16' here" in error
    assert run_json("import", file, *options, "--dtype", "float32")["new"] > 0


def test_keys_and_encrypted_stores(run: Run, run_json: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = run("key", "new").stdout.strip()
    assert len(base64.b64decode(key)) == 32
    store, chain, file = tmp_path / "store", random_chain(3), tmp_path / "out.kvembed"
    with KVStore(store, key=base64.b64decode(key)) as opened:
        put_all(opened, chain)
        opened.pin(keys_of(chain), "report")
    said = run("ls", "--dir", store, status=1).stderr
    assert "is encrypted" in said
    assert "KVEMBED_KEY" in said
    assert "is encrypted" in run("key", "check", "--dir", store, status=1).stderr
    monkeypatch.setenv("KVEMBED_KEY", base64.b64encode(bytes(32)).decode())
    assert "not the key" in run("key", "check", "--dir", store, status=1).stderr
    monkeypatch.setenv("KVEMBED_KEY", key)
    assert run_json("key", "check", "--dir", store) == {"path": str(store), "encrypted": True, "fits": True}
    assert "this is its key" in run("key", "check", "--dir", store).stdout
    assert [entry["names"] for entry in run_json("ls", "--dir", store)] == [["report"]]
    assert "(encrypted)" in run("stats", "--dir", store).stdout
    assert run_json("verify", "--dir", store)["blocks"] == 3
    assert run_json("doctor", "--quick", "--dir", store)["store"]["encrypted"]
    run("export", "report", file, "--dir", store)
    assert chain[0].token_ids.tobytes() not in file.read_bytes()
    assert "is encrypted" in run("import", file, "--dir", tmp_path / "plain", status=1).stderr
    assert run_json("import", file, "--key", "env", "--dir", tmp_path / "plain")["new"] == 3
    run("export", "report", file, "--plain", "--dir", store)
    assert chain[0].token_ids.tobytes() in file.read_bytes()
    assert "not encrypted" in run("key", "check", "--dir", tmp_path / "plain").stdout
    assert "no store" in run("key", "check", "--dir", tmp_path / "none", status=1).stderr


def test_a_key_in_the_keyring(run: Run, run_json: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[tuple[str, str], str] = {}
    fake: Any = types.ModuleType("keyring")
    fake.get_password = lambda service, name: held.get((service, name))
    fake.set_password = lambda service, name, text: held.update({(service, name): text})
    monkeypatch.setitem(sys.modules, "keyring", fake)
    said = run("key", "new", "--keyring", "work").stdout
    assert "keyring:work" in said
    assert held["kvembed", "work"] not in said
    assert "already" in run("key", "new", "--keyring", "work", status=1).stderr
    KVStore(tmp_path, key="keyring:work").close()
    assert run_json("key", "check", "--keyring", "work", "--dir", tmp_path)["fits"]
    monkeypatch.setenv("KVEMBED_KEY", "keyring:work")
    assert run_json("ls", "--dir", tmp_path) == []
