"""Build the documentation site: ``python tools/build_docs.py`` writes it to ``site/``; a warning is an error.

It is built in a copy, because zensical keeps its cache in ``.cache`` beside its settings and deletes that folder for a
clean build: here it holds the models. Nothing is fetched, neither now nor when a page is read, which is checked.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["build", "figures", "main"]

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_PEERS = {
    "recipe": "transformers, the recipe of its documentation",
    "llama.cpp": "llama.cpp, state file",
}
_FIGURES = re.compile(r"<!-- figures: (\w+) -->")
_LOADED = re.compile(
    rb"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?https?://"
)
_NO_LINKS = re.compile(rb"<link rel=[\"']?(?:canonical|alternate|next|prev)\b[^>]*>")


def figures(name: str) -> str:
    """Return a benchmark's results as a table and a line about the machine."""
    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    if name == "peers":
        head = ["", "cold", "warm", "after a restart"]
        keys = ("cold s", "warm s", "after restart s")
        rows = [[_PEERS.get(row[""], row[""]), *(f"{row[key]:.2f} s" for key in keys)] for row in results["rows"]]
    else:
        head = ["document", "cold", "live", "cpu", "disk", "disk, in a new process", "transformers, cache kept by hand"]
        keys = ("live ms", "cpu ms", "disk ms", "new process ms", "plain bare forward ms")
        rows = [
            [
                f"{row['document tokens']:,} tokens",
                f"{row['cold s']:.1f} s",
                *(f"{row[key] / 1000:.2f} s" for key in keys),
            ]
            for row in results["rows"]
        ]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", f"{results['hardware']}. Medians."])


def build(out: Path) -> None:
    """Build the site into a folder, replacing what is there.

    Raises:
        SystemExit: zensical warned, or a page would load something from another host.
    """
    with tempfile.TemporaryDirectory(prefix="kvembed-docs-") as folder:
        work = Path(folder)
        no_caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "docs", work / "docs", ignore=no_caches)
        shutil.copytree(ROOT / "kvembed", work / "kvembed", ignore=no_caches)
        shutil.copy(ROOT / "tools" / "mkdocs.yml", work)
        for source, page in ROOT_PAGES.items():
            text = (ROOT / source).read_text(encoding="utf-8")
            # Links of a file of the root are relative to it.
            (work / "docs" / page).write_text(text.replace("](docs/", "]("), encoding="utf-8")
        for path in (work / "docs").glob("**/*.md"):
            text = path.read_text(encoding="utf-8")
            path.write_text(_FIGURES.sub(lambda match: figures(match[1]), text), encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
        done = subprocess.run(command, cwd=work, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        loading = [
            str(page.relative_to(work))
            for page in (work / "site").glob("**/*.html")
            if _LOADED.search(_NO_LINKS.sub(b"", page.read_bytes()))
        ]
        if loading:
            raise SystemExit(f"these pages load something from another host: {', '.join(loading)}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(work / "site", out)


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the pages (default: site)")
    out = parser.parse_args().out
    build(out)
    print(f"{out / 'index.html'}")


if __name__ == "__main__":
    main()
