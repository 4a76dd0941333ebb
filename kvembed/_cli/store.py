"""Commands on the store: ``ls``, ``stats``, ``path``, ``rm``, ``prune`` and ``verify``. No model is loaded."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvembed._cli import _common
from kvembed._codecs.names import LOSSLESS
from kvembed._errors import ConfigError
from kvembed._units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from kvembed._store_types import PrefixEntry

__all__ = ["register"]


_Targets = Annotated[
    list[str] | None, typer.Argument(help="Ids from kvembed ls, or names of pinned documents.", show_default=False)
]

_PlotOption = Annotated[
    Path | None,
    typer.Option(help="Draw hit rates and written bytes into this file (.png, .svg, .pdf).", show_default=False),
]


def _absent(folder: Path | None, as_json: bool, value: Any) -> None:
    """Say that there is no store yet; to a listing that is an empty one, not an error."""
    if as_json:
        _common.print_json(value)
    else:
        _common.console().print(f"No store at {_common.store_path(folder)} yet.", markup=False, soft_wrap=True)


def _row(entry: PrefixEntry) -> tuple[str, ...]:
    used = "" if entry.last_used is None else f"{format_seconds(max(0.0, time.time() - entry.last_used))} ago"
    numbers = (format_count(entry.n_tokens), format_count(entry.n_blocks), format_bytes(entry.nbytes))
    return (entry.id, *numbers, entry.codec, used, ", ".join(entry.names), entry.model)


def register(app: typer.Typer) -> None:
    """Add the commands."""

    @app.command()
    def ls(
        limit: int = typer.Option(50, min=1, help="Most sequences to show."),
        sort: str = typer.Option("used", help="used, created or tokens."),
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """List the stored sequences, each with all blocks before its end.

        The text itself is not shown: the catalog does not hold it.
        """
        store = _common.open_store(folder)
        if store is None:
            _absent(folder, as_json, [])
            return
        with store:
            entries = store.ls(limit=limit, sort=sort)
        if as_json:
            _common.print_json([entry.to_dict() for entry in entries])
            return
        headers = ("id", ">tokens", ">blocks", ">KV", "codec", ">used", "pinned as", "model")
        rows = [_row(entry) for entry in entries]
        if all(entry.codec == LOSSLESS for entry in entries):
            headers, rows = headers[:4] + headers[5:], [row[:4] + row[5:] for row in rows]
        _common.console().print(_common.table(headers, rows))
        if len(entries) == limit:
            typer.echo(f"The first {limit}; see more with --limit.")

    @app.command()
    def stats(
        plot: _PlotOption = None,
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Show how full the store is, what was reused and written, and what hit rate other budgets would have had.

        Budgets and limits shown are the defaults: those of a program that opened the store otherwise are its own.
        """
        store = _common.open_store(folder)
        if store is None:
            _absent(folder, as_json, {"path": str(_common.store_path(folder)), "exists": False})
            return
        with store:
            found, curve, written = store.stats(), store.hit_curve(), store.written_by_day()
        if plot is not None:
            from kvembed._cli._plot import plot as draw

            draw(plot, curve, written, found.max_write_bytes_per_day)
        if as_json:
            more = {"hit_curve": curve.to_dict(), "written_by_day": written, "exists": True}
            _common.print_json({**found.to_dict(), **more})
            return
        typer.echo(repr(found))
        typer.echo(f"\n{curve}")
        if plot is not None:
            typer.echo(f"Plot: {plot}")

    @app.command()
    def path(folder: _common.DirOption = None, as_json: _common.JsonOption = False) -> None:
        """Print the folder of the store."""
        place = _common.store_path(folder)
        if as_json:
            from kvembed._paths import cache_dir, models_dir

            folders = {"store": place, "cache": cache_dir(), "models": models_dir()}
            _common.print_json({**folders, "exists": _common.holds_store(place)})
        else:
            typer.echo(place)

    @app.command()
    def rm(
        targets: _Targets = None,
        everything: bool = typer.Option(False, "--all", help="Remove everything, pinned documents too."),
        yes: _common.YesOption = False,
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Erase sequences: every block that nothing else needs."""
        if bool(targets) == everything:
            raise ConfigError("name what to remove (ids from kvembed ls, or pinned names), or give --all")
        with _common.existing_store(folder) as store:
            if everything:
                _common.confirm(f"Erase everything in {store.path}?", yes)
                removed = store.clear()
            else:
                names, pinned = list(targets or ()), store.pins()
                for name in names:
                    if name not in pinned:
                        store._find(name)  # a wrong one must be found before another is erased
                _common.confirm(f"Erase {', '.join(names)}?", yes)
                removed = sum(store.remove(name) for name in names)
        if as_json:
            _common.print_json({"blocks": removed})
        else:
            typer.echo(f"Removed {removed:,} blocks.")

    @app.command()
    def prune(
        older_than: str | None = typer.Option(
            None, help="Remove what was not used for so long: 30d, 12h, 2w.", show_default=False
        ),
        max_bytes: str | None = typer.Option(
            None, help="Remove the longest unused until the store is no larger: 5GiB, 800MB.", show_default=False
        ),
        dry_run: bool = typer.Option(False, "--dry-run", help="Only say what would go."),
        yes: _common.YesOption = False,
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Remove old sequences. Pinned documents stay."""
        if older_than is None and max_bytes is None:
            raise ConfigError("say what to remove: --older-than 30d, or --max-bytes 5GiB, or both")
        from kvembed._units import parse_age, parse_bytes

        rules: dict[str, Any] = {
            "older_than_s": None if older_than is None else parse_age(older_than, name="--older-than"),
            "max_bytes": None if max_bytes is None else parse_bytes(max_bytes, name="--max-bytes"),
        }
        store = _common.open_store(folder)
        if store is None:
            _absent(folder, as_json, {"blocks": 0, "nbytes": 0, "dry_run": dry_run})
            return
        with store:
            report = store.prune(**rules, dry_run=True)
            if not dry_run and report.blocks:
                _common.confirm(f"Remove {report.blocks:,} blocks ({format_bytes(report.nbytes)})?", yes)
                report = store.prune(**rules)
        if as_json:
            _common.print_json(report.to_dict())
        else:
            typer.echo(str(report) if report.blocks else "Nothing to remove.")

    @app.command()
    def verify(
        fix: bool = typer.Option(False, "--fix", help="Repair: bad files are moved to quarantine, lost rows dropped."),
        recompute: bool = typer.Option(
            False, "--recompute", help="Compute the blocks of --model again instead, and quarantine what differs."
        ),
        model: str = typer.Option("smollm2", help="With --recompute: alias, hub id, folder or GGUF file."),
        dtype: str = typer.Option("auto", help="With --recompute: type of the weights."),
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Read every block from end to end and compare it with its checksums and with the catalog.

        Ends with status 1 when something is wrong and was not repaired.
        """
        if recompute:
            from kvembed._cli.recompute import recompute as run

            run(model, dtype, folder, as_json=as_json)
            return
        store = _common.open_store(folder)
        if store is None:
            _absent(folder, as_json, {"blocks": 0, "nbytes": 0, "problems": [], "fixed": 0, "ok": True})
            return
        from kvembed._cli._steps import Steps

        with store, Steps(quiet=as_json or not sys.stderr.isatty()).step("Verifying") as progress:
            report = store.verify(fix=fix, on_progress=progress)
        _common.conclude(report, as_json)
