"""What a conversation gives back: a reply, a turn, and the whole of it as text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError
from kvembed._html import bar_html, panel, text_html
from kvembed._usage import Usage, reply_bundle

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kvembed._keys import TokenIds
    from kvembed._prompt_view import PromptView
    from kvembed._sessions.messages import Message, SessionInfo

__all__ = ["exported", "Reply", "talk_html", "Turn", "turns_of"]

_TURNS_SHOWN = 6
_CHARACTERS_SHOWN = 600


@dataclass(frozen=True, repr=False)
class Reply:
    """The model's answer in a conversation.

    Args:
        text: Without special tokens.
        usage: What it cost.
        prompt_ids: Ids of the whole prompt, int32: what plain transformers would be given.
        token_ids: Ids of the reply, int32.
        finished: False when it was stopped, or ran to the most tokens allowed.
        dropped_turns: Oldest turns that were left out of the prompt because the context is full.
        loss: Why the prompt did not go on from all that was computed before, in words; None when it did.
        prompt: Where each part of the prompt came from, with its text; None where nobody knows.
    """

    text: str
    usage: Usage
    prompt_ids: TokenIds
    token_ids: TokenIds
    finished: bool
    dropped_turns: int = 0
    loss: str | None = None
    prompt: PromptView | None = None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Reply {self.text!r}>"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        return reply_bundle("reply", self.text, self.usage, self.prompt, include, exclude)


@dataclass(frozen=True)
class Turn:
    """One exchange.

    Args:
        user: What the user said.
        reply: What the model said; None when it was stopped before its first token.
        meta: What is kept of the reply's cost: the fields of `Usage`, and `Reply`'s ``finished`` and ``loss``.
    """

    user: str
    reply: str | None
    meta: dict[str, Any]


def turns_of(branch: Sequence[Message]) -> list[Turn]:
    """Return the exchanges of a branch, oldest first."""
    found: list[Turn] = []
    for message in branch:
        if message.role == "user":
            found.append(Turn(message.content, None, {}))
        elif message.role == "assistant" and found:
            found[-1] = Turn(found[-1].user, message.content, message.meta)
    return found


def talk_html(title: str, system: str | None, documents: Sequence[str], turns: Sequence[Turn]) -> str:
    """Return the end of a conversation for a notebook, each reply with what it cost."""
    parts: list[str] = []
    if system:
        parts.append(text_html(f"System: {_short(system)}", "opacity:.8"))
    if documents:
        parts.append(text_html(f"Attached: {', '.join(documents)}", "opacity:.8"))
    left_out = max(0, len(turns) - _TURNS_SHOWN)
    if left_out:
        parts.append(text_html(f"… {left_out} earlier turns …", "opacity:.65;font-style:italic"))
    for turn in turns[left_out:]:
        parts.append(text_html(_short(turn.user), "font-weight:600;margin-top:.5em"))
        if turn.reply is not None:
            parts.append(text_html(_short(turn.reply)))
        tiers = turn.meta.get("cached_tokens_by_tier")
        computed = turn.meta.get("computed_tokens")
        if isinstance(tiers, dict) and isinstance(computed, int):
            parts.append(bar_html(tiers, computed, width=24))
    return panel(title, *parts)


def _short(text: str) -> str:
    return text if len(text) <= _CHARACTERS_SHOWN else f"{text[:_CHARACTERS_SHOWN]} …"


def exported(info: SessionInfo, branch: Sequence[Message], kind: str) -> str:
    """Return a branch as text; see `Session.export`."""
    if kind == "json":
        messages = [{"role": m.role, "content": m.content, **({"meta": m.meta} if m.meta else {})} for m in branch]
        found = {"name": info.name, "system": info.system, "settings": info.settings, "messages": messages}
        return json.dumps(found, ensure_ascii=False, indent=2)
    if kind != "md":
        raise ConfigError(f'export as "md" or "json", not {kind!r}')
    parts = [f"# {info.name}\n"]
    if info.system is not None:
        parts.append(f"> {info.system}\n")
    for message in branch:
        if message.role == "document":
            parts.append(f"*Attached: {message.meta.get('name', 'a document')}*\n")
        else:
            parts.append(f"**{'You' if message.role == 'user' else 'Model'}**\n\n{message.content}\n")
    return "\n".join(parts)
