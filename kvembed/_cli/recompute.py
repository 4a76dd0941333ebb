"""``kvembed verify --recompute``: what a model stored, computed again and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvembed._cli import _common
from kvembed._cli._steps import Steps
from kvembed._errors import UnsupportedModelError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["recompute"]


def recompute(model: str, dtype: str, folder: Path | None, *, as_json: bool) -> None:
    """Load a model, compute its stored blocks again, and end with status 1 when some were wrong.

    Args:
        model: Alias, hub id, folder or GGUF file.
        dtype: Type of the weights.
        folder: The store.
        as_json: Print JSON.
    """
    from kvembed._store import KVStore

    steps = Steps(quiet=as_json)
    with KVStore(_common.store_path(folder)) as store, _common.load_model(model, store, steps, dtype=dtype) as cached:
        if cached.support is not None:
            raise UnsupportedModelError(f"kvembed cannot cache {model}: {cached.support}")
        with steps.step("Computing again") as progress:
            report = cached.recheck(progress)
        store.take_problems()  # told below
    _common.conclude(report, as_json)
