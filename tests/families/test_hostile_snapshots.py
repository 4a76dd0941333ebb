"""Snapshots that were damaged, cut or exchanged: a miss and one warning, never other text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import CachedModel, KVStore, StoreWarning
from kvembed._blockfile import EncodedBlock, read_block
from kvembed._keys import SNAPSHOT_IDS

from .zoo import build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK = 16
PROMPT = torch.randint(0, 250, (1, 3 * BLOCK + 5), generator=torch.Generator().manual_seed(4))


def _generate(model: Any) -> list[int]:
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=6, do_sample=False)[0].tolist()


def _snapshots(folder: Path) -> list[Path]:
    paths = sorted((folder / "blocks").glob("*/*.safetensors"))
    return [path for path in paths if np.array_equal(read_block(path).token_ids, SNAPSHOT_IDS)]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-200] ^= 0xFF
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "falcon_h1", "deepseek_v4"])
@pytest.mark.parametrize("damage", [_flip, _cut, _empty, _remove], ids=lambda f: f.__name__)
def test_a_damaged_snapshot_is_a_miss(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    model = build(name)
    expected = _generate(model)
    folder = tmp_path / "store"
    with KVStore(folder) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        assert _generate(cached) == expected
        cached.close()
    found = _snapshots(folder)
    assert len(found) >= 2
    for path in found:
        damage(path)
    with KVStore(folder, max_cpu_bytes=None) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False, max_live=0)
        if damage is _remove:
            assert _generate(cached) == expected
        else:
            with pytest.warns(StoreWarning):
                assert _generate(cached) == expected
        assert cached.usage.cached_tokens == 0
        # It is stored again, and serves.
        store.flush()
        assert _generate(cached) == expected
        assert cached.usage.cached_tokens == PROMPT.shape[1] - 1
        cached.close()


def test_a_snapshot_of_another_shape_is_a_miss(tmp_path: Path) -> None:
    # Sound files, but not what this model makes: as if somebody had written them by hand.
    model, other = build("qwen3_next"), build("mamba2")
    expected = _generate(model)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, which in zip(folders, (model, other), strict=True):
        with KVStore(folder) as store:
            cached = CachedModel(which, store=store, block_size=BLOCK, progress=False)
            _generate(cached)
            cached.close()
    foreign = read_block(_snapshots(folders[1])[0])
    for path in _snapshots(folders[0]):
        own = read_block(path)
        info = type(own.info)(
            own.info.key, own.info.parent, own.info.namespace, own.info.start, 1, own.info.exact, foreign.data.nbytes
        )
        path.unlink()
        EncodedBlock(type(own)(info, own.token_ids, foreign.layout, foreign.data), "test").write(path)
    with KVStore(folders[0], max_cpu_bytes=None) as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False, max_live=0)
        with pytest.warns(StoreWarning):
            assert _generate(cached) == expected
        assert cached.usage.cached_tokens == 0
        cached.close()
