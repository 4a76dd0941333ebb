"""The oldest transformers: the same everywhere it is written, and a clear error with an older one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvembed import CachedModel, ConfigError, KVEmbedError, KVStore
from kvembed.hf import _compat

if TYPE_CHECKING:
    from .conftest import ModelFactory

_REPO = Path(__file__).resolve().parent.parent
_OLDEST, _UNTRIED = (".".join(map(str, version)) for version in (_compat.OLDEST, _compat.UNTRIED))


def test_pyproject_names_the_same_oldest_version() -> None:
    found = re.search(r'"transformers>=([\d.]+),<([\d.]+)"', (_REPO / "pyproject.toml").read_text(encoding="utf-8"))
    assert found is not None
    assert found[1] == _OLDEST
    assert found[2] == _UNTRIED


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.18.0", "5.18.0.dev0"])
def test_wrapping_with_an_older_version_says_what_to_install(
    version: str, tiny_llama: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "_installed", lambda: version)
    message = re.escape(f"{version} is installed: pip install 'transformers>={_OLDEST},<{_UNTRIED}'")
    with KVStore(tmp_path / "store") as store, pytest.raises(ConfigError, match=message) as error:
        CachedModel(tiny_llama(), store=store)
    assert isinstance(error.value, KVEmbedError)
    # Before anything is looked for.
    with pytest.raises(ConfigError, match=message):
        CachedModel.from_pretrained(tmp_path / "no-such-model")


@pytest.mark.parametrize("version", [f"{_OLDEST}.0", f"{_OLDEST}.0.dev0", "5.100.1", "6.0.0rc1"])
def test_the_oldest_version_and_later_ones_are_not_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "_installed", lambda: version)
    _compat.check_version()


def test_a_version_without_our_base_classes_can_be_imported() -> None:
    code = (
        "import transformers, torch\n"
        "from transformers import cache_utils\n"
        "transformers.__version__ = '4.50.0'\n"
        "for name in [n for n in vars(cache_utils) if n.endswith('Layer')]:\n"
        "    delattr(cache_utils, name)\n"
        "from kvembed import CachedModel, ConfigError, KVEmbedError, attach\n"
        "model = torch.nn.Module()\n"
        "model.generate = model.config = None\n"
        "try:\n"
        "    CachedModel(model)\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "4.50.0 is installed: pip install" in done.stdout


def test_every_layer_class_is_one_also_where_this_version_lacks_it() -> None:
    for name in [name for name in _compat.__all__ if name.endswith("Layer")]:
        layer_class = getattr(_compat, name)
        assert isinstance(layer_class, type)
        assert layer_class.__name__ == name
