"""Progress of a long prefill: a callback first, a tqdm bar as one of its users."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

__all__ = ["prefill_progress", "Progress", "StoppedEarly", "wants_bar"]

Progress: TypeAlias = "bool | Literal['auto'] | Callable[[int, int], object]"
"""True or False for a bar, ``"auto"`` for one where someone looks, or ``callable(done_tokens, all_tokens)``."""

_AUTO_TOKENS = 2048  # shorter prefills end before a bar would be read


def _someone_looks() -> bool:
    if "ipykernel" in sys.modules:
        return True
    return bool(getattr(sys.stderr, "isatty", lambda: False)())


def wants_bar(progress: Any, is_long: bool) -> bool:
    """Return whether to show a bar, for something that takes long enough to be looked at or not."""
    if progress == "auto":
        return is_long and _someone_looks()
    return progress is not False and progress is not None


class StoppedEarly(Exception):
    """A call was stopped in its prefill: there is no token, and what was computed is kept."""


@contextmanager
def prefill_progress(
    progress: Any, done: int, total: int, cancel: threading.Event | None = None
) -> Iterator[Callable[[int, int], object] | None]:
    """Yield the function to call after each step, or None when nobody wants to know.

    Args:
        progress: What the caller asked for.
        done: Tokens that need not be computed.
        total: Tokens of the prompt.
        cancel: Once this is set, the function raises `StoppedEarly`.
    """
    with _shown(progress, done, total) as on_progress:
        if cancel is None:
            yield on_progress
            return

        def step(at: int, total: int) -> None:
            if on_progress is not None:
                on_progress(at, total)
            if cancel.is_set():
                raise StoppedEarly

        yield step


@contextmanager
def _shown(progress: Any, done: int, total: int) -> Iterator[Callable[[int, int], object] | None]:
    if callable(progress):
        callback: Callable[[int, int], object] = progress
        yield callback
        return
    if not wants_bar(progress, total - done >= _AUTO_TOKENS):
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, desc="prefill", unit="tok", unit_scale=True, leave=False) as bar:

        def update(at: int, _total: int) -> None:
            bar.update(at - bar.n)

        yield update
