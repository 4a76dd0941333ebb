"""The plot of ``kvembed stats --plot FILE``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvembed import plots
from kvembed._errors import ConfigError
from kvembed._figure import new_figure

if TYPE_CHECKING:
    from pathlib import Path

    from kvembed._hitcurve import HitCurve

__all__ = ["plot"]


def plot(path: Path, curve: HitCurve, written: dict[str, int], limit: int | None) -> None:
    """Draw hit rate by budget, and bytes written by day.

    Args:
        path: File to write; its suffix chooses the format.
        curve: The hit rates.
        written: Bytes by day, oldest first.
        limit: Most that may be written in a day.

    Raises:
        ConfigError: matplotlib is missing, or cannot write this file.
    """
    figure = new_figure((10, 4))
    left, right = figure.subplots(1, 2)
    plots.hit_rates(curve, ax=left)
    plots.written(written, limit=limit, ax=right)
    try:
        # Some of what shows pictures shows transparent ones on black.
        figure.savefig(path, facecolor="white")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot to {path}: {error}") from error
