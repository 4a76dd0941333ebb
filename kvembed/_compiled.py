"""Models under ``torch.compile``: their own code for our forwards, stock cache layers for theirs.

Our prefill runs forwards of many lengths, over a cache whose layers mean nothing to the compiler: each would be
compiled anew (a trial took twelve seconds instead of a tenth). So our forwards run the modules as they were written,
and the compiled code gets a cache like the one it would have made itself, of which it sees one token at a time.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["compiled_from", "is_compiled", "uncompiled"]

_ORIGINAL = "_torchdynamo_orig_callable"


def compiled_from(model: Any) -> Any:
    """Return the module that ``torch.compile(model)`` wraps, or the model itself.

    The wrapper's ``generate()`` is that of the module inside, which runs as it was written.
    """
    return getattr(model, "_orig_mod", model)


def _compiled_parts(model: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield (attributes, name, what was written) of what was compiled in place: a module's call, or its forward."""
    if "torch._dynamo" not in sys.modules:
        return
    for module in model.modules():
        own = module.__dict__
        if own.get("_compiled_call_impl") is not None:
            yield own, "_compiled_call_impl", None
        written = getattr(own.get("forward"), _ORIGINAL, None)
        if written is not None:
            yield own, "forward", written


def is_compiled(model: Any) -> bool:
    """True when the model, or a part of it, was compiled in place."""
    return next(_compiled_parts(model), None) is not None


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Run a block of code with the modules as they were written.

    Of this model alone: ``torch.compiler.set_stance`` would do it for the whole process, other threads included.
    """
    parts = list(_compiled_parts(model))
    compiled = [own[name] for own, name, _ in parts]
    for own, name, written in parts:
        own[name] = written
    try:
        yield
    finally:
        for (own, name, _), value in zip(parts, compiled, strict=True):
            own[name] = value
