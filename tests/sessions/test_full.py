"""Conversations that do not fit the context any more: what is dropped, what that costs, and what is said of it."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvembed import PromptError
from kvembed._keys import common_prefix

from .test_sessions import plain

if TYPE_CHECKING:
    from kvembed import CachedModel

LIMIT = 400
NEW = 12
SYSTEM = "You count ships, and nothing else."


def text_of(turn: int) -> str:
    return f"Question {turn}: how many ships are there?"


def length(model: CachedModel, turns: list[tuple[str, str | None]], skipped: int) -> int:
    """Tokens of a prompt without the oldest turns, by the chat template alone."""
    messages = [{"role": "system", "content": SYSTEM}]
    for user, reply in turns[skipped:]:
        messages.append({"role": "user", "content": user})
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture
def ascii_only() -> dict[str, Any]:
    """Letters only, so that a reply's text tokenises as it was generated and the lengths above are right."""
    return {"prefix_allowed_tokens_fn": lambda *_: list(range(66, 91)), "max_new_tokens": NEW}


def test_a_quarter_of_the_context_is_left_free(model: CachedModel, ascii_only: dict[str, Any]) -> None:
    hf_model: Any = model.hf_model
    hf_model.config.max_position_embeddings = LIMIT
    session = model.session("drops", system=SYSTEM, when_full="drop")
    dropped, drops = 0, []
    for number in range(14):
        turns: list[tuple[str, str | None]] = [(turn.user, turn.reply) for turn in session.turns]
        turns.append((text_of(number), None))
        if length(model, turns, dropped) + NEW > LIMIT:
            dropped = next(n for n in range(dropped + 1, 99) if length(model, turns, n) + NEW + LIMIT // 4 <= LIMIT)
            drops.append(number)
            assert length(model, turns, dropped - 1) + NEW + LIMIT // 4 > LIMIT  # no more than needed
        before = common_prefix(session._renderer.history(session._branch).stream, session.prompt_ids(text_of(number)))
        reply = session.send(text_of(number), **ascii_only)
        assert reply.dropped_turns == dropped
        assert len(reply.prompt_ids) == length(model, turns, dropped)
        assert reply.token_ids.tolist() == plain_letters(model, reply, ascii_only)
        if drops and drops[-1] == number:
            assert reply.usage.cached_tokens == before  # the system message, and no more
        elif number:
            assert reply.usage.computed_tokens <= len(model.tokenizer(text_of(number))["input_ids"]) + 40
    # Room for some turns, so that not every turn drops and computes all anew.
    assert len(drops) >= 2
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(drops))
    assert len(session.turns) == 14  # what is left out of the prompt is still there


def plain_letters(model: CachedModel, reply: Any, options: dict[str, Any]) -> list[int]:
    import torch

    ids = torch.from_numpy(reply.prompt_ids.astype(np.int64))[None]
    hf_model: Any = model.hf_model
    result = hf_model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return result[0, ids.shape[1] :].tolist()


def test_the_refusal_says_what_dropping_would_do(model: CachedModel) -> None:
    hf_model: Any = model.hf_model
    hf_model.config.max_position_embeddings = LIMIT
    session = model.session("full", system=SYSTEM)

    def talk() -> None:
        for number in range(14):
            session.send(text_of(number), max_new_tokens=NEW)

    with pytest.raises(PromptError) as raised:
        talk()
    found = re.search(
        r"conversation has (\d+) tokens and (\d+) more .* context is (\d+): .* leaves out the (\d+) oldest turns "
        r"and computes (\d+) tokens again",
        str(raised.value),
    )
    assert found is not None, raised.value
    tokens, new, limit, turns, again = map(int, found.groups())
    assert (new, limit) == (NEW, LIMIT)
    assert tokens + new > limit
    asked = len(session.turns)
    dropping = model.session("full", when_full="drop")
    reply = dropping.send(text_of(asked), max_new_tokens=NEW)
    assert reply.dropped_turns == turns > 0
    assert reply.usage.computed_tokens == again
    assert len(reply.prompt_ids) + NEW + LIMIT // 4 <= LIMIT
    assert reply.token_ids.tolist() == plain(model, reply, NEW)


def test_one_turn_may_use_the_free_quarter(model: CachedModel) -> None:
    hf_model: Any = model.hf_model
    hf_model.config.max_position_embeddings = LIMIT
    session = model.session("long", when_full="drop")
    session.send(text_of(0), max_new_tokens=NEW)
    reply = session.send("x" * (LIMIT - 60), max_new_tokens=NEW)
    assert reply.dropped_turns == 1
    assert len(reply.prompt_ids) + NEW > LIMIT - LIMIT // 4
    assert reply.token_ids.tolist() == plain(model, reply, NEW)
