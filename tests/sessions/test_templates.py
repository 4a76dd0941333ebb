"""Conversations with the templates of several families: cached tokens of each turn against the most there can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvembed import CachedModel, KVStore, SessionDB, _matching
from kvembed._keys import PROBE_TOKENS, common_prefix
from kvembed._sessions import clock

from ._families import FAMILIES, Family, Script, byte_tokenizer, plain_reply

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvembed import Reply, Session
    from kvembed._keys import TokenIds

BLOCK = 16
WORDS = ("What do rivers carry?", "And bread?", "Tell me of the moon and of chess.", "Why?", "Wool or maps?", "Rain?")


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


class Chat:
    """One family's conversation over a store, which can be opened again.

    Args:
        family: The family.
        make: Makes its tiny model.
        folder: Where its store and sessions are.
    """

    def __init__(self, family: Family, make: Any, folder: Path, **options: Any) -> None:
        self.family, self.make, self.folder, self.options = family, make, folder, options
        self.tokenizer = byte_tokenizer(family)
        self.streams: list[TokenIds] = []
        self.open()

    def open(self) -> None:
        self.hf_model = self.make(eos_token_id=self.tokenizer.eos_token_id)
        self.store = KVStore(self.folder / "store")
        self.model = CachedModel(
            self.hf_model, self.tokenizer, store=self.store, block_size=BLOCK, progress=False, **self.options
        )
        self.db = SessionDB(self.folder / "sessions.db")
        self.session: Session = self.model.session(
            "chat",
            system=self.family.system,
            db=self.db,
            template_kwargs=self.family.arguments or None,
        )

    def close(self) -> None:
        self.model.close()
        self.store.close()
        self.db.close()

    def script(self, number: int, *, thinks: bool = True) -> Script:
        answer = [f"So {number}: ", 9 + number % 3, "!"]
        if self.family.thinks is None or not thinks:
            return Script(self.tokenizer, *answer)
        return Script(self.tokenizer, self.family.thinks, 14, "\n</think>\n\n", *answer)

    def most(self, prompt: TokenIds) -> int:
        """Return the most tokens of a prompt that can have been computed before; one has to be computed."""
        # Nothing is computed for the last token of a reply.
        return min(max((common_prefix(stream[:-1], prompt) for stream in self.streams), default=0), len(prompt) - 1)

    def most_by_text(self, text: str) -> int:
        """The same by the text alone, a token being a byte or a special token: nothing of the session's doing."""
        now = self.tokens(self.rendered(text))
        said = [self.tokenizer.decode(stream[:-1].tolist(), skip_special_tokens=False) for stream in self.streams]
        return min(max((common_prefix(self.tokens(was), now) for was in said), default=0), len(now) - 1)

    def tokens(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype="<i4")

    def rendered(self, text: str) -> str:
        messages = [{"role": "system", "content": self.family.system}] if self.family.system else []
        for turn in self.session.turns:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.reply}]
        messages.append({"role": "user", "content": text})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string="24 Nov 2026", **self.family.arguments
        )

    def send(self, text: str, script: Script, *, slack: int = 0) -> Reply:
        by_text = self.most_by_text(text)
        reply = self.session.send(text, **script.arguments)
        cached = reply.usage.cached_tokens
        assert reply.usage.bypass_reason is None
        assert self.most(reply.prompt_ids) - slack <= cached <= self.most(reply.prompt_ids)
        assert cached >= by_text - slack
        assert reply.token_ids.tolist() == plain_reply(self.hf_model, reply, script)
        self.streams.append(np.concatenate([reply.prompt_ids, reply.token_ids]))
        return reply


@pytest.fixture
def chat(family: Family, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> Iterator[Chat]:
    monkeypatch.setattr(clock, "now", lambda: "2026-11-24T23:59:00")
    # Below 64 tokens computing is as fast as restoring, and conversations here are short.
    monkeypatch.setattr(_matching, "_WORTH_RESTORING", 1)
    chat = Chat(family, request.getfixturevalue(family.model), tmp_path)
    yield chat
    chat.close()


def test_every_turn_reuses_the_most_there_is(chat: Chat, monkeypatch: Any) -> None:
    loss = chat.family.loss
    for number, text in enumerate(WORDS):
        if number == 3:
            monkeypatch.setattr(clock, "now", lambda: "2026-11-25T00:01:00")  # midnight has passed
        if number == 4:
            chat.close()
            chat.open()
        # After it was opened again, the last few tokens were too few to be stored.
        reply = chat.send(text, chat.script(number), slack=PROBE_TOKENS if number == 4 else 0)
        if loss is None or not number:
            assert reply.loss is None
        else:
            assert reply.loss is not None
            assert reply.loss.startswith(loss.format(number))
            assert chat.session.turns[-1].meta["loss"] == reply.loss
    explanation = chat.session.explain("More?")
    if loss is not None:
        assert loss.format(len(WORDS)) in explanation.hint
    # The session leaves the template's text as it is, but for white space around what the model said.
    said = chat.tokenizer.decode(chat.session.prompt_ids("More?"), skip_special_tokens=False)
    assert "".join(said.split()) == "".join(chat.rendered("More?").split())


def test_prepared_turns_pay_for_their_words_only(chat: Chat) -> None:
    for number, text in enumerate(WORDS[:3]):
        chat.send(text, chat.script(number))
        chat.session.prepare()
        prepared = chat.session.prompt_ids("")
        found = chat.session.preview("Next?")
        # All but what stands after the user's words, and the token that may become another one with them.
        after = len(chat.tokens(chat.rendered("").split(WORDS[number])[-1]))
        assert found.num_tokens >= len(prepared) - after
        chat.streams.append(np.append(prepared[: found.num_tokens], 0).astype("<i4"))


def test_stopped_at_any_token(chat: Chat) -> None:
    chat.send(WORDS[0], chat.script(0))
    # Before its first token, inside its thoughts or words, and at the end of them.
    for kept in (1, 6, 17):
        script = chat.script(1)
        script._plan = script._plan[:kept]
        reply = chat.send(f"Stop at {kept}", script)
        assert not reply.finished
        assert len(reply.token_ids) == kept
        assert chat.session.turns[-1].reply == chat.tokenizer.decode(reply.token_ids, skip_special_tokens=True)
    chat.send(WORDS[1], chat.script(2))


def test_stopped_while_the_prompt_is_read(chat: Chat) -> None:
    chat.send(WORDS[0], chat.script(0))
    session, text = chat.session, "A long question. " * 6
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        session.stop()

    for say in (session.send, lambda text, **kwargs: list(session.stream(text, **kwargs))):
        chat.model.progress = stop
        said = say(text, **chat.script(1).arguments)
        chat.model.progress = False
        assert str(said) in ("", "[]")
        assert [turn.user for turn in session.turns] == [WORDS[0]]
    assert seen[0] < seen[1]  # what was read the first time is not read again
    reply = session.send(text, **chat.script(1).arguments)
    assert reply.usage.cached_tokens >= seen[1]
    assert reply.token_ids.tolist() == plain_reply(chat.hf_model, reply, chat.script(1))
    assert len(session.turns) == 2
