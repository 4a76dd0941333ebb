"""The engine: matches a prompt against what is kept, opens a cache for it, prefills the rest, captures blocks.

`CachedModel` calls it in this order for every generation::

    match(ids) -> open(match, ids, capacity) -> prefill(sequence, ids) -> transformers -> capture(sequence)

Exactness is tracked here: ``sequence.exact`` counts the leading tokens whose KV came from grid steps on exact
ancestors. A cold call computes the grid ``[0, 256), [256, 512) ...`` and leaves the rest to transformers, so a warm
call that reuses up to a block edge runs the very same forwards and gets the very same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed import hf
from kvembed._block import BlockInfo
from kvembed._codecs.names import LOSSLESS
from kvembed._devices import Devices
from kvembed._html import COMPUTED
from kvembed._keys import PROBE_TOKENS, as_token_ids, block_key, root_key
from kvembed._live import LivePool, LiveSequence
from kvembed._matching import Matcher, exact_run, is_takeover
from kvembed._memory import HostPool
from kvembed._plan import Plan, Speeds, plan_of
from kvembed._prefill import Prefill
from kvembed._restore import Piece, Restore
from kvembed._states import Snapshots
from kvembed._stats import TierStats
from kvembed._tree import LiveTokens
from kvembed._wrapped import WrappedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed._cachespec import CacheSpec
    from kvembed._fingerprint import Fingerprint
    from kvembed._keys import TokenIds
    from kvembed._matching import Match
    from kvembed._media import Media
    from kvembed._store import KVStore

__all__ = ["Engine"]

_MOST_PREPARED_BYTES = 512 << 20


class Engine:
    """Reuse for one model and one store.

    Args:
        model: A transformers causal LM.
        store: Where blocks live.
        block_size: Tokens of a full block, and of one grid step.
        cache_salt: Isolates callers: blocks of one salt are never found under another.
        max_live: Recent sequences kept whole.
    """

    def __init__(self, model: Any, store: KVStore, *, block_size: int, cache_salt: str, max_live: int) -> None:
        self.model = model
        self.store = store
        self.block_size = block_size
        self.salt = cache_salt
        self._owner = f"live-{id(self):x}"
        self.live = LivePool(max_live, 0)
        self._pool = HostPool(0)
        self._devices = Devices(store, model.device)
        self.wrapped = WrappedModel(model, store, block_size)
        self.speeds = Speeds(store)
        self._adopt()

    # --- the model -------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Start the key chain from the model's identity, and touch memory someone may be about to need."""
        fingerprint = self.wrapped.fingerprint
        self.root = root_key(fingerprint.digest, self.salt) if fingerprint is not None else b""
        if self.refusal is None:
            self.live.max_bytes = self._devices.prepare(self.spec, self.block_size) // 2
            self._pool.limit(self.live.max_bytes if self.live.max_sequences and self._on_host else 0)
            self._prepare_memory()

    @property
    def refusal(self) -> str | None:
        """Why the model is passed through, or None."""
        return self.wrapped.refusal

    @property
    def fingerprint(self) -> Fingerprint:
        """Identity of a model that is served."""
        assert self.wrapped.fingerprint is not None
        return self.wrapped.fingerprint

    @property
    def has_state(self) -> bool:
        """True for a model that is served and goes on only from where a state of it was kept."""
        return self.refusal is None and self.spec.has_state

    @property
    def spec(self) -> CacheSpec:
        """Shape of the cache of a model that is served."""
        assert self.wrapped.spec is not None
        return self.wrapped.spec

    def check_identity(self) -> None:
        """Notice a model that changed since the last call; live sequences of the old one are dropped."""
        if self.wrapped.noticed_change():
            self.drop_live()
            self._adopt()

    def refresh(self) -> None:
        """Take the full fingerprint again."""
        if self.wrapped.refresh():
            self.drop_live()
            self._adopt()

    # --- one call --------------------------------------------------------------------------------------

    def match(self, ids: TokenIds, *, deterministic: bool, media: Media | None = None) -> Match:
        """Find the longest usable prefix of ``ids``; at least one token is left to compute.

        Args:
            ids: The prompt.
            deterministic: Use only what gives a cold call's bits.
            media: Its media: no prefix ends inside one.
        """
        matcher = Matcher(self.store, self.live, self._live_tier)
        while True:
            found = matcher.match(
                self.root,
                self.spec,
                self._snapshots,
                ids,
                deterministic=deterministic,
                stepwise=self.wrapped.stepwise,
            )
            end = found.tokens if media is None else media.floor(found.tokens)
            if end == found.tokens:
                return found
            ids = ids[: end + 1]

    @property
    def _snapshots(self) -> Snapshots:
        return Snapshots(self.store, self.spec, self.fingerprint.digest)

    @property
    def _live_tier(self) -> str:
        return "live" if self._on_host else "gpu"

    def plan(self, match: Match) -> Plan:
        """Decide what of a match is restored, and what is computed because that is faster."""
        return plan_of(match, self.speeds, self.wrapped.prefill_rate, may_split=self.spec.full_only)

    def open(
        self, match: Match, ids: TokenIds, capacity: int, *, front: int = 0
    ) -> tuple[LiveSequence, Restore | None, list[tuple[str, int]]]:
        """Return a sequence that holds (or is being filled with) the matched prefix.

        Args:
            match: What `match` found.
            ids: The prompt.
            capacity: Tokens to make room for: prompt and everything to be generated.
            front: Leading tokens that the caller computes while the others are read; see `join`.

        Returns:
            The sequence, the restore still under way if any, and the runs of the prompt as `kvembed._spans` has them.
        """
        if match.live is not None:
            sequence = self._open_live(match, ids, capacity)
            runs = [(self._live_tier, match.live_tokens)]
        else:
            sequence = self.new_sequence(capacity)
            runs = [(COMPUTED, front)]
        pieces = self._open_pieces(match, ids, match.live_tokens + front)
        if match.snapshot is not None and not self._load_state(match, sequence, pieces):
            for piece in pieces:
                piece.source.close()
            return self.new_sequence(capacity), None, []
        runs += [(piece.source.tier, piece.n_tokens) for piece in pieces]
        if not pieces:
            return sequence, None, runs
        if front:
            self._mark_lossy(sequence, pieces)
            restore = Restore(sequence.cache, pieces, self.block_size, self._devices.transfers, behind=True)
            restore.start()
            return sequence, restore, runs
        exact_before = sequence.exact == match.live_tokens
        self._mark_lossy(sequence, pieces)
        restore = Restore(sequence.cache, pieces, self.block_size, self._devices.transfers)
        length = restore.length
        sequence.ids = ids[:length]
        full = length // self.block_size
        sequence.captured = full * self.block_size
        if exact_before:
            run = min(exact_run(match.blocks), full - match.live_tokens // self.block_size)
            sequence.exact = match.live_tokens + self.block_size * run
        if match.snapshot is not None:
            # Its values are as they were; what they were computed on may not have been.
            sequence.mark_lossy(length - 1, match.snapshot.info.codec)
        if match.snapshot is not None and not match.snapshot.info.exact:
            sequence.exact = min(sequence.exact, (length - 1) // self.block_size * self.block_size)
        sequence.keys = match.keys[:full]
        restore.start()
        return sequence, restore, runs

    def join(self, match: Match, ids: TokenIds, sequence: LiveSequence, restore: Restore) -> None:
        """Add what was read behind a computation to the sequence that was computed; raises as `Restore.finish`."""
        front, size = len(sequence.ids), self.block_size
        restore.finish()
        full = restore.length // size
        sequence.ids = ids[: restore.length]
        sequence.captured = full * size
        if sequence.exact == front:
            sequence.exact = min(front + size * exact_run(match.blocks[front // size :]), full * size)
        sequence.keys = match.keys[:full]

    @staticmethod
    def _mark_lossy(sequence: LiveSequence, pieces: list[Piece]) -> None:
        for piece in pieces:
            sequence.mark_lossy(piece.start, piece.source.info.codec)

    def _new_cache(self, capacity: int) -> Any:
        return hf.new_cache(self.spec, self.model.config, capacity, self._pool)

    def new_sequence(self, capacity: int) -> LiveSequence:
        """Return an empty sequence with room for so many tokens."""
        none = as_token_ids([])
        return LiveSequence(self._new_cache(capacity), self.root, none, has_state=self.spec.has_state)

    def _load_state(self, match: Match, sequence: LiveSequence, pieces: list[Piece]) -> bool:
        """Bring back the state at the end of ``pieces``; False when that is impossible."""
        if sum(piece.n_tokens for piece in pieces) != match.tokens or match.snapshot is None:
            return False  # some block was gone or bad: the state belongs to a longer prefix
        sequence.snapshot_at = match.tokens
        return self._snapshots.load(sequence.cache, match.snapshot)

    def _open_live(self, match: Match, ids: TokenIds, capacity: int) -> LiveSequence:
        live = match.live
        assert live is not None
        n = match.live_tokens
        if is_takeover(live, n):
            # Most of it is wanted again: take it over. What is cut off is in blocks already.
            self.live.take(live)
            live.cut(n, self.block_size)
            return live
        fork = LiveSequence(self._new_cache(capacity), self.root, ids[:n], keys=match.keys[: n // self.block_size])
        hf.copy_prefix(live.cache, fork.cache, n, n // self.block_size * self.block_size)
        edge = n // self.block_size * self.block_size
        fork.exact, fork.captured = min(live.exact, edge), min(live.captured, edge)
        if live.faithful is not None and n > live.faithful:
            fork.mark_lossy(live.faithful, live.codec)
        return fork

    def _open_pieces(self, match: Match, ids: TokenIds, position: int) -> list[Piece]:
        """Open the matched blocks from ``position`` on, comparing ids; the run ends at the first that differs."""
        pieces: list[Piece] = []
        for stored, n in match.stored:
            if stored.info.start < position:
                continue
            # What was matched as exact has to be: the catalog may be another's.
            source = self.store.open(stored.info.key, exact_only=stored.info.exact)
            if source is None:
                break
            same = source.info.start == position and np.array_equal(source.token_ids[:n], ids[position : position + n])
            if not same or source.layout != self.spec.layout:
                source.close()
                self.store.discard(stored.info.key, "holds other tokens or another layout than its key says")
                break
            pieces.append(Piece(source, n))
            position += n
        return pieces

    def prefill(
        self,
        sequence: LiveSequence,
        ids: TokenIds,
        *,
        upto: int | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        put: Callable[[LiveSequence], object] | None = None,
    ) -> None:
        """Compute the prompt up to where transformers takes over; see `kvembed._prefill.Prefill.run`."""

        def put_state(sequence: LiveSequence) -> None:
            self._snapshots.put(sequence, self._prefix_key(sequence))

        prefill = Prefill(self.wrapped, self.spec, on_progress, put, put_state)
        prefill.run(sequence, ids, upto)

    def settle(self, sequence: LiveSequence, ids: TokenIds, *, fed: int | None) -> bool:
        """Make the sequence agree with its cache after a forward ended, or broke off.

        Args:
            sequence: The sequence whose cache transformers appended to.
            ids: All ids that may have been fed: prompt and generated tokens.
            fed: How many of them were, or None when a forward may have broken off half-way.

        Returns:
            False when the cache is no longer ours to keep.
        """
        layers = hf.layers_of(sequence.cache)
        if not all(layer.attached for layer in layers):
            return False
        if sequence.has_state and fed is None:
            return False  # rows can be cut back, states cannot
        # Without rows nothing but the caller counts tokens.
        length = min((layer.get_seq_length() for layer in layers), default=fed or 0)
        if length > len(ids) or length < len(sequence.ids) or (sequence.has_state and length != fed):
            return False
        hf.truncate(sequence.cache, length)
        sequence.ids = ids[:length]
        return True

    # --- blocks ----------------------------------------------------------------------------------------

    def capture(self, sequence: LiveSequence, *, tail: bool) -> int:
        """Store the finished full blocks of a sequence, and its tail; return the tokens newly stored.

        With ``tail`` the state at the end of the sequence is stored too, otherwise now and then.
        """
        size, ids = self.block_size, sequence.ids
        stored = 0
        while sequence.captured + size <= len(ids):
            start = sequence.captured
            stored += self._put(sequence, start, start + size, sequence.exact >= start + size)
            sequence.captured = start + size
            for layer in hf.layers_of(sequence.cache):
                layer.captured = sequence.captured
        rest = ids[sequence.captured :]
        # Where a state is good at one position only, the last few tokens before it are worth a block too.
        if tail and len(rest) >= (1 if sequence.has_state else PROBE_TOKENS):
            parent = self._parent(sequence, sequence.captured)
            known = self.store.find_tail(parent, rest)
            # A state is the child of exactly its prefix, so that it can be forgotten with it.
            if known is None or known[1] < len(rest) or sequence.has_state:
                stored += self._put(sequence, sequence.captured, len(ids), False)
        if sequence.has_state and len(ids) > sequence.snapshot_at and (tail or self._snapshots.due(sequence)):
            self._snapshots.put(sequence, self._prefix_key(sequence))
        return stored

    def _prefix_key(self, sequence: LiveSequence) -> bytes:
        """Return the key that names all tokens of a sequence."""
        start = len(sequence.ids) // self.block_size * self.block_size
        parent = self._parent(sequence, start)
        rest = sequence.ids[start:]
        return block_key(parent, np.ascontiguousarray(rest)) if len(rest) else parent

    def _parent(self, sequence: LiveSequence, start: int) -> bytes:
        size = self.block_size
        while len(sequence.keys) * size < start:
            at = len(sequence.keys) * size
            parent = sequence.keys[-1] if sequence.keys else sequence.root
            sequence.keys.append(block_key(parent, sequence.ids[at : at + size]))
        return sequence.keys[start // size - 1] if start else sequence.root

    def _put(self, sequence: LiveSequence, start: int, end: int, exact: bool) -> int:
        parent = self._parent(sequence, start)
        ids = np.ascontiguousarray(sequence.ids[start:end])
        key = block_key(parent, ids)
        codec, size = sequence.codec_at(end), self.spec.layout.nbytes(end - start)
        exact = exact and codec == LOSSLESS
        info = BlockInfo(key, parent, self.fingerprint.digest, start, end - start, exact, size, codec)
        known = self.store.lookup([key])
        if known and known[0].info.rank >= self.store.rank_of(info, self.spec.layout):
            return 0
        self.store.put(self._devices.block(sequence.cache, info, ids, self.spec.layout))
        return end - start

    def keep(self, sequence: LiveSequence) -> None:
        """Keep a finished sequence live."""
        self._note_length(len(sequence.ids))
        gone = self.live.add(sequence)
        self._account()
        for old in gone:
            self._parent(old, old.captured)  # names its blocks
            self._devices.leave(old, self.spec, self.fingerprint.digest)

    def live_tokens(self) -> list[LiveTokens]:
        """Return what the live sequences hold, for `kvembed._tree`."""
        size = self.spec.token_nbytes
        return [LiveTokens(self._live_tier, self.root, live.ids, size) for live in self.live.of_root(self.root)]

    def live_stats(self) -> TierStats:
        """Return how full the live tier is; its blocks are sequences, its bytes those kept for the next ones too."""
        nbytes = self.live.nbytes + (self._pool.free_bytes if self._on_host else 0)
        return TierStats("live", len(self.live), nbytes, self.live.max_bytes, 0, 0)

    def drop_live(self) -> None:
        """Forget the live sequences; their blocks stay stored."""
        self.live.clear()
        self._account()

    def release_memory(self) -> None:
        """Give memory kept for the next caches back to the system: it holds what was in the last ones."""
        self._pool.limit(0)
        self._account()

    @property
    def _on_host(self) -> bool:
        return self._devices.on_host

    def _account(self) -> None:
        """Count live caches, and memory kept for the next ones, against the budget in host memory."""
        if self.store.closed:
            return  # nothing is counted any more
        self._pool.limit(self.live.max_bytes - self.live.nbytes)
        if self._on_host:
            self.store.reserve(self._owner, self.live.nbytes + self._pool.free_bytes)
        else:
            self.store.reserve(self._owner, self.live.nbytes, on_device=True)

    def _prepare_memory(self) -> None:
        """Touch memory for what this model's longest stored sequence needs: someone is about to come back to it."""
        tokens = self.store.get_note(self.fingerprint.digest, "longest_tokens")
        if isinstance(tokens, int) and self._on_host:
            self._pool.prepare(min(self.spec.host_nbytes(tokens + 2 * self.block_size), _MOST_PREPARED_BYTES))
            self._account()

    def _note_length(self, tokens: int) -> None:
        known = self.store.get_note(self.fingerprint.digest, "longest_tokens")
        if not isinstance(known, int) or tokens > known:
            self.store.set_note(self.fingerprint.digest, "longest_tokens", tokens)

    def close(self) -> None:
        """Release the live sequences and their memory."""
        self.live.clear()
        self._devices.close()
        self._pool.limit(0)
        if not self.store.closed:
            for on_device in (False, True):
                self.store.reserve(self._owner, 0, on_device=on_device)
