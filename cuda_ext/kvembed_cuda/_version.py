"""The version, by itself so that it can be read without importing numpy."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
