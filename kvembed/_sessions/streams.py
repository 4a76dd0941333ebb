"""Which tokens a session has been computed with, without its tokenizer or model: to find its blocks in a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvembed._keys import as_token_ids
from kvembed._tree import KnownText

if TYPE_CHECKING:
    from kvembed._keys import TokenIds
    from kvembed._sessions.db import SessionDB

__all__ = ["known_texts", "streams_of"]


def streams_of(db: SessionDB, name: str) -> list[TokenIds]:
    """Return the ids of every conversation that was had in a session, of all branches, the longest first.

    A stream that is the beginning of another is left out.
    """
    found: list[TokenIds] = []
    seen = set[int]()
    for head in sorted(db.heads(name), reverse=True):
        if head in seen:  # on a branch that went on from here
            continue
        stream = as_token_ids([])
        for message in db.branch(head):
            if message.role != "user":
                rest = np.frombuffer(message.ids_rest, dtype="<i4")
                stream = as_token_ids(np.concatenate([stream[: message.ids_kept], rest]))
                found.append(stream)
            seen.add(message.id)
    longest: list[TokenIds] = []
    for stream in sorted(found, key=len, reverse=True):
        if len(stream) and not any(np.array_equal(other[: len(stream)], stream) for other in longest):
            longest.append(stream)
    return longest


def known_texts(db: SessionDB) -> list[KnownText]:
    """Return the streams of all sessions, each with the session's name."""
    return [KnownText(info.name, ids) for info in db.sessions() for ids in streams_of(db, info.name)]
