"""A matplotlib figure that shows itself in a notebook, without pyplot."""

from __future__ import annotations

import io
from typing import Any

from kvembed._errors import ConfigError

__all__ = ["new_figure"]

_DPI = 144  # twice what it is shown with: sharp on screens of today


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure with a transparent ground.

    Args:
        size: Width and height in inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        # Not pyplot, which would choose a window system and keep the figure for ever.
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'kvembed[notebook]'") from error

    class Plot(Figure):  # pyright: ignore[reportUntypedBaseClass]
        """Known to IPython by its mime bundle, whatever backend was chosen or none."""

        def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=_DPI, transparent=True)
            width, height = self.get_size_inches()
            shown = {"width": round(width * _DPI / 2), "height": round(height * _DPI / 2)}
            return {"image/png": buffer.getvalue(), "text/plain": repr(self)}, {"image/png": shown}

        def __repr__(self) -> str:
            titles = [ax.get_title() for ax in self.axes if ax.get_title()]
            return f"<Figure: {'; '.join(titles)}>"

    return Plot(figsize=size, layout="constrained", facecolor="none")
