"""Files of every kind become text, and a file that cannot be read says what to do about it."""

from __future__ import annotations

import builtins
import io
import json
import os
import sys
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import ConfigError, PromptError
from kvembed._documents.reading import read_document

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORDS = "The lighthouse keeper counts the ships at dusk."


def pdf(*pages: bytes, more: bytes = b"", kids: bytes = b"") -> bytes:
    """Return a PDF with one content stream for each page."""
    count = len(pages)
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count %d/Kids[%s]>>"
        % (count, kids or b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(count))),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    for i, content in enumerate(pages):
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>/Contents %d 0 R>>"
            % (5 + 2 * i)
        )
        objects.append(b"<</Length %d%s>>stream\n%s\nendstream" % (len(content), more, content))
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    trailer = b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (size, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table) + trailer


def page(*lines: str) -> bytes:
    shown = b" 0 -14 Td ".join(b"(%s) Tj" % line.encode("cp1252") for line in lines)
    return b"BT /F1 12 Tf 72 720 Td %s ET" % shown


def locked_pdf() -> bytes:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf(page("secret"))))
    writer.encrypt("word", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def docx(body: str, **more: bytes) -> bytes:
    w = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    package = "http://schemas.openxmlformats.org/package/2006"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    parts: dict[str, bytes] = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="xml" '
        'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/>'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        "</Types>".encode()
        .decode()
        .encode(),
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="a" Type="{office}" '
        'Target="word/document.xml"/></Relationships>'.encode(),
        "word/document.xml": f"<w:document {w}><w:body>{body}</w:body></w:document>".encode(),
        "word/styles.xml": f'<w:styles {w}><w:style w:type="paragraph" w:styleId="H1"><w:name w:val="heading 1"/>'
        "</w:style></w:styles>".encode(),
        "word/_rels/document.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="s" Type='
        f'"{office.rpartition("/")[0]}/styles" Target="styles.xml"/></Relationships>'.encode(),
        **more,
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return out.getvalue()


def paragraph(text: str, style: str = "") -> str:
    return f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>'


DOCX = docx(
    paragraph("Ships", "H1")
    + paragraph(WORDS)
    + "<w:tbl><w:tr>"
    + "".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in ("day", "ships"))
    + "</w:tr><w:tr>"
    + "".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in ("Monday", "12"))
    + "</w:tr></w:tbl>"
    + paragraph("The end.")
)
HTML = (
    f"<html><head><title>The harbour</title><style>p {{}}</style><script>var x = 1</script></head><body><h2>Ships</h2>"
    f"<p>{WORDS}</p><table><tr><th>day</th><th>ships</th></tr><tr><td>Monday</td><td>12</td></tr></table>"
    '<img src="data:image/png;base64,AAAA"><ul><li>one<li>two</ul><a href="http://example.org/long">a link</a></body>'
)
NOTEBOOK = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}},
    "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Ships\n", WORDS]},
        {
            "cell_type": "code",
            "metadata": {},
            "execution_count": 1,
            "source": "1 + 1",
            "outputs": [
                {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": "2"}},
                {"output_type": "stream", "name": "stdout", "text": "x" * 9000},
            ],
        },
    ],
}


def read(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(data)
    return read_document(path).text


@pytest.mark.parametrize("ending", ["pdf", "docx", "html", "ipynb", "md", "py"])
def test_every_kind_of_file_gives_its_words_in_order(tmp_path: Path, ending: str) -> None:
    data, expected = {
        "pdf": (pdf(page("Ships", WORDS), page("The end.")), ["Ships", WORDS, "The end."]),
        "docx": (DOCX, ["# Ships", WORDS, "| day | ships |", "| Monday | 12 |", "The end."]),
        "html": (HTML.encode(), ["# The harbour", "## Ships", WORDS, "| Monday | 12 |", "- one", "- two", "a link"]),
        "ipynb": (json.dumps(NOTEBOOK).encode(), ["# Ships", WORDS, "```python\n1 + 1\n```", "Output:\n```\n2"]),
        "md": (f"# Ships\n\n{WORDS}".encode(), ["# Ships", WORDS]),
        "py": ("# -*- coding: latin-1 -*-\nname = 'café'\n".encode("latin-1"), ["name = 'café'"]),
    }[ending]
    text = read(tmp_path, f"ships.{ending}", data)
    at = 0
    for part in expected:
        assert part in text[at:], (part, text)
        at = text.index(part, at)
    assert not any(noise in text for noise in ("var x", "base64", "example.org", "x" * 5000))


def test_the_ending_may_be_in_capitals_and_a_source_is_its_absolute_path(tmp_path: Path) -> None:
    assert WORDS in read(tmp_path, "SHIPS.PDF", pdf(page(WORDS)))
    content = read_document(str(tmp_path / "SHIPS.PDF"))
    assert (content.name, content.source) == ("SHIPS.PDF", str(tmp_path / "SHIPS.PDF"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_text_of_any_encoding(tmp_path: Path, encoding: str) -> None:
    text = "Die Fähre fährt über den Fluß, täglich außer Montag. Größere Schiffe müssen draußen warten. " * 40
    assert read(tmp_path, "ferry.txt", text.encode(encoding)) == text


def test_a_list_has_a_heading_for_each_and_begins_as_a_shorter_one_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("First.")
    short = read_document([tmp_path / "a.txt", "Some words."]).text
    assert short == "[Document 1: a.txt]\n\nFirst.\n\n[Document 2]\n\nSome words."
    assert read_document([tmp_path / "a.txt", "Some words.", "More."]).text.startswith(short)


def nested_html() -> bytes:
    return b"<div>" * 50_000 + b"words" + b"</div>" * 50_000


def bomb() -> bytes:
    return docx("", **{"word/document.xml": b"<a>" + b" " * (40 << 20)})


LOOP = pdf(page("x"), kids=b"2 0 R")
BAD: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "truncated pdf": ("a.pdf", lambda: pdf(page(WORDS))[:200], "is damaged"),
    "no pdf": ("a.pdf", lambda: b"hello there", "is not a PDF"),
    "pdf in a circle": ("a.pdf", lambda: LOOP, "is damaged|has no text|nested"),
    "locked pdf": ("a.pdf", locked_pdf, "locked with a password"),
    "scanned pdf": ("a.pdf", lambda: pdf(b"0 0 100 100 re f"), "has no text on its 1 pages.*ocrmypdf"),
    "pdf bomb": (
        "a.pdf",
        lambda: pdf(zlib.compress(b"q Q " * (40 << 20), 9), more=b"/Filter/FlateDecode"),
        "is damaged|has no text",
    ),
    "pdf called txt": ("a.txt", lambda: pdf(page(WORDS)), r"is a PDF: give it the ending \.pdf"),
    "binary called txt": ("a.txt", lambda: os.urandom(5000), "not text but binary"),
    "old word": ("a.docx", lambda: b"\xd0\xcf\x11\xe0" + bytes(600), r"an open \.docx"),
    "truncated docx": ("a.docx", lambda: DOCX[:-30], "is damaged"),
    "docx without a document": ("a.docx", lambda: docx("<<"), "is damaged"),
    "docx bomb": ("a.docx", bomb, r"unpacks to 40\.\d MiB"),
    "huge html": ("a.html", lambda: b"<p>words</p>" * 5_000_000, "HTML is read up to"),
    "deep html": ("a.html", nested_html, "nested too deeply"),
    "no notebook": ("a.ipynb", lambda: b'{"cells": 3}', "no notebook"),
    "truncated notebook": ("a.ipynb", lambda: json.dumps(NOTEBOOK).encode()[:-40], "no notebook"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_and_what_to_do_about_it(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, make, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, name, make())
    assert repr(name) in str(caught.value)
    assert caught.value.__suppress_context__, "a library's error may hold the text"
    assert not caplog.records


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for missing in ("report.pdf", "my report.MD", tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="no file .*: pass the text itself"):
            read_document(missing)
    with pytest.raises(ConfigError, match="it is a folder. Pass its files"):
        read_document(str(tmp_path))
    with pytest.raises(ConfigError, match="nothing is downloaded"):
        read_document("https://example.org/report")
    for empty in ("", " \n", [], ["words", ""]):
        with pytest.raises(PromptError, match="empty"):
            read_document(empty)
    with pytest.raises(ConfigError, match="not int"):
        read_document(7)  # pyright: ignore[reportArgumentType]
    assert read_document("See report.pdf\nfor more.").text == "See report.pdf\nfor more."
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
        with pytest.raises(ConfigError, match="a device or a pipe"):
            read_document("pipe.txt")


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"1\.0+ TiB.*read up to 64\.0 MiB|1024\.0 GiB"):
        read_document(tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("name", "data", "package"),
    [
        ("a.pdf", pdf(page(WORDS)), "pypdf"),
        ("a.docx", DOCX, "mammoth"),
        ("a.html", HTML.encode(), "beautifulsoup4"),
        ("a.ipynb", b"{}", "nbformat"),
        ("a.txt", "Fähre".encode("cp1252"), "charset-normalizer"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, package: str
) -> None:
    real = builtins.__import__

    def missing(module: str, *args: Any, **kwargs: Any) -> Any:
        return real(module, *args, **kwargs)

    for module in ("pypdf", "mammoth", "bs4", "nbformat", "charset_normalizer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'needs the package {package}: pip install "kvembed\[documents\]"'):
        read(tmp_path, name, data)
