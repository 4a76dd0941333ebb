"""HTML as Markdown: headings, lists and tables stay, scripts, pictures and addresses of links go."""

from __future__ import annotations

import re
import warnings

from kvembed._documents.failing import BadFileError, needed
from kvembed._units import format_bytes

__all__ = ["markdown_of", "read_html"]

_MOST_MARKUP = 8 << 20
_EMBEDDED = re.compile(rb"data:[\w.+/-]{1,80};base64,[A-Za-z0-9+/=]*")
_UNSEEN = ("script", "style", "noscript", "template", "svg", "head")
_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")


def read_html(data: bytes, name: str) -> str:
    """Return what a page says, as Markdown.

    Raises:
        BadFileError: There is too much of it.
    """
    if data.startswith(b"%PDF-"):
        raise BadFileError("is a PDF: give it the ending .pdf")
    # Pictures inside a page are most of many a saved page, and no text.
    return markdown_of(_EMBEDDED.sub(b"", data))


def markdown_of(markup: bytes | str) -> str:
    """Return markup as Markdown, of at most some megabytes: parsing takes about a second for each."""
    if len(markup) > _MOST_MARKUP:
        raise BadFileError(
            f"has {format_bytes(len(markup))} of markup, and HTML is read up to {format_bytes(_MOST_MARKUP)}: split "
            "it, or save it as text"
        )
    soup_class = needed("bs4", "beautifulsoup4").BeautifulSoup
    converter = needed("markdownify", "markdownify").MarkdownConverter(
        heading_style="ATX",
        bullets="-",
        strip=["a", "img"],
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it looks like XML, or like a file's name
        soup = soup_class(markup, "html.parser")
        title = soup.title.get_text(" ", strip=True) if soup.title is not None else ""
        has_heading = soup.find("h1") is not None
        for element in soup(_UNSEEN):
            element.decompose()
        text = converter.convert_soup(soup)
    text = _BLANK_LINES.sub("\n\n", text).strip()
    return f"# {title}\n\n{text}" if title and text and not has_heading else text
