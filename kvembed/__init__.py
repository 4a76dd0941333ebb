"""Prompt caching inside your own Python process, for Hugging Face transformers models.

::

    from kvembed import CachedModel

    model = CachedModel.from_pretrained("smollm2")
    doc = model.document("report.txt")
    print(doc.ask("What changed?").text)
    print(model.usage)

Importing the package loads neither torch nor transformers: names that need them are loaded on first use.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvembed._errors import (
    BlockFormatError,
    CacheBypassWarning,
    ConfigError,
    ContextFullError,
    EncryptedBlockError,
    KVEmbedError,
    KVEmbedWarning,
    ModelMismatchError,
    ModelNotFoundError,
    PromptError,
    StoreClosedError,
    StoreError,
    StoreFormatError,
    StoreKeyError,
    StoreReadOnlyError,
    StoreWarning,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from kvembed._attach import attach, attached, detach
    from kvembed._documents.answer import Answer
    from kvembed._documents.document import Document
    from kvembed._documents.library import Library, LibraryEntry
    from kvembed._documents.parts import Parts
    from kvembed._match import Explanation, PrefixMatch
    from kvembed._model import CachedModel
    from kvembed._prompt_view import PromptView
    from kvembed._score import Score
    from kvembed._sessions.db import SessionDB
    from kvembed._sessions.messages import SessionInfo
    from kvembed._sessions.replies import Reply, Turn
    from kvembed._sessions.session import Session
    from kvembed._store import KVStore, StoreStats, VerifyReport
    from kvembed._usage import Usage

__all__ = [
    "__version__",
    "Answer",
    "attach",
    "attached",
    "BlockFormatError",
    "CacheBypassWarning",
    "CachedModel",
    "ConfigError",
    "ContextFullError",
    "detach",
    "Document",
    "EncryptedBlockError",
    "Explanation",
    "KVEmbedError",
    "KVEmbedWarning",
    "KVStore",
    "Library",
    "LibraryEntry",
    "ModelMismatchError",
    "ModelNotFoundError",
    "Parts",
    "PrefixMatch",
    "PromptError",
    "PromptView",
    "Reply",
    "Score",
    "Session",
    "SessionDB",
    "SessionInfo",
    "StoreClosedError",
    "StoreError",
    "StoreFormatError",
    "StoreKeyError",
    "StoreReadOnlyError",
    "StoreStats",
    "StoreWarning",
    "Turn",
    "UnsupportedModelError",
    "Usage",
    "VerifyReport",
]

__version__ = "0.1.0"

_LAZY = {
    "attach": "kvembed._attach",
    "attached": "kvembed._attach",
    "detach": "kvembed._attach",
    "Reply": "kvembed._sessions.replies",
    "Score": "kvembed._score",
    "Session": "kvembed._sessions.session",
    "SessionDB": "kvembed._sessions.db",
    "SessionInfo": "kvembed._sessions.messages",
    "Turn": "kvembed._sessions.replies",
    "Answer": "kvembed._documents.answer",
    "CachedModel": "kvembed._model",
    "Document": "kvembed._documents.document",
    "Explanation": "kvembed._match",
    "KVStore": "kvembed._store",
    "Library": "kvembed._documents.library",
    "LibraryEntry": "kvembed._documents.library",
    "Parts": "kvembed._documents.parts",
    "PrefixMatch": "kvembed._match",
    "PromptView": "kvembed._prompt_view",
    "StoreStats": "kvembed._store",
    "Usage": "kvembed._usage",
    "VerifyReport": "kvembed._store",
}

logging.getLogger("kvembed").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    """Load a public name on first use (PEP 562)."""
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'kvembed' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def load_ipython_extension(ipython: Any) -> None:
    """Add ``%%ask`` and ``%kv`` to a notebook: ``%load_ext kvembed``."""
    from kvembed._magic import load

    load(ipython)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
