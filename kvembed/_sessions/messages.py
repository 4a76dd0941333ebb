"""What the file of sessions holds: messages and lines of a list of sessions."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

__all__ = [
    "LINE",
    "line_of",
    "Message",
    "MESSAGE_COLUMNS",
    "message_now",
    "message_of",
    "SESSION_COLUMNS",
    "session_of",
    "SessionInfo",
]

MESSAGE_COLUMNS = (
    "id, parent, role, content, meta, created, token_ids, text_kept, text_rest, ids_kept, ids_rest, tokenizer"
)
SESSION_COLUMNS = "name, system, settings, head, created, updated, template, date, hidden"
LINE = (
    "WITH RECURSIVE line(id, parent) AS (SELECT id, parent FROM messages WHERE id = ? UNION ALL "
    "SELECT m.id, m.parent FROM messages m JOIN line ON m.id = line.parent)"
)
"""A message and all before it, the last first."""


@dataclass(frozen=True)
class Message:
    """One message, or an attached document.

    Args:
        id: Its number.
        parent: Number of the message before it, or None.
        role: ``"user"``, ``"assistant"`` or ``"document"``.
        content: Its text, without special tokens.
        meta: What is known beside it: name of a document, cost of a reply.
        created: Seconds since 1970.
        token_ids: int32 bytes of the tokens of a reply, as they were generated.
        text_kept: Of the prompt this reply answered, as rendered: characters shared with the last one before it ...
        text_rest: ... and the characters after them.
        ids_kept: The same in tokens of the whole stream (that prompt and its reply) ...
        ids_rest: ... and the int32 bytes of the ids after them.
        tokenizer: Digest of the tokenizer that made them.
    """

    id: int
    parent: int | None
    role: str
    content: str
    meta: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0
    token_ids: bytes = b""
    text_kept: int = 0
    text_rest: str = ""
    ids_kept: int = 0
    ids_rest: bytes = b""
    tokenizer: str = ""


@dataclass(frozen=True)
class SessionInfo:
    """One line of a list of sessions.

    Args:
        name: What it is called.
        system: Its system message.
        settings: Arguments of ``generate()`` it was given.
        head: Number of its last message, or None.
        created: Seconds since 1970.
        updated: Seconds since 1970.
        template: Arguments of the chat template it was given.
        date: The time its chat template is shown, ``"2026-11-24T20:38:07"``; None before the first message.
        hidden: When it was hidden, in seconds since 1970; None for one that is listed.
    """

    name: str
    system: str | None
    settings: dict[str, Any]
    head: int | None
    created: float
    updated: float
    template: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    hidden: float | None = None


def session_of(row: Sequence[Any]) -> SessionInfo:
    """Return a row of `SESSION_COLUMNS`."""
    name, system, settings, head, created, updated, template, date, hidden = row
    return SessionInfo(
        name, system, json.loads(settings), head, created, updated, json.loads(template), date=date, hidden=hidden
    )


def line_of(db: sqlite3.Connection, head: int | None) -> list[int]:
    """Return the numbers of a message and of all before it, the last first."""
    return [row[0] for row in db.execute(f"{LINE} SELECT id FROM line", (head,))]


def message_of(row: Sequence[Any]) -> Message:
    """Return a row of `MESSAGE_COLUMNS`."""
    kept = (row[5], row[6] or b"", row[7], row[8], row[9], row[10] or b"", row[11])
    return Message(row[0], row[1], row[2], row[3], json.loads(row[4]), *kept)


def message_now(role: str, content: str, meta: dict[str, Any] | None = None) -> Message:
    """Return a new message, not stored yet."""
    return Message(0, None, role, content, meta or {}, time.time())
