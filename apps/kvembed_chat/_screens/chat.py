"""The chat screen: sessions on the left, the conversation, and the prompt under it."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Footer, Input, OptionList, Static

from kvembed import KVEmbedError
from kvembed_chat._engine import Ask
from kvembed_chat._screens.inspector import InspectorScreen
from kvembed_chat._screens.models import ModelScreen
from kvembed_chat._screens.settings import SettingsScreen
from kvembed_chat._screens.verbs import VerbsScreen
from kvembed_chat._threads import in_thread
from kvembed_chat._widgets.empty import EmptyState
from kvembed_chat._widgets.gauges import TierGauges
from kvembed_chat._widgets.prompt import Completions, Prompt
from kvembed_chat._widgets.sidebar import Sidebar
from kvembed_chat._widgets.status import Status
from kvembed_chat._widgets.transcript import Transcript

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

__all__ = ["ChatScreen"]

_FIRST_MODEL = "smollm2"
_QUESTION = "Explain in three sentences what a KV cache is."


class ChatScreen(VerbsScreen):
    """See the module."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 - as Textual declares it
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Stop", priority=True),
        Binding("ctrl+n", "new_session", "New", priority=True),
        Binding("ctrl+r", "regenerate", "Again", priority=True),
        Binding("ctrl+e", "edit_last", "Edit", priority=True),
        Binding("ctrl+f", "search", "Search", priority=True),
        Binding("ctrl+o", "models", "Model", priority=True),
        Binding("ctrl+b,f3", "sidebar", "Sessions", show=False, priority=True),
        Binding("f2", "cache", "Cache"),
        Binding("f4", "settings", "Settings", show=False),
    ]

    def compose(self) -> ComposeResult:
        """Lay out the panes."""
        yield Static("", id="title")
        with Horizontal(id="panes"):
            yield Sidebar()
            with Vertical(id="main"):
                yield EmptyState()
                yield Transcript()
                yield Completions(id="completions", compact=True)
                with Vertical(id="writing"):
                    yield Prompt()
                    yield Status()
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Show what there is, and begin with what the command line asked for."""
        self.query_one(Completions).display = False
        self.prompt.focus()
        self.go(self._begin, "session")

    async def _begin(self) -> None:
        if self.current is not None:
            await in_thread(partial(self.engine.create, self.current, self.draft_system, self.draft_settings))
        await self.open_session(self.current)
        if self.engine.model is None and self.options.model is not None:
            self.load(self.options.model)
        if self.options.document is not None:
            path = self.options.document
            self.send(Ask("send"), [path], f"@{path}")

    # --- what is shown ---------------------------------------------------------------------------------

    async def open_session(self, name: str | None) -> None:
        """Show a session; None for a new one."""
        self.current = name
        self.editing = None
        self.conversation = None if name is None else await in_thread(partial(self.engine.open, name))
        await self.transcript.show(self.conversation)
        if self.conversation is not None:
            self.prompt.said = [turn.user for turn in self.conversation.turns]
        self.mode_changed()
        self.session_changed()
        self.ask_preview()

    def session_changed(self) -> None:
        """Show the list and the title anew."""
        self.go(self._list, "list", exclusive=True)
        self._show_title()
        self._show_empty()
        self.show_gauges()

    def show_gauges(self) -> None:
        """Show how full the tiers are."""
        if self.options.cached:
            self.go(self._gauges, "gauges", exclusive=True)

    async def _gauges(self) -> None:
        try:
            tiers = await in_thread(lambda: self.engine.prefixes.tiers())
        except KVEmbedError:  # a store that cannot be opened: loading a model says so
            tiers = ()
        self.query_one(TierGauges).show(tiers)

    async def _list(self) -> None:
        sidebar = self.query_one(Sidebar)
        sidebar.show(await in_thread(partial(self.engine.sessions, sidebar.words)), self.current)

    def model_changed(self) -> None:
        """Another model answers."""
        self._show_title()
        self._show_empty()
        self.show_gauges()
        self.ask_preview()

    def mode_changed(self) -> None:
        """Editing began or ended."""
        writing = self.query_one("#writing")
        writing.set_class(self.editing is not None, "editing")
        writing.border_title = "" if self.editing is None else f"edit turn {self.editing + 1} · esc cancels"

    def _show_title(self) -> None:
        model = self.engine.model
        left = self.current or "New conversation"
        right = "no model" if model is None else " · ".join(part for part in (model.title, model.detail) if part)
        if model is not None and model.refusal is not None:
            right += " · not cached"
        elif not self.options.cached:
            right += " · cache off"
        width = max(10, self.app.size.width - len(right) - 4)
        left = left if len(left) <= width else left[: width - 1] + "…"
        gap = max(2, self.app.size.width - 2 - len(left) - len(right))
        self.query_one("#title", Static).update(Content.assemble((left, "bold"), " " * gap, right))

    def on_resize(self) -> None:
        """The title reaches from side to side."""
        self._show_title()

    def _show_empty(self) -> None:
        is_empty = not self.is_busy and (self.conversation is None or not self.conversation.turns)
        self.transcript.display = not is_empty
        empty = self.query_one(EmptyState)
        empty.display = is_empty
        if not is_empty:
            return
        if self.engine.model is None and not self.is_loading:
            empty.show(
                "No model is loaded yet.",
                [
                    (f"load:{_FIRST_MODEL}", "Load smollm2: small, quick on any machine, downloaded once (93 MB)"),
                    ("models", "Choose another model: a hub id, a folder, a GGUF file"),
                    ("help", "See all keys"),
                ],
            )
            return
        pending = self.conversation.pending if self.conversation is not None else ()
        about = f"Attached: {', '.join(pending)}. Ask about it." if pending else "Nothing said yet."
        first = "Summarise the document in three sentences." if pending else _QUESTION
        empty.show(
            about,
            [
                (f"say:{first}", first),
                ("attach", "Attach a document: computed once, asked about often"),
                ("settings", "Set a system message and how it samples"),
            ],
        )

    def busy_changed(self) -> None:
        """Keys and the empty state depend on what runs."""
        super().busy_changed()
        self._show_empty()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show only keys that do something now."""
        has_turns = self.conversation is not None and bool(self.conversation.turns)
        if action in ("regenerate", "edit_last"):
            return True if has_turns and not self.is_busy else None
        return True

    # --- the prompt ------------------------------------------------------------------------------------

    def on_text_area_changed(self) -> None:
        """What the next turn reuses may have changed."""
        self.ask_preview()

    def on_prompt_completing(self, message: Prompt.Completing) -> None:
        """Show the files that could be meant."""
        box = self.query_one(Completions)
        box.clear_options()
        box.add_options(message.names)
        box.display = bool(message.names)
        if message.names:
            box.highlighted = 0

    def on_prompt_moved(self, message: Prompt.Moved) -> None:
        """Go through the files, or take one."""
        box = self.query_one(Completions)
        if box.highlighted is None:
            return
        if message.step:
            box.highlighted = (box.highlighted + message.step) % box.option_count
        else:
            self.prompt.accept(str(box.get_option_at_index(box.highlighted).prompt))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take the file that was clicked."""
        if event.option_list.id == "completions":
            self.prompt.accept(str(event.option.prompt))

    def on_empty_state_picked(self, message: EmptyState.Picked) -> None:
        """Do what was suggested."""
        verb, _, rest = message.action.partition(":")
        self.prompt.focus()
        if verb == "load":
            self.load(rest)
        elif verb == "say":
            self.prompt.write(rest)
            self.prompt.action_submit()
        elif verb == "help":
            self.app.run_worker(self.app.run_action("help"))
        else:
            self.run_worker(self.run_action(verb))

    def on_prompt_left(self) -> None:
        """Go to what is above an empty prompt."""
        empty = self.query_one(EmptyState)
        if empty.display:
            empty.choose()

    # --- actions ---------------------------------------------------------------------------------------

    def action_back(self) -> None:
        """Stop what runs; otherwise go one step closer to the empty prompt."""
        if self.prompt.is_completing and self.prompt.has_focus:
            self.prompt.close_completions()
        elif self.stop_run():
            pass
        elif self.query_one(Sidebar).words and not self.prompt.has_focus:
            self.query_one("#search", Input).value = ""
            self.prompt.focus()
        elif not self.prompt.has_focus:
            self.prompt.focus()
        elif self.editing is not None:
            self.editing = None
            self.prompt.clear()
            self.mode_changed()
            self.ask_preview()

    def action_new_session(self) -> None:
        """Begin a conversation."""
        self.switch(None)

    def action_regenerate(self) -> None:
        """Answer the last message once more."""
        self.send(Ask("regenerate", sent_at=time.perf_counter()), [], "")

    def action_edit_last(self) -> None:
        """Edit what was said last."""
        if self.conversation is not None and self.conversation.turns:
            self.edit(len(self.conversation.turns) - 1)

    def edit(self, turn: int) -> None:
        """Put an earlier turn in the box, to be sent again."""
        if self.is_busy or self.conversation is None:
            return
        self.editing = turn
        self.prompt.write(self.conversation.turns[turn].user)
        self.prompt.focus()
        self.mode_changed()
        self.ask_preview()

    def action_search(self) -> None:
        """Search all conversations."""
        self.set_class(True, "-sidebar")
        self.set_class(False, "-no-sidebar")
        self.query_one("#search", Input).focus()

    def action_sidebar(self) -> None:
        """Show or hide the sessions."""
        is_shown = bool(self.query_one(Sidebar).display)
        self.set_class(not is_shown, "-sidebar")
        self.set_class(is_shown, "-no-sidebar")
        if is_shown:
            self.prompt.focus()
        elif self.app.size.width < 100:
            self.query_one("#sessions", OptionList).focus()

    def action_attach(self) -> None:
        """Write the first character of a file's name."""
        self.prompt.focus()
        self.prompt.write(f"{self.prompt.text} @".lstrip() if self.prompt.text else "@")

    def action_models(self) -> None:
        """Choose a model."""
        self.go(self._choose_model, "dialog", exclusive=True)

    async def _choose_model(self) -> None:
        model = self.engine.model
        items = await in_thread(self.engine.models)
        name = await self.app.push_screen_wait(ModelScreen(items, model.name if model is not None else None))
        if name is not None:
            self.load(name)

    def action_cache(self) -> None:
        """Look into the cache."""
        self.app.push_screen(InspectorScreen(self.engine.prefixes), lambda _: self.cache_changed())

    def cache_changed(self) -> None:
        """Something may have been evicted."""
        self.show_gauges()
        self.ask_preview()

    def action_settings(self) -> None:
        """Change the system message and the sampling of this session."""
        self.go(self._settings, "dialog", exclusive=True)

    async def _settings(self) -> None:
        known = self.conversation
        system = known.system if known is not None else self.draft_system
        settings = known.settings if known is not None else self.draft_settings
        title = self.current or "the new conversation"
        screen = SettingsScreen(title, system, settings, has_turns=known is not None and bool(known.turns))
        changed = await self.app.push_screen_wait(screen)
        if changed is None:
            return
        if known is None:
            self.draft_system, self.draft_settings = changed
            return
        if changed[0] != system:
            await in_thread(partial(self.engine.set_system, known.name, changed[0]))
        if changed[1] != settings:
            await in_thread(partial(self.engine.set_settings, known.name, changed[1]))
        self.conversation = await in_thread(partial(self.engine.open, known.name))
        self.ask_preview()
