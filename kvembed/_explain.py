"""Why a prompt is not reused further: finds the nearest stored sequence and says what parts it from the prompt.

Stored sequences are walked by token ids from the root, so the walk also works under another model's root, where
every key is another one. Sequences under another ``cache_salt`` are never looked at: a salt isolates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed._codecs.names import fidelity
from kvembed._fingerprint import describe_difference
from kvembed._keys import PROBE_TOKENS, block_key, common_prefix, root_key
from kvembed._match import Explanation, classify, context
from kvembed._prompt import decoder
from kvembed._units import format_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed._engine import Engine
    from kvembed._keys import TokenIds
    from kvembed._match import ExplanationKind
    from kvembed._matching import Match
    from kvembed._media import Media

__all__ = ["explain_prompt", "miss_reason"]

_LOST_HINTS = {
    "evicted": "It was evicted to keep the budget: raise max_disk_bytes, or pin what must stay.",
    "removed": "It was removed by hand: with rm, prune, evict or clear.",
    "quarantined": "Its file was damaged and set aside; kvembed verify shows the state of the store.",
}
_MOST_CHILDREN = 256
_LOOK_AHEAD_BLOCKS = 3
_MOST_NAMESPACES = 32
_WORTH_SAYING = 64


def explain_prompt(
    engine: Engine,
    tokenizer: Any,
    ids: TokenIds,
    support: str | None,
    *,
    deterministic: bool,
    media: Media | None = None,
) -> Explanation:
    """Explain a prompt; see `CachedModel.explain`."""
    if support is not None:
        return Explanation("bypassed", prompt_tokens=len(ids), hint=support)
    found = engine.match(ids, deterministic=deterministic, media=media)
    position = found.tokens
    decode = decoder(tokenizer)

    def ends(kind: ExplanationKind, at: int, nearest: int, hint: str) -> Explanation:
        here, offset = context(ids.tolist(), at, decode)
        return Explanation(kind, at, len(ids), at, nearest_tokens=nearest, here=here, here_offset=offset, hint=hint)

    if found.without_state:
        hint = (
            f"The next {format_count(found.without_state)} tokens are stored, but this model can only go on where a "
            "state was kept: at the end of a turn or document, and at some block edges."
        )
        return ends("diverged", position, position + found.without_state, hint)
    if media is None:
        plan = engine.plan(found)
        kept = max(plan.match.tokens - plan.front, 0)
        if plan.reason is not None and kept < position:
            hint = f"{format_count(position)} tokens are stored. {plan.reason[0].upper()}{plan.reason[1:]}."
            return ends("recomputed", kept, position, hint)
    if position >= len(ids) - 1:
        return Explanation("hit", position, len(ids), position, nearest_tokens=position)
    lossy = _lossy(engine, found)
    if lossy is not None:
        hint = (
            f"What follows is stored as {lossy}. Open the store with codec={lossy!r} to use it; opened with "
            f"codec={engine.store.codec!r} it is computed again, and then stored so."
        )
        return ends("lossy", position, position, hint)
    lost = _lost(engine, found)
    own = _nearest(engine, found.root, ids)
    for live in engine.live.of_root(found.root):
        if common_prefix(live.ids, ids) > common_prefix(own, ids):
            own = live.ids
    if lost is not None and common_prefix(own, ids) <= position:
        return ends(lost, position, position, _LOST_HINTS[lost])
    other, differences = _other_model(engine, ids)
    if common_prefix(other, ids) > max(position, common_prefix(own, ids)):
        shared = common_prefix(other, ids)
        changed = ", ".join(differences)
        return Explanation(
            "other_model",
            position,
            len(ids),
            position,
            nearest_tokens=shared,
            differences=differences,
            hint=f"{format_count(shared)} tokens are stored, but for a model that differs in: {changed}.",
        )
    shared = common_prefix(own, ids)
    if shared == 0:
        return _never_seen(ids, decode)
    return _differs(ids, own, position, decode, deterministic=deterministic)


def _never_seen(ids: TokenIds, decode: Callable[[list[int]], str]) -> Explanation:
    here, at = context(ids.tolist(), 0, decode)
    if len(ids) <= PROBE_TOKENS:
        hint = f"Prompts of up to {PROBE_TOKENS} tokens are not stored: computing them costs less than finding them."
        return Explanation("too_short", 0, len(ids), 0, here=here, here_offset=at, hint=hint)
    hint = "Nothing stored starts like this prompt; after one call it will be there."
    return Explanation("never_seen", 0, len(ids), 0, here=here, here_offset=at, hint=hint)


def _differs(
    ids: TokenIds, stored: TokenIds, cached: int, decode: Callable[[list[int]], str], *, deterministic: bool
) -> Explanation:
    shared = common_prefix(stored, ids)
    kind: ExplanationKind
    kind, hint = classify(ids.tolist(), stored.tolist(), shared, decode)
    if kind == "hit" and shared < len(ids):
        # The stored sequence simply ends: what follows is new.
        kind, hint = "diverged", "The stored sequence ends here; what follows is new."
    if deterministic and cached < shared:
        hint = f"{hint} deterministic=True reuses only whole blocks of a cold prefill.".strip()
    here, at = context(ids.tolist(), shared, decode)
    there, _ = context(stored.tolist(), shared, decode)
    return Explanation(
        kind,
        shared,
        len(ids),
        cached,
        nearest_tokens=len(stored),
        here=here,
        here_offset=at,
        there=there,
        expected_token=decode([int(stored[shared])]) if shared < len(stored) else None,
        actual_token=decode([int(ids[shared])]) if shared < len(ids) else None,
        hint=hint,
    )


def _nearest(engine: Engine, root: bytes, ids: TokenIds) -> TokenIds:
    """Return the ids of the nearest stored sequence (longest shared prefix), a little past where it differs."""
    path: list[TokenIds] = []
    parent, position = root, 0
    while True:
        best, best_key, common = None, b"", 0
        for info in engine.store.children(parent)[:_MOST_CHILDREN]:
            tokens = engine.store.token_ids(info.key)
            if tokens is None:
                continue
            n = common_prefix(tokens, ids[position:])
            if best is None or (n, len(tokens)) > (common, len(best)):
                best, best_key, common = tokens, info.key, n
        if best is None:
            break
        path.append(best)
        position += len(best)
        parent = best_key
        if common < len(best):
            path += _onward(engine, parent)
            break
    return np.concatenate(path) if path else ids[:0]


def _onward(engine: Engine, parent: bytes) -> list[TokenIds]:
    """Follow the latest children a few blocks on, so that text which realigns after a difference is seen."""
    path: list[TokenIds] = []
    for _ in range(_LOOK_AHEAD_BLOCKS):
        children = engine.store.children(parent)
        tokens = engine.store.token_ids(children[0].key) if children else None
        if tokens is None:
            break
        path.append(tokens)
        parent = children[0].key
    return path


def _other_model(engine: Engine, ids: TokenIds) -> tuple[TokenIds, dict[str, tuple[str, str]]]:
    """Return the nearest sequence stored by another model under the same salt, and how that model differs."""
    best, differences = ids[:0], {}
    for digest, fields in list(engine.store.namespaces().items())[:_MOST_NAMESPACES]:
        if digest == engine.fingerprint.digest:
            continue
        near = _nearest(engine, root_key(digest, engine.salt), ids)
        if common_prefix(near, ids) > common_prefix(best, ids):
            best, differences = near, describe_difference(fields, engine.fingerprint.fields)
    return best, differences


def _lost(engine: Engine, found: Match) -> ExplanationKind | None:
    """Return why the next block is gone, when it was here once."""
    at = found.tokens // found.block_size
    if at >= len(found.keys):
        return None
    reason = engine.store.why_missing(found.keys[at])
    return reason if reason in ("evicted", "removed", "quarantined") else None


def _lossy(engine: Engine, found: Match) -> str | None:
    """Return the codec of the next block when it is here, but not stored faithfully enough for this store."""
    at = found.tokens // found.block_size
    codec = engine.store.codec_of(found.keys[at]) if at < len(found.keys) else None
    return codec if codec is not None and fidelity(codec) < fidelity(engine.store.codec) else None


def miss_reason(engine: Engine, found: Match, ids: TokenIds, cached: int) -> str | None:
    """Say in a few words why a call computed what it did; cheap enough for every call."""
    rest = len(ids) - cached
    if rest < _WORTH_SAYING:
        return None
    if found.without_state >= _WORTH_SAYING:
        return f"no recurrent state is stored for the {format_count(found.without_state)} tokens after {cached:,}"
    lossy = _lossy(engine, found)
    if lossy is not None:
        return f"stored as {lossy} only from token {format_count(cached)} on, this store reads {engine.store.codec}"
    lost = _lost(engine, found)
    if lost is not None:
        return f"{lost} from token {format_count(cached)} on"
    if cached == 0:
        changed = _first_block_elsewhere(engine, ids)
        return f"model changed ({changed})" if changed else "new prefix"
    return f"new text from token {format_count(cached)} on"


def _first_block_elsewhere(engine: Engine, ids: TokenIds) -> str | None:
    if len(ids) < engine.block_size:
        return None
    first = np.ascontiguousarray(ids[: engine.block_size])
    for digest, fields in list(engine.store.namespaces().items())[:_MOST_NAMESPACES]:
        if digest == engine.fingerprint.digest:
            continue
        if engine.store.lookup([block_key(root_key(digest, engine.salt), first)]):
            differences = describe_difference(fields, engine.fingerprint.fields)
            return ", ".join(f"{k}: {was} there, {now} now" for k, (was, now) in list(differences.items())[:3])
    return None
