"""``kvembed warm``: compute the KV of a file now, so that questions about it start at once later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvembed._cli import _common
from kvembed._cli._steps import Steps
from kvembed._errors import UnsupportedModelError
from kvembed._units import format_bytes, format_count, format_seconds

__all__ = ["register"]

_File = Annotated[Path, typer.Argument(help="Text file, UTF-8.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def warm(
        file: _File,
        model: str = typer.Option("smollm2", help="Alias, hub id, folder or GGUF file."),
        name: str | None = typer.Option(None, help="Name of the document; by default the file's.", show_default=False),
        system: str | None = typer.Option(None, help="System message before the document.", show_default=False),
        pin: bool = typer.Option(False, "--pin", help="Keep it when other blocks are evicted."),
        dtype: str = typer.Option("auto", help="Type of the weights; blocks serve only the type they were made with."),
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Prefill a file as a document and store its KV.

        model.document(FILE) then finds it in any process, as long as the model, its type and the system message
        are the same.
        """
        if not file.is_file():
            raise typer.BadParameter(f"no file {str(file)!r}", param_hint="FILE")
        from kvembed._store import KVStore

        steps = Steps(quiet=as_json)
        # Asked for by name, so it is written even when today's write budget is spent; it counts all the same.
        with KVStore(_common.store_path(folder), max_write_bytes_per_day=None) as store:
            with _common.load_model(model, store, steps, dtype=dtype) as cached:
                if cached.support is not None:
                    raise UnsupportedModelError(f"kvembed cannot cache {model}: {cached.support}")
                with steps.step(f"Prefilling {file.name}") as progress:
                    document = cached.document(file, name=name, system=system, pin=pin, progress=progress)
                usage, token_bytes = document.usage, cached.kv_bytes_per_token
            stored = usage.stored_tokens * token_bytes
            if as_json:
                _common.print_json(
                    {
                        "name": document.name,
                        "tokens": document.tokens,
                        "kv_bytes": document.tokens * token_bytes,
                        "stored_bytes": stored,
                        "pinned": pin,
                        "store": str(store.path),
                        "usage": usage.to_dict(),
                    }
                )
                return
            speed = usage.prefill_tokens_per_second
            rate = f" at {speed:,.0f} tok/s" if speed else ""
            out = _common.console()
            out.print(
                f"{document.name}: {format_count(document.tokens)} tokens in {format_seconds(usage.total_s)}{rate} "
                f"({format_count(usage.cached_tokens)} were there already), {format_bytes(stored)} stored"
                f"{', pinned' if pin else ''}",
                markup=False,
            )
