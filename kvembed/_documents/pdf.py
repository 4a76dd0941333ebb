"""The text of PDF files, in the order in which their pages draw it."""

from __future__ import annotations

import io
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvembed._documents.failing import BadFileError, MissingReaderError, needed

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["read_pdf"]

_MOST_CHARACTERS = 64_000_000
_MOST_PAGES = 20_000


def read_pdf(data: bytes, name: str) -> str:
    """Return the text of all pages.

    Raises:
        BadFileError: It is damaged, locked, or holds pictures of pages only.
    """
    if b"%PDF-" not in data[:1024]:
        raise BadFileError("is not a PDF, whatever its ending says")
    pypdf = needed("pypdf", "pypdf")
    pages: list[str] = []
    length = 0
    try:
        with _quiet():
            reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
            if reader.is_encrypted and not reader.decrypt(""):
                raise BadFileError("is locked with a password: unlock it first (qpdf --decrypt locked.pdf open.pdf)")
            count = len(reader.pages)
            if count > _MOST_PAGES:
                raise BadFileError(f"has {count:,} pages: split it")
            for page in reader.pages:
                pages.append(page.extract_text().strip())
                length += len(pages[-1])
                if length > _MOST_CHARACTERS:
                    raise BadFileError("holds more text than any model's context: split it")
    except (BadFileError, MissingReaderError, RecursionError):
        raise
    except pypdf.errors.DependencyError:
        raise BadFileError('is encrypted with AES: pip install "kvembed[encryption]" to read it') from None
    except Exception as error:  # of a damaged file anything may come
        raise BadFileError(
            f"is damaged, or no PDF that can be read ({type(error).__name__}): open and save it anew, or export it as "
            "text"
        ) from None
    if not any(pages):
        raise BadFileError(
            f"has no text on its {count:,} pages: they may be pictures of a scan. Recognise the text first "
            "(ocrmypdf scan.pdf text.pdf)"
        )
    return "\n\n".join(page for page in pages if page)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from logging every flaw of a file; what cannot be read raises."""
    logger = logging.getLogger("pypdf")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
