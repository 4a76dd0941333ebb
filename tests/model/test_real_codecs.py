"""What the codecs cost real models on real text, held to what the documentation says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvembed import CachedModel, KVStore
from kvembed._codecs.measure import measure_codecs
from kvembed._keys import as_token_ids

from ._lab import cut_texts

if TYPE_CHECKING:
    from pathlib import Path


def measured(folder: Path) -> dict[str, Any]:
    with KVStore(max_disk_bytes=None, max_cpu_bytes="64MiB") as store:
        model = CachedModel.from_pretrained(str(folder), store=store, dtype="float32", progress=False)
        (ids,) = cut_texts(model.tokenizer, [320])
        figures = measure_codecs(
            model._engine, as_token_ids(ids[0].numpy()), ("lossless", "bf16", "int8", "fp8"), predicted=64
        )
        model.close()
    return {f.codec: f for f in figures}


def hold(found: dict[str, Any]) -> None:
    assert found["lossless"].kl_mean < 1e-9
    assert found["bf16"].kl_mean < 1e-4
    assert found["int8"].kl_mean < 1e-3
    assert found["fp8"].kl_mean < 1e-2
    assert found["int8"].top1 > 0.95
    assert found["int8"].ratio > 3.8


@pytest.mark.model
def test_smollm2(smollm2: Path) -> None:
    hold(measured(smollm2))


@pytest.mark.model
@pytest.mark.slow
def test_gemma3(gemma3_270m: Path) -> None:
    hold(measured(gemma3_270m))
