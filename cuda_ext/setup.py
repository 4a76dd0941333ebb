"""Builds the C library, and the kernels where nvcc is found, into the wheel."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

import native_build


class BinaryDistribution(Distribution):
    """Has a library of its own, so that the wheel is of one platform."""

    def has_ext_modules(self) -> bool:
        return True


class BuildPy(build_py):
    """Compiles after the Python files are in place."""

    def run(self) -> None:
        super().run()
        # An editable install is used where it lies, so that is where the library has to be.
        package = Path("kvembed_cuda") if self.editable_mode else Path(self.build_lib) / "kvembed_cuda"
        native_build.build_library(package / native_build.FOLDER)
        kernels = native_build.build_kernels(package / native_build.FOLDER)
        if kernels is None:
            print(f"kvembed-cuda: built without kernels, because {native_build.why_no_kernels()}.", file=sys.stderr)
            print("kvembed-cuda: copies and events work; quantising while offloading needs kernels.", file=sys.stderr)


class BdistWheel(bdist_wheel):
    """ctypes loads the library, so any Python will do: only the platform matters."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(distclass=BinaryDistribution, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
