from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import kvembed_chat
import pytest

import kvembed
from kvembed import _chat_entry

ROOTS = [Path(kvembed.__file__).parent, Path(kvembed_chat.__file__).parent]
SOURCES = sorted(path for root in ROOTS for path in root.rglob("*.py"))


def _name(path: Path) -> str:
    root = next(root for root in ROOTS if path.is_relative_to(root))
    return str(path.relative_to(root.parent))


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_all_public_names_exist_and_are_sorted() -> None:
    assert kvembed.__all__ == sorted(kvembed.__all__, key=str.casefold)
    for name in kvembed.__all__:
        value = getattr(kvembed, name)
        assert not isinstance(value, ModuleType), name
    assert {name for name in dir(kvembed) if not name.startswith("_")} == set(kvembed.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'CachedModle'"):
        kvembed.CachedModle  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]


def test_import_is_fast_and_loads_no_large_library() -> None:
    code = (
        "import time; t = time.perf_counter(); import kvembed; took = time.perf_counter() - t\n"
        "import sys\n"
        "large = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'safetensors', 'rich', 'typer', 'sqlite3'}\n"
        "print(took, *sorted(large & set(sys.modules)))"
    )
    runs = [run_python(code).split() for _ in range(3)]
    assert [run[1:] for run in runs] == [[], [], []]
    assert min(float(run[0]) for run in runs) < 0.1


def test_the_parts_that_move_no_tensors_do_not_load_torch() -> None:
    code = (
        "import sys, kvembed._loading, kvembed._store, kvembed._usage, kvembed._match, kvembed._cli\n"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code) == ""


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_house_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert "from __future__ import annotations" in text
    names = {target.id for node in tree.body for target in _targets(node)}
    assert "__all__" in names or path.name == "__main__.py"
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    } | {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "shelve", "marshal", "dill", "cloudpickle"}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_conditions_are_entered_by_their_lock(path: Path) -> None:
    # `Condition.__enter__` is Python code: Ctrl-C inside it leaves the lock taken, and the next thread waits for ever.
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"self\.(\w+) = threading\.Condition\(", text):
        assert not re.search(rf"with self\.{name}\b", text)


def _targets(node: ast.stmt) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target for target in targets if isinstance(target, ast.Name)]


def _pretend_installed(monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)


def test_chat_without_its_extra_prints_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend_installed(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        _chat_entry.main()
    assert stop.value.code == 1
    assert "\n    pip install 'kvembed[chat]'\n" in capsys.readouterr().err


def test_chat_without_the_app_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _pretend_installed(monkeypatch, "textual")
    with pytest.raises(SystemExit) as stop:
        _chat_entry.main()
    assert stop.value.code == 1
    assert f"not part of kvembed {kvembed.__version__}" in capsys.readouterr().err


def test_chat_starts_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_installed(monkeypatch, "textual", "kvembed_chat")
    calls: list[str] = []
    app = ModuleType("kvembed_chat")
    app.main = lambda: calls.append("started")  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "kvembed_chat", app)
    _chat_entry.main()
    assert calls == ["started"]
