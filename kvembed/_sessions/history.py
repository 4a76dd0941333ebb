"""Token-exact history: the next prompt of a conversation, made of the very ids that were computed before.

Rendering a conversation with its chat template and tokenising the text gives other ids than those that are cached: a
reply tokenises differently from how it was generated, templates trim it, or strip its thinking. So for every reply
the prompt it answered (text and ids) and its own ids are remembered. Of all these *anchors* the longest that the
template still renders the same is taken over as ids, and only the text after it is tokenised.

A reply counts as unchanged also where the template only changes white space around it: its ids are what the model
wrote. Where a template renders no anchor again as it did (what it puts before a reply may be another thing in a prompt
than in the history), the longest common part is cut at the last special token in it.

What another tokenizer made, when the conversation was with another model, is no anchor, however alike the text: its ids
are other words to this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvembed._keys import as_token_ids, common_prefix
from kvembed._prompt import tokenize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._keys import TokenIds
    from kvembed._sessions.marks import Marks
    from kvembed._sessions.messages import Message

__all__ = ["common_text", "History", "messages_of", "Prompt"]


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    Args:
        text: As the chat template renders it.
        ids: Its token ids, int32; those of ``anchor_tokens`` leading ones were computed before.
        anchor_tokens: How many are taken over.
    """

    text: str
    ids: TokenIds
    anchor_tokens: int = 0


@dataclass(frozen=True)
class _Anchor:
    """What was computed up to one reply: the prompt before it, the reply itself, and whether by this tokenizer."""

    text: str
    ids: TokenIds
    content: str
    reply: TokenIds
    own: bool


class History:
    """The anchors of one branch of a conversation.

    Args:
        marks: The special tokens of the model's tokenizer.
        branch: The messages from the first on.
    """

    def __init__(self, marks: Marks, branch: Sequence[Message] = ()) -> None:
        self._tokenizer = marks.tokenizer
        self._marks = marks
        self._anchors: list[_Anchor] = []
        self._text = ""
        self._stream: TokenIds = as_token_ids([])
        for message in branch:
            if message.role == "user":
                continue
            text = self._text[: message.text_kept] + message.text_rest
            rest = np.frombuffer(message.ids_rest, dtype="<i4")
            stream = as_token_ids(np.concatenate([self._stream[: message.ids_kept], rest]))
            reply = as_token_ids(np.frombuffer(message.token_ids, dtype="<i4"))
            content = message.content if message.role == "assistant" else ""
            own = message.tokenizer == self._marks.digest
            self._anchors.append(_Anchor(text, stream[: len(stream) - len(reply)], content, reply, own))
            self._text, self._stream = text, stream

    @property
    def stream(self) -> TokenIds:
        """Ids up to the last reply or document, it included: what was computed last."""
        return self._stream

    @property
    def foreign(self) -> bool:
        """Whether what was computed last was made with another tokenizer."""
        return bool(self._anchors) and not self._anchors[-1].own

    @property
    def said(self) -> str:
        """What was computed last, as text with special tokens: a prompt, and the reply to it."""
        reply = self._anchors[-1].reply if self._anchors else as_token_ids([])
        return self._text + (self._tokenizer.decode(reply.tolist(), skip_special_tokens=False) if len(reply) else "")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens."""
        return self._marks.special_ids

    @property
    def streams(self) -> list[TokenIds]:
        """Ids of the stream up to each reply or document, it included."""
        return [as_token_ids(np.concatenate([anchor.ids, anchor.reply])) for anchor in self._anchors]

    def prompt(self, text: str) -> Prompt:
        """Return the ids of a rendered conversation, with as many known ones as its text still allows."""
        best_end, best_ids = 0, as_token_ids([])
        for anchor in self._anchors:
            if not anchor.own:
                continue
            if text.startswith(anchor.text):
                end, ids = len(anchor.text), anchor.ids
                spliced = self._spliced(text[end:], anchor)
                if spliced is not None:
                    end, ids = end + spliced[0], as_token_ids(np.concatenate([ids, spliced[1]]))
            else:
                end, ids = self._marks.cut(anchor.text, anchor.ids, common_text(anchor.text, text))
            if end >= best_end:
                best_end, best_ids = end, ids
        rest = self._tokens_from(text, best_end)
        return Prompt(text, as_token_ids(np.concatenate([best_ids, rest])), len(best_ids))

    def _spliced(self, rest: str, anchor: _Anchor) -> tuple[int, TokenIds] | None:
        """Return how much of ``rest`` an anchor's reply stands for, and its ids; None where it was rewritten."""
        if not len(anchor.reply):
            return None
        content, blank = anchor.content.strip(), len(rest) - len(rest.lstrip())
        if not content:
            return None
        if rest.startswith(anchor.content):
            end = len(anchor.content)
        elif rest.startswith(anchor.content.rstrip()):
            end = len(anchor.content.rstrip())
        elif rest.startswith(content, blank):
            end = blank + len(content)
        else:
            return None
        ids = anchor.reply
        closing = len(ids)
        while closing and int(ids[closing - 1]) in self._marks.special_ids:
            closing -= 1
        mark = self._tokenizer.decode(ids[closing:].tolist(), skip_special_tokens=False) if closing < len(ids) else ""
        if mark and rest[end:].startswith(mark):
            return end + len(mark), ids
        return end, ids[:closing]

    def _tokens_from(self, text: str, start: int) -> TokenIds:
        """Return the ids of a text from one character on: as in the whole text where a token begins there."""
        if not start:
            return tokenize(self._tokenizer, text, special=False)
        if start >= len(text):
            return as_token_ids([])
        if getattr(self._tokenizer, "is_fast", False):
            # By itself the rest could begin otherwise: some tokenizers put a space before any text. But what comes
            # before a special token has no part in how the text from there on is cut up.
            first = self._marks.last_before(text, start)
            shown = self._tokenizer(text[first:], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            starts = [offsets[0] + first for offsets in shown["offset_mapping"]]
            at = next((i for i, offset in enumerate(starts) if offset >= start), None)
            if at is not None and starts[at] == start:
                return as_token_ids(shown["input_ids"][at:])
        return tokenize(self._tokenizer, text[start:], special=False)

    def remember(self, message: Message, prompt: Prompt, reply: TokenIds) -> Message:
        """Return a message, the next of this branch, with what has to be stored of it.

        Args:
            message: The reply, or a document (then without ids).
            prompt: What was before it.
            reply: Its ids.
        """
        stream = as_token_ids(np.concatenate([prompt.ids, reply]))
        text_kept = common_text(self._text, prompt.text)
        ids_kept = common_prefix(self._stream, stream)
        return replace(
            message,
            token_ids=reply.tobytes(),
            text_kept=text_kept,
            text_rest=prompt.text[text_kept:],
            ids_kept=ids_kept,
            ids_rest=stream[ids_kept:].tobytes(),
            tokenizer=self._marks.digest,
        )


def common_text(a: str, b: str) -> int:
    """Return how many leading characters two texts share."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def messages_of(branch: Sequence[Message], system: str | None, *, skip_turns: int = 0) -> list[dict[str, str]]:
    """Return a branch as chat messages; documents go in front of the user's next words.

    Args:
        branch: The messages.
        system: System message, or None.
        skip_turns: Leave out so many of the oldest turns (their documents stay).
    """
    found: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    documents: list[str] = []
    turn = 0
    for message in branch:
        if message.role == "document":
            documents.append(message.content)
            continue
        turn += message.role == "user"
        if turn <= skip_turns:
            continue
        content = message.content
        if message.role == "user" and documents:
            content = "\n\n".join([*documents, content])
            documents = []
        found.append({"role": message.role, "content": content})
    return found
