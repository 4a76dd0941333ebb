"""What the commands share: options, consoles, tables, JSON, sizes and ages."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvembed._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.table import Table

    from kvembed._cli._steps import Steps
    from kvembed._model import CachedModel
    from kvembed._store import KVStore

__all__ = [
    "DirOption",
    "JsonOption",
    "YesOption",
    "complain",
    "conclude",
    "confirm",
    "console",
    "existing_store",
    "holds_store",
    "load_model",
    "open_store",
    "print_json",
    "show",
    "store_path",
    "table",
]

DirOption = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder of the store; by default the one in the user's cache.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def console(*, stderr: bool = False) -> Console:
    """Return a console; without a terminal it is wide, so that piped tables are not cut to 80 columns."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else 140
    return Console(stderr=stderr, width=wide, highlight=False)


def complain(message: str, *, error: bool = True) -> None:
    """Print one line on stderr: red for an error, yellow for a warning."""
    from rich.text import Text

    line = Text.assemble(("error: ", "bold red"), message) if error else Text.assemble(("warning: ", "yellow"), message)
    console(stderr=True).print(line, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print ``value`` (dataclasses, bytes and paths too) as JSON."""
    # Pipes of other encodings get escapes: a replaced character would change the data.
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=not utf8))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, os.PathLike) else value


def show(report: Any, as_json: bool) -> None:
    """Print a report: as JSON, or in its own words."""
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))


def conclude(report: Any, as_json: bool) -> None:
    """Print a report, and end with status 1 when it is not ``ok``."""
    show(report, as_json)
    if not report.ok:
        raise typer.Exit(1)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> Table:
    """Return a plain table. A header that starts with ``>`` sets its column to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for header in headers:
        right = header.startswith(">")
        result.add_column(header.lstrip(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        # Text and not str: names given by users may hold what looks like markup.
        result.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return result


def confirm(question: str, yes: bool) -> None:
    """Ask before something is deleted; end with status 1 when the answer is no.

    Raises:
        ConfigError: There is nobody to ask, and ``--yes`` was not given.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody to ask here: add --yes to do it, or --dry-run to look")
    if not typer.confirm(question):
        raise typer.Exit(1)


def store_path(folder: Path | None) -> Path:
    """Return the folder of the store that a command works on."""
    if folder is not None:
        return folder.expanduser().absolute()
    from kvembed._paths import store_dir

    return store_dir()


def holds_store(path: Path) -> bool:
    """Return True when a folder holds a store, also one whose catalog was lost."""
    return (path / "kvembed.db").exists() or (path / "blocks").is_dir()


def open_store(folder: Path | None, *, read_only: bool = False) -> KVStore | None:
    """Open an existing store; None when there is none yet, since looking must not create one."""
    path = store_path(folder)
    if path.is_dir() and not holds_store(path):
        return None  # the user's own folder, perhaps by a slip of the keyboard
    if not path.exists():
        return None
    from kvembed._store import KVStore

    return KVStore(path, read_only=read_only or None)


def existing_store(folder: Path | None) -> KVStore:
    """Open a store that has to be there.

    Raises:
        ConfigError: There is none.
    """
    store = open_store(folder)
    if store is None:
        raise ConfigError(f"there is no store at {store_path(folder)}")
    return store


def load_model(name: str, store: KVStore, steps: Steps, **options: Any) -> CachedModel:
    """Load and wrap a model, showing downloads and conversions as a step."""
    with steps.step(f"Loading {name}") as update:
        from kvembed import CachedModel

        def on_progress(stage: str, done: int, total: int) -> None:
            update(done, total)

        return CachedModel.from_pretrained(name, store=store, on_progress=on_progress, **options)
