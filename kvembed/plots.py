"""Plots of what calls cost and what a store holds: ``pip install 'kvembed[notebook]'``.

::

    from kvembed import plots

    plots.ttft(model)  # time to first token, call by call, against an estimate without the cache
    plots.tokens(model)  # where each prompt came from
    plots.growth(model.store)
    plots.hit_rates(model.store)

Each function returns a matplotlib ``Figure`` that shows itself in a notebook, on light pages and on dark ones, or
draws into ``ax=``, axes of your own. Nothing global is touched: no window system is chosen, no style is set.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError
from kvembed._html import COMPUTED, TIER_ORDER, rgba
from kvembed._units import format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvembed._hitcurve import HitCurve
    from kvembed._model import CachedModel
    from kvembed._store import KVStore
    from kvembed._usage import Usage

__all__ = ["growth", "hit_rates", "tokens", "ttft", "written"]

_INK = (0.5, 0.5, 0.5, 1.0)
"""Middle grey is read on white (4:1) and on black (5:1)."""

# As the glyphs of bars do: parts are told apart without colour too.
_HATCHES = {"cpu": "//", "disk": "..", "remote": "xx"}
_MOST_POINTS = 2000
_MOST_BARS = 60


def ttft(calls: CachedModel | Iterable[Usage], *, labels: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draw the time to the first token of each call.

    Beside a call that reused something stands, hollow, what it would have taken without: its own time and the estimate
    of ``usage.saved_s`` (reused tokens at the measured prefill speed).

    Args:
        calls: A model, for its ``history``, or the `Usage` of some calls. Only those that generated are drawn, and of
            many the latest.
        labels: What to call each of them; by default their numbers.
        ax: Axes to draw into; by default those of a new figure.

    Returns:
        The figure.

    Raises:
        ConfigError: matplotlib is missing, or there are not as many labels as calls.
    """
    usages, names = _calls(calls, labels, generated=True)
    figure, ax = _axes(ax, rows=len(usages))
    ax.set_title("Time to first token", color=_INK)
    if not usages:
        return _nothing(figure, ax, "nothing was generated yet")
    for row, usage in enumerate(usages):
        cached = usage.cached_tokens_by_tier
        tier = max(cached, key=cached.__getitem__) if 2 * usage.cached_tokens > usage.prompt_tokens else COMPUTED
        ax.barh(row, usage.ttft_s, color=rgba(tier, 0.85), edgecolor=_INK, hatch=_HATCHES.get(tier), linewidth=0.5)
        text = format_seconds(usage.ttft_s)
        end = usage.ttft_s
        if usage.saved_s is not None and usage.saved_s > 0 and usage.cached_tokens:
            end += usage.saved_s
            ax.barh(row, end, fill=False, edgecolor=_INK, linestyle="--", linewidth=0.8)
            text = f"{text}, without the cache ≈ {format_seconds(end)}"
        ax.annotate(text, (end, row), xytext=(4, 0), textcoords="offset points", va="center", color=_INK, fontsize=8)
    ax.set_xlabel("seconds")
    ax.margins(x=0.4)
    _rows(ax, names)
    _legend(ax, _tiers_of(usages))
    return figure


def tokens(calls: CachedModel | Iterable[Usage], *, labels: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draw which tier the tokens of each prompt came from.

    Args:
        calls: A model, for its ``history``, or the `Usage` of some calls; of many the latest.
        labels: What to call each of them; by default their numbers.
        ax: Axes to draw into; by default those of a new figure.

    Returns:
        The figure.

    Raises:
        ConfigError: matplotlib is missing, or there are not as many labels as calls.
    """
    usages, names = _calls(calls, labels, generated=False)
    figure, ax = _axes(ax, rows=len(usages))
    ax.set_title("Prompt tokens by where they came from", color=_INK)
    if not usages:
        return _nothing(figure, ax, "no calls yet")
    tiers = _tiers_of(usages)
    for row, usage in enumerate(usages):
        left = 0
        for tier in tiers:
            n = usage.computed_tokens if tier == COMPUTED else usage.cached_tokens_by_tier.get(tier, 0)
            if n:
                style = {"color": rgba(tier, 0.85), "edgecolor": _INK, "hatch": _HATCHES.get(tier), "linewidth": 0.5}
                ax.barh(row, n, left=left, **style)
            left += n
        text = f"{format_count(usage.computed_tokens)} computed"
        ax.annotate(text, (left, row), xytext=(4, 0), textcoords="offset points", va="center", color=_INK, fontsize=8)
    ax.set_xlabel("tokens")
    ax.margins(x=0.2)
    _rows(ax, names)
    _legend(ax, tiers)
    return figure


def growth(store: KVStore, *, ax: Any = None) -> Any:
    """Draw how a store on disk grew, with its budget: the blocks that are in it now, by when they were written.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, ax = _axes(ax)
    ax.set_title("Growth of the store", color=_INK)
    points = store.growth()
    if not points:
        return _nothing(figure, ax, "nothing is on disk yet")
    step = -(-len(points) // _MOST_POINTS)
    kept = [*points[:-1:step], points[-1]]
    scale, unit = _unit(max(kept[-1][1], 1))
    times = [datetime.datetime.fromtimestamp(when) for when, _ in kept]
    sizes = [nbytes / scale for _, nbytes in kept]
    ax.step(times, sizes, where="post", color=rgba("cpu", 1.0), marker="." if len(kept) < 50 else None)
    ax.fill_between(times, sizes, step="post", color=rgba("cpu", 0.2))
    ax.set(ylabel=unit, ylim=(0, 1.15 * sizes[-1]))
    ax.set_xlabel("blocks that are stored now, by the time they were written")
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter  # pyright: ignore[reportMissingImports]

    locator = AutoDateLocator(minticks=3, maxticks=7)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    ax.xaxis.get_offset_text().set_color(_INK)
    if store.max_disk_bytes:
        share = 100 * points[-1][1] / store.max_disk_bytes
        note = f"{share:.2g} % of the budget"
        ax.annotate(note, (0.02, 0.92), xycoords="axes fraction", color=_INK, fontsize=9)
    return figure


def hit_rates(store: KVStore | HitCurve, *, ax: Any = None) -> Any:
    """Draw what hit rate other disk budgets would have had, replayed from the log of calls.

    Args:
        store: The store, or what its ``hit_curve()`` returned.
        ax: Axes to draw into; by default those of a new figure.

    Raises:
        ConfigError: matplotlib is missing.
    """
    curve: Any = store if hasattr(store, "hit_rates") else store.hit_curve()  # pyright: ignore[reportAttributeAccessIssue]
    figure, ax = _axes(ax)
    ax.set_title(f"Hit rate by budget, {curve.calls:,} calls replayed (LRU)", color=_INK)
    if not curve.calls:
        return _nothing(figure, ax, "no calls logged yet")
    scale, unit = _unit(curve.working_set)
    ax.set_xscale("log")
    sizes = [budget / scale for budget in curve.budgets]
    ax.plot(sizes, [100 * rate for rate in curve.hit_rates], marker="o", color=rgba("cpu", 1.0))
    if curve.budget and curve.hit_rate is not None:
        ax.axvline(curve.budget / scale, linestyle="--", color=_INK)
        note = f"now {100 * curve.hit_rate:.0f} %"
        ax.annotate(note, (curve.budget / scale, 5), rotation=90, ha="right", color=_INK)
    ax.set(xlabel=f"disk budget ({unit})", ylabel="hit rate (%)", ylim=(0, 100))
    return figure


def written(store: KVStore | Mapping[str, int], *, limit: int | None = None, ax: Any = None) -> Any:
    """Draw the bytes written to disk on each of the latest days.

    Args:
        store: The store, or what its ``written_by_day()`` returned.
        limit: Most that may be written in a day; of a store its own.
        ax: Axes to draw into; by default those of a new figure.

    Raises:
        ConfigError: matplotlib is missing.
    """
    days: Any = store
    if hasattr(days, "written_by_day"):
        limit = days.stats().max_write_bytes_per_day if limit is None else limit
        days = days.written_by_day()
    figure, ax = _axes(ax)
    ax.set_title("Written to disk by day", color=_INK)
    if not days:
        return _nothing(figure, ax, "nothing written yet")
    scale, unit = _unit(max(days.values()))
    ax.bar(range(len(days)), [nbytes / scale for nbytes in days.values()], color=rgba("disk", 0.85))
    ax.set_xticks(range(len(days)), [day[5:] for day in days], rotation=90)
    ax.set_xlim(-0.6, max(len(days), 7) - 0.4)  # a single day is no wall
    if limit and limit <= 20 * max(days.values()):
        ax.axhline(limit / scale, linestyle="--", color=_INK)
    ax.set_ylabel(unit)
    return figure


# --- shared ------------------------------------------------------------------------------------------------


def _axes(ax: Any, rows: int | None = None) -> tuple[Any, Any]:
    """Return a figure and axes that are read on any page; a new figure, unless there are axes already."""
    if ax is None:
        from kvembed._figure import new_figure

        figure = new_figure((8.0, 3.6 if rows is None else 1.4 + 0.32 * max(rows, 1)))
        ax = figure.subplots()
    ax.set_facecolor("none")
    ax.tick_params(colors=_INK)
    for name in ("top", "right"):
        ax.spines[name].set_visible(False)
    for name in ("left", "bottom"):
        ax.spines[name].set_color(_INK)
    ax.xaxis.label.set_color(_INK)
    ax.yaxis.label.set_color(_INK)
    return ax.get_figure(), ax


def _calls(calls: Any, labels: Sequence[str] | None, *, generated: bool) -> tuple[list[Usage], list[str]]:
    usages: list[Usage] = list(getattr(calls, "history", calls))
    if labels is not None and len(labels) != len(usages):
        raise ConfigError(f"there are {len(usages)} calls but {len(labels)} labels: give as many as calls")
    names = [str(number) for number in range(1, len(usages) + 1)] if labels is None else list(labels)
    found = [
        (usage, name)
        for usage, name in zip(usages, names, strict=True)
        if not generated or usage.completion_tokens or usage.ttft_s
    ][-_MOST_BARS:]
    return [usage for usage, _ in found], [name for _, name in found]


def _tiers_of(usages: Iterable[Usage]) -> list[str]:
    seen = {tier for usage in usages for tier in usage.cached_tokens_by_tier}
    return [*(tier for tier in TIER_ORDER if tier in seen), *sorted(seen - set(TIER_ORDER)), COMPUTED]


def _rows(ax: Any, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), [name if len(name) <= 40 else f"{name[:39]}…" for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)  # the first call on top


def _legend(ax: Any, tiers: Sequence[str]) -> None:
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    handles = [Patch(facecolor=rgba(t, 0.85), edgecolor=_INK, hatch=_HATCHES.get(t), label=t) for t in tiers]
    ax.legend(handles=handles, frameon=False, labelcolor=_INK, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _nothing(figure: Any, ax: Any, why: str) -> Any:
    ax.annotate(why, (0.5, 0.5), xycoords="axes fraction", ha="center", color=_INK)
    return figure


def _unit(nbytes: int) -> tuple[float, str]:
    return (2.0**30, "GiB") if nbytes >= 2**30 else (2.0**20, "MiB")
