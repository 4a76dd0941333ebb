"""Tests with libraries that call ``generate()`` or change a model; skipped where a library is not installed."""
