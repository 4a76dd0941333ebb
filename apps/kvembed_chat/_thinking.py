"""What a model thinks before it answers, told from the answer while both arrive in pieces."""

from __future__ import annotations

__all__ = ["ThinkingSplitter", "split_thinking"]

_OPEN, _CLOSE = "<think>", "</think>"


class ThinkingSplitter:
    """Takes pieces of a reply and tells thoughts from words, though a mark may be cut in two.

    Only a mark at the very start opens a thought: elsewhere it is something the model talks about.

    Attributes:
        is_thinking: A thought is open.
    """

    def __init__(self) -> None:
        self.is_thinking = False
        self._may_open = True
        self._may_trim = False
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str]:
        """Return (thought, words) that are certain after this piece."""
        self._held += piece
        thought = words = ""
        if self._may_open:
            start = self._held.lstrip()
            if _OPEN.startswith(start[: len(_OPEN)]) and len(start) < len(_OPEN):
                return "", ""  # still undecided
            self._may_open = False
            if start.startswith(_OPEN):
                self.is_thinking, self._held = True, start[len(_OPEN) :].lstrip("\n")
        if self.is_thinking:
            before, mark, after = self._held.partition(_CLOSE)
            if mark:
                self.is_thinking, self._may_trim = False, True
                thought, self._held = before, after
            else:
                keep = _undecided(self._held)
                thought, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                return thought, ""
        if self._may_trim:
            self._held = self._held.lstrip("\n")
            self._may_trim = not self._held
        words, self._held = self._held, ""
        return thought, words

    def end(self) -> tuple[str, str]:
        """Return what was held back."""
        held, self._held = self._held, ""
        return (held, "") if self.is_thinking else ("", held)


def _undecided(text: str) -> int:
    """Return how many characters at the end may be the start of a closing mark."""
    return next((n for n in range(len(_CLOSE) - 1, 0, -1) if text.endswith(_CLOSE[:n])), 0)


def split_thinking(text: str) -> tuple[str, str]:
    """Return (thought, words) of a whole reply.

    Some templates open the thought themselves, so that a reply begins inside of one.
    """
    if _CLOSE in text and not text.lstrip().startswith(_OPEN):
        text = _OPEN + text
    splitter = ThinkingSplitter()
    pieces = splitter.feed(text), splitter.end()
    return "".join(thought for thought, _ in pieces).strip(), "".join(words for _, words in pieces).strip("\n")
