"""Outlines on an attached model: constrained texts are those without the cache, and the second call hits."""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvembed import CachedModel

outlines = pytest.importorskip("outlines")

# Of torch's compiler, when outlines imports its kernels.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")


class Ship(BaseModel):
    kind: Literal["barge", "ferry"]
    masts: Literal[1, 2, 3]


TEXT = "A lighthouse stands at the end of the pier, and its keeper counts the ships. "
REGEX = r"[0-9]{2} (ships|boats)"
TYPES: dict[str, Any] = {"choice": Literal["one", "two", "many"], "regex": outlines.regex(REGEX), "json": Ship}


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    # Outlines compiles the kernel that applies a mask: half a minute, and a C++ compiler.
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def pair(cached: CachedModel, tiny_llama: Any, tiny_tokenizer: Any) -> list[Any]:
    """Outlines' model without a cache, and with one."""
    # A copy, because it changes the tokenizer; without a template, which it would put around every text.
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return [outlines.from_transformers(model, tokenizer) for model in (tiny_llama(), cached.hf_model)]


@pytest.mark.parametrize("kind", TYPES)
def test_constrained_texts(pair: list[Any], cached: CachedModel, kind: str) -> None:
    plain, ours = pair
    options = {"max_new_tokens": 60, "do_sample": False}
    expected = plain(TEXT, TYPES[kind], **options)
    free = plain(TEXT, **options)
    for i in range(2):
        assert ours(TEXT, TYPES[kind], **options) == expected
        assert cached.usage.bypass_reason is None
        assert cached.usage.cached_tokens == i * (cached.usage.prompt_tokens - 1)
    # The constraint is not part of what is cached: without it, the same prompt goes on freely.
    assert ours(TEXT, **options) == free != expected
    assert cached.usage.cached_tokens == cached.usage.prompt_tokens - 1
    if kind == "choice":
        assert expected in ("one", "two", "many")
    elif kind == "regex":
        assert re.fullmatch(REGEX, expected)
    else:
        assert Ship.model_validate(json.loads(expected)).masts in (1, 2, 3)


def test_a_batch_and_a_seeded_sample(pair: list[Any], cached: CachedModel) -> None:
    plain, ours = pair
    texts = [TEXT, TEXT + "Some come at night."]
    options = {"max_new_tokens": 20, "do_sample": False}
    assert ours.batch(texts, TYPES["regex"], **options) == plain.batch(texts, TYPES["regex"], **options)
    assert cached.usage.bypass_reason is None
    samples = []
    for model in (plain, ours):
        torch.manual_seed(5)
        samples.append([model(TEXT, TYPES["regex"], max_new_tokens=20, do_sample=True) for _ in range(3)])
    assert samples[0] == samples[1]
    assert len(set(samples[1])) > 1
    assert cached.usage.cached_tokens == cached.usage.prompt_tokens - 1
