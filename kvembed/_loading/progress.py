"""Progress of long steps: a callback first, with a tqdm bar as the usual one."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ProgressCallback", "no_bars", "progress_bar", "quiet"]


class ProgressCallback(Protocol):
    """Called as work goes on.

    ``stage`` is ``"download"`` (``done`` and ``total`` in bytes) or ``"convert"`` (in steps).
    """

    def __call__(self, stage: str, done: int, total: int, /) -> None:
        """Report that ``done`` of ``total`` are finished."""
        ...


@contextlib.contextmanager
def progress_bar(title: str, callback: ProgressCallback | None) -> Iterator[ProgressCallback]:
    """Yield ``callback``, or one that draws a bar for each stage when it is None.

    Nothing is drawn when Hugging Face progress bars are switched off.
    """
    if callback is not None:
        yield callback
        return
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}
    disabled = are_progress_bars_disabled()

    def draw(stage: str, done: int, total: int) -> None:
        bar = bars.get(stage)
        if bar is None:
            for other in bars.values():
                other.close()
            scale: dict[str, Any] = (
                {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if stage == "download" else {"unit": "step"}
            )
            label = {"download": "Downloading", "convert": "Converting"}.get(stage, stage)
            bar = bars[stage] = tqdm(desc=f"{label} {title}", total=total or None, disable=disabled, **scale)
        bar.update(done - bar.n)

    try:
        yield draw
    finally:
        for bar in bars.values():
            bar.close()


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Switch off the progress bars of transformers and the hub inside the block, and restore them after."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as hf_logging

    bars, hub_bars_off = hf_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()
        # transformers' switch turns those of the hub with it.
        if hub_bars_off:
            disable_progress_bars()
        else:
            enable_progress_bars()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch off transformers' bars, log lines and all warnings inside the block, and restore them after."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with no_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
