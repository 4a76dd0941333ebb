"""Documents: read from files, computed once, asked many times, and kept by name.

`kvembed._documents.db` lists them without torch; `kvembed._documents.library` opens them with a model.
"""

from __future__ import annotations

__all__: list[str] = []
