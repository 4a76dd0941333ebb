"""What the tests of the command line share: a runner, and a store with known sequences in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvembed._block import Block, BlockInfo, Layout, TensorSpec
from kvembed._keys import as_token_ids, block_key, root_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

MODEL_FINGERPRINT = b"m" * 32
_LAYOUT = Layout(tuple(TensorSpec(layer, name, 2, 8, "F32") for layer in range(2) for name in ("k", "v")))


def chain(seed: int, blocks: int, *, size: int = 16) -> list[Block]:
    """Return the blocks of one made-up sequence, first to last."""
    rng = np.random.default_rng(seed)
    parent, result = root_key(MODEL_FINGERPRINT), []
    for number in range(blocks):
        ids = as_token_ids(rng.integers(0, 1000, size))
        key = block_key(parent, ids)
        data = rng.integers(0, 255, _LAYOUT.nbytes(size), dtype=np.uint8)
        info = BlockInfo(key, parent, MODEL_FINGERPRINT, number * size, size, True, data.nbytes)
        result.append(Block(info, ids, _LAYOUT, data))
        parent = key
    return result


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Folder of a store with two sequences of 3 and 2 blocks; the second one is pinned as ``report``."""
    from kvembed import KVStore

    folder = tmp_path / "store"
    with KVStore(folder) as store:
        store.register_namespace(MODEL_FINGERPRINT, {"name": "tiny [bold]model[/bold]"})
        for block in (*chain(1, 3), *chain(2, 2)):
            store.put(block)
        store.flush()
        store.pin([block.key for block in chain(2, 2)], "report")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A tiny llama on disk, as ``from_pretrained`` wants it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run ``kvembed`` with arguments; a traceback is raised rather than hidden in the result."""
    from kvembed._cli import app

    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object, status: int = 0, **options: Any) -> Any:
        result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False, **options)
        assert result.exit_code == status, result.output
        return result

    return call


@pytest.fixture
def run_json(run: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``kvembed ... --json`` and return what it printed."""

    def call(*args: object, **options: Any) -> Any:
        return json.loads(run(*args, "--json", **options).stdout)

    return call
