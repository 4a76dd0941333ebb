"""Jupyter notebooks: text and code of the cells, and the text of their outputs."""

from __future__ import annotations

import json
import warnings
from typing import Any

from kvembed._documents.failing import BadFileError, needed
from kvembed._documents.plain import read_text

__all__ = ["read_notebook"]

_MOST_OUTPUT = 4000
"""Characters of one output: a log of a training is not what anybody asks about."""


def read_notebook(data: bytes, name: str) -> str:
    """Return a notebook as Markdown.

    Raises:
        BadFileError: It is damaged, or of a version that cannot be read.
    """
    text = read_text(data, name)
    nbformat = needed("nbformat", "nbformat")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cells without ids, and of what does not fit the schema
            found = nbformat.reads(text, as_version=4)
        language = found.metadata.get("kernelspec", {}).get("language") or "python"
        parts = [part for cell in found.cells for part in _parts(cell, str(language))]
    except RecursionError:
        raise
    except Exception as error:  # of a damaged file anything may come
        raise BadFileError(f"is damaged, or no notebook ({type(error).__name__}): open and save it anew") from None
    return "\n\n".join(parts)


def _parts(cell: Any, language: str) -> list[str]:
    source = str(cell.get("source", "")).strip()
    if not source:
        return []
    if cell.get("cell_type") != "code":
        return [source]
    outputs = [shown for output in cell.get("outputs", []) if (shown := _output(output))]
    return [f"```{language}\n{source}\n```", *(f"Output:\n```\n{shown}\n```" for shown in outputs)]


def _output(output: Any) -> str:
    kind = output.get("output_type")
    if kind == "stream":
        text = output.get("text", "")
    elif kind == "error":
        text = f"{output.get('ename', '')}: {output.get('evalue', '')}"
    else:
        found = output.get("data", {})
        text = found.get("text/markdown") or found.get("text/plain") or ""
        if isinstance(text, dict | list):
            text = json.dumps(text)
    text = str(text).strip()
    return text if len(text) <= _MOST_OUTPUT else f"{text[:_MOST_OUTPUT]} …"
