"""``kvembed export`` and ``kvembed import``: stored sequences as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvembed._cli import _common
from kvembed._cli._steps import Steps

__all__ = ["register"]

_What = Annotated[str, typer.Argument(help="Id from kvembed ls, or name of a pinned document.", show_default=False)]
_Target = Annotated[Path, typer.Argument(help="File to write.", show_default=False)]
_Source = Annotated[Path, typer.Argument(help="File that kvembed export wrote.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands."""

    @app.command()
    def export(
        what: _What, file: _Target, folder: _common.DirOption = None, as_json: _common.JsonOption = False
    ) -> None:
        """Write the blocks of a sequence to one file.

        The file is not encrypted and has the text's tokens in it.
        """
        with _common.existing_store(folder) as store:
            report = store.export(file, what)
        _common.show(report, as_json)

    @app.command(name="import")
    def import_(
        file: _Source,
        model: str | None = typer.Option(
            None, help="Load this model and take the file only if it wrote it.", show_default=False
        ),
        dtype: str = typer.Option("auto", help="Type of that model's weights."),
        any_model: bool = typer.Option(False, "--any-model", help="Take blocks of a model the store does not know."),
        pin: str | None = typer.Option(None, help="Pin them under this name.", show_default=False),
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Take in the blocks of an exported file, every byte checked.

        Without --model a file of a model that has no blocks here is refused, unless the store is empty.
        """
        from kvembed._store import KVStore

        with KVStore(_common.store_path(folder)) as store:
            if model is None:
                report = store.import_(file, pin=pin, any_model=any_model)
            else:
                with _common.load_model(model, store, Steps(quiet=as_json), dtype=dtype) as cached:
                    report = cached.import_(file, pin=pin)
        _common.show(report, as_json)
