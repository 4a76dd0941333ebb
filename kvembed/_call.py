"""What one generation needs from transformers' hooks: the first token's time, the ids so far, a way to stop."""

from __future__ import annotations

import contextlib
import inspect
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Mapping

__all__ = ["PromptOnceStreamer", "Watch", "first_step", "with_watch"]


class Watch(StoppingCriteria):
    """Sees every token, never changes one.

    Args:
        cancel: Generation stops after the current token once this is set.

    Attributes:
        first_token_at: ``time.perf_counter()`` of the first token, or None.
        last: Ids after the latest token, ``[1, n]``.
        in_model: The first step is being fed or computed: by the model and not by the caller's processors and criteria.
            It stays so when the model fails.
    """

    def __init__(self, cancel: threading.Event | None = None) -> None:
        self._cancel = cancel
        self.first_token_at: float | None = None
        self.last: torch.Tensor | None = None
        self.in_model = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Note the time and the ids; ask to stop only when cancelled."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.last = input_ids
        stop = self._cancel is not None and self._cancel.is_set()
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)


def with_watch(criteria: Any, watch: Watch) -> StoppingCriteriaList:
    """Return the caller's stopping criteria with ours behind them; theirs is left as it was."""
    return StoppingCriteriaList([*(criteria or []), watch])


class PromptOnceStreamer(BaseStreamer):
    """Passes everything on, but the prompt only once, also when a call is repeated without a bad block."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._prompt_seen = False
        self._skip = False

    def repeat(self) -> None:
        """The call starts again: the next ``put`` is the prompt once more."""
        self._skip = self._prompt_seen

    def put(self, value: Any) -> None:
        """Pass tokens on."""
        if self._skip:
            self._skip = False
            return
        self._prompt_seen = True
        self._streamer.put(value)

    def end(self) -> None:
        """Pass the end on."""
        self._streamer.end()


@contextmanager
def first_step(
    model: Any, *, skip: int = 0, replace: Mapping[str, Any] | None = None, watch: Watch | None = None
) -> Iterator[None]:
    """Change what the first step of a generation is fed.

    Args:
        model: The wrapped model.
        skip: Skip so many tokens, which its cache holds already. transformers cuts them off itself in plain decoding,
            but not in assisted generation, nor for models that call their cache ``cache_params``: those would be fed
            the whole prompt again, on top of itself, without an error.
        replace: Arguments to put in the place of the caller's (None: to leave out): the pictures that are not in the
            cache yet. ``generate()`` itself has to see all of them, because positions after a picture depend on
            its size; but it must neither encode nor feed those that are kept.
        watch: Told when the model is at work.
    """
    prepare_inputs = model.prepare_inputs_for_generation
    encode_media = getattr(model, _ENCODE_MEDIA, None)
    wanted, watch = replace or {}, watch or Watch()

    def prepare_inputs_for_generation(
        input_ids: Any, next_sequence_length: Any = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> Any:
        if is_first_iteration:
            watch.in_model = True
            if skip and next_sequence_length is None and input_ids.shape[1] > skip:
                next_sequence_length = input_ids.shape[1] - skip
            kwargs.update({name: value for name, value in wanted.items() if name in kwargs})
        inputs = prepare_inputs(
            input_ids, next_sequence_length=next_sequence_length, is_first_iteration=is_first_iteration, **kwargs
        )
        watch.in_model = False
        return inputs

    def encode_wanted_media(model_kwargs: dict[str, Any]) -> Any:
        kept = {name: value for name, value in model_kwargs.items() if wanted.get(name, value) is not None}
        assert encode_media is not None
        watch.in_model = True
        encoded = encode_media({**kept, **{name: wanted[name] for name in kept if name in wanted}})
        watch.in_model = False
        return encoded

    def enter(*_: Any) -> None:
        watch.in_model = True

    def leave(*_: Any) -> None:
        watch.in_model = False

    # transformers looks at the signature to see which arguments a model knows.
    prepare_inputs_for_generation.__signature__ = inspect.signature(prepare_inputs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_bound(model, "prepare_inputs_for_generation", prepare_inputs_for_generation))
        if wanted:
            stack.enter_context(model.register_forward_pre_hook(enter))
            stack.enter_context(model.register_forward_hook(leave))
            if encode_media is not None:
                stack.enter_context(_bound(model, _ENCODE_MEDIA, encode_wanted_media))
        yield


_ENCODE_MEDIA = "_prepare_multimodal_encoder_kwargs_for_generation"


@contextmanager
def _bound(model: Any, name: str, function: Any) -> Iterator[None]:
    """Set an attribute on the instance for a while."""
    before = vars(model).get(name)
    setattr(model, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)
