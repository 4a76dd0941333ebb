"""The command line of ``kvembed-chat``; argparse, because ``--help`` has to answer before anything large is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "Options", "parse"]


@dataclass(frozen=True)
class Options:
    """What the app starts with.

    Args:
        model: What to load; None offers ``smollm2``.
        session: Session to open, or None for a new one.
        document: File to attach at the start.
        system: System message of new sessions.
        store: Folder of the KV; None for the user's cache folder.
        theme: Of the interface.
        max_new_tokens: Most tokens of a reply in new sessions.
        cached: False runs plain transformers.
    """

    model: str | None = None
    session: str | None = None
    document: Path | None = None
    system: str | None = None
    store: str | None = None
    theme: str | None = None
    max_new_tokens: int | None = None
    cached: bool = True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvembed-chat",
        description="Chat with a local model. What was computed once is kept, and every reply shows what that saved.",
        epilog="Keys: enter sends, esc stops, F1 shows all keys. Defaults can be set in the file that F1 names.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="alias (smollm2), hub id, folder or GGUF file")
    parser.add_argument("--session", metavar="NAME", help="open this session, or begin one of this name")
    parser.add_argument("--doc", metavar="FILE", type=Path, help="attach a text file: it is computed once and kept")
    parser.add_argument("--system", metavar="TEXT", help="system message of new sessions")
    parser.add_argument("--no-cache", action="store_true", help="plain transformers: nothing is reused or stored")
    parser.add_argument("--store", metavar="DIR", help="folder of the KV (default: the user's cache folder)")
    parser.add_argument("--theme", metavar="NAME", help="such as textual-dark, textual-light, nord, gruvbox")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    return parser


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Return what the command line and the config file say; the command line wins.

    Raises:
        SystemExit: For ``--help`` and ``--version``, and with status 2 for what cannot be understood.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.version:
        from kvembed import __version__

        print(f"kvembed-chat {__version__}")
        raise SystemExit(0)
    if given.doc is not None and not given.doc.is_file():
        parser.error(f"--doc: there is no file {str(given.doc)!r}")
    from kvembed._errors import ConfigError
    from kvembed_chat._config import read_config

    try:
        config = read_config()
    except ConfigError as error:
        parser.error(str(error))
    return Options(
        model=given.model or config.model,
        session=given.session,
        document=given.doc,
        system=given.system if given.system is not None else config.system,
        store=given.store or config.store,
        theme=given.theme or config.theme,
        max_new_tokens=config.max_new_tokens,
        cached=not given.no_cache,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the app; the entry point of ``kvembed-chat``."""
    options = parse(arguments)
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        sys.stderr.write("kvembed-chat needs a terminal; for scripts there is kvembed.CachedModel.session().\n")
        raise SystemExit(1)
    if not options.cached:
        os.environ["KVEMBED_DISABLE"] = "1"
    # Before transformers is imported: what they print would be drawn over the interface.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from kvembed_chat._app import ChatApp
    from kvembed_chat._real import RealEngine

    engine = RealEngine(store=options.store)
    app = ChatApp(engine, options)
    try:
        app.run()
    finally:
        # Before anything else can go wrong.
        if app.unsent:
            print(f"Not sent yet:\n{app.unsent}\n")
        if app.last_session is not None:
            print(f"Go on with: kvembed-chat --session {_quoted(app.last_session)}")
        engine.close()
    raise SystemExit(app.return_code or 0)


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
