"""F2: the tree of stored prefixes, and what can be done with them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Static

from kvembed._units import format_bytes, format_count
from kvembed_chat._rows import SORTS, ago, columns_of, named, searched, size_of
from kvembed_chat._screens.dialogs import Choice
from kvembed_chat._threads import in_thread
from kvembed_chat._tiers import gauges_of, legend, sparkline, tier_mark, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from textual.app import ComposeResult
    from textual.binding import BindingType

    from kvembed._stats import TierStats
    from kvembed._tree import PrefixRow, PrefixTree
    from kvembed_chat._prefixes import PrefixSource

__all__ = ["InspectorScreen"]

_MOST_ROWS = 1000
"""More rows than people read make the table slow; a filter finds the others."""

_MEMORY = frozenset({"live", "gpu", "cpu"})


class _Table(DataTable[Content]):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
        Binding("home", "scroll_top", show=False),
        Binding("end", "scroll_bottom", show=False),
    ]


class InspectorScreen(Screen[None]):
    """The stored prefixes as a table, with the details of the one under the cursor.

    Args:
        source: Where they come from.
    """

    DEFAULT_CSS = """
    InspectorScreen { layout: vertical; background: $background; }
    #cache-head { height: 1; padding: 0 1; background: $panel; text-style: bold; text-wrap: nowrap; }
    #cache-gauges, #cache-rates { height: auto; padding: 0 1; text-wrap: nowrap; }
    #cache-filter { margin: 0 1; background: $surface; }
    #prefixes { height: 1fr; background: $background; scrollbar-size-vertical: 1; }
    #cache-below { height: auto; max-height: 6; padding: 0 1; border-top: solid $panel; }
    #details { height: auto; text-wrap: nowrap; }
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back"),
        Binding("f2,q", "leave", show=False),
        Binding("p", "pin", "Pin"),
        Binding("e", "evict", "Evict"),
        Binding("v", "verify", "Verify"),
        Binding("x,delete", "forget", "Forget"),
        Binding("t", "words", "Text"),
        Binding("slash", "filter", "Filter"),
        Binding("s", "sort", "Sort"),
        Binding("r", "reload", "Reload"),
    ]

    def __init__(self, source: PrefixSource) -> None:
        super().__init__()
        self._source = source
        self._tree: PrefixTree | None = None
        self._tiers: Sequence[TierStats] = ()
        self._rates: Sequence[float] = ()
        self._shown: list[PrefixRow] = []
        self._sort = "tree"
        self._now = 0.0
        self._has_words = False
        self._words: dict[bytes, str | None] = {}
        self._busy = ""
        self._legend = Content("")

    def compose(self) -> ComposeResult:
        """Figures above, the table, details below."""
        yield Static("", id="cache-head")
        yield Static("", id="cache-gauges")
        yield Static("", id="cache-rates")
        yield Input(placeholder="session, pinned name, model, tier or id", id="cache-filter", compact=True)
        yield _Table(id="prefixes", cursor_type="row", zebra_stripes=True)
        with Vertical(id="cache-below"):
            yield Static("", id="details")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Read the store."""
        self.query_one("#cache-filter").display = False
        self.table.focus()
        self.action_reload()

    @property
    def table(self) -> _Table:
        """The table."""
        return self.query_one(_Table)

    @property
    def row(self) -> PrefixRow | None:
        """The row under the cursor."""
        at = self.table.cursor_row
        return self._shown[at] if 0 <= at < len(self._shown) else None

    # --- reading ---------------------------------------------------------------------------------------

    def _go(self, work: Coroutine[Any, Any, object], group: str) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self.notify(f"{error}", severity="error", markup=False)
            finally:
                if group == "change":
                    self._busy = ""
                    self._show_head()

        self.run_worker(guarded(), group=group, exclusive=True, exit_on_error=False)

    def action_reload(self) -> None:
        """Read the store again."""
        self._go(self._read(), "read")

    async def _read(self) -> None:
        source = self._source

        def look() -> tuple[PrefixTree, Sequence[TierStats], list[float], float]:
            return source.tree(), source.tiers(), source.hit_rates(), source.now()

        self._tree, self._tiers, self._rates, self._now = await in_thread(look)
        self._words.clear()
        self._draw()

    def _draw(self) -> None:
        self._show_gauges(self._tiers)
        self._show_rates(self._rates)
        self._fill()

    def _fill(self) -> None:
        """Put the rows into the table; the cursor stays on the row it was on."""
        tree = self._tree
        if tree is None:
            return
        kept, at = self.row, self.table.cursor_row
        words = self.query_one("#cache-filter", Input).value.lower().split()
        rows = [row for row in tree.rows if all(word in searched(row) for word in words)]
        if self._sort != "tree":
            rows.sort(key=SORTS[self._sort])
        self._shown = rows[:_MOST_ROWS]
        table = self.table
        table.clear(columns=True)
        cells = [self._cells(row) for row in self._shown]
        for at_column, (label, width) in enumerate(columns_of(cells, self.app.size.width)):
            table.add_column(label, width=width, key=str(at_column))
        for row, line in zip(self._shown, cells, strict=True):
            table.add_row(*line, key=row.key.hex())
        keys = [row.key for row in self._shown]
        if kept is not None and kept.key in keys:
            at = keys.index(kept.key)
        if keys:
            table.move_cursor(row=min(at, len(keys) - 1))
        self._show_head(len(rows))
        self._show_details()

    def _cells(self, row: PrefixRow) -> list[Content]:
        indent = f"{'  ' * min(row.depth - 1, 8)}└ " if row.depth and self._sort == "tree" else ""
        return [
            Content(f"{indent}{format_count(row.start)}–{format_count(row.end)}"),
            Content(f"{format_bytes(size_of(row)):>9}"),
            Content.assemble(*(tier_mark(tier) for tier in row.nbytes)),
            Content(ago(row, self._now)),
            Content.styled(f"● {', '.join(row.names)}" if row.names else "", "$text-warning"),
            Content(", ".join(row.users)),
        ]

    # --- showing ---------------------------------------------------------------------------------------

    def _show_head(self, found: int | None = None) -> None:
        tree = self._tree
        parts = ["Cache"]
        if tree is not None:
            total = len(tree.rows)
            found = len(self._shown) if found is None else found
            shown = len(self._shown)
            count = f"{format_count(total)} {'prefix' if total == 1 else 'prefixes'}"
            parts.append(count if shown == total else f"{format_count(shown)} of {count}")
            parts.append(f"sorted by {self._sort}" if self._sort != "tree" else "as a tree")
        if self._busy:
            parts.append(f"{self._busy}…")
        left = " · ".join(parts)
        gap = max(2, self.app.size.width - 2 - len(left) - self._legend.cell_length)
        self.query_one("#cache-head", Static).update(Content.assemble(left, " " * gap, self._legend))

    def _show_gauges(self, tiers: Sequence[TierStats]) -> None:
        parts: list[Content] = []
        shown: list[str] = []
        for gauge in gauges_of(tiers):
            shown += gauge.parts
            figures = gauge.lines(0)[0].plain.removeprefix(gauge.label).strip()
            parts.append(Content.assemble((f"{gauge.label} ", "bold"), gauge.bar(10), f" {figures}"))
        self._legend = legend(shown)
        lines = wrapped(parts, self.app.size.width - 2, "   ")
        self.query_one("#cache-gauges", Static).update(Content("\n").join(lines))

    def _show_rates(self, rates: Sequence[float]) -> None:
        line = Content("no calls yet")
        if rates:
            curve = sparkline(rates, min(60, self.app.size.width - 44))
            latest = rates[-len(curve) :]
            mean = 100 * sum(latest) / len(latest)
            calls = f"latest {len(latest)} calls" if len(latest) > 1 else "latest call"
            line = Content.assemble((curve, "$text-success"), f" {mean:.0f} % of the prompts of the {calls}")
        self.query_one("#cache-rates", Static).update(Content.assemble(("Reused ", "bold"), line))

    def _show_details(self) -> None:
        row, details = self.row, self.query_one("#details", Static)
        if row is None:
            empty = "Nothing is stored yet." if self._tree is not None and not self._tree.rows else "Nothing matches."
            details.update(Content(empty if self._tree is not None else "Reading…"))
            return
        width = self.app.size.width - 2
        blocks = f"{format_count(row.n_blocks)} {'block' if row.n_blocks == 1 else 'blocks'}"
        parts = [Content.styled(f"tokens {format_count(row.start)}–{format_count(row.end)}", "bold"), Content(blocks)]
        if row.states:
            parts.append(Content(f"{row.states} {'state' if row.states == 1 else 'states'}"))
        parts.append(Content("bit-exact" if row.exact else "equal to rounding"))
        parts += [tier_mark(tier, f"{tier} {format_bytes(size)}") for tier, size in row.nbytes.items()]
        parts.append(Content(f"used {ago(row, self._now)}"))
        if row.hits:
            parts.append(Content(f"read {format_count(row.hits)}× from disk"))
        parts.append(Content(f"{row.model_name or 'unknown model'} {row.namespace.hex()[:8]}"))
        parts.append(Content.styled(row.id, "$text-muted"))
        if row.names:
            parts.append(Content.styled(f"● pinned as {', '.join(row.names)}", "$text-warning"))
        if row.users:
            parts.append(Content(f"in {', '.join(row.users)}"))
        if not row.reachable:
            parts.append(Content.styled("out of reach: what came before it is gone", "$text-error"))
        lines = wrapped(parts, width)
        if self._has_words:
            words = self._words.get(row.key, "…")
            text = f"“{words}”" if words is not None else "a model has to be loaded to read the text"
        else:
            text = "t shows the first words"
        lines.append(Content.styled(text, "$text-muted").truncate(width, ellipsis=True))
        details.update(Content("\n").join(lines))

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Show the details of another row."""
        event.stop()
        self._show_details()
        if self._has_words:
            self._go(self._read_words(), "words")

    def on_resize(self) -> None:
        """Divide the width anew."""
        if self._tree is not None:
            self._draw()

    # --- looking ---------------------------------------------------------------------------------------

    def action_back(self) -> None:
        """Leave the filter, or the screen."""
        box = self.query_one("#cache-filter", Input)
        if box.display:
            box.value = ""
            box.display = False
            self.table.focus()
        else:
            self.dismiss(None)

    def action_leave(self) -> None:
        """Go back to the chat."""
        self.dismiss(None)

    def action_filter(self) -> None:
        """Show only rows with some words."""
        box = self.query_one("#cache-filter", Input)
        box.display = True
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter as one types."""
        event.stop()
        self._fill()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go to what was found."""
        event.stop()
        self.table.focus()

    def action_sort(self) -> None:
        """Sort in the next way."""
        names = list(SORTS)
        self._sort = names[(names.index(self._sort) + 1) % len(names)]
        self._fill()

    def action_words(self) -> None:
        """Show or hide the first words of the row."""
        self._has_words = not self._has_words
        self._show_details()
        if self._has_words:
            self._go(self._read_words(), "words")

    async def _read_words(self) -> None:
        row = self.row
        if row is None or row.key in self._words:
            return
        words = await in_thread(partial(self._source.words, row))
        self._words[row.key] = words
        self._show_details()

    # --- changing --------------------------------------------------------------------------------------

    def _change(self, doing: str, work: Callable[[], str]) -> None:
        async def change() -> None:
            done = await in_thread(work)
            self.notify(done, markup=False)
            await self._read()

        if self._busy:
            self.notify("Wait until this is done.", severity="warning")
            return
        self._busy = doing
        self._show_head()
        self._go(change(), "change")

    def action_pin(self) -> None:
        """Pin the row, or unpin it."""
        row, tree = self.row, self._tree
        if row is None or tree is None:
            return
        if row.names:
            self._change("unpinning", partial(self._source.unpin, row))
        else:
            self._change("pinning", partial(self._source.pin, tree, row))

    def action_verify(self) -> None:
        """Check the row's files."""
        if self.row is not None:
            self._change("checking", partial(self._source.verify, self.row))

    def action_evict(self) -> None:
        """Ask where from, and evict the row."""
        row, tree = self.row, self._tree
        if row is None or tree is None:
            return
        choices: list[tuple[str, str]] = []
        if "disk" in row.nbytes and _MEMORY & row.nbytes.keys():
            choices = [("memory", "From memory"), ("disk", "From disk")]
        choices += [("everywhere", "Everywhere"), ("cancel", "Cancel")]
        text = f"Evict {named(tree, row)}? What is pinned stays; the rest is computed again when it is needed."

        def chosen(where: str | None) -> None:
            if where not in (None, "cancel"):
                self._change("evicting", partial(self._source.evict, row, where))

        self.app.push_screen(Choice("Evict", text, tuple(choices)), chosen)

    def action_forget(self) -> None:
        """Ask, and erase the row."""
        row, tree = self.row, self._tree
        if row is None or tree is None:
            return
        text = f"Erase {named(tree, row)} from memory and disk, and look for traces? This cannot be undone."
        if row.names:
            text += f" It is pinned as {', '.join(row.names)}."
        if row.users:
            text += f" The words of {', '.join(row.users)} stay in the sessions."

        def chosen(answer: str | None) -> None:
            if answer == "erase":
                self._change("erasing", partial(self._source.forget, tree, row))

        self.app.push_screen(Choice("Forget", text, (("erase", "Erase"), ("cancel", "Cancel"))), chosen)
