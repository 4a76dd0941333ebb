"""Finding and loading models: aliases, local folders, GGUF files and hub ids.

Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from kvembed._loading.aliases import ALIASES, Alias, find_alias
from kvembed._loading.dtype import choose_dtype, default_device, explain_dtype
from kvembed._loading.load import load
from kvembed._loading.progress import ProgressCallback
from kvembed._loading.resolve import Resolved, resolve

__all__ = [
    "ALIASES",
    "Alias",
    "ProgressCallback",
    "Resolved",
    "choose_dtype",
    "default_device",
    "explain_dtype",
    "find_alias",
    "load",
    "resolve",
]
