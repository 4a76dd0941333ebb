from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvembed._paths import cache_dir, is_disabled, make_private_dir, models_dir, store_dir


def test_the_cache_folder_comes_from_the_most_specific_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("KVEMBED_MODELS_DIR", raising=False)
    monkeypatch.setenv("KVEMBED_CACHE_DIR", str(tmp_path / "a"))
    monkeypatch.setenv("KVEMBED_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "a"
    assert store_dir() == tmp_path / "a" / "store"
    assert models_dir() == tmp_path / "a" / "models"
    monkeypatch.setenv("KVEMBED_MODELS_DIR", str(tmp_path / "c"))
    assert models_dir() == tmp_path / "c"
    monkeypatch.setenv("KVEMBED_CACHE_DIR", "")
    assert cache_dir() == tmp_path / "b" / "cache"
    monkeypatch.delenv("KVEMBED_HOME")
    assert cache_dir().is_absolute()
    assert cache_dir().name == "kvembed"


def test_a_tilde_and_a_relative_path_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("KVEMBED_CACHE_DIR", "~/kv")
    assert cache_dir() == tmp_path / "kv"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVEMBED_CACHE_DIR", "kv2")
    assert cache_dir() == tmp_path / "kv2"


def test_asking_for_a_folder_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVEMBED_CACHE_DIR", str(tmp_path / "kv"))
    monkeypatch.delenv("KVEMBED_MODELS_DIR", raising=False)
    assert store_dir() != models_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), (" YES ", True), ("0", False), ("", False)]
)
def test_disable_switch(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("KVEMBED_DISABLE", value)
    assert is_disabled() is expected


@pytest.mark.skipif(os.name == "nt", reason="modes are those of POSIX")
@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_new_folders_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    target = tmp_path / "x" / "y" / "z"
    before = os.umask(umask)
    try:
        made = make_private_dir(target)
    finally:
        os.umask(before)
    assert made == target
    assert [path.stat().st_mode & 0o777 for path in (target, target.parent, target.parent.parent)] == [0o700] * 3


@pytest.mark.skipif(os.name == "nt", reason="modes are those of POSIX")
def test_an_existing_folder_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o755)
    make_private_dir(tmp_path / "shared")
    make_private_dir(tmp_path / "shared" / "inner")
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "shared" / "inner").stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        make_private_dir(tmp_path / "file")
    with pytest.raises(OSError):
        make_private_dir(tmp_path / "file" / "below")
