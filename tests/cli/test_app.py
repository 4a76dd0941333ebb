"""The command itself: help, version, errors and warnings, and what its helpers read and print."""

from __future__ import annotations

import io
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvembed._cli import _common
from kvembed._errors import KVEmbedError, StoreWarning

if TYPE_CHECKING:
    from collections.abc import Callable

COMMANDS = ("bench", "demo", "doctor", "ls", "path", "prune", "rm", "stats", "verify", "warm")


def test_help_names_every_command(run: Callable[..., Any]) -> None:
    out = run("--help").stdout
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run: Callable[..., Any], name: str) -> None:
    out = run(name, "--help").stdout
    assert "--json" in out
    assert "--child" not in out


def test_version(run: Callable[..., Any]) -> None:
    from kvembed import __version__

    assert run("--version").stdout.strip() == f"kvembed {__version__}"


def test_unknown_command_is_a_usage_error(run: Callable[..., Any]) -> None:
    run("frobnicate", status=2)


def test_own_errors_are_one_line_and_others_keep_their_traceback(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path | None, **_: Any) -> None:
        raise KVEmbedError("no [red]luck[/red]; try again")

    monkeypatch.setattr(_common, "open_store", fail)
    assert run("ls", status=1).stderr == "error: no [red]luck[/red]; try again\n"

    def crash(folder: Path | None, **_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(_common, "open_store", crash)
    with pytest.raises(ZeroDivisionError):
        run("ls")


def test_own_warnings_are_one_line(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def warn(folder: Path | None) -> Path:
        warnings.warn("the disk is full", StoreWarning, stacklevel=2)
        return tmp_path

    monkeypatch.setattr(_common, "store_path", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("path").stderr == "warning: the disk is full\n"


@dataclass
class _Thing:
    path: Path
    key: bytes
    names: tuple[str, ...]


def test_json_of_everything_we_have(capsys: pytest.CaptureFixture[str]) -> None:
    _common.print_json({"things": [_Thing(Path("a/b"), b"\x01\xff", ("é",))], 1: {"x"}})
    assert json.loads(capsys.readouterr().out) == {
        "things": [{"path": "a/b", "key": "01ff", "names": ["é"]}],
        "1": ["x"],
    }


def test_json_survives_an_output_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    _common.print_json({"name": "日本"})
    sys.stdout.flush()
    assert json.loads(raw.getvalue()) == {"name": "日本"}


def test_steps_say_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    from kvembed._cli._steps import Steps

    with Steps().step("Counting [x]") as update:
        update(1, 2)
    with Steps(quiet=True).step("Silent"):
        pass
    err = capsys.readouterr().err
    assert err.startswith("Counting [x] … ")
    assert "Silent" not in err


def test_steps_draw_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from kvembed._cli import _steps

    screen = io.StringIO()
    monkeypatch.setattr(_steps, "console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    with _steps.Steps().step("Prefilling") as update:
        update(5, 10)
        time.sleep(0.3)
        update(10, 10)
    assert "━" in screen.getvalue()
    assert "Prefilling" in screen.getvalue()
