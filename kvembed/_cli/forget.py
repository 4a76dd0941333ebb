"""``kvembed forget``: erase a text from the store, and look for what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvembed._cli import _common
from kvembed._cli._steps import Steps
from kvembed._errors import ConfigError, UnsupportedModelError

__all__ = ["register"]

_File = Annotated[Path | None, typer.Argument(help="Text file, UTF-8, as it was given to warm.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def forget(
        file: _File = None,
        text: str | None = typer.Option(None, help="A text in place of a file.", show_default=False),
        model: str = typer.Option("smollm2", help="Model that stored it: alias, hub id, folder or GGUF file."),
        system: str | None = typer.Option(None, help="System message before the document.", show_default=False),
        dtype: str = typer.Option("auto", help="Type of the weights it was stored with."),
        yes: _common.YesOption = False,
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Erase a text and what was asked about it, and scan the store for traces.

        FILE is what was given to kvembed warm or model.document(). What other texts share stays. Ends with status 1
        when the scan found something. kvembed rm erases by id or pinned name, without loading a model.
        """
        if (file is None) == (text is None):
            raise ConfigError("say what to forget: a FILE, or --text with the text itself")
        if file is not None and not file.is_file():
            raise typer.BadParameter(f"no file {str(file)!r}", param_hint="FILE")
        store = _common.existing_store(folder)
        steps = Steps(quiet=as_json)
        with store, _common.load_model(model, store, steps, dtype=dtype) as cached:
            if cached.support is not None:
                raise UnsupportedModelError(f"kvembed cannot cache {model}: {cached.support}")
            what = text if file is None else cached.document(file, system=system, prefill=False)
            name = "this text" if file is None else file.name
            _common.confirm(f"Erase {name} from {store.path}?", yes)
            with steps.step("Erasing and scanning"):
                report = cached.forget(what)
        _common.conclude(report, as_json)
