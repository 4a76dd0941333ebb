"""Vision models: text is served, also after a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed import CachedModel, KVStore

from .zoo import build

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 16


def _generate(model: Any, ids: torch.Tensor) -> list[int]:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[0].tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_text_after_a_picture(name: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 250, (1, 3 * BLOCK + 4), generator=torch.Generator().manual_seed(0))
    expected = _generate(build(name), ids)
    model = build(name)
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, store=store, block_size=BLOCK, progress=False)
        for _ in range(2):
            # What generating with an image leaves behind: later positions would be off by this.
            model.model.rope_deltas = torch.tensor([[-7]])
            assert _generate(cached, ids) == expected
        assert cached.usage.cached_tokens == 3 * BLOCK + 3
        cached.close()
