"""``kvembed tree``: what the store holds, as a tree of prefixes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from kvembed._cli import _common
from kvembed._html import TIER_GLYPHS
from kvembed._units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.text import Text

    from kvembed._tree import KnownText, PrefixRow, PrefixTree

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def tree(
        limit: int = typer.Option(50, min=1, help="Most rows to show."),
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Show the stored prefixes as a tree: what texts share is one row, and each goes on below it.

        The texts themselves are not shown: the catalog does not hold them. Sessions are named beside what they use.
        """
        store = _common.open_store(folder)
        if store is None:
            if as_json:
                _common.print_json([])
            else:
                place = _common.store_path(folder)
                _common.console().print(f"No store at {place} yet.", markup=False, soft_wrap=True)
            return
        with store:
            found = store.prefixes(_known_texts())
        if as_json:
            _common.print_json(found.to_dict())
            return
        if not found.rows:
            typer.echo("Nothing is stored yet.")
            return
        _draw(found, limit)


def _known_texts() -> list[KnownText]:
    from kvembed._paths import sessions_file

    if not sessions_file().exists():
        return []  # looking must not create one
    from kvembed._sessions.db import SessionDB
    from kvembed._sessions.streams import known_texts

    db = SessionDB()
    try:
        return known_texts(db)
    finally:
        db.close()


def _draw(found: PrefixTree, limit: int) -> None:
    from rich.text import Text
    from rich.tree import Tree

    models: dict[bytes, Tree] = {}
    branches: dict[int, Tree] = {}
    for number, row in enumerate(found.rows[:limit]):
        if row.parent is None:
            if row.namespace not in models:
                name = row.model_name or "unknown model"
                title = Text.assemble((name, "bold"), (f" {row.namespace.hex()[:8]}", "dim"))
                models[row.namespace] = Tree(title, guide_style="dim")
            above = models[row.namespace]
        else:
            above = branches[row.parent]
        branches[number] = above.add(_line(row))
    console = _common.console()
    for model in models.values():
        console.print(model)
    glyphs = "  ".join(f"{TIER_GLYPHS[tier]} {tier}" for tier in ("cpu", "disk"))
    console.print(Text(f"{glyphs}  ≈ equal to rounding, not bit for bit", style="dim"))
    if len(found.rows) > limit:
        typer.echo(f"The first {limit} of {format_count(len(found.rows))} rows; see more with --limit.")


def _line(row: PrefixRow) -> Text:
    from rich.text import Text

    where = "  ".join(f"{TIER_GLYPHS.get(tier, '▚')} {format_bytes(size)}" for tier, size in row.nbytes.items())
    line = Text.assemble(
        (f"{format_count(row.start)}–{format_count(row.end)}", "bold"),
        f"  {format_count(row.n_blocks)} {'block' if row.n_blocks == 1 else 'blocks'}  {where}",
    )
    if not row.exact:
        line.append("  ≈", "dim")
    if row.last_used is not None:
        line.append(f"  {format_seconds(max(0.0, time.time() - row.last_used))} ago", "dim")
    if row.names:
        line.append(f"  pinned: {', '.join(row.names)}", "yellow")
    if row.users:
        line.append(f"  in {', '.join(row.users)}", "cyan")
    if not row.reachable:
        line.append("  out of reach: what came before it is gone", "red")
    return line.append(f"  {row.id}", "dim")
