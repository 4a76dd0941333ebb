"""The parts of the app that need no screen."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from kvembed_chat._cli import parse
from kvembed_chat._config import config_file
from kvembed_chat._export import kind_of
from kvembed_chat._files import attachments, completions
from kvembed_chat._settings import form_of, settings_of
from kvembed_chat._thinking import ThinkingSplitter, split_thinking
from kvembed_chat._words import free_name, name_from, time_left

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "thought", "words"),
    [
        ("<think>\nHm, 1 < 2.</think>\n\nSo.", "Hm, 1 < 2.", "So."),
        ("Plain <think>words</think>.", "", "Plain <think>words</think>."),
        ("<thin air", "", "<thin air"),
        ("<think>never ends </thi", "never ends </thi", ""),
    ],
)
def test_thoughts_are_told_from_words_in_pieces_of_any_size(size: int, text: str, thought: str, words: str) -> None:
    splitter = ThinkingSplitter()
    pieces = [splitter.feed(text[i : i + size]) for i in range(0, len(text), size)] + [splitter.end()]
    assert "".join(a for a, _ in pieces).strip() == thought
    assert "".join(b for _, b in pieces) == words


def test_a_thought_that_the_template_opened() -> None:
    assert split_thinking("It is so.</think>\n\nYes.") == ("It is so.", "Yes.")
    assert split_thinking("Yes.") == ("", "Yes.")


def test_files_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / ".hidden").write_text("", encoding="utf-8")
    assert completions("", tmp_path) == ["a.txt", "docs/"]
    assert completions("A", tmp_path) == ["a.txt"]
    assert completions("a.txt", tmp_path) == []  # nothing left to complete
    assert completions("none/", tmp_path) == []
    assert attachments("@a.txt what? mail me@b.c or @nobody", tmp_path) == (
        [tmp_path / "a.txt"],
        "what? mail me@b.c or @nobody",
    )


def test_settings_round_trip_and_greedy_needs_none() -> None:
    form = {"temperature": "0.7", "top_p": "0.9", "max_new_tokens": "64"}
    settings = settings_of(form, {"seed": 1})
    assert settings == {"seed": 1, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 64, "do_sample": True}
    assert form_of(settings) == form
    assert settings_of({"temperature": "0", "top_p": "0.9"}, settings) == {"seed": 1}
    with pytest.raises(ValueError, match="Most tokens of a reply: a number from 1"):
        settings_of({"max_new_tokens": "many"}, {})


def test_names_and_times() -> None:
    assert name_from("## What is\nthe capital of the country of France?") == "What is the capital of the…"
    assert name_from("???") == "???"
    assert free_name("a", {"a", "a (2)"}) == "a (3)"
    assert time_left(512, 1024, 256, 1.0) == 2.0
    assert time_left(256, 1024, 256, 1.0) is None
    assert kind_of("x.JSON") == "json"
    with pytest.raises(ValueError, match="not .pdf"):
        kind_of("x.pdf")


def test_the_command_line_wins_over_the_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    config_file().parent.mkdir(parents=True)
    config_file().write_text('model = "smollm2"\ntheme = "nord"\nmax_new_tokens = 64\n', encoding="utf-8")
    options = parse(["--theme", "gruvbox", "--session", "trip", "--no-cache"])
    assert (options.model, options.theme, options.session, options.cached) == ("smollm2", "gruvbox", "trip", False)
    assert options.max_new_tokens == 64
    with pytest.raises(SystemExit):
        parse(["--doc", "missing.txt"])
    assert "there is no file 'missing.txt'" in capsys.readouterr().err
    config_file().write_text("model = 7", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse([])
    assert "model is text, not 7" in capsys.readouterr().err


def test_help_loads_nothing_large() -> None:
    code = (
        "import sys, kvembed_chat\n"
        "try:\n    kvembed_chat.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'torch', 'transformers', 'textual', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("usage: kvembed-chat")
    assert done.stdout.splitlines()[-1] == ""
