"""Plain text, Markdown and source code: whatever their encoding."""

from __future__ import annotations

import codecs
import io
import tokenize

from kvembed._documents.failing import BadFileError, needed

__all__ = ["read_python", "read_text"]

_SAMPLE = 1 << 16
_BOMS = (  # the longest first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = (
    (b"%PDF-", "is a PDF: give it the ending .pdf"),
    (b"PK\x03\x04", "is an archive (Word, Excel, EPUB ...): give it the ending .docx if it is one, or save it as text"),
    (b"\xd0\xcf\x11\xe0", "is a file of an old Office: save it as .docx or as text"),
    (b"{\\rtf", "is RTF: save it as .docx or as text"),
)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\x08\x1b\x1a"))


def read_text(data: bytes, name: str) -> str:
    """Return text, of any encoding that shows itself.

    Raises:
        BadFileError: It is no text, or nobody can tell its encoding.
    """
    for magic, advice in _MAGIC:
        if data.startswith(magic):
            raise BadFileError(advice)
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return _decoded(data, encoding)
    sample = data[:_SAMPLE]
    encoding = _utf16_without_mark(sample)
    if encoding is not None:
        return _decoded(data, encoding)
    if b"\0" in sample or len(sample.translate(None, _CONTROLS)) < 0.99 * len(sample):
        raise BadFileError("is not text but binary data: save or export it as text, PDF or .docx")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    # Where it is not UTF-8 may be far from the beginning: that part tells the most.
    at = max(0, _first_high(data) - _SAMPLE // 2)
    found = needed("charset_normalizer", "charset-normalizer").from_bytes(data[at : at + _SAMPLE]).best()
    if found is None:
        raise BadFileError("is in no encoding that can be told: save it as UTF-8")
    return _decoded(data, found.encoding)


def read_python(data: bytes, name: str) -> str:
    """Return Python source, in the encoding that it names itself (PEP 263).

    Raises:
        BadFileError: It is no text, or not in that encoding.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    except SyntaxError:
        return read_text(data, name)
    if b"\0" in data[:_SAMPLE]:
        return read_text(data, name)
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return read_text(data, name)


def _first_high(data: bytes) -> int:
    try:
        data.decode("ascii")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _utf16_without_mark(sample: bytes) -> str | None:
    """Return the byte order of UTF-16 text of mostly Latin letters: every second byte is zero."""
    half = len(sample) // 2
    if half < 8:
        return None
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if odd > 0.4 * half and even < 0.02 * half:
        return "utf-16-le"
    if even > 0.4 * half and odd < 0.02 * half:
        return "utf-16-be"
    return None


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        raise BadFileError(f"looks like {encoding}, but is damaged or mixed: save it as UTF-8") from None
