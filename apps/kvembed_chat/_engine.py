"""What the interface knows of models, conversations and costs: an engine, its data and its events.

Nothing here, and nothing in the widgets, imports torch or transformers. Two engines exist: `kvembed_chat._real` over a
`CachedModel`, and `kvembed_chat._scripted` for tests. Every method may block, and is called in a thread of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

    from kvembed import Usage
    from kvembed_chat._prefixes import PrefixSource

__all__ = [
    "Ask",
    "ContextFull",
    "Conversation",
    "Engine",
    "Event",
    "Exchange",
    "ModelInfo",
    "ModelItem",
    "Piece",
    "Preview",
    "Progress",
    "SessionItem",
    "Stopped",
]


class Stopped(Exception):
    """Work was stopped because the user asked for it, before there was anything to keep of it."""


@dataclass(frozen=True)
class Progress:
    """How far some long work is.

    Args:
        stage: What is done: ``"download"``, ``"convert"``, ``"load"`` or ``"prefill"``.
        done: So many bytes, steps or tokens ...
        total: ... of so many; 0 when nobody knows.
        what: Of what, for the eye: the name of a document or model.
    """

    stage: str
    done: int = 0
    total: int = 0
    what: str = ""


@dataclass(frozen=True)
class Piece:
    """Some text of a reply."""

    text: str


Event = Progress | Piece


@dataclass(frozen=True)
class ModelInfo:
    """The model that answers.

    Args:
        name: What it was asked for by.
        title: For the eye.
        context: Context length in tokens, or None.
        detail: Format and device: ``float32 · cpu``.
        refusal: Why its KV cannot be kept, or None.
    """

    name: str
    title: str
    context: int | None = None
    detail: str = ""
    refusal: str | None = None


@dataclass(frozen=True)
class ModelItem:
    """A model that could be loaded.

    Args:
        name: What to load it by.
        title: For the eye.
        note: Where it is, or how much has to be downloaded.
    """

    name: str
    title: str
    note: str = ""


@dataclass(frozen=True)
class SessionItem:
    """One line of the list of sessions; ``excerpt`` is what a search found in it."""

    name: str
    excerpt: str = ""


@dataclass(frozen=True)
class Exchange:
    """One turn.

    Args:
        user: What the user said.
        reply: The answer, or None.
        usage: What it cost, or None.
        finished: False when it was stopped or ran to the most tokens allowed.
        documents: Names of what was attached to it.
        dropped_turns: Oldest turns left out of its prompt.
    """

    user: str
    reply: str | None = None
    usage: Usage | None = None
    finished: bool = True
    documents: tuple[str, ...] = ()
    dropped_turns: int = 0


@dataclass(frozen=True)
class Conversation:
    """A session as it is now.

    Args:
        name: What it is called.
        system: System message, or None.
        settings: Arguments of ``generate()``.
        turns: Oldest first.
        pending: Documents attached after the last turn.
    """

    name: str
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    turns: tuple[Exchange, ...] = ()
    pending: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """A reply that is wanted.

    Args:
        kind: ``"send"`` something new, ``"edit"`` an earlier turn, or ``"regenerate"`` the last reply.
        text: What the user says; nothing for ``"regenerate"``.
        turn: Which turn is edited.
        drop_oldest: Leave out the oldest turns if it does not fit the context.
        sent_at: ``time.perf_counter()`` when the user sent it: the time to the first token starts there.
    """

    kind: Literal["send", "edit", "regenerate"]
    text: str = ""
    turn: int | None = None
    drop_oldest: bool = False
    sent_at: float = 0.0


@dataclass(frozen=True)
class Preview:
    """What sending something would cost.

    Args:
        prompt_tokens: Of the whole prompt.
        reusable_tokens: Of those, what need not be computed.
        by_tier: The same by where it is kept.
    """

    prompt_tokens: int
    reusable_tokens: int
    by_tier: dict[str, int] = field(default_factory=dict)


class ContextFull(Exception):
    """A conversation does not fit the context any more.

    Args:
        tokens: Of the prompt.
        new_tokens: That may be generated.
        limit: The context.
        dropped_turns: So many of the oldest turns would have to be left out; 0 when that does not help.
        computed_tokens: Tokens that would be computed anew then.
        seconds: Estimate of how long that takes, or None.
    """

    def __init__(
        self,
        tokens: int,
        new_tokens: int,
        limit: int,
        dropped_turns: int = 0,
        computed_tokens: int = 0,
        seconds: float | None = None,
    ) -> None:
        super().__init__(f"the conversation has {tokens:,} tokens, but the context is {limit:,}")
        self.tokens = tokens
        self.new_tokens = new_tokens
        self.limit = limit
        self.dropped_turns = dropped_turns
        self.computed_tokens = computed_tokens
        self.seconds = seconds


class Engine(Protocol):
    """Models, conversations and their KV. Errors are exceptions whose text says what to do."""

    on_warning: Callable[[str], object] | None
    """Called with what is wrong with the cache though answers go on (a damaged block, a full disk), from any thread."""

    @property
    def model(self) -> ModelInfo | None:
        """The model that is loaded."""
        ...

    @property
    def prefixes(self) -> PrefixSource:
        """What is cached, for the gauges and the inspector."""
        ...

    def models(self) -> list[ModelItem]:
        """Return what can be loaded: aliases, and models on this machine."""
        ...

    def load(self, name: str, emit: Callable[[Event], None]) -> ModelInfo:
        """Load a model in the place of the one before."""
        ...

    def sessions(self, words: str = "") -> list[SessionItem]:
        """Return sessions, the latest first; with words, only those that have all of them."""
        ...

    def open(self, name: str) -> Conversation:
        """Return a session as it is now."""
        ...

    def create(self, name: str, system: str | None, settings: dict[str, Any]) -> None:
        """Make a session; one that exists is left as it is."""
        ...

    def rename(self, name: str, new: str) -> None:
        """Call a session something else."""
        ...

    def fork(self, name: str, new: str) -> None:
        """Make a session that goes on from where another one is."""
        ...

    def delete(self, name: str) -> None:
        """Hide a session until `close`, which erases it."""
        ...

    def undelete(self, name: str) -> str:
        """Bring a deleted session back; return its name, another one where its own was taken meanwhile."""
        ...

    def set_system(self, name: str, system: str | None) -> None:
        """Give a session another system message."""
        ...

    def set_settings(self, name: str, settings: dict[str, Any]) -> None:
        """Give a session other arguments of ``generate()``."""
        ...

    def attach(self, name: str, path: Path, emit: Callable[[Event], None], stop: threading.Event) -> Usage:
        """Compute a document and pin it, in front of what the user says next."""
        ...

    def reply(self, name: str, ask: Ask, emit: Callable[[Event], None], stop: threading.Event) -> Exchange:
        """Answer; once ``stop`` is set, what was said so far is kept and returned.

        Raises:
            ContextFull: It does not fit, and ``ask.drop_oldest`` is not set.
        """
        ...

    def preview(self, name: str | None, ask: Ask) -> Preview | None:
        """Say what sending something would cost; None while nobody can say. Never waits for a reply."""
        ...

    def delete_turn(self, name: str, turn: int) -> None:
        """Leave a turn out of a conversation."""
        ...

    def undo(self, name: str) -> bool:
        """Take back the last change of a conversation; False when there is none."""
        ...

    def export(self, name: str, kind: str) -> str:
        """Return a conversation as ``"md"`` or ``"json"``."""
        ...

    def close(self) -> None:
        """Write what is pending and release everything."""
        ...
