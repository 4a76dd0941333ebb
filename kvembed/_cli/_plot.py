"""The plot of ``kvembed stats --plot FILE``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvembed._errors import ConfigError

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
    try:
        # Not pyplot, which would choose a window system and keep the figure for ever.
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'kvembed[notebook]'") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="disk budget (GiB)", ylabel="hit rate (%)", ylim=(0, 100))
    left.set_title(f"Hit rate by budget, {curve.calls:,} calls replayed (LRU)")
    if curve.calls:
        left.set_xscale("log")
        sizes = [budget / 2**30 for budget in curve.budgets]
        left.plot(sizes, [100 * rate for rate in curve.hit_rates], marker="o")
        if curve.budget and curve.hit_rate is not None:
            left.axvline(curve.budget / 2**30, linestyle="--", color="gray")
            left.annotate(f"now {100 * curve.hit_rate:.0f} %", (curve.budget / 2**30, 5), rotation=90, ha="right")
    right.set(title="Written to disk by day", ylabel="GiB")
    days = list(written)
    right.bar(range(len(days)), [nbytes / 2**30 for nbytes in written.values()])
    right.set_xticks(range(len(days)), [day[5:] for day in days], rotation=90)
    if limit:
        right.axhline(limit / 2**30, linestyle="--", color="gray")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot to {path}: {error}") from error
