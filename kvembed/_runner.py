"""One call from start to end: match, restore, prefill, hand over to transformers, store, measure.

A block that turns out bad while its rows are being read stops the forward before any token exists; the call is
then repeated without it, so the caller sees a slower call and a warning, never an error and never other text.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._attempt import plain_usage, prefill_usage, usage_of
from kvembed._batch import new_tokens, rows_of_batch, servable_batches
from kvembed._bypass import bypass_reason, copies_of_prompt, generation_value, input_ids_of, is_assisted, is_draft
from kvembed._call import PromptOnceStreamer, Watch, first_step, with_watch
from kvembed._errors import CacheBypassWarning, StoreClosedError, StoreWarning
from kvembed._explain import miss_reason
from kvembed._keys import as_token_ids
from kvembed._media import Media, MediaError, has_media
from kvembed._media_trial import MediaVerdict, note_failure, tried_media
from kvembed._restore import RestoreError
from kvembed._score import score_on
from kvembed._stages import Stages, sequence_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._attempt import Attempt, Request
    from kvembed._engine import Engine
    from kvembed._keys import TokenIds
    from kvembed._progress import Progress
    from kvembed._score import Score
    from kvembed._usage import Usage

__all__ = ["Runner"]

_CLOSED = "the store is closed"
_WRONG_CHUNKS = (
    "prefill_chunk_size, with which transformers continues this model from zero: its text is not that of one go"
)
_STATEFUL_DRAFTS = "an assistant with a state, which cannot be rolled back to the tokens that were accepted"
_NO_TOKENS = "token ids below zero or beyond 31 bits"  # kvembed's own ids for media are below zero
_MOST_NEW_TOKENS = 1 << 16  # room is made for no more than this in advance


class _MediaFailure(Exception):
    """The model failed that got the media of a suffix only, before any token: is that why?"""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Runner:
    """Runs calls for one engine.

    Args:
        engine: Where reuse happens.
        audit: Part of the calls with stored blocks that are audited.
    """

    def __init__(self, engine: Engine, audit: float = 0.0) -> None:
        self.engine = engine
        self._stages = Stages(engine, audit)
        self._model = engine.model
        self._store = engine.store
        self._warned: set[str] = set()

    # --- generate --------------------------------------------------------------------------------------

    def generate(self, request: Request, refusal: str | None) -> tuple[Any, Usage]:
        """Run one ``generate()``; see `CachedModel.generate`.

        Args:
            request: The call.
            refusal: Why it cannot be served, when that is known already.
        """
        refusal = refusal or self._refusal(request)
        if refusal is not None:
            return self._pass_through(request, refusal)
        prompt = input_ids_of(request.inputs, request.kwargs)
        assert prompt is not None
        media: Media | None = None
        if has_media(request.kwargs):
            try:
                media = tried_media(self.engine.wrapped, prompt, request.kwargs)
            except MediaError as error:
                return self._pass_through(request, str(error))
        before_another = None
        if request.kwargs.get("streamer") is not None:
            streamer = PromptOnceStreamer(request.kwargs["streamer"])
            request.kwargs = {**request.kwargs, "streamer": streamer}
            before_another = streamer.repeat
        if prompt.shape[0] > 1:
            return self._stages.repeat(lambda cold: self._generate_batch(request, prompt, cold=cold))
        ids = media.ids if media is not None else as_token_ids(prompt[0].cpu().numpy())
        try:
            return self._stages.repeat(lambda cold: self._generate_once(request, ids, media, cold=cold), before_another)
        except _MediaFailure as failure:
            assert media is not None
            if before_another is not None:
                before_another()
            alone = media.judged(MediaVerdict())  # once more, from the start
            result = self._stages.repeat(
                lambda cold: self._generate_once(request, ids, alone, cold=cold), before_another
            )
            note_failure(self.engine.wrapped, media, failure.cause)
            return result

    def _refusal(self, request: Request) -> str | None:
        """Return why a call passes through, whatever its media; notices when the model has become another one."""
        inputs, config, kwargs = request.inputs, request.generation_config, request.kwargs
        wrapped = self.engine.wrapped
        refusal = bypass_reason(self._model, inputs, config, kwargs, batches=servable_batches(wrapped.spec))
        if refusal is not None:
            return refusal
        try:
            self.engine.check_identity()
        except StoreClosedError:
            return _CLOSED
        if self.engine.refusal is not None:  # the model may have been changed into one that cannot be served
            return self.engine.refusal
        if wrapped.stepwise and generation_value(self._model, config, kwargs, "prefill_chunk_size"):
            return _WRONG_CHUNKS
        if is_draft(config) and self.engine.spec.has_state:
            return _STATEFUL_DRAFTS
        prompt = input_ids_of(inputs, kwargs)
        assert prompt is not None
        return None if 0 <= int(prompt.min()) <= int(prompt.max()) < 1 << 31 else _NO_TOKENS

    def _generate_once(self, request: Request, ids: TokenIds, media: Media | None, *, cold: bool) -> tuple[Any, Usage]:
        room = self._new_tokens(len(ids), request) + self.engine.block_size
        self.engine.wrapped.forget_media()  # of earlier calls, and of an attempt that broke off
        with contextlib.ExitStack() as stack:
            try:
                attempt = stack.enter_context(
                    self._stages.attempt(ids, room, deterministic=request.deterministic, cold=cold, media=media)
                )
                self._ask_why(attempt)
                self._compute(attempt, request)
            except StoreClosedError:  # by another thread, since this call looked
                return self._pass_through(request, _CLOSED)
            watch = attempt.watch = Watch(request.cancel)
            cache, held = attempt.sequence.cache, len(attempt.sequence.ids)
            part = media.part(held, len(ids)) if media is not None and held else None
            try:
                attempt.result = self._call(request, watch, cache, held, part)
            except RestoreError:
                raise
            except Exception as error:
                # What the caller's own processors, criteria and streamers raise is theirs.
                if media is None or not attempt.match.tokens or watch.last is not None or not watch.in_model:
                    raise
                raise _MediaFailure(error) from error
            self._stages.end_restore(attempt)
        self._report_problems()
        completed = len(sequence_of(attempt.result)) - len(ids)
        return attempt.result, usage_of(self.engine.wrapped, request, [attempt], watch, completed)

    def _ask_why(self, attempt: Attempt) -> None:
        """Note why no more is reused, before this call stores what was missing, and with it the reason is gone."""
        cached = sum(attempt.tiers.values())
        attempt.why = attempt.why or miss_reason(self.engine, attempt.match, attempt.ids, cached)

    def _compute(self, attempt: Attempt, request: Request) -> None:
        """Compute what transformers need not, and make the cache what it is to be given."""
        config, kwargs, media = request.generation_config, request.kwargs, attempt.media
        attempt.copies = copies_of_prompt(self._model, config, kwargs)
        draft, compiled = is_draft(config), self.engine.wrapped.compiled
        attempt.goes_on = draft or compiled
        # A cache that is repeated for beams, rolled back by an assistant, or goes to compiled code as a stock one, can
        # be captured only before. So can windows that have to be kept for rejected drafts: they leave our rows.
        detached = is_assisted(self._model, config, kwargs) and not self.engine.spec.full_only
        attempt.is_given_away = attempt.copies > 1 or draft or compiled or detached
        upto = len(attempt.ids) - 1 if attempt.is_given_away else None
        if media is not None:
            # transformers computes the media themselves, and what comes after them, in one forward.
            upto = media.start // self.engine.block_size * self.engine.block_size if media.resumes else 0
        elif request.state_at is not None and attempt.sequence.has_state and not request.deterministic:
            # Ends with the state there being kept. One token is always left to transformers, which would feed the whole
            # prompt once more to a cache that holds all of it.
            upto_state = min(request.state_at, len(attempt.ids) - 1)
            self._stages.prefill(attempt, request.progress, upto=upto_state, cancel=request.cancel)
        self._stages.prefill(attempt, request.progress, upto=upto, cancel=request.cancel)
        cache = attempt.sequence.cache
        if compiled:
            hf.export_cache(cache)
        if attempt.copies > 1:
            hf.expand(cache, attempt.copies)
        if draft:
            cache.activate_past_recording()

    def _generate_batch(self, request: Request, prompt: torch.Tensor, *, cold: bool) -> tuple[Any, Usage]:
        attempts: list[Attempt] = []
        self.engine.wrapped.forget_media()
        try:
            # All rows are kept at the end only: a cache that is kept may be taken over for the next row.
            with contextlib.ExitStack() as stack:
                for ids in rows_of_batch(prompt, request.kwargs.get("attention_mask")):
                    attempt = stack.enter_context(
                        self._stages.attempt(
                            ids, self.engine.block_size, deterministic=request.deterministic, cold=cold
                        )
                    )
                    attempts.append(attempt)
                    self._ask_why(attempt)
                    self._stages.prefill(attempt, request.progress, upto=len(ids) - 1)
                    self._stages.end_restore(attempt)
                    attempt.fed = len(ids) - 1
                cache = hf.join([attempt.sequence.cache for attempt in attempts], self._model.config)
        except StoreClosedError:
            return self._pass_through(request, _CLOSED)
        copies = copies_of_prompt(self._model, request.generation_config, request.kwargs)
        if copies > 1:
            hf.expand(cache, copies, len(attempts))
        watch = Watch(request.cancel)
        result = self._call(request, watch, cache, prompt.shape[1] - 1)
        self._report_problems()
        completed = new_tokens(result, prompt.shape[1], self._eos(request))
        return result, usage_of(self.engine.wrapped, request, attempts, watch, completed)

    def _eos(self, request: Request) -> list[int]:
        eos = generation_value(self._model, request.generation_config, request.kwargs, "eos_token_id")
        return [] if eos is None else [int(e) for e in (eos if isinstance(eos, list | tuple) else [eos])]

    def _call(self, request: Request, watch: Watch, cache: Any, held: int, media: Any = None) -> Any:
        """Let transformers generate from a cache that holds ``held`` tokens of each row, and ``media`` not yet."""
        wrapped = self.engine.wrapped
        arguments = {
            **request.kwargs,
            "stopping_criteria": with_watch(request.kwargs.get("stopping_criteria"), watch),
            wrapped.cache_name: cache,
        }
        if generation_value(self._model, request.generation_config, request.kwargs, "cache_implementation"):
            arguments["cache_implementation"] = None  # "dynamic", which is what this is, and yet not taken with a cache
        feeds_all = wrapped.cache_name != "past_key_values" or is_assisted(
            self._model, request.generation_config, request.kwargs
        )
        skip = held if feeds_all else 0
        changed = contextlib.nullcontext()
        if skip or media:
            changed = first_step(self._model, skip=skip, replace=media, watch=watch)
        switch = contextlib.nullcontext() if wrapped.compiled else wrapped.switch.active()
        with switch, changed:
            return self._model.generate(request.inputs, generation_config=request.generation_config, **arguments)

    def _new_tokens(self, prompt_tokens: int, request: Request) -> int:
        """Tokens to make room for; a wrong guess costs a copy later, nothing else."""
        new = generation_value(self._model, request.generation_config, request.kwargs, "max_new_tokens")
        if new is None:
            total = generation_value(self._model, request.generation_config, request.kwargs, "max_length")
            new = max(20, (total or 0) - prompt_tokens)
        return min(int(new), _MOST_NEW_TOKENS)

    # --- without a generation --------------------------------------------------------------------------

    def score(
        self, ids: TokenIds, continuations: Sequence[TokenIds], *, deterministic: bool, progress: Progress
    ) -> tuple[list[Score], Usage]:
        """Score continuations of one prompt; see `CachedModel.score`."""
        began = time.perf_counter()
        room = max(len(c) for c in continuations) + self.engine.block_size

        def run(cold: bool) -> tuple[list[Score], Attempt]:
            with self._stages.attempt(ids, room, deterministic=deterministic, cold=cold, strict=True) as attempt:
                self._stages.prefill(attempt, progress, upto=len(ids) - 1)
                self._stages.end_restore(attempt)
                scores = score_on(self.engine, attempt.sequence, ids, continuations)
                attempt.fed = len(ids) - 1
            return scores, attempt

        scores, attempt = self._stages.repeat(run)
        self._report_problems()
        return scores, prefill_usage(self.engine.wrapped, attempt, began, deterministic=deterministic)

    def prefill(self, ids: TokenIds, *, deterministic: bool, progress: Progress) -> Usage:
        """Compute and store the KV of a whole prompt; see `CachedModel.prefill`."""
        began = time.perf_counter()
        # One id more than there is: a match leaves the last token to be computed, and here none need be.
        wanted = as_token_ids([*ids.tolist(), 0])
        room = 2 * self.engine.block_size

        def run(cold: bool) -> Attempt:
            with self._stages.attempt(
                ids, room, deterministic=deterministic, cold=cold, wanted=wanted, strict=True
            ) as attempt:
                self._stages.prefill(attempt, progress, upto=len(ids))
                self._stages.end_restore(attempt)
                attempt.fed = len(ids)
            return attempt

        attempt = self._stages.repeat(run)
        self._report_problems()
        return prefill_usage(self.engine.wrapped, attempt, began, deterministic=deterministic)

    # --- not served ------------------------------------------------------------------------------------

    def _pass_through(self, request: Request, reason: str) -> tuple[Any, Usage]:
        ids = input_ids_of(request.inputs, request.kwargs)
        watch = Watch(request.cancel)
        arguments = dict(request.kwargs)
        # A custom_generate may know nothing of stopping criteria; everything else takes them.
        if not arguments.get("custom_generate"):
            arguments["stopping_criteria"] = with_watch(arguments.get("stopping_criteria"), watch)
        result = self._model.generate(request.inputs, generation_config=request.generation_config, **arguments)
        if reason not in self._warned:
            self._warned.add(reason)
            _warn_caller(f"not cached: {reason}", CacheBypassWarning)
        prompt = int(ids.shape[-1]) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else 0
        return result, plain_usage(self._model, request, watch, result, prompt, reason)

    def _report_problems(self) -> None:
        problems = self._store.take_problems()
        if problems:
            _warn_caller("; ".join(problems), StoreWarning)


def _warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line of the caller's that called into kvembed."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "kvembed":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
