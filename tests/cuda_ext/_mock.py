"""What the tests of the CUDA extension are made with: its library, and a driver without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import native_build
import pytest
from kvembed_cuda import Driver

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Kit", "MockDriver", "build_kit", "compile_cpp"]

_CALLBACK = ctypes.CFUNCTYPE(None)
HERE = Path(__file__).resolve().parent / "native"


def compile_cpp(source: Path, target: Path, *flags: str) -> Path:
    """Compile a C++ source of the tests."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", f"-I{native_build.NATIVE}", *flags]
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert not done.stderr, done.stderr  # warnings
    return target


class Kit:
    """Paths of the library and of the mock driver."""

    def __init__(self, library: Path, mock: Path) -> None:
        self.library = library
        self.mock = mock
        self.functions: Any = ctypes.CDLL(str(mock))
        self.functions.mock_seed.argtypes = [ctypes.c_uint64]
        self.functions.mock_reset.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
        self.functions.mock_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long]
        self.functions.mock_calls.argtypes = [ctypes.c_char_p]
        self.functions.mock_calls.restype = ctypes.c_long
        self.functions.mock_run.restype = ctypes.c_long
        self.functions.mock_pending.restype = ctypes.c_long
        self.functions.mock_alive.restype = ctypes.c_long
        self.functions.mock_registered.restype = ctypes.c_uint64
        self.functions.mock_call.argtypes = [ctypes.c_int, ctypes.c_void_p, _CALLBACK]
        self.functions.mock_compute.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            *[ctypes.c_uint64] * 4,
            ctypes.c_int,
        ]

    def open(self, version: int = 13000, devices: int = 1, seed: int = 0) -> MockDriver:
        """Return a `Driver` on a fresh mock."""
        self.functions.mock_reset(version, devices, seed)
        return MockDriver(self)


def build_kit(folder: Path) -> Kit:
    """Compile both; skips where there is no compiler."""
    if native_build.c_compiler() is None:
        pytest.skip("no C compiler")
    mock = compile_cpp(
        HERE / "mock_cuda.cpp", folder / "libmockcuda.so", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"
    )
    return Kit(native_build.build_library(folder), mock)


class MockDriver(Driver):
    """A `Driver` whose GPU is host memory and seldom in a hurry."""

    def __init__(self, kit: Kit) -> None:
        self.mock: Any = kit.functions
        self._callbacks: list[Any] = []
        super().__init__(kit.library, kit.mock)

    def seed(self, seed: int) -> None:
        """Take another schedule from here on."""
        self.mock.mock_seed(seed)

    def fail(self, function: str, code: int, after: int = 0) -> None:
        """Have a function fail once, after so many calls that do not."""
        self.mock.mock_fail(function.encode(), code, after)

    def lose(self, code: int = 719) -> None:
        """Have every call fail from now on."""
        self.mock.mock_lose(code)

    def calls(self, function: str) -> int:
        """Return how often a function of the driver was called."""
        return self.mock.mock_calls(function.encode())

    def run(self) -> int:
        """Run all that can; returns how much is left."""
        return self.mock.mock_run()

    @property
    def pending(self) -> int:
        """How much is queued."""
        return self.mock.mock_pending()

    @property
    def violations(self) -> list[str]:
        """What was done that a real driver would not forgive."""
        text = ctypes.create_string_buffer(4096)
        self.mock.mock_violations(text, ctypes.c_size_t(len(text)))
        return text.value.decode().splitlines()

    def queue(self, stream: int, function: Callable[[], object], device: int = 0) -> None:
        """Queue a function, as a kernel would be."""
        callback = _CALLBACK(function)
        self._callbacks.append(callback)
        assert not self.mock.mock_call(device, stream, callback)

    def compute(self, stream: int, dst: int, src: int, nbytes: int, key: int, device: int = 0, piece: int = 64) -> None:
        """Queue ``dst[i] = src[i] ^ key``, which stands for a kernel of somebody's."""
        assert not self.mock.mock_compute(device, stream, dst, src, nbytes, piece, key)
