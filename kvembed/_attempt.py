"""One attempt at a call: what was asked, what it has so far, and what it cost."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvembed._call import Watch
from kvembed._codecs.names import LOSSLESS, fidelity
from kvembed._errors import StoreClosedError
from kvembed._spans import tiers_of
from kvembed._usage import Usage

if TYPE_CHECKING:
    import threading

    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence
    from kvembed._matching import Match
    from kvembed._media import Media
    from kvembed._progress import Progress
    from kvembed._restore import Restore
    from kvembed._spans import Spans
    from kvembed._wrapped import WrappedModel

__all__ = ["Attempt", "Request", "plain_usage", "prefill_usage", "usage_of"]

_RATE_TOKENS = 64  # a prefill rate is believed when at least this many tokens were computed


@dataclass
class Request:
    """What the caller of ``generate()`` asked for.

    Args:
        inputs: First positional argument of ``generate()``.
        generation_config: Second one.
        kwargs: All others.
        deterministic: Reuse only what makes the call bit-identical to a cold one.
        progress: Who wants to see a long prefill.
        cancel: Set to stop after the current token.
        state_at: Tokens of the prompt after which a recurrent state is kept too: the next prompt will share so many.
        began: ``time.perf_counter()`` when the call came in.
    """

    inputs: Any
    generation_config: Any
    kwargs: dict[str, Any]
    deterministic: bool
    progress: Progress
    cancel: threading.Event | None = None
    state_at: int | None = None
    began: float = field(default_factory=time.perf_counter)


@dataclass
class Attempt:
    """State of one attempt, filled as it goes.

    Args:
        spans: Where each part of the prompt comes from.
        front: Leading tokens that are computed while others are read.
        fed: Tokens that the cache holds after a call without a generation; None when it broke off half-way.
        watch: Sees what is generated.
        result: What ``generate()`` returned.
        is_given_away: The cache will not be ours after the call, so it is captured before.
        lossy: The least faithful codec that what is reused has been through, if any.
        goes_on: Nor is anything to be done about it then: compiled code got a stock one, and an assistant's next
            drafts go on with ours.
    """

    ids: TokenIds
    match: Match
    sequence: LiveSequence
    restore: Restore | None
    spans: Spans
    media: Media | None = None
    front: int = 0
    audited: bool = False
    why: str | None = None
    stored: int = 0
    copies: int = 1
    fed: int | None = None
    watch: Watch = field(default_factory=Watch)
    result: Any = None
    is_given_away: bool = False
    goes_on: bool = False
    lossy: str | None = None

    def __post_init__(self) -> None:
        # Now, while the sequence holds what is reused and nothing else.
        codec = self.sequence.codec if self.sequence.faithful is not None else LOSSLESS
        self.lossy = codec if codec != LOSSLESS else None

    @property
    def tiers(self) -> dict[str, int]:
        """Tokens that each tier has."""
        return tiers_of(self.spans)


def prefill_usage(wrapped: WrappedModel, attempt: Attempt, began: float, *, deterministic: bool) -> Usage:
    """Return what computing one prompt cost, without a generation."""
    total = time.perf_counter() - began
    computed = len(attempt.ids) - sum(attempt.tiers.values())
    rate = _rate(wrapped, computed, total, attempt.restore)
    return Usage(
        prompt_tokens=len(attempt.ids),
        cached_tokens_by_tier=attempt.tiers,
        spans=attempt.spans,
        lookup_s=attempt.match.seconds,
        restore_s=attempt.restore.seconds if attempt.restore is not None else 0.0,
        prefill_s=total - attempt.match.seconds,
        total_s=total,
        prefill_tokens_per_second=rate,
        audited=attempt.audited,
        deterministic=deterministic,
        stored_tokens=attempt.stored,
        lossy=attempt.lossy,
    )


def _rate(wrapped: WrappedModel, computed: int, seconds: float, restore: Restore | None) -> float | None:
    if computed < _RATE_TOKENS or restore is not None or seconds <= 0:
        return None
    rate = computed / seconds
    wrapped.note_prefill_rate(rate)
    return rate


def plain_usage(model: Any, request: Request, watch: Watch, result: Any, prompt_tokens: int, reason: str) -> Usage:
    """Return what a call cost that was passed through."""
    total = time.perf_counter() - request.began
    sequences = getattr(result, "sequences", result)
    before = 1 if getattr(model.config, "is_encoder_decoder", False) else prompt_tokens  # the decoder's start token
    length = int(sequences.shape[-1]) if getattr(sequences, "ndim", 0) == 2 else 0
    ttft = watch.first_token_at - request.began if watch.first_token_at is not None else total
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=max(0, length - before),
        prefill_s=ttft,
        decode_s=total - ttft,
        ttft_s=ttft,
        total_s=total,
        bypass_reason=reason,
    )


def usage_of(
    wrapped: WrappedModel, request: Request, attempts: list[Attempt], watch: Watch, completion_tokens: int
) -> Usage:
    """Return what a generation cost, over all rows of its batch."""
    now = time.perf_counter()
    first = watch.first_token_at if watch.first_token_at is not None else now
    ttft = first - request.began
    # A restore overlaps with the compute, so its seconds are not taken off the prefill's.
    restores = [attempt.restore for attempt in attempts if attempt.restore is not None]
    restore_s = min(sum(restore.seconds for restore in restores), ttft)
    lookup_s = sum(attempt.match.seconds for attempt in attempts)
    prefill_s = max(0.0, ttft - lookup_s)
    tiers = Counter[str]()
    for attempt in attempts:
        tiers.update(attempt.tiers)
    cached = sum(tiers.values())
    prompt = sum(len(attempt.ids) for attempt in attempts)
    rate = known = None
    with contextlib.suppress(StoreClosedError):
        if not any(attempt.media for attempt in attempts):  # encoding a picture is no prefill of tokens
            rate = _rate(wrapped, prompt - cached, prefill_s, restores[0] if restores else None)
        known = wrapped.prefill_rate
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion_tokens,
        cached_tokens_by_tier=dict(tiers),
        spans=attempts[0].spans if len(attempts) == 1 else (),
        lookup_s=lookup_s,
        restore_s=restore_s,
        prefill_s=prefill_s,
        decode_s=now - first,
        ttft_s=ttft,
        total_s=now - request.began,
        prefill_tokens_per_second=rate,
        saved_s=cached / known - restore_s if known and cached else None,
        audited=any(attempt.audited for attempt in attempts),
        miss_reason=next((attempt.why for attempt in attempts if attempt.why), None),
        deterministic=request.deterministic,
        stored_tokens=sum(attempt.stored for attempt in attempts),
        lossy=min((attempt.lossy for attempt in attempts if attempt.lossy), key=fidelity, default=None),
    )
