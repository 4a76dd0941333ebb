"""Steps of a long command, shown as they run: live on a terminal, one line each elsewhere."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvembed._cli._common import console
from kvembed._units import format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Steps"]


class Steps:
    """Shows what is going on, on stderr, so that stdout holds results only.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = console(stderr=True)
        self._quiet = quiet

    @contextmanager
    def step(self, text: str) -> Iterator[Callable[[int, int], None]]:
        """Show ``text`` while the block runs, and its seconds after; yields ``callable(done, total)`` for a bar."""
        began = time.perf_counter()
        if self._quiet or not self._console.is_terminal:
            yield _ignore
        else:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            # Slowly refreshed: the display must not take the cores whose speed is being measured.
            with Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
                refresh_per_second=4,
            ) as progress:
                task = progress.add_task(text, total=None)

                def update(done: int, total: int) -> None:
                    # A finished prefill pulses again: what follows (decoding) has no known length.
                    progress.update(task, completed=done, total=total if done < total else None)

                yield update
        if not self._quiet:
            self._console.print(f"{text} … {format_seconds(time.perf_counter() - began)}", markup=False)


def _ignore(done: int, total: int) -> None:
    """Progress that nobody looks at."""
