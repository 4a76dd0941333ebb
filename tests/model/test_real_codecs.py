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

ALL_THREADS = True


def measured(folder: Path, dtype: str) -> dict[str, Any]:
    with KVStore(max_disk_bytes=None, max_cpu_bytes="64MiB") as store:
        model = CachedModel.from_pretrained(str(folder), store=store, dtype=dtype, progress=False)
        (ids,) = cut_texts(model.tokenizer, [640])
        figures = measure_codecs(model._engine, as_token_ids(ids[0].numpy()), predicted=128)
        model.close()
    return {f.codec: f for f in figures}


@pytest.mark.model
def test_smollm2_in_float32(smollm2: Path) -> None:
    found = measured(smollm2, "float32")
    assert found["lossless"].kl_mean < 1e-9
    assert found["bf16"].kl_mean < 1e-4
    assert found["int8"].kl_mean < 1e-3
    assert found["fp8"].kl_mean < 1e-2
    assert found["int8"].top1 > 0.95
    assert found["int8"].ratio > 3.8


@pytest.mark.model
def test_gemma3_in_bfloat16_is_as_far_from_lossless_as_from_itself(gemma3_270m: Path) -> None:
    found = measured(gemma3_270m, "bfloat16")
    assert found["bf16"].kl_max == 0
    for codec in ("k16v8", "int8"):
        assert found[codec].kl_mean < 2 * found["lossless"].kl_mean
    assert found["fp8"].kl_mean < 1e-2
    assert found["int8"].ratio > 1.9
