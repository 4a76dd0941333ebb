"""Build wheel and sdist into ``dist/``, look into them, and install the wheel with each extra, and with none.

An environment has exactly what pip would install: the packages that the wheel's metadata asks for, and theirs in turn,
linked from the environment this runs in. So it needs no network, and seconds in place of gigabytes. It needs symbolic
links, which Windows gives to administrators only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
IN_SDIST = ("pyproject.toml", "constraints.txt", "Makefile", "README.md", "CHANGELOG.md", "LICENSE", ".ci/run")
IN_SDIST += ("tests/conftest.py", "docs/tutorial.md", "tools/mkdocs.yml", "benchmarks/ttft.py")
UNWANTED = ("__pycache__", ".pyc", ".cache/", ".venv/", ".git/", "site/")


class Check(NamedTuple):
    """What somebody does, and what an environment with and without the extra answers.

    Args:
        extra: That it needs.
        command: Arguments of Python.
        says: Part of what it prints when the extra is missing; with the extra the command ends with status 0.
    """

    extra: str
    command: tuple[str, ...]
    says: str


def _code(*lines: str) -> tuple[str, ...]:
    return ("-c", "\n".join(lines))


CHECKS = (
    Check("chat", ("-m", "kvembed_chat", "--version"), "pip install 'kvembed[chat]'"),
    Check(
        "encryption",
        _code("import kvembed", "kvembed.KVStore('s', key=bytes(range(32))).close()"),
        "kvembed[encryption]",
    ),
    Check("gguf", _code("from kvembed._loading.convert import require_gguf", "require_gguf('it')"), "kvembed[gguf]"),
    Check(
        "documents",
        _code(
            "from pathlib import Path",
            "from kvembed._documents.reading import read_document",
            "Path('a.html').write_text('<p>A word.</p>')",
            "read_document(Path('a.html'))",
        ),
        "kvembed[documents]",
    ),
    Check(
        "notebook",
        _code("import kvembed", "from kvembed import plots", "plots.growth(kvembed.KVStore('s'))"),
        "kvembed[notebook]",
    ),
    Check("lm-eval", ("-c", "import kvembed.lm_eval"), "pip install 'kvembed[lm-eval]'"),
)


def build(out: Path) -> tuple[Path, Path]:
    """Build the sdist, and from it the wheel; return (wheel, sdist)."""
    for old in out.glob("kvembed-*"):
        old.unlink()
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)])
    (wheel,), (sdist,) = out.glob("kvembed-*.whl"), out.glob("kvembed-*.tar.gz")
    _run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)])
    return wheel, sdist


def look_into(wheel: Path, sdist: Path) -> None:
    """Check what the two hold.

    Raises:
        SystemExit: Something is missing, or should not be there.
    """
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    wanted = {
        path.relative_to(ROOT / top).as_posix()
        for top, package in ((".", "kvembed"), ("apps", "kvembed_chat"))
        for path in (ROOT / top / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = [*(set(IN_SDIST) - source), *(wanted - installed)]
    extra = [name for name in (*source, *installed) if any(part in name for part in UNWANTED)]
    strange = [name for name in installed if not name.startswith(("kvembed/", "kvembed_chat/", "kvembed-"))]
    if missing or extra or strange:
        raise SystemExit(f"missing: {missing}; not to be packed: {extra}; outside the packages: {strange}")
    print(f"{sdist.name}: {len(source)} entries; {wheel.name}: {len(installed)} files")


def requirements(wheel: Path, extra: str) -> set[str]:
    """Return the distributions that pip would install with the wheel and one extra (``""``: none).

    Raises:
        SystemExit: One of them is not in this environment.
    """
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = importlib.metadata.PathDistribution(zipfile.Path(archive, name.rpartition("/")[0] + "/"))
        todo = [(line, extra) for line in metadata.requires or []]
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while todo:
        line, asked = todo.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": asked}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for further in ("", *requirement.extras):
            if (name, further) in seen:
                continue
            seen.add((name, further))
            try:
                todo += [(line, further) for line in importlib.metadata.requires(name) or []]
            except importlib.metadata.PackageNotFoundError:
                raise SystemExit(f"the extra {extra!r} needs {name}, which is not installed here") from None
    return found


def make_environment(folder: Path, distributions: set[str], wheel: Path) -> Path:
    """Make an environment with these distributions and the wheel; return its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in distribution.files or [] if not str(file).startswith("..")}:
            there = Path(str(distribution.locate_file(top)))
            if top != "__pycache__" and there.exists() and not (site / top).exists():
                (site / top).symlink_to(there)
    # Unpacked by pip itself, from the wheel alone.
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            str(wheel),
        ]
    )
    return python


def try_out(python: Path, extra: str, folder: Path) -> None:
    """Run what needs this extra, or all that needs one when there is none.

    Raises:
        SystemExit: Something else happened than should.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "KVEMBED_KEY")}
    environment |= {"KVEMBED_HOME": str(folder), "HF_HUB_OFFLINE": "1"}

    def run(command: tuple[str, ...]) -> tuple[int, str]:
        done = subprocess.run([str(python), *command], env=environment, cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    _expect(run(("-m", "kvembed", "--version")), 0, "kvembed 0")
    for check in CHECKS:
        if not extra:
            _expect(run(check.command), 1, check.says)
        elif check.extra == extra:
            _expect(run(check.command), 0, "")
    if not extra:
        # The commands themselves, as pip wrote them.
        for script, code, says in (("kvembed", 0, "kvembed 0"), ("kvembed-chat", 1, CHECKS[0].says)):
            _expect(run((str(python.parent / script), "--version")), code, says)
        _expect(run(_code("import sys, kvembed", "assert not {'torch', 'transformers'} & set(sys.modules)")), 0, "")


def _expect(result: tuple[int, str], code: int, text: str) -> None:
    if result[0] != code or text not in result[1]:
        raise SystemExit(f"ended with {result[0]} and not {code}, or does not say {text!r}:\n{result[1][-2000:]}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def main() -> None:
    """Read the command line, and do all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where to put the two files (default: dist)")
    parser.add_argument("--extras", nargs="*", help="only these; by default each, and none")
    args = parser.parse_args()
    wheel, sdist = build(args.out)
    look_into(wheel, sdist)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    extras = ["", *(line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra: "))]
    for extra in extras if args.extras is None else args.extras:
        needed = requirements(wheel, extra)
        with tempfile.TemporaryDirectory(prefix="kvembed-package-") as folder:
            python = make_environment(Path(folder) / "env", needed, wheel)
            try_out(python, extra, Path(folder))
        print(f"{f'kvembed[{extra}]' if extra else 'kvembed'}: {len(needed)} packages, as it should be")


if __name__ == "__main__":
    main()
