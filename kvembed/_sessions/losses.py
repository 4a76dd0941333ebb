"""Why the next prompt of a conversation does not go on from all that was computed for the last one, in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvembed._keys import common_prefix
from kvembed._match import DATE
from kvembed._sessions.history import common_text
from kvembed._units import format_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._match import Explanation, ExplanationKind
    from kvembed._sessions.messages import Message
    from kvembed._sessions.rendering import Prepared

__all__ = ["explained", "Loss", "loss_of"]

_SHOWN = 24
"""Characters of a text that are shown where nothing better can be said."""


@dataclass(frozen=True)
class Loss:
    """What cannot be reused any more, and why.

    Args:
        kind: Its class.
        cause: A sentence without its stop; turns are counted from 1.
        position: Token up to which the prompt is what was computed before.
        tokens: Tokens after it that were computed and are of no use now.
    """

    kind: ExplanationKind
    cause: str
    position: int
    tokens: int

    def __str__(self) -> str:
        if not self.tokens:
            return self.cause
        return f"{self.cause}: {format_count(self.tokens)} computed tokens from there on are of no use"


def loss_of(prepared: Prepared) -> Loss | None:
    """Return why a prompt does not go on from all that was computed before; None when it does."""
    stream, ids = prepared.history.stream, prepared.prompt.ids
    if prepared.history.foreign:
        cause = "what was said before was computed by a model with another tokenizer"
        return Loss("retokenized", cause, prepared.prompt.anchor_tokens, len(stream))
    shared = common_prefix(stream, ids)
    lost = len(stream) - shared
    if prepared.dropped and (lost or not len(stream)):
        some = "the oldest turn was" if prepared.dropped == 1 else f"the {prepared.dropped} oldest turns were"
        return Loss("diverged", f"{some} left out, because the context is full", shared, lost)
    if lost > 1:  # nothing was computed after the last token of a reply
        return Loss(*_cause(prepared.history.said, prepared.prompt.text, prepared), shared, lost)
    if any(message.role == "assistant" and not message.token_ids for message in prepared.branch):
        return Loss("diverged", "a turn was deleted, and what comes after it is computed again, once", shared, 0)
    return None


def explained(explanation: Explanation, loss: Loss | None) -> Explanation:
    """Return an explanation that names the cause of a loss, if that is what it is about."""
    if loss is None or explanation.kind not in ("diverged", "template_changed", "date_changed", "retokenized", "hit"):
        return explanation
    kind = explanation.kind if explanation.kind == "hit" else loss.kind
    return replace(explanation, kind=kind, hint=f"{loss}. {explanation.hint}".strip())


def _cause(was: str, now: str, prepared: Prepared) -> tuple[ExplanationKind, str]:
    at = common_text(was, now)
    before = [m.content.strip() for m in prepared.branch if m.role == "user"]
    in_system = not before or at <= _found(was, before[0])
    if dates := _dates(was, now, at):
        where = "the system prompt" if in_system else "the prompt"
        return "date_changed", f"the date in {where} changed from {dates[0]} to {dates[1]}"
    opened = was.rfind("<think>", 0, at + len("<think>"))
    if opened >= 0 and "</think>" not in was[opened:at] and not now.startswith("<think>", opened):
        return "template_changed", f"the template removed the thinking of turn {_turn(was, opened, prepared.branch)}"
    system = (prepared.beginning.system or "").strip()
    if system:
        stood = was.rfind(system, 0, at + len(system))
        if 0 <= stood <= at and now.find(system) > stood:
            return "template_changed", "the template moved the system prompt into the last user message"
    if in_system:
        return "template_changed", f"what comes before the first message changed, {_shown(was, now, at)}"
    turn = _turn(was, at, prepared.branch)
    replies = [m for m in prepared.branch if m.role == "assistant"]
    if turn <= len(replies) and at >= _found(was, before[turn - 1]) + len(before[turn - 1]):
        return "template_changed", f"the template shows the reply of turn {turn} otherwise, {_shown(was, now, at)}"
    return "template_changed", f"the prompt changed in turn {turn}, {_shown(was, now, at)}"


def _dates(was: str, now: str, at: int) -> tuple[str, str] | None:
    """Return the dates of both texts that the first difference lies in."""
    start = max(0, at - 2 * _SHOWN)
    found: list[str] = []
    for text in (was, now):
        piece = text[start : at + 2 * _SHOWN]
        match = next((m for m in DATE.finditer(piece) if m.start() <= at - start < m.end()), None)
        if match is None:
            return None
        found.append(match.group())
    return (found[0], found[1]) if found[0] != found[1] else None


def _found(text: str, content: str) -> int:
    at = text.find(content)
    return at if at >= 0 else 0


def _turn(text: str, at: int, branch: Sequence[Message]) -> int:
    """Return the number, from 1, of the turn that a character of a rendered conversation belongs to."""
    turn, position = 0, 0
    for message in branch:
        if message.role != "user":
            continue
        found = text.find(message.content.strip(), position)
        if found < 0 or found > at:
            break
        turn, position = turn + 1, found + len(message.content.strip())
    return max(turn, 1)


def _shown(was: str, now: str, at: int) -> str:
    start = max(0, at - _SHOWN // 2)
    parts = [repr(text[start : at + _SHOWN]) for text in (was, now)]
    return f"from {parts[0]} to {parts[1]}"
