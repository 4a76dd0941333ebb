"""From the messages of a conversation to the prompt of its next turn: chat template, fixed date, context length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvembed._errors import ContextFullError, PromptError
from kvembed._keys import common_prefix
from kvembed._prompt import MARK, context_length, split_at_mark
from kvembed._sessions import clock
from kvembed._sessions.clock import at_fixed_time
from kvembed._sessions.history import History, Prompt, messages_of
from kvembed._sessions.messages import Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._sessions.marks import Marks
    from kvembed._sessions.messages import SessionInfo

__all__ = ["Beginning", "dropped_of", "Prepared", "Renderer"]

_ROOM = 4
"""When turns are dropped, one part in so many of the context is left free, so that the next turns need not drop."""


@dataclass(frozen=True)
class Beginning:
    """What the prompt of every turn begins with.

    Args:
        system: System message, or None.
        template: Arguments of the chat template.
        date: What time the template is told that it is.
    """

    system: str | None
    template: dict[str, Any] = field(default_factory=dict)
    date: str = ""

    @classmethod
    def of(cls, info: SessionInfo) -> Beginning:
        """Return that of a session; one without a message begins now."""
        return cls(info.system, info.template, info.date or clock.now())


@dataclass(frozen=True)
class Prepared:
    """A prompt that is ready to be computed.

    Args:
        branch: The messages it has, from the first on.
        beginning: What it begins with.
        history: The tokens that were computed before.
        prompt: The prompt.
        dropped: Oldest turns that are left out of it.
    """

    branch: list[Message]
    beginning: Beginning
    history: History
    prompt: Prompt
    dropped: int


def dropped_of(branch: Sequence[Message]) -> int:
    """Return how many of the oldest turns were left out of the last prompt."""
    return next((m.meta.get("dropped_turns", 0) for m in reversed(branch) if m.role == "assistant"), 0)


class Renderer:
    """Renders conversations with one model.

    Args:
        hf_model: The transformers model.
        marks: The special tokens of its tokenizer, which has a chat template.
    """

    def __init__(self, hf_model: Any, marks: Marks) -> None:
        self._tokenizer = marks.tokenizer
        self._model = hf_model
        self._marks = marks
        self._known: tuple[list[int], History] = [], History(marks)

    def history(self, branch: Sequence[Message]) -> History:
        """Return the history of those messages that are stored; it is kept for the next call."""
        stored = [message for message in branch if message.id]
        numbers = [message.id for message in stored]
        if self._known[0] != numbers:
            self._known = numbers, History(self._marks, stored)
        return self._known[1]

    def forget(self) -> None:
        """Keep no history any longer."""
        self._known = [], History(self._marks)

    def render(
        self, branch: Sequence[Message], beginning: Beginning, *, skip_turns: int = 0, to_answer: bool = True
    ) -> str:
        """Return a branch as its chat template has it."""
        # A template that asks for the date is told the session's: another one would change all tokens after it.
        template, time = at_fixed_time(self._tokenizer.get_chat_template(), beginning.date)
        return self._tokenizer.apply_chat_template(
            messages_of(branch, beginning.system, skip_turns=skip_turns),
            tokenize=False,
            add_generation_prompt=to_answer,
            chat_template=template,
            **time,
            **beginning.template,
        )

    def before_words(self, branch: Sequence[Message], beginning: Beginning, *, skip_turns: int = 0) -> str:
        """Return what stands before the user's next words, whatever they are.

        Raises:
            ConfigError: The chat template leaves the user's words out.
        """
        said = Message(0, None, "user", MARK)
        return split_at_mark(self.render([*branch, said], beginning, skip_turns=skip_turns))[0]

    def prepare(
        self, branch: list[Message], beginning: Beginning, max_new_tokens: int, *, may_drop: bool = False
    ) -> Prepared:
        """Return the prompt of a branch that ends with the user's words.

        Args:
            branch: The messages.
            beginning: What it begins with.
            max_new_tokens: Tokens to leave room for.
            may_drop: Leave out the oldest turns when it does not fit.

        Raises:
            PromptError: It does not fit the context.
        """
        history = self.history(branch)
        limit = context_length(self._model)
        before = dropped_of(branch)
        turns = sum(message.role == "user" for message in branch)
        room = 0
        for dropped in range(min(before, turns - 1), turns):
            prompt = history.prompt(self.render(branch, beginning, skip_turns=dropped))
            if limit is None or len(prompt.ids) + max_new_tokens + room <= limit:
                return Prepared(branch, beginning, history, prompt, dropped)
            if dropped == turns - 1:
                if len(prompt.ids) + max_new_tokens <= limit:
                    return Prepared(branch, beginning, history, prompt, dropped)
                raise PromptError(f"this turn alone does not fit the context of {limit:,} tokens: shorten it")
            room = limit // _ROOM
            if not may_drop:
                raise self._too_long(branch, beginning, max_new_tokens, limit, len(prompt.ids))
        raise AssertionError("a branch that is answered has a turn")  # pragma: no cover

    def surviving(self, prepared: Prepared) -> int:
        """Return how many tokens of a prompt the next one will begin with, whatever is replied and said then."""
        branch, beginning, dropped = prepared.branch, prepared.beginning, prepared.dropped
        said = [Message(0, None, role, MARK) for role in ("assistant", "user")]
        text = self.render([*branch, *said], beginning, skip_turns=dropped)
        return common_prefix(prepared.prompt.ids, prepared.history.prompt(text).ids)

    def _too_long(
        self, branch: list[Message], beginning: Beginning, max_new_tokens: int, limit: int, tokens: int
    ) -> PromptError:
        try:
            found = self.prepare(branch, beginning, max_new_tokens, may_drop=True)
        except PromptError as error:
            return error
        again = len(found.prompt.ids) - common_prefix(found.history.stream, found.prompt.ids)
        return ContextFullError(tokens, max_new_tokens, limit, found.dropped, again)
