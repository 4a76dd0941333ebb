"""Texts that are longer than the context: cut where people would cut them, and asked part by part."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import CachedModel, ConfigError, KVStore, PromptError
from kvembed._documents.parts import split_text

from .conftest import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHAPTERS = [
    f"# Chapter {i}\n\n" + "\n\n".join(f"In part {j} of it {i * j} ships passed. They were late." for j in range(4))
    for i in range(6)
]
TEXT = "\n\n".join(CHAPTERS)


def test_a_text_is_cut_before_headings(tiny_tokenizer: Any) -> None:
    parts = split_text(tiny_tokenizer, TEXT, 500)
    assert len(parts) == 3
    assert all(part.startswith("# Chapter") for part in parts)
    assert "\n\n".join(parts) == TEXT


@pytest.mark.parametrize("joint", [" ", "\n", "\n\n", ""])
def test_no_part_is_too_long_and_no_word_is_lost(tiny_tokenizer: Any, joint: str) -> None:
    text = joint.join(f"word{i}" for i in range(300))
    parts = split_text(tiny_tokenizer, text, 100)
    assert max(len(tiny_tokenizer(part)["input_ids"]) for part in parts) <= 100
    assert min(len(part) for part in parts[:-1]) > 45
    assert "".join("".join(part.split()) for part in parts) == "".join(text.split())


def test_windows_share_their_ends(tiny_tokenizer: Any) -> None:
    text = " ".join(f"word{i}" for i in range(300))
    parts = split_text(tiny_tokenizer, text, 200, overlap=50)
    for one, other in pairwise(parts):
        shared = next(n for n in range(len(one), 0, -1) if other.startswith(one[-n:].lstrip()))
        assert 30 <= shared <= 60


def test_every_part_is_asked(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    small = tiny_llama(max_position_embeddings=512)
    with KVStore(tmp_path) as store:
        model = CachedModel(small, tiny_tokenizer, store=store, block_size=BLOCK, progress=False)
        with pytest.raises(PromptError, match=r"split it into parts that fit with model\.documents"):
            model.document(TEXT)
        parts = model.documents(TEXT, name="log")
        assert model.library.names() == [part.name for part in reversed(parts)]
        assert parts[0].name == f"log (1 of {len(parts)})"
        assert max(part.tokens for part in parts) <= 512 - 128
        answers = parts.ask("How many?", max_new_tokens=4)
        assert [answer.document for answer in answers] == [part.name for part in parts]
        assert all(answer.usage.cached_tokens >= part.tokens - 8 for answer, part in zip(answers, parts, strict=True))
        (again, _) = parts.ask_many(["How many?", "When?"], max_new_tokens=4)
        assert [answer.text for answer in again] == [answer.text for answer in answers]
        with pytest.raises(ConfigError, match="max_tokens must be"):
            model.documents(TEXT, max_tokens=1000)
        with pytest.raises(ConfigError, match="overlap must be"):
            model.documents(TEXT, overlap=400)
        assert len(model.documents("Short.")) == 1
        model.close()
