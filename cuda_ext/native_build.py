"""Compiles what kvembed-cuda has in C and CUDA; setup.py and the tests call it.

Environment: ``CC`` names the C compiler, ``NVCC`` the CUDA compiler (``NVCC=none`` builds without kernels).
"""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

__all__ = [
    "ARCHITECTURES",
    "FOLDER",
    "KERNELS",
    "LIBRARY",
    "NATIVE",
    "PTX",
    "build_kernels",
    "build_library",
    "c_compiler",
    "fatbin_contents",
    "nvcc",
    "why_no_kernels",
]

NATIVE = Path(__file__).resolve().parent / "native"
FOLDER = "lib"
"""Folder inside the package that the results go to."""
LIBRARY = "kvcuda.dll" if sys.platform == "win32" else "libkvcuda.so"
KERNELS = "kernels.fatbin"

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""With machine code, where nvcc knows them: 12.8 and later know all. Code for 8.0 runs on 8.7 too, for 10.0 on 10.3,
for 12.0 on 12.1."""
PTX = (75, 120)
"""With PTX, which drivers compile for what is not in the list."""

_SOURCES = ("driver.c", "copies.c", "objects.c")


def c_compiler() -> list[str] | None:
    """Return the command of a C compiler, or None."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    names = ("cl",) if sys.platform == "win32" else ("cc", "gcc", "clang")
    found = next((path for name in names if (path := shutil.which(name))), None)
    return [found] if found else None


def nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    named = os.environ.get("NVCC")
    if named:
        return None if named == "none" else named
    usual = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda", "bin", "nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def why_no_kernels() -> str:
    """Return why `build_kernels` builds none."""
    return "NVCC is none" if os.environ.get("NVCC") == "none" else "no nvcc was found"


def build_library(folder: Path) -> Path:
    """Compile the C library into ``folder``.

    Raises:
        RuntimeError: There is no C compiler, or it failed.
    """
    compiler = c_compiler()
    if compiler is None:
        raise RuntimeError("kvembed-cuda needs a C compiler to be built: install gcc or clang, or set CC")
    target = folder / LIBRARY
    sources = [str(NATIVE / name) for name in _SOURCES]
    if Path(compiler[0]).stem.lower() == "cl":
        command = [*compiler, "/nologo", "/O2", "/LD", "/W3", *sources, f"/Fe:{target}", f"/Fo{folder}{os.sep}"]
    else:
        flags = ["-O2", "-std=c11", "-Wall", "-Wextra", "-fvisibility=hidden", "-shared"]
        libraries = [] if sys.platform == "win32" else ["-fPIC", "-ldl", "-lpthread"]
        command = [*compiler, *flags, *sources, "-o", str(target), *libraries]
    _run(command, folder)
    return target


def build_kernels(
    folder: Path,
    architectures: tuple[int, ...] = ARCHITECTURES,
    ptx: tuple[int, ...] = PTX,
    *,
    strict: bool = False,
) -> Path | None:
    """Compile the kernels into one fat binary in ``folder``; None where there is no nvcc.

    Args:
        folder: Where it goes.
        architectures: To make machine code for, as far as this nvcc knows them.
        ptx: To make PTX for, likewise.
        strict: Take warnings for errors.

    Raises:
        RuntimeError: nvcc failed, or what it made is not what was asked for.
    """
    compiler = nvcc()
    if compiler is None:
        return None
    known = _known_architectures(compiler)
    architectures = tuple(a for a in architectures if a in known)
    ptx = tuple(a for a in ptx if a in known)
    target = folder / KERNELS
    code = [f"arch=compute_{a},code=sm_{a}" for a in architectures] + [
        f"arch=compute_{a},code=compute_{a}" for a in ptx
    ]
    # Without --fmad=false a product and a sum may be rounded once, and the host's bits would be others.
    flags = ["-fatbin", "-O3", "-std=c++17", "--fmad=false", "--threads", "2"]
    flags += ["-Werror", "all-warnings"] * strict
    gencode = [word for one in code for word in ("-gencode", one)]
    _run([compiler, *flags, *gencode, str(NATIVE / "kernels.cu"), "-o", str(target)], folder)
    made = fatbin_contents(target.read_bytes())
    if made != {("cubin", a) for a in architectures} | {("ptx", a) for a in ptx}:
        raise RuntimeError(f"{target} holds {sorted(made)}, which is not what nvcc was asked for")
    return target


def _known_architectures(compiler: str) -> set[int]:
    done = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, errors="replace", check=False)
    known = {int(line[3:]) for line in done.stdout.split() if line.startswith("sm_") and line[3:].isdigit()}
    if not known & set(ARCHITECTURES):
        raise RuntimeError(f"{compiler} knows none of the architectures {ARCHITECTURES}; set NVCC to another, or none")
    return known


def fatbin_contents(data: bytes) -> set[tuple[str, int]]:
    """Return what a fat binary holds: ``("cubin", 90)``, ``("ptx", 75)`` and so on.

    Raises:
        RuntimeError: It is none.
    """
    if len(data) < 16 or struct.unpack_from("<I", data)[0] != 0xBA55ED50:
        raise RuntimeError("this is not a fat binary")
    _, _, header, size = struct.unpack_from("<IHHQ", data)
    found, at = set(), header
    while at < header + size:
        kind, _, length, padded = struct.unpack_from("<HHIQ", data, at)
        (architecture,) = struct.unpack_from("<I", data, at + 28)
        found.add(({1: "ptx", 2: "cubin"}.get(kind, f"kind {kind}"), architecture))
        at += length + padded
    return found


def _run(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
