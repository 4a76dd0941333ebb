"""One call from start to end: match, restore, prefill, hand over to transformers, store, measure.

A block that turns out bad while its rows are being read stops the forward before any token exists; the call is
then repeated without it, so the caller sees a slower call and a warning, never an error and never other text.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed import hf
from kvembed._attempt import Attempt, plain_usage, prefill_usage, usage_of
from kvembed._audit import Auditor
from kvembed._batch import new_tokens, rows_of_batch, servable_batches
from kvembed._bypass import bypass_reason, copies_of_prompt, generation_value, input_ids_of, is_assisted, is_draft
from kvembed._call import PromptOnceStreamer, Watch, first_step, with_watch
from kvembed._errors import CacheBypassWarning, StoreClosedError, StoreWarning
from kvembed._explain import miss_reason
from kvembed._keys import as_token_ids
from kvembed._media import Media, MediaError, has_media
from kvembed._media_trial import MediaVerdict, note_failure, tried_media
from kvembed._plan import Plan
from kvembed._progress import prefill_progress
from kvembed._restore import RestoreError
from kvembed._score import score_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._attempt import Request
    from kvembed._engine import Engine
    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence
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
_ATTEMPTS = 4  # the last one restores nothing
_MOST_NEW_TOKENS = 1 << 16  # room is made for no more than this in advance


class _MediaFailure(Exception):
    """A forward failed that got the media of a suffix only, before any token: is that why?"""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _sequence_of(result: Any) -> TokenIds:
    """Return the ids ``generate()`` returned: prompt and new tokens."""
    return as_token_ids(getattr(result, "sequences", result)[0].cpu().numpy())


def _continued(prompt: TokenIds, sequence: TokenIds) -> TokenIds:
    """Return the prompt as the key chain knows it, with its content ids, and what was generated after it."""
    return np.concatenate([prompt, sequence[len(prompt) :]])


class Runner:
    """Runs calls for one engine.

    Args:
        engine: Where reuse happens.
        audit: Part of the calls with stored blocks that are audited.
    """

    def __init__(self, engine: Engine, audit: float = 0.0) -> None:
        self.engine = engine
        self._auditor = Auditor(engine, audit)
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
        inputs, config, kwargs = request.inputs, request.generation_config, request.kwargs
        batches = servable_batches(self.engine.wrapped.spec)
        refusal = refusal or bypass_reason(self._model, inputs, config, kwargs, batches=batches)
        if refusal is None:
            try:
                self.engine.check_identity()
                if self.engine.wrapped.stepwise and generation_value(self._model, config, kwargs, "prefill_chunk_size"):
                    return self._pass_through(request, _WRONG_CHUNKS)
                if is_draft(config) and self.engine.spec.has_state:
                    return self._pass_through(request, _STATEFUL_DRAFTS)
                refusal = self.engine.refusal  # the model may have been changed into one that cannot be served
            except StoreClosedError:
                refusal = _CLOSED
        if refusal is not None:
            return self._pass_through(request, refusal)
        prompt = input_ids_of(inputs, kwargs)
        assert prompt is not None
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < 1 << 31:
            return self._pass_through(request, _NO_TOKENS)
        media = failure = None
        if has_media(kwargs):
            try:
                media = tried_media(self.engine.wrapped, prompt, kwargs)
            except MediaError as error:
                return self._pass_through(request, str(error))
        streamer = kwargs.get("streamer")
        if streamer is not None:
            streamer = PromptOnceStreamer(streamer)
            request.kwargs = {**kwargs, "streamer": streamer}
        for attempt in range(_ATTEMPTS):
            self.engine.wrapped.forget_media()  # of earlier calls, and of an attempt that broke off
            try:
                cold = attempt == _ATTEMPTS - 1
                if prompt.shape[0] > 1:
                    return self._generate_batch(request, prompt, cold=cold)
                ids = media.ids if media is not None else as_token_ids(prompt[0].cpu().numpy())
                result = self._generate_once(request, ids, media, cold=cold)
                if failure is not None and media is not None:
                    note_failure(self.engine.wrapped, media, failure)
                return result
            except RestoreError as error:
                self._store.discard(error.key, error.reason)
            except _MediaFailure as error:
                assert media is not None
                failure, media = error.cause, media.judged(MediaVerdict())  # once more, from the start
            if streamer is not None:
                streamer.repeat()
        raise AssertionError("a cold attempt restores nothing")  # pragma: no cover

    def _generate_once(self, request: Request, ids: TokenIds, media: Media | None, *, cold: bool) -> tuple[Any, Usage]:
        engine = self.engine
        room = self._new_tokens(len(ids), request) + engine.block_size
        try:
            attempt = self._begin(ids, ids[:1] if cold else ids, request.deterministic, room, media)
            # Asked before this call stores what was missing, and with it the reason is gone.
            attempt.why = attempt.why or miss_reason(engine, attempt.match, ids, sum(attempt.tiers.values()))
        except StoreClosedError:  # by another thread, since this call looked
            return self._pass_through(request, _CLOSED)
        watch = Watch(request.cancel)
        result = None
        try:
            attempt.copies = copies_of_prompt(self._model, request.generation_config, request.kwargs)
            draft, compiled = is_draft(request.generation_config), engine.wrapped.compiled
            # A cache that is repeated for beams, rolled back by an assistant, or goes to compiled code as a stock one,
            # can be captured only before.
            attempt.is_given_away = attempt.copies > 1 or draft or compiled
            upto = len(ids) - 1 if attempt.is_given_away else None
            if media is not None:
                # transformers computes the media themselves, and what comes after them, in one forward.
                upto = media.start // engine.block_size * engine.block_size if media.resumes else 0
            self._prefill(attempt, request.progress, upto=upto)
            if compiled:
                hf.export_cache(attempt.sequence.cache)
            if attempt.copies > 1:
                hf.expand(attempt.sequence.cache, attempt.copies)
            if draft:
                attempt.sequence.cache.activate_past_recording()
            held = len(attempt.sequence.ids)
            part = media.part(held, len(ids)) if media is not None and held else None
            result = self._call(request, watch, attempt.sequence.cache, held, part)
            self._end_restore(attempt)
        except RestoreError:
            attempt.sequence.ids = ids[:0]  # its rows were never filled: nothing of this cache may be kept
            raise
        except Exception as error:
            if media is None or not attempt.match.tokens or watch.last is not None:
                raise
            raise _MediaFailure(error) from error
        finally:
            with contextlib.suppress(StoreClosedError):
                self._keep(attempt, watch, result)
        self._report_problems()
        return result, usage_of(engine.wrapped, request, [attempt], watch, len(_sequence_of(result)) - len(ids))

    def _generate_batch(self, request: Request, prompt: torch.Tensor, *, cold: bool) -> tuple[Any, Usage]:
        attempts: list[Attempt] = []
        try:
            for ids in rows_of_batch(prompt, request.kwargs.get("attention_mask")):
                attempt = self._begin(ids, ids[:1] if cold else ids, request.deterministic, self.engine.block_size)
                attempts.append(attempt)
                cached = sum(attempt.tiers.values())
                attempt.why = attempt.why or miss_reason(self.engine, attempt.match, ids, cached)
                self._prefill(attempt, request.progress, upto=len(ids) - 1)
                self._end_restore(attempt)
            cache = hf.join([attempt.sequence.cache for attempt in attempts], self._model.config)
        except RestoreError:
            attempts[-1].sequence.ids = attempts[-1].ids[:0]
            raise
        except StoreClosedError:
            return self._pass_through(request, _CLOSED)
        finally:
            for attempt in attempts:
                # A row that broke off has fewer tokens than it was to have, and what it was fed last is not known.
                fed = len(attempt.ids) - 1 if len(attempt.sequence.ids) == len(attempt.ids) - 1 else None
                with contextlib.suppress(StoreClosedError):
                    self._keep(attempt, Watch(), None, fed)
        copies = copies_of_prompt(self._model, request.generation_config, request.kwargs)
        if copies > 1:
            hf.expand(cache, copies, len(attempts))
        watch = Watch(request.cancel)
        result = self._call(request, watch, cache, prompt.shape[1] - 1)
        self._report_problems()
        return result, usage_of(
            self.engine.wrapped, request, attempts, watch, new_tokens(result, prompt.shape[1], self._eos(request))
        )

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
        changed = first_step(self._model, skip=skip, replace=media) if skip or media else contextlib.nullcontext()
        switch = contextlib.nullcontext() if wrapped.compiled else wrapped.switch.active()
        with switch, changed:
            return self._model.generate(request.inputs, generation_config=request.generation_config, **arguments)

    def _begin(
        self, ids: TokenIds, wanted: TokenIds, deterministic: bool, room: int, media: Media | None = None
    ) -> Attempt:
        for tokens in (wanted, wanted, wanted[:1]):
            match = self.engine.match(tokens, deterministic=deterministic, media=media)
            plan = self.engine.plan(match) if media is None else Plan(match)
            audited = media is None and self._auditor.is_due(plan.match)
            if audited and not self._auditor.audit(ids, plan.match):
                match = self.engine.match(tokens, deterministic=deterministic)
                plan = self.engine.plan(match)
            match, front = plan.match, plan.front
            sequence, restore, tiers = self.engine.open(match, ids, len(ids) + room, front=front)
            if media is None or media.floor(len(sequence.ids)) == len(sequence.ids):
                if front and restore is None:
                    front, plan = 0, Plan(match)
                return Attempt(ids, match, sequence, restore, tiers, media, front, audited, plan.reason)
            # A block was gone when it was opened, and what is left ends inside a picture.
            if restore is not None:
                restore.cancel()
        raise AssertionError("nothing restored ends nowhere")  # pragma: no cover

    def _prefill(self, attempt: Attempt, progress: Progress, *, upto: int | None) -> None:
        def put(sequence: LiveSequence) -> None:
            with contextlib.suppress(StoreClosedError):
                attempt.stored += self.engine.capture(sequence, tail=False)

        with prefill_progress(progress, len(attempt.sequence.ids), len(attempt.ids)) as on_progress:
            if attempt.front and attempt.restore is not None:
                self.engine.prefill(attempt.sequence, attempt.ids, upto=attempt.front, on_progress=on_progress, put=put)
                self.engine.join(attempt.match, attempt.ids, attempt.sequence, attempt.restore)
            self.engine.prefill(attempt.sequence, attempt.ids, upto=upto, on_progress=on_progress, put=put)
        if attempt.sequence.has_state or attempt.is_given_away:
            # What comes next changes the state, or takes the cache away.
            self._end_restore(attempt)
            with contextlib.suppress(StoreClosedError):
                attempt.stored += self.engine.capture(attempt.sequence, tail=True)

    def _end_restore(self, attempt: Attempt) -> None:
        restore = attempt.restore
        if restore is not None:
            restore.finish()
            tier, *others = restore.tiers
            if not others:
                with contextlib.suppress(StoreClosedError):
                    self.engine.speeds.note(tier, restore.nbytes, restore.seconds)

    def _new_tokens(self, prompt_tokens: int, request: Request) -> int:
        """Tokens to make room for; a wrong guess costs a copy later, nothing else."""
        new = generation_value(self._model, request.generation_config, request.kwargs, "max_new_tokens")
        if new is None:
            total = generation_value(self._model, request.generation_config, request.kwargs, "max_length")
            new = max(20, (total or 0) - prompt_tokens)
        return min(int(new), _MOST_NEW_TOKENS)

    def _keep(self, attempt: Attempt, watch: Watch, result: Any, fed: int | None = None) -> None:
        """Store what the call has learned, also when it broke off; keep its cache live unless it was given away."""
        sequence, restore = attempt.sequence, attempt.restore
        if restore is not None:
            restore.cancel()
        if not len(sequence.ids) and result is None and watch.last is None:
            return
        seen = attempt.ids
        if result is not None:
            seen = _continued(attempt.ids, _sequence_of(result))
            fed = len(seen) - 1  # the last token was made, not fed
        elif watch.last is not None:
            seen = _continued(attempt.ids, as_token_ids(watch.last[0].cpu().numpy()))
        ours = not attempt.is_given_away and self.engine.settle(sequence, seen, fed=fed)
        if ours:
            with contextlib.suppress(StoreClosedError):
                attempt.stored += self.engine.capture(sequence, tail=True)
        if attempt.is_given_away and attempt.copies == 1:
            pass  # what compiled code got was a stock one, and an assistant's next drafts go on with ours
        elif result is not None and getattr(result, "past_key_values", None) is not None:
            hf.export_cache(sequence.cache)
        elif ours:
            self.engine.keep(sequence)
        self._store.touch(sequence.keys)
        read = (stored.info for stored, _ in attempt.match.stored if stored.tier == "disk")
        from_disk = [info.key for info in read if info.start >= attempt.front]
        if from_disk:
            self._store.promote(from_disk)

    # --- score -----------------------------------------------------------------------------------------

    def score(
        self, ids: TokenIds, continuations: Sequence[TokenIds], *, deterministic: bool, progress: Progress
    ) -> tuple[list[Score], Usage]:
        """Score continuations of one prompt; see `CachedModel.score`."""
        began = time.perf_counter()
        for attempt in range(_ATTEMPTS):
            try:
                cold = attempt == _ATTEMPTS - 1
                return self._score_once(ids, continuations, deterministic, progress, began, cold=cold)
            except RestoreError as error:
                self._store.discard(error.key, error.reason)
        raise AssertionError("a cold attempt restores nothing")  # pragma: no cover

    def _score_once(
        self,
        ids: TokenIds,
        continuations: Sequence[TokenIds],
        deterministic: bool,
        progress: Progress,
        began: float,
        *,
        cold: bool,
    ) -> tuple[list[Score], Usage]:
        room = max(len(c) for c in continuations) + self.engine.block_size
        attempt = self._begin(ids, ids[:1] if cold else ids, deterministic, room)
        fed = None
        try:
            self._prefill(attempt, progress, upto=len(ids) - 1)
            self._end_restore(attempt)
            scores = score_on(self.engine, attempt.sequence, ids, continuations)
            fed = len(ids) - 1
        except RestoreError:
            attempt.sequence.ids = ids[:0]
            raise
        finally:
            self._keep(attempt, Watch(), None, fed)
        self._report_problems()
        return scores, prefill_usage(self.engine.wrapped, attempt, began, deterministic=deterministic)

    # --- prefill ---------------------------------------------------------------------------------------

    def prefill(self, ids: TokenIds, *, deterministic: bool, progress: Progress) -> Usage:
        """Compute and store the KV of a whole prompt; see `CachedModel.prefill`."""
        began = time.perf_counter()
        for attempt in range(_ATTEMPTS):
            try:
                return self._prefill_once(ids, deterministic, progress, began, cold=attempt == _ATTEMPTS - 1)
            except RestoreError as error:
                self._store.discard(error.key, error.reason)
        raise AssertionError("a cold attempt restores nothing")  # pragma: no cover

    def _prefill_once(
        self, ids: TokenIds, deterministic: bool, progress: Progress, began: float, *, cold: bool
    ) -> Usage:
        # One id more than there is: a match leaves the last token to be computed, and here none need be.
        wanted = ids[:1] if cold else as_token_ids([*ids.tolist(), 0])
        attempt = self._begin(ids, wanted, deterministic, 2 * self.engine.block_size)
        fed = None
        try:
            self._prefill(attempt, progress, upto=len(ids))
            self._end_restore(attempt)
            fed = len(ids)
        except RestoreError:
            attempt.sequence.ids = ids[:0]
            raise
        finally:
            self._keep(attempt, Watch(), None, fed)
        self._report_problems()
        return prefill_usage(self.engine.wrapped, attempt, began, deterministic=deterministic)

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
            warnings.warn(f"not cached: {reason}", CacheBypassWarning, stacklevel=4)
        prompt = int(ids.shape[-1]) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else 0
        return result, plain_usage(self._model, request, watch, result, prompt, reason)

    def _report_problems(self) -> None:
        problems = self._store.take_problems()
        if problems:
            warnings.warn("; ".join(problems), StoreWarning, stacklevel=5)
