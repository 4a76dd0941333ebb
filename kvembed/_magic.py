"""``%load_ext kvembed``: ``%%ask`` asks a document or a conversation, ``%kv`` looks into the store."""

from __future__ import annotations

import shlex
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.display_functions import display
from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from kvembed._errors import KVEmbedError
from kvembed._html import bar_html, mimebundle, panel, table_html
from kvembed._units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from kvembed._model import CachedModel
    from kvembed._prompt_view import PromptView
    from kvembed._store import KVStore
    from kvembed._usage import Usage

__all__ = ["KVMagics", "load"]

_PLOTS = ("ttft", "tokens", "growth", "hits", "written")


@magics_class
class KVMagics(Magics):
    """The magics, and what they find in the namespace of the notebook."""

    @magic_arguments()
    @argument("target", help="A variable that holds a document or a session, or the name of a document in the library.")
    @argument("-n", "--max-new-tokens", type=int, default=256, help="Most tokens of the answer.")
    @argument("-v", "--var", help="Keep the answer in this variable, too.")
    @argument("-m", "--model", help="Variable of the model; needed only where there are several.")
    @argument("-f", "--fork", help="Answer in a fork of the session, kept in this variable; it stays as it is.")
    @cell_magic
    def ask(self, line: str, cell: str) -> None:
        """Ask a document or a conversation what the cell says; the answer is written as it comes.

        Over a document every cell begins at the document's end: cells do not see each other's answers, and can be run
        again, and in any order. Each computes its question only.

        Over a session every cell is the next turn, also when it is run again. With ``--fork idea`` the turn is said in
        a new session that begins where this one is, and which the variable ``idea`` then holds; ``%%ask idea`` goes on
        there. Both share the KV of all that came before. When the cell is run again, the fork begins anew (the old one
        is hidden, as ``SessionDB.hide`` does).
        """
        options = parse_argstring(self.ask, line)
        from kvembed._sessions.session import Session

        question = cell.strip()
        with _told():
            target = self._target(_unquoted(options.target), options.model)
            streamer = _printer(target)
            new = options.max_new_tokens
            if isinstance(target, Session):
                if options.fork is not None:
                    target = self._fork(target, options.fork)
                answer: Any = target.send(question, max_new_tokens=new, streamer=streamer)
            elif options.fork is not None:
                raise UsageError("--fork is for sessions; cells that ask a document are forks of it already")
            else:
                answer = target.ask(question, max_new_tokens=new, streamer=streamer)
        display(_Cost(answer.usage, answer.prompt))
        if options.var is not None:
            self._namespace[_name(options.var)] = answer

    @line_magic
    def kv(self, line: str) -> Any:
        """Look at what is stored, and at what calls cost; computes nothing.

        ::

            %kv stats               how full the store is, and what it saved
            %kv ls                  the stored sequences
            %kv docs                the library of documents
            %kv history             what the latest calls cost
            %kv lookup  WHAT        how much of a prompt is stored
            %kv explain WHAT        why not more of it
            %kv show    WHAT        its text, by the tier each part would come from
            %kv plot    KIND        ttft, tokens, growth, hits or written

        WHAT is a text, or a variable that holds a prompt or an answer; with a document or a session first, the rest is
        a question to it, in quotes if it ends with a question mark (which IPython would take for its own):
        ``%kv explain report "What changed?"``. The model is the only one there is, or that of
        ``--model VAR`` right after the sub-command.
        """
        words = line.split(None, 1)
        command, rest = (words[0] if words else "help"), (words[1] if len(words) > 1 else "")
        action = _COMMANDS.get(command)
        if action is None:
            raise UsageError(f"%kv has no {command!r}; there are {', '.join(_COMMANDS)}")
        with _told():
            return action(self, rest.strip())

    # --- what %kv does -----------------------------------------------------------------------------------

    def _help(self, rest: str) -> None:
        print("\n".join(line[8:] for line in (KVMagics.kv.__doc__ or "").splitlines()))

    def _stats(self, rest: str) -> Any:
        return self._store(rest).stats()

    def _ls(self, rest: str) -> Any:
        now = time.time()
        rows = [
            (
                entry.id,
                entry.n_tokens,
                format_bytes(entry.nbytes),
                entry.tier,
                "" if entry.last_used is None else f"{format_seconds(max(0.0, now - entry.last_used))} ago",
                ", ".join(entry.names),
            )
            for entry in self._store(rest).ls()
        ]
        return _Table(f"{len(rows)} stored sequences", ("id", "tokens", "KV", "tier", "used", "pinned as"), rows)

    def _docs(self, rest: str) -> Any:
        model, _ = self._model_of(rest)
        return model.library

    def _history(self, rest: str) -> Any:
        model, _ = self._model_of(rest)
        rows = [
            (
                number,
                usage.prompt_tokens,
                " · ".join(f"{tier} {format_count(n)}" for tier, n in usage.cached_tokens_by_tier.items()),
                usage.computed_tokens,
                format_seconds(usage.ttft_s) if usage.ttft_s else "",
                format_seconds(usage.total_s),
            )
            for number, usage in enumerate(model.history, start=1)
        ]
        return _Table(f"{len(rows)} calls", ("call", "prompt", "cached", "computed", "TTFT", "total"), rows)

    def _lookup(self, rest: str) -> Any:
        model, prompt = self._prompt(rest)
        return model.lookup(prompt)

    def _explain(self, rest: str) -> Any:
        model, prompt = self._prompt(rest)
        return model.explain(prompt)

    def _show(self, rest: str) -> Any:
        model, prompt = self._prompt(rest)
        return model.show_prompt(prompt)

    def _plot(self, rest: str) -> Any:
        from kvembed import plots

        kind, _, rest = rest.partition(" ")
        if kind not in _PLOTS:
            raise UsageError(f"plot one of {', '.join(_PLOTS)}, not {kind!r}")
        if kind in ("ttft", "tokens"):
            model, _ = self._model_of(rest)
            return plots.ttft(model) if kind == "ttft" else plots.tokens(model)
        draw = {"growth": plots.growth, "hits": plots.hit_rates, "written": plots.written}[kind]
        return draw(self._store(rest))

    # --- what is there -----------------------------------------------------------------------------------

    @property
    def _namespace(self) -> dict[str, Any]:
        assert self.shell is not None
        return self.shell.user_ns

    def _named(self, name: str, kinds: Any) -> Any:
        found = self._namespace.get(name)
        return found if isinstance(found, kinds) else None

    def _variables(self, kinds: Any) -> dict[str, Any]:
        """Return the user's own variables of some types, each object once."""
        found: dict[int, tuple[str, Any]] = {}
        for name, value in list(self._namespace.items()):
            if not name.startswith("_") and isinstance(value, kinds):
                found.setdefault(id(value), (name, value))
        return dict(found.values())

    def _model_of(self, rest: str) -> tuple[CachedModel, str]:
        """Return the model, and what follows ``--model VAR``."""
        from kvembed._model import CachedModel

        flag, *words = rest.split(None, 2) or [""]
        if flag in ("--model", "-m"):
            name = words[0] if words else ""
            model = self._named(name, CachedModel)
            if model is None:
                raise UsageError(f"there is no CachedModel in a variable {name!r}")
            return model, words[1] if len(words) > 1 else ""
        models = self._variables(CachedModel)
        if not models:
            raise UsageError('no model here yet: model = kvembed.CachedModel.from_pretrained("smollm2")')
        if len(models) > 1:
            raise UsageError(f"several models here: say which with --model {' or --model '.join(models)}")
        return next(iter(models.values())), rest

    def _store(self, rest: str) -> KVStore:
        from kvembed._store import KVStore

        stores = self._variables(KVStore)
        if len(stores) == 1 and not rest:
            return next(iter(stores.values()))
        return self._model_of(rest)[0].store

    def _target(self, name: str, model: str | None) -> Any:
        from kvembed import Document, Session

        found = self._named(name, (Document, Session))
        if found is not None:
            return found
        if model is None and not self._known_models():
            raise UsageError(f"no document or session in a variable {name!r}, and no model whose library could have it")
        library = self._model_of(f"--model {model}" if model else "")[0].library
        if name in library:
            return library.open(name)
        there = [*self._variables((Document, Session)), *(repr(known) for known in library.names())]
        raise UsageError(f"no document or session {name!r}; there are {', '.join(there) or 'none yet'}")

    def _known_models(self) -> dict[str, Any]:
        from kvembed._model import CachedModel

        return self._variables(CachedModel)

    def _prompt(self, rest: str) -> tuple[CachedModel, Any]:
        """Return the model, and the prompt that a line of words means."""
        from kvembed import Answer, Document, Reply, Session

        first, _, more = rest.partition(" ")
        about = self._named(first, (Document, Session))
        if about is not None:
            ids = about.prompt_ids(_unquoted(more.strip())) if more.strip() else getattr(about, "prefix_ids", None)
            if ids is None:
                raise UsageError(f"say what would be sent to {first}")
            return about._model, ids
        model, rest = self._model_of(rest)
        found = self._named(rest, (Answer, Reply))
        if found is not None:
            return model, found.prompt_ids
        value = self._namespace.get(rest)
        if value is not None:
            return model, value
        if not rest:
            raise UsageError("say of which prompt: a text, or a variable")
        return model, _unquoted(rest)

    def _fork(self, session: Any, variable: str) -> Any:
        """Return a fork of a session, in a variable; one that this cell made before is hidden."""
        name = f"{session.name} / {_name(variable)}"
        if any(info.name == name for info in session._db.sessions()):
            session._db.hide(name)
        fork = self._namespace[variable] = session.fork(name)
        return fork

    # --- the keyboard ------------------------------------------------------------------------------------

    def complete_kv(self, _: Any, event: Any) -> list[str]:
        """Return what may follow ``%kv``."""
        words = event.line.split()
        if words[1:2] == ["plot"] and (len(words) > 2 or event.line.endswith(" ")):
            return list(_PLOTS)
        if len(words) > 2 or (len(words) == 2 and event.line.endswith(" ")):
            from kvembed import Document, Session

            return list(self._variables((Document, Session, str)))
        return list(_COMMANDS)

    def complete_ask(self, _: Any, event: Any) -> list[str]:
        """Return what may follow ``%%ask``."""
        from kvembed import Document, Session

        return [*self._variables((Document, Session)), "--fork", "--max-new-tokens", "--model", "--var"]


_COMMANDS: dict[str, Any] = {
    "stats": KVMagics._stats,
    "ls": KVMagics._ls,
    "docs": KVMagics._docs,
    "history": KVMagics._history,
    "lookup": KVMagics._lookup,
    "explain": KVMagics._explain,
    "show": KVMagics._show,
    "plot": KVMagics._plot,
    "help": KVMagics._help,
}


@dataclass(frozen=True, repr=False)
class _Cost:
    """What stands under an answer whose text was written already."""

    usage: Usage
    prompt: PromptView | None

    def __repr__(self) -> str:
        return f"[{self.usage}]"

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        bar = bar_html(self.usage.cached_tokens_by_tier, self.usage.computed_tokens)
        folded = self.prompt.folded_html() if self.prompt is not None else ""
        return mimebundle(repr(self), panel(self.usage, bar, folded), include, exclude)


@dataclass(frozen=True, repr=False)
class _Table:
    """Rows that show themselves."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __repr__(self) -> str:
        cells = [list(self.header), *([f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
        return "\n".join([self.title, *lines])

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
        return mimebundle(repr(self), panel(self.title, table_html(self.rows, self.header)), include, exclude)


@contextmanager
def _told() -> Iterator[None]:
    """Show an error of ours as one line: the traceback would be of the magic, not of the user's code."""
    try:
        yield
    except KVEmbedError as error:
        raise UsageError(str(error)) from None


def _printer(target: Any) -> Any:
    """Return a streamer of transformers that writes the words as they come."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", flush=True)

    return Printer(target._model.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _name(text: str) -> str:
    if not text.isidentifier():
        raise UsageError(f"{text!r} is no name of a variable")
    return text


def _unquoted(text: str) -> str:
    if text[:1] in "\"'" and text[:1]:
        try:
            parts = shlex.split(text)
        except ValueError:
            return text
        return parts[0] if len(parts) == 1 else text
    return text


def load(shell: Any) -> None:
    """Make the magics known to an IPython shell."""
    magics = KVMagics(shell)
    shell.register_magics(magics)
    shell.set_hook("complete_command", magics.complete_kv, str_key="%kv")
    shell.set_hook("complete_command", magics.complete_ask, str_key="%%ask")
