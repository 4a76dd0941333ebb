"""Text as it is generated: transformers runs in a thread, the caller iterates."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

import torch

from kvembed._progress import StoppedEarly
from kvembed._prompt import as_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvembed._keys import TokenIds
    from kvembed._model import CachedModel
    from kvembed._usage import Usage

__all__ = ["stream_text"]


def stream_text(
    model: CachedModel,
    ids: TokenIds,
    max_new_tokens: int,
    kwargs: dict[str, Any],
    keep: Callable[[Any, Usage], object] | None = None,
    state_at: int | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[str]:
    """Yield pieces of the reply; an error of the generation is raised here, after the pieces before it.

    Args:
        model: The wrapped model.
        ids: The prompt.
        max_new_tokens: Most tokens to generate.
        kwargs: Further arguments of ``generate()``.
        keep: Called with what ``generate()`` returned and its cost, also when it was stopped, before the last piece.
        state_at: See `kvembed._attempt.Request`.
        cancel: Set, in any thread, to stop after the current token, or step of the prefill; then nothing is kept.
    """
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    cancel = threading.Event() if cancel is None else cancel
    failure: list[BaseException] = []
    prompt = as_prompt(model.hf_model, ids)

    def run() -> None:
        try:
            arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": max_new_tokens, **kwargs}
            with model._lock:
                result = model._generate(prompt, None, {**arguments, "streamer": streamer}, cancel, state_at)
                usage = model.usage
            if keep is not None:
                keep(result, usage)
        except StoppedEarly:
            pass
        except BaseException as error:
            failure.append(error)
        finally:
            # Also after an error, or the reader would wait for ever.
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=run, name="kvembed-generate", daemon=True)
    thread.start()
    try:
        while True:
            try:
                piece = streamer.text_queue.get(timeout=1.0)
            except queue.Empty:
                if thread.is_alive():
                    continue
                break
            if piece is streamer.stop_signal:
                break
            if piece:
                yield piece
    finally:
        cancel.set()
        thread.join()
    if failure:
        raise failure[0]
