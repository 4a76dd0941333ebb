"""``forget``, ``export`` and ``import``, with a tiny model of random weights in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
