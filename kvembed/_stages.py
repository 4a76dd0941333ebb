"""The stages of every call: take up what is stored of a prompt, compute the rest, keep what was learned."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvembed import hf
from kvembed._attempt import Attempt
from kvembed._audit import Auditor
from kvembed._errors import StoreClosedError
from kvembed._keys import as_token_ids
from kvembed._plan import Plan
from kvembed._progress import prefill_progress
from kvembed._restore import RestoreError
from kvembed._spans import as_spans

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from kvembed._engine import Engine
    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence
    from kvembed._media import Media
    from kvembed._progress import Progress

__all__ = ["Stages", "sequence_of"]

_T = TypeVar("_T")
_ATTEMPTS = 4  # the last one restores nothing


def sequence_of(result: Any) -> TokenIds:
    """Return the ids ``generate()`` returned: prompt and new tokens."""
    return as_token_ids(getattr(result, "sequences", result)[0].cpu().numpy())


def _continued(prompt: TokenIds, sequence: TokenIds) -> TokenIds:
    """Return the prompt as the key chain knows it, with its content ids, and what was generated after it."""
    return np.concatenate([prompt, sequence[len(prompt) :]])


class Stages:
    """What calls of one engine are made of.

    Args:
        engine: Where reuse happens.
        audit: Part of the calls with stored blocks that are audited.
    """

    def __init__(self, engine: Engine, audit: float) -> None:
        self._engine = engine
        self._store = engine.store
        self._auditor = Auditor(engine, audit)

    def repeat(self, run: Callable[[bool], _T], before_another: Callable[[], object] | None = None) -> _T:
        """Run a call, and again without each block that turned out bad while it was read.

        Args:
            run: Makes one attempt; given True, one that must restore nothing.
            before_another: Called before every attempt but the first.
        """
        cold = False
        for number in range(_ATTEMPTS):
            if number and before_another is not None:
                before_another()
            try:
                return run(cold or number == _ATTEMPTS - 1)
            except RestoreError as error:
                if error.key is not None:
                    self._store.discard(error.key, error.reason)
                else:
                    self._store.report_problem("transfer", f"blocks could not be copied to the model: {error.reason}")
                    cold = True
        raise AssertionError("a cold attempt restores nothing")  # pragma: no cover

    @contextlib.contextmanager
    def attempt(
        self,
        ids: TokenIds,
        room: int,
        *,
        deterministic: bool,
        cold: bool,
        wanted: TokenIds | None = None,
        media: Media | None = None,
        strict: bool = False,
    ) -> Iterator[Attempt]:
        """Take up what is stored of a prompt; in the end store what was learned, also when the call broke off.

        Args:
            ids: The prompt, as the key chain knows it.
            room: Tokens after the prompt to make room for.
            deterministic: Reuse only what makes the call bit-identical to a cold one.
            cold: Reuse nothing.
            wanted: Ids to look for, where they are others than the prompt's.
            media: The prompt's pictures.
            strict: A store that was closed meanwhile is an error.
        """
        attempt = self._begin(
            ids, ids[:1] if cold else ids if wanted is None else wanted, deterministic, len(ids) + room, media
        )
        try:
            yield attempt
        except RestoreError:
            attempt.sequence.ids = ids[:0]  # its rows were never filled: nothing of this cache may be kept
            raise
        finally:
            with contextlib.suppress(*(() if strict else (StoreClosedError,))):
                self._keep(attempt)

    def _begin(
        self, ids: TokenIds, wanted: TokenIds, deterministic: bool, capacity: int, media: Media | None
    ) -> Attempt:
        for tokens in (wanted, wanted, wanted[:1]):
            match = self._engine.match(tokens, deterministic=deterministic, media=media)
            plan = self._engine.plan(match) if media is None else Plan(match)
            audited = media is None and self._auditor.is_due(plan.match)
            if audited and not self._auditor.audit(ids, plan.match):
                match = self._engine.match(tokens, deterministic=deterministic)
                plan = self._engine.plan(match)
            match, front = plan.match, plan.front
            sequence, restore, runs = self._engine.open(match, ids, capacity, front=front)
            if media is None or media.floor(len(sequence.ids)) == len(sequence.ids):
                if front and restore is None:
                    front, plan = 0, Plan(match)
                spans = as_spans(runs, len(ids))
                return Attempt(ids, match, sequence, restore, spans, media, front, audited, plan.reason)
            # A block was gone when it was opened, and what is left ends inside a picture.
            if restore is not None:
                restore.cancel()
        raise AssertionError("nothing restored ends nowhere")  # pragma: no cover

    def prefill(
        self, attempt: Attempt, progress: Progress, *, upto: int | None, cancel: threading.Event | None = None
    ) -> None:
        """Compute a prompt up to a position, or all but what is left to transformers; store what is finished.

        Raises:
            StoppedEarly: ``cancel`` was set.
        """

        def put(sequence: LiveSequence) -> None:
            with contextlib.suppress(StoreClosedError):
                attempt.stored += self._engine.capture(sequence, tail=False)

        engine = self._engine
        with prefill_progress(progress, len(attempt.sequence.ids), len(attempt.ids), cancel) as on_progress:
            if attempt.front and attempt.restore is not None:
                engine.prefill(attempt.sequence, attempt.ids, upto=attempt.front, on_progress=on_progress, put=put)
                engine.join(attempt.match, attempt.ids, attempt.sequence, attempt.restore)
            engine.prefill(attempt.sequence, attempt.ids, upto=upto, on_progress=on_progress, put=put)
        if attempt.sequence.has_state or attempt.is_given_away:
            # What comes next changes the state, or takes the cache away.
            self.end_restore(attempt)
            with contextlib.suppress(StoreClosedError):
                attempt.stored += engine.capture(attempt.sequence, tail=True)

    def end_restore(self, attempt: Attempt) -> None:
        """Wait until all rows are filled.

        Raises:
            RestoreError: A block was bad.
        """
        restore = attempt.restore
        if restore is not None:
            restore.finish()
            (tier, codec), *others = restore.kinds
            if not others:
                with contextlib.suppress(StoreClosedError):
                    self._engine.speeds.note(tier, restore.nbytes, restore.seconds, codec)

    def _keep(self, attempt: Attempt) -> None:
        """Store what the call has learned; keep its cache live unless it was given away."""
        sequence, restore, watch, result = attempt.sequence, attempt.restore, attempt.watch, attempt.result
        if restore is not None:
            restore.cancel()
            if not restore.complete and not attempt.front:
                sequence.ids = sequence.ids[:0]  # broken off while rows were still being read
                return
        if not len(sequence.ids) and result is None and watch.last is None:
            return
        seen, fed = attempt.ids, attempt.fed
        if result is not None:
            seen = _continued(attempt.ids, sequence_of(result))
            fed = len(seen) - 1  # the last token was made, not fed
        elif watch.last is not None:
            seen = _continued(attempt.ids, as_token_ids(watch.last[0].cpu().numpy()))
        ours = not attempt.is_given_away and self._engine.settle(sequence, seen, fed=fed)
        if ours:
            with contextlib.suppress(StoreClosedError):
                attempt.stored += self._engine.capture(sequence, tail=True)
        if attempt.goes_on:
            pass
        elif result is not None and getattr(result, "past_key_values", None) is not None:
            hf.export_cache(sequence.cache)
        elif ours:
            self._engine.keep(sequence)
        self._store.touch(sequence.keys)
        read = (stored.info for stored, _ in attempt.match.stored if stored.tier == "disk")
        from_disk = [info.key for info in read if info.start >= attempt.front]
        if from_disk:
            self._store.promote(from_disk)
