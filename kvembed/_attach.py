"""`attach`: the cache inside a model object, for code that insists on a transformers model.

Pipelines, trainers and harnesses test the class of what they are given, or call methods no wrapper knows of. So only
``generate`` is replaced, on the one instance: a composition wrapper runs in a pipeline but is logged as "not
supported", and changing the instance's class breaks pickling.
"""

from __future__ import annotations

import functools
import threading
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvembed._compiled import compiled_from
from kvembed._errors import ConfigError
from kvembed._model import CachedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvembed._progress import Progress
    from kvembed._store import KVStore

__all__ = ["attach", "attached", "detach", "real_assistant"]


class _AttachedGenerate:
    """Stands in for one model's ``generate``; copies and pickles of the model get the plain one back."""

    def __init__(self, cached: CachedModel) -> None:
        self._cached = cached
        model: Any = cached.hf_model
        self._original = model.generate
        self._calls = threading.local()
        functools.update_wrapper(self, self._original)

    @property
    def cached(self) -> CachedModel:
        """The model's cache."""
        return self._cached

    def __call__(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate through the cache; calls of its own come back here and go to transformers."""
        if getattr(self._calls, "inside", False):
            return self._original(inputs, generation_config, **kwargs)
        self._calls.inside = True
        try:
            return self._cached.generate(inputs, generation_config, **kwargs)
        finally:
            self._calls.inside = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model is another model: it starts without a cache.
        model = self._cached.hf_model
        return _plain_generate(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return _plain_generate, (self._cached.hf_model,)


def _plain_generate(model: Any) -> Any:
    return types.MethodType(type(model).generate, model)


def attach(
    model: Any,
    tokenizer: Any = None,
    *,
    store: KVStore | None = None,
    deterministic: bool = False,
    cache_salt: str = "",
    block_size: int = 256,
    max_live: int = 3,
    audit: float = 0.0,
    progress: Progress = "auto",
) -> CachedModel:
    """Make ``model.generate()`` itself keep and reuse KV; everything else of the model stays as it is.

    Args:
        model: A loaded transformers model (or a PEFT model around one).
        tokenizer: See `CachedModel`, like all further arguments.
        store: Where blocks are kept.
        deterministic: Reuse only what makes a call bit-identical to a cold one.
        cache_salt: Isolates callers.
        block_size: Tokens of a block.
        max_live: Caches of recent sequences kept whole in memory.
        audit: Part of the calls that are audited.
        progress: Progress of long prefills.

    Returns:
        The model's cache: for ``usage``, ``lookup``, ``explain`` and the rest. `detach` closes it.

    Raises:
        ConfigError: Something is attached already, or an option cannot work.
    """
    model = compiled_from(model)
    if attached(model) is not None:
        raise ConfigError("this model has a cache attached already: detach(model) first")
    cached = CachedModel(
        model,
        tokenizer,
        store=store,
        deterministic=deterministic,
        cache_salt=cache_salt,
        block_size=block_size,
        max_live=max_live,
        audit=audit,
        progress=progress,
    )
    model.generate = _AttachedGenerate(cached)
    return cached


def attached(model: Any) -> CachedModel | None:
    """Return the cache attached to a model, or None."""
    generate = vars(compiled_from(model)).get("generate")
    return generate.cached if isinstance(generate, _AttachedGenerate) else None


def detach(model: Any) -> None:
    """Give a model its own ``generate()`` back, and close the cache; what was stored stays stored.

    Raises:
        ConfigError: Nothing is attached.
    """
    cached = attached(model)
    if cached is None:
        raise ConfigError("nothing is attached to this model")
    del compiled_from(model).generate
    cached.close()


@contextmanager
def real_assistant(main: Any, assistant: Any) -> Iterator[Any]:
    """Give transformers a model where the caller named a cached one as the assistant of ``main``.

    transformers reads private attributes of an assistant and calls its ``generate()`` for every few drafts. So it gets
    the model itself, whose ``generate`` goes through its cache meanwhile, as if one were attached: the first of those
    calls takes up the prompt, and the others bring the cache that it handed out.
    """
    if not isinstance(assistant, CachedModel):
        yield assistant
        return
    model: Any = compiled_from(assistant.hf_model)
    # A model that drafts for itself is in the middle of a call already.
    if model is main or "generate" in vars(model):
        yield model
        return
    model.generate = _AttachedGenerate(assistant)
    try:
        yield model
    finally:
        # Another thread may have used the same assistant, and been done first.
        vars(model).pop("generate", None)
