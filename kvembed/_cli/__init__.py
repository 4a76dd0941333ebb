"""The ``kvembed`` command.

Commands import what they need when they run: ``kvembed --help`` must not wait for torch.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from kvembed._cli import _common, bench, demo, doctor, forget, key, portable, store, tree, warm
from kvembed._errors import KVEmbedError, KVEmbedWarning

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Shows kvembed's own errors and warnings as one line each; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            others = warnings.showwarning

            def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
                if issubclass(category, KVEmbedWarning):
                    _common.complain(str(message), error=False)
                else:
                    others(message, category, *args, **kwargs)

            warnings.showwarning = show
            try:
                return super().invoke(ctx)
            except KVEmbedError as error:
                _common.complain(str(error))
                raise typer.Exit(1) from error


# Not typer's pretty tracebacks: they replace sys.excepthook, and print local variables, which may hold prompts.
app = typer.Typer(
    name="kvembed",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from kvembed import __version__

        typer.echo(f"kvembed {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Prompt caching inside your own Python process: look at the store, try it, measure it."""


for _module in (demo, store, tree, warm, forget, portable, key, bench, doctor):
    _module.register(app)


def main() -> None:
    """Run the command line; the entry point of ``kvembed``."""
    for stream in (sys.stdout, sys.stderr):
        # Bars and × do not exist in every encoding: a question mark is better than a traceback.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    app()
