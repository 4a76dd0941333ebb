"""The wheel, the kernels for every architecture, and our copies of the driver's types against its headers."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import kvembed_cuda
import native_build
import numpy as np
import pytest
from kvembed_cuda import QUANT, SEGMENT, STRIP, Code, Group, Type
from kvembed_cuda._kernels import _TABLES
from kvembed_cuda._library import DeviceRecord, IssuedRecord

from ._mock import HERE, Kit, compile_cpp

ROOT = Path(native_build.__file__).resolve().parent
pytestmark = pytest.mark.skipif(native_build.c_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel with kernels, where there is an nvcc, and one without; built as pip would, with the setuptools here."""
    if importlib.util.find_spec("setuptools") is None:  # not imported here: it replaces distutils in this process
        pytest.skip("setuptools is not installed")
    made = {}
    for name in ["plain"] + ["kernels"] * (native_build.nvcc() is not None):
        folder = tmp_path_factory.mktemp(name)
        # A copy: a build leaves files beside its sources.
        ignored = shutil.ignore_patterns("lib", "build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, folder / "sources", ignore=ignored)
        done = subprocess.run(
            [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('..'); b.build_sdist('..')"],
            cwd=folder / "sources",
            env={**os.environ, "NVCC": "none" if name == "plain" else str(native_build.nvcc())},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, done.stdout + done.stderr
        assert ("built without kernels, because NVCC is none" in done.stderr) == (name == "plain")
        (made[name],) = folder.glob("*.whl")
    return made


def test_a_wheel_without_nvcc(wheels: dict[str, Path], tmp_path: Path) -> None:
    wheel = wheels["plain"]
    version = kvembed_cuda.__version__
    assert re.fullmatch(rf"kvembed_cuda-{re.escape(version)}-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path)
    assert f"kvembed_cuda/lib/{native_build.LIBRARY}" in names
    assert f"kvembed_cuda/lib/{native_build.KERNELS}" not in names
    assert "kvembed_cuda/py.typed" in names
    assert not [name for name in names if name.endswith((".c", ".cu", ".h"))]
    # As it is used: on this machine, without torch and without the sources.
    code = (
        "import sys, kvembed_cuda as k; s = k.status(driver=__import__('pathlib').Path('/nowhere/libcuda.so.1'));"
        "print(s.usable, s.reason, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("False no usable CUDA driver: /nowhere/libcuda.so.1")
    assert done.stdout.split()[-1] == "False"


def test_a_wheel_with_kernels(wheels: dict[str, Path]) -> None:
    """Machine code for every architecture, and PTX for those to come."""
    if "kernels" not in wheels:
        pytest.skip("no nvcc")
    with zipfile.ZipFile(wheels["kernels"]) as file:
        found = native_build.fatbin_contents(file.read(f"kvembed_cuda/lib/{native_build.KERNELS}"))
    known = native_build._known_architectures(str(native_build.nvcc()))  # before 12.8 not all
    asked = {("cubin", a) for a in (75, 80, 86, 89, 90, 100, 120)} | {("ptx", 75), ("ptx", 120)}
    assert found == {(kind, a) for kind, a in asked if a in known}


def test_the_kernels_compile_without_a_warning(tmp_path: Path) -> None:
    if native_build.nvcc() is None:
        pytest.skip("no nvcc")
    made = native_build.build_kernels(tmp_path, architectures=native_build.ARCHITECTURES[:1], ptx=(), strict=True)
    assert made is not None
    assert native_build.fatbin_contents(made.read_bytes()) == {("cubin", 75)}


def test_an_nvcc_that_knows_other_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "true")
    with pytest.raises(RuntimeError, match="knows none of the architectures"):
        native_build.build_kernels(tmp_path)


def test_what_is_no_fat_binary_is_refused() -> None:
    for data in (b"", b"x" * 64):
        with pytest.raises(RuntimeError, match="not a fat binary"):
            native_build.fatbin_contents(data)


def test_the_sources_are_in_the_sdist(wheels: dict[str, Path]) -> None:
    (sdist,) = wheels["plain"].parent.glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", str(sdist)], capture_output=True, text=True, check=True).stdout
    for path in [*ROOT.joinpath("native").iterdir(), ROOT / "native_build.py", ROOT / "LICENSE"]:
        assert f"/{path.relative_to(ROOT)}\n" in listed


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(RuntimeError, match="false .*driver.c.* failed"):
        native_build.build_library(tmp_path)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="needs a C compiler to be built"):
        native_build.build_library(tmp_path)


def test_the_library_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("neither gcc nor clang")
    sources = [str(path) for path in native_build.NATIVE.glob("*.c")]
    flags = [
        "-std=c11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Wshadow",
        "-Wstrict-prototypes",
        "-Werror",
        "-fsyntax-only",
    ]
    subprocess.run([compiler, *flags, *sources], check=True, cwd=tmp_path)


def test_only_what_is_meant_is_exported(kit: Kit) -> None:
    """And what a library that is loaded beside torch must not bring: the CUDA runtime, or a C++ library."""
    if shutil.which("nm") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs nm, on Linux")
    library = str(kit.library)
    out = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in out.splitlines()}
    declared = set(re.findall(r"KVC_API \w+ (\w+)\(", (native_build.NATIVE / "kvcuda.h").read_text()))
    assert exported - {"_init", "_fini"} == declared
    needed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r"\bcu[A-Z]|\bcuda|_Z", needed)


def test_layouts_are_those_of_cudas_headers(tmp_path: Path) -> None:
    compiler = native_build.nvcc()
    places = [Path("/usr/local/cuda/include"), *([Path(compiler).resolve().parents[1] / "include"] if compiler else [])]
    place = next((place for place in places if (place / "cudaTypedefs.h").is_file()), None)
    if place is None:
        pytest.skip("no CUDA headers")
    compile_cpp(HERE / "layouts.cpp", tmp_path / "layouts", f"-isystem{place}", "-fsyntax-only")


def test_python_has_the_layouts_of_the_library(tmp_path: Path) -> None:
    """Offsets, sizes and numbers, printed by a program that includes the headers."""
    structs = {
        "kvc_strip": STRIP,
        "KvSegment": SEGMENT,
        "KvQuant": QUANT,
        "kvc_issued": IssuedRecord,
        "kvc_device_info": DeviceRecord,
    }
    lines, want = [], []
    for name, layout in structs.items():
        if isinstance(layout, np.dtype):
            fields = {field: layout.fields[field][1] for field in layout.names}  # type: ignore[index,union-attr]
            size = layout.itemsize
        else:
            fields = {field[0]: getattr(layout, field[0]).offset for field in layout._fields_}
            size = ctypes.sizeof(layout)
        lines.append(f"n(sizeof({name}));")
        want.append(size)
        for field, offset in fields.items():
            lines.append(f"n(offsetof({name}, {field}));")
            want.append(offset)
    for name, value in {
        "sizeof(KvSegments)": _TABLES[SEGMENT.itemsize].itemsize,
        "sizeof(KvQuants)": _TABLES[QUANT.itemsize].itemsize,
        "offsetof(KvSegments, items)": 8,
        "KV_F32": Type.FLOAT32,
        "KV_F16": Type.FLOAT16,
        "KV_BF16": Type.BFLOAT16,
        "KV_INT8": Code.INT8,
        "KV_FP8_E4M3": Code.FP8_E4M3,
        "KV_BY_TOKEN": Group.TOKEN,
        "KV_BY_CHANNEL": Group.CHANNEL,
        "KV_UNSCALED": Group.NONE,
    }.items():
        lines.append(f"n({name});")
        want.append(int(value))
    source = tmp_path / "print.cpp"
    source.write_text(
        '#include <cstddef>\n#include <cstdio>\n#include "kv_math.h"\n#include "kvcuda.h"\n'
        'static void n(size_t x) { printf("%zu\\n", x); }\n'
        f"int main() {{ {' '.join(lines)} }}\n"
    )
    program = compile_cpp(source, tmp_path / "print")
    out = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert [int(line) for line in out.split()] == want


def test_public_names() -> None:
    assert kvembed_cuda.__all__ == sorted(kvembed_cuda.__all__)
    for name in kvembed_cuda.__all__:
        assert getattr(kvembed_cuda, name) is not None
