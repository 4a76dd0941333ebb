"""What README and docs say is true: snippets run, commands exist, modules and links are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
import urllib.parse
from pathlib import Path

import pytest

import kvembed

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
ROOT_PAGES = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fences(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of every fenced block."""
    return [(m[1], m[2]) for m in _FENCE.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_docs_compiles(page: Path) -> None:
    for language, code in fences(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(code, page.name, "exec")


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = _FENCE.sub("", text)
    names = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    found: set[str] = set()
    for name in names:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        number = next(n for n in range(len(names)) if (slug if not n else f"{slug}_{n}") not in found)
        found.add(f"{slug}_{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", [*PAGES, *ROOT_PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)", text):
        if "://" in target:
            parts = urllib.parse.urlsplit(target)
            assert parts.scheme == "https", target
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), target
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        if anchor:
            assert anchor in _anchors(there.read_text(encoding="utf-8")), target


def test_the_navigation_has_every_page() -> None:
    settings = (ROOT / "tools" / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r": ([\w/-]+\.md)$", settings, re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.parent != ROOT]
    assert sorted(named) == sorted([*pages, "changelog.md", "contributing.md"]), "put the page into nav: of that file"


def test_the_reference_has_every_public_name() -> None:
    folder = ROOT / "docs" / "reference"
    named = set(re.findall(r"^::: kvembed\.(\w+)$", (folder / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    named |= set(
        re.findall(r"^\| `(\w+(?:Error|Warning))` \|", (folder / "errors.md").read_text("utf-8"), re.MULTILINE)
    )
    bases = {"__version__", "KVEmbedError", "KVEmbedWarning", "StoreError", "EncryptedBlockError"}
    assert named | bases == set(kvembed.__all__) | bases


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "cli_page.py"), "--check"], check=False)
    assert done.returncode == 0, "write it anew: python tools/cli_page.py"


def test_the_page_of_folders_names_every_variable() -> None:
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(kvembed.__file__).parent.rglob("*.py"))
    read = set(re.findall(r"\bKVEMBED_[A-Z]+(?:_[A-Z]+)*\b", sources))
    assert set(re.findall(r"`(KVEMBED_\w+)`", page)) == read


def test_the_readme_and_its_snippets_are_short() -> None:
    first, own_file = [code for language, code in fences(README) if language == "python"]
    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    assert len(own_file.splitlines()) < 10
    assert len(README.splitlines()) < 150


def _without_times(text: str) -> str:
    """Seconds and speeds differ between machines; tokens do not."""
    text = re.sub(r"\d[\d.,]* ?(ms|s|min|tok/s)\b", "TIME", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.mark.model
@pytest.mark.slow
def test_the_readme_snippet_prints_what_the_readme_shows(smollm2: Path, tmp_path: Path) -> None:
    blocks = fences(README)
    at = next(i for i, (language, _) in enumerate(blocks) if language == "python")
    shown = blocks[at + 1][1]
    environment = {**os.environ, "KVEMBED_HOME": str(tmp_path), "KVEMBED_CACHE_DIR": str(tmp_path / "cache")}
    run = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", blocks[at][1]],
            cwd=tmp_path,
            env={**environment, "KVEMBED_MODELS_DIR": str(smollm2.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    # README shows the second run: a new process, served from disk.
    assert _without_times(run[1]) == _without_times(shown)
    assert run[0].splitlines()[0] == run[1].splitlines()[0]


def test_make_commands_in_the_readme_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"\bmake (\w+)", README)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_scripts_named_in_the_readme_exist() -> None:
    for name in set(re.findall(r"benchmarks/[\w./]+\.py", README)):
        assert (ROOT / name).is_file(), name


def test_the_design_page_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text[text.index("## Modules") : text.index("## Exactness")]
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", section))
    package = Path(kvembed.__file__).parent
    present = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    present |= {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {name for name in named if name != "_base.py"} == present


def test_the_snippet_of_the_budgets_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "howto" / "budgets.md").read_text(encoding="utf-8")
    (code,) = [code for language, code in fences(page) if language == "python"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "written today 0 B of 27.9 GiB a day" in done.stdout
    assert "dropped when unused for 1440 h" in done.stdout
    assert (tmp_path / "my-store" / "kvembed.db").is_file()


def test_the_budgets_page_names_every_option_of_the_store_that_bounds_it() -> None:
    page = (ROOT / "docs" / "howto" / "budgets.md").read_text(encoding="utf-8")
    import inspect

    options = set(inspect.signature(kvembed.KVStore.__init__).parameters) - {
        "self",
        "path",
        "codec",
        "durability",
        "key",
        "read_only",
    }
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == options
