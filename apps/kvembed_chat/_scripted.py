"""An engine without a model: what it answers and what that costs is written down, for tests and pictures."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvembed import ConfigError, PromptError, Usage
from kvembed_chat._engine import (
    Ask,
    ContextFull,
    Conversation,
    Event,
    Exchange,
    ModelInfo,
    ModelItem,
    Piece,
    Preview,
    Progress,
    SessionItem,
    Stopped,
)
from kvembed_chat._scripted_prefixes import ScriptedPrefixes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = ["Reply", "ScriptedEngine", "usage"]


_TINY = ModelInfo("tiny", "Tiny", 8192, "float32 · cpu")


def usage(prompt: int, by_tier: dict[str, int] | None = None, new: int = 24, **figures: Any) -> Usage:
    """Return a cost with plausible times, the same each time."""
    known = {"ttft_s": 0.18, "prefill_s": 0.17, "decode_s": 2.0, "total_s": 2.18, "saved_s": 5.9 if by_tier else None}
    return Usage(prompt_tokens=prompt, completion_tokens=new, cached_tokens_by_tier=by_tier or {}, **(known | figures))


@dataclass(frozen=True)
class Reply:
    """One scripted answer.

    Args:
        pieces: Of its text.
        usage: What it costs.
        prefill: Steps of progress before the first piece: (done, total).
        error: Raised after the pieces.
        finished: False for one that ran to the most tokens allowed.
    """

    pieces: Sequence[str] = ("Hello", " there.")
    usage: Usage = field(default_factory=lambda: usage(40))
    prefill: Sequence[tuple[int, int]] = ()
    error: Exception | None = None
    finished: bool = True


class ScriptedEngine:
    """Answers from a list.

    Args:
        replies: Answers in order; after the last one it says the same again and again.
        conversations: Sessions there are, the latest first.
        model: The model that is loaded, or None.
        context: Most tokens of a conversation: a token a character here.

    Attributes:
        gate: Every piece and step waits until this is set; tests clear it to stop the engine in the middle.
        waiting: Set while it waits at the gate.
        calls: Names and arguments of all calls that change something.
        prefixes: What is cached.
    """

    def __init__(
        self,
        replies: Iterable[Reply] = (),
        conversations: Iterable[Conversation] = (),
        model: ModelInfo | None = _TINY,
        context: int = 8192,
    ) -> None:
        self._replies = list(replies)
        self._known = {conversation.name: conversation for conversation in conversations}
        self._hidden: dict[str, Conversation] = {}
        self._undo: dict[str, list[Conversation]] = {}
        self.model = model
        self.context = context
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.calls: list[tuple[Any, ...]] = []
        self.available = [
            ModelItem("smollm2", "SmolLM2-135M-Instruct", "93 MB to download"),
            ModelItem("gemma3-270m", "Gemma 3 270M (base)", "on this machine"),
        ]
        self.on_warning: Callable[[str], object] | None = None
        self.load_error: Exception | None = None
        self.prefixes = ScriptedPrefixes()
        self.closed = False

    def _pass(self, stop: threading.Event | None = None) -> bool:
        """Wait at the gate; False when the work is to be stopped."""
        self.waiting.set()
        while not self.gate.wait(0.01):
            if stop is not None and stop.is_set():
                break
        self.waiting.clear()
        return stop is None or not stop.is_set()

    # --- models ----------------------------------------------------------------------------------------

    def models(self) -> list[ModelItem]:
        """Return two models."""
        return self.available

    def load(self, name: str, emit: Callable[[Event], None]) -> ModelInfo:
        """Load in two steps."""
        self.calls.append(("load", name))
        for done in (40, 80):
            emit(Progress("download", done, 100, name))
            self._pass()
        if self.load_error is not None:
            raise self.load_error
        self.model = ModelInfo(name, name, self.context, "float32 · cpu")
        return self.model

    # --- sessions --------------------------------------------------------------------------------------

    def sessions(self, words: str = "") -> list[SessionItem]:
        """Return sessions; the search looks for each word in names and turns."""
        found: list[SessionItem] = []
        for name, conversation in self._known.items():
            texts = [name, *(text for turn in conversation.turns for text in (turn.user, turn.reply or ""))]
            if all(any(word.lower() in text.lower() for text in texts) for word in words.split()):
                hit = next((t for t in texts[1:] if words and words.split()[0].lower() in t.lower()), "")
                found.append(SessionItem(name, hit[:40]))
        return found

    def open(self, name: str) -> Conversation:
        """Return one session."""
        if name not in self._known:
            raise ConfigError(f"no session {name!r}")
        return self._known[name]

    def create(self, name: str, system: str | None, settings: dict[str, Any]) -> None:
        """Add a session in front."""
        if name not in self._known:
            self.calls.append(("create", name, system, settings))
            self._known = {name: Conversation(name, system, settings), **self._known}

    def rename(self, name: str, new: str) -> None:
        """Rename."""
        if new in self._known:
            raise ConfigError(f"there is a session {new!r} already")
        self.calls.append(("rename", name, new))
        self._known = {
            (new if key == name else key): (replace(value, name=new) if key == name else value)
            for key, value in self._known.items()
        }

    def fork(self, name: str, new: str) -> None:
        """Copy."""
        if new in self._known:
            raise ConfigError(f"there is a session {new!r} already")
        self.calls.append(("fork", name, new))
        self._known = {new: replace(self.open(name), name=new), **self._known}

    def delete(self, name: str) -> None:
        """Hide."""
        self.calls.append(("delete", name))
        self._hidden[name] = self._known.pop(name)

    def undelete(self, name: str) -> str:
        """Bring back."""
        self.calls.append(("undelete", name))
        self._known = {name: self._hidden.pop(name), **self._known}
        return name

    def set_system(self, name: str, system: str | None) -> None:
        """Note another system message."""
        self.calls.append(("set_system", name, system))
        self._known[name] = replace(self.open(name), system=system)

    def set_settings(self, name: str, settings: dict[str, Any]) -> None:
        """Note other settings."""
        self.calls.append(("set_settings", name, settings))
        self._known[name] = replace(self.open(name), settings=settings)

    def delete_turn(self, name: str, turn: int) -> None:
        """Take a turn out."""
        self.calls.append(("delete_turn", name, turn))
        before = self.open(name)
        self._change(replace(before, turns=before.turns[:turn] + before.turns[turn + 1 :]))

    def undo(self, name: str) -> bool:
        """Go back to how it was before."""
        self.calls.append(("undo", name))
        earlier = self._undo.get(name)
        if not earlier:
            return False
        self._known[name] = earlier.pop()
        return True

    def export(self, name: str, kind: str) -> str:
        """Return a simple text."""
        conversation = self.open(name)
        if kind == "json":
            return json.dumps({"name": name, "turns": len(conversation.turns)})
        return "\n".join([f"# {name}", *(f"{turn.user}\n{turn.reply}" for turn in conversation.turns)])

    def _change(self, conversation: Conversation) -> None:
        self._undo.setdefault(conversation.name, []).append(self._known[conversation.name])
        self._known[conversation.name] = conversation

    # --- talking ---------------------------------------------------------------------------------------

    def attach(self, name: str, path: Path, emit: Callable[[Event], None], stop: threading.Event) -> Usage:
        """Compute in four steps of 256 tokens."""
        self.calls.append(("attach", name, path.name))
        if not path.is_file():
            raise ConfigError(f"no file {str(path)!r}")
        for done in (256, 512, 768, 1024):
            emit(Progress("prefill", done, 1024, path.name))
            if not self._pass(stop):
                raise Stopped
        before = self.open(name)
        self._change(replace(before, pending=(*before.pending, path.name)))
        return usage(1024, new=0, total_s=3.2, ttft_s=0.0)

    def reply(self, name: str, ask: Ask, emit: Callable[[Event], None], stop: threading.Event) -> Exchange:
        """Say the next answer."""
        self.calls.append((ask.kind, name, ask.text, ask.turn))
        before = self.open(name)
        turns, text = before.turns, ask.text
        if ask.kind == "regenerate":
            if not turns:
                raise PromptError("there is nothing to answer yet: send something first")
            turns, text = turns[:-1], turns[-1].user
        elif ask.kind == "edit":
            turns = turns[: ask.turn]
        documents = before.pending if ask.kind == "send" else before.turns[len(turns)].documents
        tokens = sum(len(turn.user) + len(turn.reply or "") for turn in turns) + len(text)
        if tokens > self.context and not ask.drop_oldest:
            raise ContextFull(tokens, 512, self.context, 1, tokens // 2, 12.0)
        script = self._replies.pop(0) if self._replies else Reply()
        said: list[str] = []
        for done, total in script.prefill:
            emit(Progress("prefill", done, total))
            if not self._pass(stop):
                raise Stopped
        for piece in script.pieces:
            if not self._pass(stop):
                break
            said.append(piece)
            emit(Piece(piece))
        stopped = stop.is_set()
        if stopped and not said:
            raise Stopped
        if script.error is not None and not stopped:
            raise script.error
        whole = Exchange(
            text,
            "".join(said) or None,
            script.usage if said else None,
            script.finished and not stopped,
            documents,
            1 if ask.drop_oldest else 0,
        )
        self._change(replace(before, turns=(*turns, whole), pending=()))
        return whole

    def preview(self, name: str | None, ask: Ask) -> Preview | None:
        """Count a token a character; all but the new words is reusable."""
        if self.model is None:
            return None
        conversation = self._known.get(name or "")
        turns = conversation.turns if conversation is not None else ()
        kept = turns[: ask.turn] if ask.kind == "edit" else turns
        tokens = sum(len(turn.user) + len(turn.reply or "") for turn in kept)
        return Preview(tokens + len(ask.text), tokens, {"disk": tokens} if tokens else {})

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True
