"""F1: all keys, and where things are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Markdown

from kvembed_chat._config import config_file

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

__all__ = ["HelpScreen"]

_TEXT = """\
## Writing
| key | what it does |
|---|---|
| enter | send |
| ctrl+j, shift+enter | new line |
| up, down | earlier messages, on the first and last line |
| `@name` | attach a text file: computed once, kept, shared by sessions |
| esc | stop the reply (what was said is kept), leave a search, or stop editing |

## Conversation
| key | what it does |
|---|---|
| ctrl+r | answer once more |
| ctrl+e | edit and resend what you said last |
| shift+tab | pick a turn: then up/down, `e` edit, `c` copy, `b` copy code, `f` fork here, `x` delete, `u` undo |
| space | unfold the thoughts of the picked turn |

## Sessions
| key | what it does |
|---|---|
| ctrl+n | new |
| ctrl+f, `/` in the list | search all conversations |
| ctrl+b, F3 | show or hide the list (in tmux, ctrl+b has to be pressed twice) |
| in the list | enter opens, `r` rename, `f` fork, `d` delete, `u` undo delete |

## The cache (F2)
| key | what it does |
|---|---|
| p | pin a prefix, or unpin it |
| e | evict it: from memory, from disk, everywhere |
| v | verify: read its files to their end |
| x | forget: erase it, what follows it, and what only led to it |
| t | show its first words |
| `/`, s, r | filter, sort, read again |

## The rest
| key | what it does |
|---|---|
| F2 | look into the cache: pin, evict, verify, forget |
| ctrl+o | models |
| F4 | system message and sampling of this session |
| ctrl+p | all commands: export, themes, copy … |
| ctrl+q | leave; a reply that is being written is kept |

"""


class HelpScreen(ModalScreen[None]):
    """All keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q", "app.pop_screen", "Close")]

    def __init__(self) -> None:
        super().__init__(classes="dialog wide")

    def compose(self) -> ComposeResult:
        """One page that scrolls."""
        with VerticalScroll(classes="box"):
            yield Markdown(f"{_TEXT}Defaults (model, theme, store, system) can be set in `{config_file()}`.")
