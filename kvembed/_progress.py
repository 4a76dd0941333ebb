"""Progress of a long prefill: a callback first, a tqdm bar as one of its users."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Progress", "prefill_progress"]

Progress: TypeAlias = "bool | Literal['auto'] | Callable[[int, int], object]"
"""True or False for a bar, ``"auto"`` for one where someone looks, or ``callable(done_tokens, all_tokens)``."""

_AUTO_TOKENS = 2048  # shorter prefills end before a bar would be read


def _someone_looks() -> bool:
    if "ipykernel" in sys.modules:
        return True
    return bool(getattr(sys.stderr, "isatty", lambda: False)())


@contextmanager
def prefill_progress(progress: Any, done: int, total: int) -> Iterator[Callable[[int, int], object] | None]:
    """Yield the function to call after each step, or None when nobody wants to know.

    Args:
        progress: What the caller asked for.
        done: Tokens that need not be computed.
        total: Tokens of the prompt.
    """
    if callable(progress):
        callback: Callable[[int, int], object] = progress
        yield callback
        return
    if (
        progress is False
        or progress is None
        or (progress == "auto" and (total - done < _AUTO_TOKENS or not _someone_looks()))
    ):
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, desc="prefill", unit="tok", unit_scale=True, leave=False) as bar:

        def update(at: int, _total: int) -> None:
            bar.update(at - bar.n)

        yield update
