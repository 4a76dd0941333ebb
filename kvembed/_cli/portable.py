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
        what: _What,
        file: _Target,
        plain: bool = typer.Option(False, "--plain", help="Do not encrypt the file of an encrypted store."),
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Write the blocks of a sequence to one file.

        The file of an encrypted store is encrypted with its key. Any other has the text's tokens in it, for whoever has
        the file.
        """
        with _common.existing_store(folder) as store:
            report = store.export(file, what, plain=plain)
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
        key: str | None = typer.Option(
            None, help="Where the key of an encrypted file is: env, keyring or keyring:name.", show_default=False
        ),
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Take in the blocks of an exported file, every byte checked.

        Without --model a file of a model that has no blocks here is refused, unless the store is empty.
        """
        from kvembed._store import KVStore

        with KVStore(_common.store_path(folder)) as store:
            if model is None:
                report = store.import_(file, pin=pin, any_model=any_model, key=key)
            else:
                with _common.load_model(model, store, Steps(quiet=as_json), dtype=dtype) as cached:
                    report = cached.import_(file, pin=pin, key=key)
        _common.show(report, as_json)
