"""Every Python snippet of the pages runs, page by page, as somebody would type it in."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).resolve().parent.parent / "docs"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

ELSEWHERE = {
    "explanation/file-format.md": "tests/store/test_formats.py",
    "howto/budgets.md": "tests/test_docs.py",
    "howto/media.md": "tests/families/test_media.py",
    "howto/lm-eval.md": "tests/clients/test_lm_eval.py",  # with a task of its own: the page's comes from the hub
}
"""Pages whose snippets run in other tests, which have what they need."""

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def snippets(page: str) -> str:
    """Return the Python of a page, each snippet at the line where it stands there."""
    text = (DOCS / page).read_text(encoding="utf-8")
    lines: list[str] = []
    for match in _BLOCK.finditer(text):
        if match[1] == "python":
            lines += [""] * (text[: match.start(2)].count("\n") - len(lines))
            lines += match[2].splitlines()
    return "\n".join(lines)


def _after_python(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of the fenced blocks that follow one of Python with nothing in between."""
    blocks = list(_BLOCK.finditer(text))
    pairs = itertools.pairwise(blocks)
    return [(b[1], b[2]) for a, b in pairs if a[1] == "python" and not text[a.end() : b.start()].strip()]


PAGES = sorted(str(path.relative_to(DOCS).as_posix()) for path in DOCS.glob("**/*.md"))
RUN = [page for page in PAGES if page not in ELSEWHERE and snippets(page)]


def test_pages_that_run_elsewhere_have_snippets() -> None:
    assert all(snippets(page) for page in ELSEWHERE)


@pytest.fixture
def desk(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a text to ask about, and a keyring of its own."""
    keyring = pytest.importorskip("keyring")
    keys: dict[tuple[str, str], str] = {}

    class Keys(keyring.backend.KeyringBackend):
        priority = 1

        def get_password(self, service: str, username: str) -> str | None:
            return keys.get((service, username))

        def set_password(self, service: str, username: str, password: str) -> None:
            keys[service, username] = password

    before = keyring.get_keyring()
    keyring.set_keyring(Keys())
    (tmp_path / "report.txt").write_text(
        "The lamp is lit at dusk. The keeper counts the ships. " * 20, encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KVEMBED_MODELS_DIR", str(smollm2.parent))
    yield tmp_path
    keyring.set_keyring(before)


def _without_times(text: str) -> str:
    """Seconds, speeds and bytes on disk differ between machines; tokens do not."""
    text = re.sub(r"\d[\d.,]* ?(ms|s|min|tok/s|MiB)\b", "SIZE", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the clients themselves
@pytest.mark.parametrize("page", RUN)
def test_snippets_run(
    page: str, desk: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = snippets(page)
    for module in re.findall(r"^(?:from|import) (langchain\w*|llama_index|peft|uvicorn)\b", code, re.MULTILINE):
        pytest.importorskip(module)
    served: list[Any] = []
    if page == "howto/serving.md":
        import uvicorn

        monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.append((app, options)))
    if page == "howto/encryption.md":
        from kvembed._encryption.sources import new_key, store_in_keyring

        store_in_keyring("default", new_key())
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code.replace(HUB, str(smollm2)), str(DOCS / page), "exec"), namespace)
    for value in namespace.values():
        if type(value).__name__ in ("CachedModel", "KVStore"):
            value.close()
    printed = _without_times(capsys.readouterr().out)
    # What a page shows right after a snippet is what it prints.
    for language, shown in _after_python((DOCS / page).read_text(encoding="utf-8")):
        if language == "text":
            assert _without_times(shown) in printed
    if page == "howto/serving.md":
        assert served[0][1]["host"] == "127.0.0.1"
