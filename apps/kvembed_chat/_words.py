"""Figures in words, as the interface shows them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvembed._units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvembed_chat._engine import ContextFull, Preview, Progress

__all__ = ["context_question", "free_name", "name_from", "preview_line", "progress_line", "time_left"]

_STAGES = {"download": "Downloading", "convert": "Converting", "load": "Loading", "prefill": "Reading"}


def time_left(done: int, total: int, first: int, seconds: float) -> float | None:
    """Return the seconds some work will still take, from how long it took since ``first``; None when unknown."""
    if done <= first or not total or seconds <= 0:
        return None
    return max(0.0, (total - done) * seconds / (done - first))


def progress_line(progress: Progress, left: float | None = None) -> str:
    """Return how far some work is, in words."""
    stage = _STAGES.get(progress.stage, progress.stage)
    words = f"{stage} {progress.what or ('the prompt' if progress.stage == 'prefill' else '')}".strip()
    if progress.total:
        if progress.stage == "download":
            words += f" · {format_bytes(progress.done)} of {format_bytes(progress.total)}"
        elif progress.stage == "prefill":
            words += f" · {format_count(progress.done)} of {format_count(progress.total)} tokens"
        else:
            words += f" · {100 * progress.done // progress.total} %"
    return words if left is None else f"{words} · about {format_seconds(left)} left"


def name_from(text: str, width: int = 32) -> str:
    """Return a name for a session from what is said first in it."""
    words = re.sub(r"\s+", " ", text).strip().strip("#*`>-. ")
    if len(words) > width:
        words = words[:width].rsplit(" ", 1)[0].rstrip(",;:.") + "…"
    return words or "Chat"


def free_name(wanted: str, taken: Collection[str]) -> str:
    """Return a name no session has yet."""
    if wanted not in taken:
        return wanted
    number = 2
    while f"{wanted} ({number})" in taken:
        number += 1
    return f"{wanted} ({number})"


def context_question(full: ContextFull) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return what to ask when the context is full, and the answers: (what is returned, label)."""
    text = (
        f"This conversation has {full.tokens:,} tokens and the reply may take {full.new_tokens:,}, "
        f"but the model's context is {full.limit:,}.\n\n"
    )
    if not full.dropped_turns:
        return text + "Leaving out old turns does not help: shorten the message, or allow fewer tokens.", (
            ("cancel", "Cancel"),
        )
    turns = "turn" if full.dropped_turns == 1 else f"{full.dropped_turns} turns"
    cost = f"{full.computed_tokens:,} tokens are then computed anew, once"
    if full.seconds is not None:
        cost += f" (about {format_seconds(full.seconds)})"
    text += f"The oldest {turns} can be left out of the prompt; {cost}. They stay in the transcript."
    return text, (("drop", "Leave out the oldest"), ("cancel", "Cancel"))


def preview_line(preview: Preview | None, *, editing: bool = False) -> str:
    """Return what sending now would reuse, in words."""
    if preview is None:
        return ""
    if editing:
        return f"prefix kept: {preview.reusable_tokens:,} tokens"
    return f"next turn: {preview.reusable_tokens:,} tokens reusable"
