"""What one generation needs from transformers' hooks: the first token's time, the ids so far, a way to stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    import threading

__all__ = ["PromptOnceStreamer", "Watch", "with_watch"]


class Watch(StoppingCriteria):
    """Sees every token, never changes one.

    Args:
        cancel: Generation stops after the current token once this is set.

    Attributes:
        first_token_at: ``time.perf_counter()`` of the first token, or None.
        last: Ids after the latest token, ``[1, n]``.
    """

    def __init__(self, cancel: threading.Event | None = None) -> None:
        self._cancel = cancel
        self.first_token_at: float | None = None
        self.last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Note the time and the ids; ask to stop only when cancelled."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.last = input_ids
        stop = self._cancel is not None and self._cancel.is_set()
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)


def with_watch(criteria: Any, watch: Watch) -> StoppingCriteriaList:
    """Return the caller's stopping criteria with ours behind them; theirs is left as it was."""
    return StoppingCriteriaList([*(criteria or []), watch])


class PromptOnceStreamer(BaseStreamer):
    """Passes everything on, but the prompt only once, also when a call is repeated without a bad block."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._prompt_seen = False
        self._skip = False

    def repeat(self) -> None:
        """The call starts again: the next ``put`` is the prompt once more."""
        self._skip = self._prompt_seen

    def put(self, value: Any) -> None:
        """Pass tokens on."""
        if self._skip:
            self._skip = False
            return
        self._prompt_seen = True
        self._streamer.put(value)

    def end(self) -> None:
        """Pass the end on."""
        self._streamer.end()
