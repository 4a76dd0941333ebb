"""Write ``docs/reference/cli.md`` from the commands themselves; with ``--check`` only say whether it is up to date."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from kvembed_chat._cli import _parser as chat_parser

from kvembed._cli import app

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PAGE", "main", "page"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "cli.md"

_HEAD = """\
# Command line

Written by `python tools/cli_page.py` from the commands themselves; a test fails when it is out of date.

`kvembed` (or `python -m kvembed`) looks at a store, fills and empties it, and measures. Commands end with status 0,
with 1 when something is wrong (one line on standard error says what, and what to do), and with 2 when an option is not
understood. `kvembed-chat` (or `python -m kvembed_chat`) is [the chat](../howto/chat.md).
"""


def page() -> str:
    """Return the whole page."""
    group: Any = typer.main.get_command(app)
    parts = [_HEAD]
    for name, command in group.commands.items():
        if children := getattr(command, "commands", None):
            parts.append(f"## kvembed {name}\n\n{_prose(command.help)}\n")
            parts.extend(_command(f"{name} {child}", children[child], "###") for child in children)
        else:
            parts.append(_command(name, command, "##"))
    parts.append(_chat())
    return "\n".join(parts)


def _command(name: str, command: Any, level: str) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    usage = " ".join(["kvembed", name, *(_argument(parameter) for parameter in arguments), "[OPTIONS]"])
    options = [p for p in command.params if p not in arguments and not p.hidden]
    rows = [*(_argument_row(p) for p in arguments), *(_option_row(p) for p in options)]
    return _section(f"{level} kvembed {name}", command.help, usage, rows)


def _section(title: str, text: str, usage: str, rows: list[tuple[str, str, str]]) -> str:
    lines = [title, "", _prose(text), "", "```", usage, "```", ""]
    if rows:
        lines += ["| | default | |", "|---|---|---|"]
        lines += [f"| {name} | {default} | {_cell(text)} |" for name, default, text in rows]
        lines.append("")
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).upper().strip("[]")
    return name if parameter.required else f"[{name}]"


def _argument_row(parameter: Any) -> tuple[str, str, str]:
    return f"`{_argument(parameter).strip('[]')}`", _default(parameter.default), parameter.help or ""


def _option_row(parameter: Any) -> tuple[str, str, str]:
    names = " / ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    return (
        names,
        "" if parameter.is_flag and parameter.default is False else _default(parameter.default),
        parameter.help or "",
    )


def _default(value: object) -> str:
    if value is None or value == () or value == []:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{getattr(value, 'value', value)}`"


def _chat() -> str:
    parser = chat_parser()
    rows: list[tuple[str, str, str]] = []
    for action in parser._actions:
        names = action.option_strings or [str(action.metavar)]
        rows.append((", ".join(f"`{name}`" for name in names), "", action.help or ""))
    return _section("## kvembed-chat", str(parser.description), "kvembed-chat [MODEL] [OPTIONS]", rows)


def _prose(text: str | None) -> str:
    """Join lines of a paragraph; the help of typer is plain text, and its angle brackets are no HTML."""
    paragraphs = re.split(r"\n\s*\n|\f", (text or "").strip())
    return "\n\n".join(" ".join(_escape(line.strip()) for line in part.splitlines()) for part in paragraphs)


def _cell(text: str) -> str:
    return _escape(" ".join(text.split())).replace("|", "\\|")


def _escape(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")


def main(arguments: Iterator[str] | list[str]) -> int:
    """Write the page, or compare it."""
    text = page()
    if "--check" in arguments:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
