"""``ls``, ``stats``, ``path``, ``rm``, ``prune``, ``verify``: no model, no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvembed import KVStore
from kvembed._testing import keys_of, put_all, random_chain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., Any]


def _block_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_ls_lists_sequences(run: Run, filled: Path) -> None:
    out = run("ls", "--dir", filled).stdout
    assert "report" in out
    assert "tiny [bold]model[/bold]" in out  # names are text, not markup
    assert " 48 " in out
    assert " 32 " in out


def test_ls_json(run_json: Run, filled: Path) -> None:
    entries = run_json("ls", "--dir", filled)
    assert sorted((e["n_tokens"], e["n_blocks"], tuple(e["names"])) for e in entries) == [
        (32, 2, ("report",)),
        (48, 3, ()),
    ]
    assert all(e["key"].startswith(e["id"]) for e in entries)


def test_ls_limit_and_sort(run: Run, run_json: Run, filled: Path) -> None:
    assert [e["n_tokens"] for e in run_json("ls", "--dir", filled, "--sort", "tokens")] == [48, 32]
    assert len(run_json("ls", "--dir", filled, "--limit", 1)) == 1
    assert "--limit" in run("ls", "--dir", filled, "--limit", 1).stdout
    assert "sort" in run("ls", "--dir", filled, "--sort", "name", status=1).stderr


def test_stats(run: Run, run_json: Run, filled: Path) -> None:
    stats = run_json("stats", "--dir", filled)
    disk = next(tier for tier in stats["tiers"] if tier["name"] == "disk")
    assert (stats["exists"], stats["path"], stats["pins"], disk["blocks"]) == (True, str(filled), 1, 5)
    assert "disk" in run("stats", "--dir", filled).stdout


def test_stats_shows_what_other_budgets_would_have_had(run: Run, run_json: Run, filled: Path) -> None:
    with KVStore(filled) as store:
        chain = random_chain(3, seed=1)
        put_all(store, chain)
        for _ in range(4):
            store.touch(keys_of(chain))
    found = run_json("stats", "--dir", filled)
    curve = found["hit_curve"]
    assert (curve["calls"], curve["blocks"], curve["hit_rates"][-1]) == (4, 12, 0.75)
    assert sum(found["written_by_day"].values()) == found["written_bytes"] == found["written_today"] > 0
    text = run("stats", "--dir", filled).stdout
    assert "written today" in text
    assert "75.0 %" in text


def test_the_plot_of_stats(run: Run, filled: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with KVStore(filled) as store:
        put_all(store, random_chain(3, seed=1))
        for _ in range(3):
            store.touch(keys_of(random_chain(3, seed=1)))
    target = tmp_path / "plot.svg"
    assert str(target) in run("stats", "--dir", filled, "--plot", target).stdout
    picture = target.read_text(encoding="utf-8")
    assert "<svg" in picture
    assert "cannot write the plot" in run("stats", "--dir", filled, "--plot", tmp_path / "plot.txt2", status=1).stderr


def test_a_plot_without_matplotlib_says_what_to_install(
    run: Run, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = run("stats", "--dir", filled, "--plot", tmp_path / "plot.png", status=1).stderr
    assert "pip install 'kvembed[notebook]'" in error


@pytest.mark.parametrize("command", [["ls"], ["stats"], ["verify"], ["prune", "--older-than", "1d"]])
def test_looking_makes_no_store(run: Run, run_json: Run, tmp_path: Path, command: list[str]) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        assert "No store" in run(*command, "--dir", folder).stdout
        run_json(*command, "--dir", folder)
    assert list(tmp_path.iterdir()) == []


def test_path_follows_dir_and_environment(
    run: Run, run_json: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVEMBED_CACHE_DIR", str(tmp_path / "cache"))
    assert run("path").stdout.strip() == str(tmp_path / "cache" / "store")
    assert run_json("path", "--dir", tmp_path / "x") == {
        "store": str(tmp_path / "x"),
        "cache": str(tmp_path / "cache"),
        "models": os.environ["KVEMBED_MODELS_DIR"],
        "exists": False,
    }


def test_a_file_in_place_of_the_folder_is_one_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    result = run("ls", "--dir", file, status=1)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert str(file) in result.stderr


def test_rm_erases_one_sequence(run: Run, run_json: Run, filled: Path) -> None:
    target = next(e["id"] for e in run_json("ls", "--dir", filled) if not e["names"])
    assert "Removed 3 blocks" in run("rm", target, "--yes", "--dir", filled).stdout
    assert [e["names"] for e in run_json("ls", "--dir", filled)] == [["report"]]
    assert len(_block_files(filled)) == 2


def test_rm_by_pinned_name(run_json: Run, filled: Path) -> None:
    assert run_json("rm", "report", "-y", "--dir", filled) == {"blocks": 2}
    assert run_json("stats", "--dir", filled)["pins"] == 0


def test_rm_all(run_json: Run, filled: Path) -> None:
    assert run_json("rm", "--all", "--yes", "--dir", filled) == {"blocks": 5}
    assert _block_files(filled) == []


def test_rm_with_one_wrong_target_erases_nothing(run: Run, filled: Path) -> None:
    result = run("rm", "report", "ffffffffffff", "--yes", "--dir", filled, status=1)
    assert "ffffffffffff" in result.stderr
    assert len(_block_files(filled)) == 5


@pytest.mark.parametrize("args", [[], ["report", "--all"]])
def test_rm_needs_targets_or_all(run: Run, filled: Path, args: list[str]) -> None:
    assert "--all" in run("rm", *args, "--dir", filled, status=1).stderr


def test_rm_without_anybody_to_ask_erases_nothing(run: Run, filled: Path) -> None:
    assert "--yes" in run("rm", "--all", "--dir", filled, status=1).stderr
    assert len(_block_files(filled)) == 5


def test_confirm_asks_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from kvembed._cli._common import confirm

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "confirm", lambda text: False)
    with pytest.raises(typer.Exit):
        confirm("Really?", yes=False)
    monkeypatch.setattr(typer, "confirm", lambda text: True)
    confirm("Really?", yes=False)


def test_prune_dry_run_deletes_nothing(run_json: Run, filled: Path) -> None:
    report = run_json("prune", "--max-bytes", "0", "--dry-run", "--dir", filled)
    assert report["blocks"] == 3  # the pinned sequence stays
    assert report["dry_run"] is True
    assert len(_block_files(filled)) == 5


def test_prune_by_size(run: Run, run_json: Run, filled: Path) -> None:
    assert "--yes" in run("prune", "--max-bytes", "0", "--dir", filled, status=1).stderr
    assert run_json("prune", "--max-bytes", "0", "--yes", "--dir", filled)["blocks"] == 3
    assert len(_block_files(filled)) == 2


def test_prune_by_age(run: Run, run_json: Run, filled: Path) -> None:
    assert run("prune", "--older-than", "1h", "--yes", "--dir", filled).stdout.strip() == "Nothing to remove."
    assert run_json("prune", "--older-than", "0s", "--yes", "--dir", filled)["blocks"] == 3


@pytest.mark.parametrize(
    ("args", "word"),
    [([], "--older-than"), (["--older-than", "soon"], "30d"), (["--max-bytes", "many"], "--max-bytes")],
)
def test_prune_needs_a_readable_rule(run: Run, filled: Path, args: list[str], word: str) -> None:
    assert word in run("prune", *args, "--yes", "--dir", filled, status=1).stderr


def test_verify_of_a_sound_store(run: Run, run_json: Run, filled: Path) -> None:
    assert run_json("verify", "--dir", filled) == {
        "blocks": 5,
        "nbytes": run_json("verify", "--dir", filled)["nbytes"],
        "problems": [],
        "fixed": 0,
        "ok": True,
    }
    assert "all good" in run("verify", "--dir", filled).stdout


def test_verify_finds_and_fixes_a_damaged_block(run: Run, run_json: Run, filled: Path) -> None:
    file = _block_files(filled)[0]
    data = bytearray(file.read_bytes())
    data[-200] ^= 1
    file.write_bytes(data)
    report = run_json("verify", "--dir", filled, status=1)
    assert not report["ok"]
    assert len(report["problems"]) == 1
    assert run_json("verify", "--fix", "--dir", filled)["fixed"] >= 1
    assert run_json("verify", "--dir", filled)["ok"]
    assert run("verify", "--dir", filled).exit_code == 0


def test_tree_shows_rows_and_sessions(run: Run, run_json: Run, filled: Path) -> None:
    from kvembed._sessions.db import SessionDB
    from kvembed._sessions.messages import Message

    with KVStore(filled) as store:
        (keys,) = [row.keys for row in store.prefixes().rows if row.end == 48]
        ids = np.concatenate([found for key in keys if (found := store.token_ids(key)) is not None])
    db = SessionDB()
    db.open("trip [b]")
    reply = Message(0, None, "assistant", "secret words", ids_rest=ids.tobytes())
    db.add("trip [b]", [Message(0, None, "user", "x"), reply], None)
    db.close()
    rows = {row["end"]: row for row in run_json("tree", "--dir", filled)}
    assert (rows[48]["users"], rows[48]["names"], rows[48]["n_blocks"], rows[48]["parent"]) == (
        ["trip [b]"],
        [],
        3,
        None,
    )
    assert (rows[32]["users"], rows[32]["names"], rows[32]["model"]) == ([], ["report"], "tiny [bold]model[/bold]")
    out = run("tree", "--dir", filled).stdout
    for words in ("0–48", "3 blocks", "▒ disk", "in trip [b]", "pinned: report", "model[/bold]", rows[48]["id"]):
        assert words in out, words
    assert "secret" not in out
    assert "The first 1 of 2 rows" in run("tree", "--dir", filled, "--limit", 1).stdout


def test_tree_of_nothing(run: Run, run_json: Run, tmp_path: Path) -> None:
    assert "No store" in run("tree", "--dir", tmp_path / "none").stdout
    assert run_json("tree", "--dir", tmp_path / "none") == []
    with KVStore(tmp_path / "empty"):
        pass
    assert "Nothing is stored" in run("tree", "--dir", tmp_path / "empty").stdout
    assert not (tmp_path / "none").exists()


def test_no_command_on_the_store_loads_torch(filled: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from kvembed._cli import app\n"
        "for args in (['--help'], ['path'], ['ls'], ['stats'], ['tree'], ['verify']):\n"
        "    extra = [] if args == ['--help'] else ['--dir', sys.argv[1]]\n"
        "    assert CliRunner().invoke(app, args + extra).exit_code == 0, args\n"
        "print({'torch', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(filled)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_piped_output_has_no_colour_and_is_not_cut(filled: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "FORCE_COLOR"}}
    command = [sys.executable, "-m", "kvembed", "ls", "--dir", str(filled)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, encoding="utf-8")
    assert "\x1b" not in done.stdout
    assert "tiny [bold]model[/bold]" in done.stdout
    assert done.stderr == ""
