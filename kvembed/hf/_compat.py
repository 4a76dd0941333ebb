"""What differs between the supported versions of transformers; the rest of kvembed is written for all of them.

====== =============================================================================================================
until  difference
====== =============================================================================================================
5.20   ``crop()`` of a stock layer takes a positive length too; ours hand it on. Nothing to do.
5.21   chunked prefill starts over on a filled cache: `CHUNKS_RESUME`.
5.21   Qwen 4's indexer keeps positions on the cache itself, not in its layers: the probe refuses such a model.
5.23   Gemma 3 cuts its token types for the mask where it goes on: the trial with pictures finds it, nothing to do.
5.23   layers without a cache of their own are empty linear ones, or missing at the end: no layer is a `DummyLayer`.
====== =============================================================================================================

Older versions than `OLDEST` may lack any of the layer classes. They are replaced by empty ones then, so that kvembed
can still be imported and say what to install when a model is wrapped.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import transformers

from kvembed._errors import ConfigError

__all__ = [
    "CHUNKS_RESUME",
    "OLDEST",
    "UNTRIED",
    "DummyLayer",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionLayer",
    "check_version",
    "is_before",
]

OLDEST: Final = (5, 19)
"""The first version whose layers have ``is_croppable``; pyproject.toml says the same."""

UNTRIED: Final = (5, 24)
"""The first version that nothing was tried with; pyproject.toml says the same. Where it is installed all the same, the
trial of each model still finds what does not work."""


def _installed() -> str:
    return transformers.__version__


def is_before(version: tuple[int, int]) -> bool:
    """True when the installed transformers is older; ``"5.23.0.dev0"`` counts as 5.23."""
    return tuple(int(number) for number in re.findall(r"\d+", _installed())[:2]) < version


def check_version() -> None:
    """Raise when transformers is too old to be wrapped.

    Raises:
        ConfigError: It is; the message says what to install.
    """
    if is_before(OLDEST):
        oldest, untried = (".".join(map(str, version)) for version in (OLDEST, UNTRIED))
        raise ConfigError(
            f"kvembed needs transformers {oldest} or later, and {_installed()} is installed: "
            f"pip install 'transformers>={oldest},<{untried}'"
        )


CHUNKS_RESUME: Final = not is_before((5, 21))
"""Whether ``prefill_chunk_size`` leaves out the tokens a cache holds already."""


if TYPE_CHECKING:
    from transformers.cache_utils import (
        DummyLayer,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        LinearAttentionLayer,
    )
else:
    from transformers import cache_utils

    def _class(name: str) -> Any:
        return getattr(cache_utils, name, None) or type(name, (), {"__doc__": "Not in this version; no layer is one."})

    DummyLayer = _class("DummyLayer")
    DynamicCache = _class("DynamicCache")
    DynamicLayer = _class("DynamicLayer")
    DynamicSlidingWindowLayer = _class("DynamicSlidingWindowLayer")
    LinearAttentionLayer = _class("LinearAttentionLayer")
    LinearAttentionAndFullAttentionLayer = _class("LinearAttentionAndFullAttentionLayer")
    LinearAttentionAndSlidingWindowAttentionLayer = _class("LinearAttentionAndSlidingWindowAttentionLayer")
