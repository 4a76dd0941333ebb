"""Word files (.docx): headings, lists, tables and footnotes, as Markdown."""

from __future__ import annotations

import io
import zipfile

from kvembed._documents.failing import BadFileError, needed
from kvembed._documents.html import markdown_of
from kvembed._units import format_bytes

__all__ = ["read_docx"]

_MOST_XML = 32 << 20  # a thousand pages are about ten megabytes
_MOST_PARTS = 10_000


def read_docx(data: bytes, name: str) -> str:
    """Return the text of a Word file.

    Raises:
        BadFileError: It is damaged, locked, or a bomb.
    """
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise BadFileError("is locked with a password, or a file of an old Office: save it as an open .docx")
    mammoth = needed("mammoth", "mammoth")
    _refuse_bomb(data)

    def no_picture(image: object) -> list[object]:
        return []

    try:
        found = mammoth.convert_to_html(io.BytesIO(data), convert_image=no_picture)
    except RecursionError:
        raise
    except Exception as error:  # of a damaged file anything may come
        raise BadFileError(f"is damaged, or no .docx ({type(error).__name__}): open and save it anew") from None
    return markdown_of(found.value)


def _refuse_bomb(data: bytes) -> None:
    """Look at the sizes an archive declares: Python reads no more of a part than these."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        raise BadFileError("is damaged, or no .docx: open and save it anew") from None
    if any(part.flag_bits & 1 for part in parts):
        raise BadFileError("is locked with a password: save it as an open .docx")
    # Pictures and fonts are not read.
    nbytes = sum(part.file_size for part in parts if part.filename.lower().endswith((".xml", ".rels")))
    if nbytes > _MOST_XML or len(parts) > _MOST_PARTS:
        raise BadFileError(
            f"unpacks to {format_bytes(nbytes)} of markup in {len(parts):,} parts, more than any honest text: "
            "split it, or save it as text"
        )
