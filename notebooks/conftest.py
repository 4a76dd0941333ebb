"""Where the notebooks run: with the models of the tests, and a home of their own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

_CACHE = Path(os.environ.get("KVEMBED_TEST_CACHE", Path(__file__).resolve().parent.parent / ".cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.model)
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item):  # a notebook has no fixtures
    if item.path.suffix != ".ipynb":
        yield
        return
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVEMBED_MODELS_DIR", str(_CACHE / "models"))
        patch.setenv("KVEMBED_HOME", home)
        patch.setenv("KVEMBED_CACHE_DIR", str(Path(home) / "cache"))
        patch.setenv("TMPDIR", home)
        patch.setenv("IPYTHONDIR", str(Path(home) / "ipython"))
        patch.setenv("MPLCONFIGDIR", str(Path(home) / "matplotlib"))
        yield
