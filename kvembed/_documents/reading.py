"""From what people call a document (text, a file, several) to text, with an error that says what to do where it fails.

Nothing here loads torch, and a reader's library is imported only when a file of its kind is read. Text that was read
never gets into an error: errors go into logs.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kvembed._documents import docx, html, notebook, pdf, plain
from kvembed._documents.failing import BadFileError, MissingReaderError
from kvembed._errors import ConfigError, PromptError
from kvembed._units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Content", "read_document", "Source"]

Source: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
"""A text, the path of a file, or a list of these."""

MOST_CHARACTERS = 64_000_000
"""More than any context holds. What is longer is refused before anybody tokenises it."""

_MB = 1 << 20


@dataclass(frozen=True)
class _Kind:
    """One kind of file.

    Args:
        name: As errors call it.
        most_bytes: A larger file is not read.
        read: From bytes and the file's name to text.
    """

    name: str
    most_bytes: int
    read: Callable[[bytes, str], str]


_TEXT = _Kind("text", 64 * _MB, plain.read_text)
_HTML = _Kind("HTML", 64 * _MB, html.read_html)
_KINDS = {
    ".pdf": _Kind("PDF", 256 * _MB, pdf.read_pdf),
    ".docx": _Kind("Word", 256 * _MB, docx.read_docx),
    ".html": _HTML,
    ".htm": _HTML,
    ".xhtml": _HTML,
    ".ipynb": _Kind("notebook", 64 * _MB, notebook.read_notebook),
    ".py": _Kind("Python", 64 * _MB, plain.read_python),
    ".pyw": _Kind("Python", 64 * _MB, plain.read_python),
}
_TEXT_ENDINGS = (".txt", ".md", ".rst", ".csv", ".json", ".tex", ".log", ".doc", ".odt", ".rtf", ".epub")
_LONGEST_NAME = 1024


@dataclass(frozen=True)
class Content:
    """What was read.

    Args:
        text: The text.
        name: A name for it: the file's, or empty.
        source: Where it came from: an absolute path, or empty.
    """

    text: str
    name: str = ""
    source: str = ""


def read_document(source: Source) -> Content:
    """Read a text, a file, or a list of them; see `CachedModel.document`.

    Raises:
        ConfigError: A file is missing, damaged, or of a kind that cannot be read; or its reader is not installed.
        PromptError: There is no text.
    """
    if isinstance(source, list | tuple):
        parts = [_read_one(item) for item in source]
        if not parts:
            raise PromptError("the document is empty: the list has nothing in it")
        # Without their number in all, so that a longer list begins with the very tokens of a shorter one.
        headed = [f"[Document {i}{f': {part.name}' if part.name else ''}]\n\n{part.text.strip()}"
                  for i, part in enumerate(parts, 1)]  # fmt: skip
        content = Content("\n\n".join(headed))
    else:
        content = _read_one(source)  # pyright: ignore[reportArgumentType]
    if len(content.text) > MOST_CHARACTERS:
        raise PromptError(
            f"the document has {len(content.text):,} characters, more than any model's context: split it into files, "
            "and ask about one after the other"
        )
    return content


def _read_one(source: str | os.PathLike[str]) -> Content:
    if isinstance(source, str):
        if not _is_file(source):
            _refuse_lost_name(source)
            content = Content(source)
            if not source.strip():
                raise PromptError("the document is empty")
            return content
    elif not isinstance(source, os.PathLike):
        raise ConfigError(f"a document is a text, a path, or a list of these, not {type(source).__name__}")
    path = Path(source)
    try:
        text = _read_file(path)
    except BadFileError as error:
        # Not `from error`, nor what it came from: a library's error may hold the text.
        raise ConfigError(f"{path.name!r} {error}") from None
    except MissingReaderError as error:
        raise ConfigError(
            f'reading {path.name!r} needs the package {error}: pip install "kvembed[documents]"'
        ) from None
    except RecursionError:
        raise ConfigError(f"{path.name!r} is nested too deeply to be read: save it as plain text") from None
    if not text.strip():
        raise PromptError(f"the document is empty: {path.name!r} has no text")
    return Content(text, path.name, str(path.absolute()))


def _is_file(text: str) -> bool:
    """True when a string is the name of an existing file or folder, rather than the text itself."""
    try:
        return len(text) <= _LONGEST_NAME and "\n" not in text and text.strip() != "" and Path(text).exists()
    except (OSError, ValueError):  # longer than a name can be, or with a character no name has
        return False


def _refuse_lost_name(text: str) -> None:
    """Raise for a text that can only be meant as the name of a file, which is not there."""
    if len(text) > 255 or "\n" in text or not text.strip():
        return
    if text.startswith(("http://", "https://", "file://")) and " " not in text:
        raise ConfigError("nothing is downloaded: save the page as a file, and pass its path")
    if Path(text).suffix.lower() in (*_KINDS, *_TEXT_ENDINGS):
        raise ConfigError(_no_file(text))


def _no_file(name: str) -> str:
    return f"no file {name!r} in {str(Path.cwd())!r}: pass the text itself, or the path of an existing file"


def _read_file(path: Path) -> str:
    kind = _KINDS.get(path.suffix.lower(), _TEXT)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadFileError(
                'cannot be read: it is a folder. Pass its files as a list, such as sorted(Path(...).glob("*.md"))'
            )
        if not stat.S_ISREG(status.st_mode):
            raise BadFileError("cannot be read: it is a device or a pipe, not a file")
        if status.st_size > kind.most_bytes:
            raise BadFileError(
                f"has {format_bytes(status.st_size)}, and a {kind.name} file is read up to "
                f"{format_bytes(kind.most_bytes)}: split it, or save it as text"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(_no_file(str(path))) from None
    except OSError as error:
        raise BadFileError(f"cannot be read: {error.strerror or error}") from None
    return kind.read(data, path.name)
