"""The engine: matches a prompt against what is kept, opens a cache for it, prefills the rest, captures blocks.

`CachedModel` calls it in this order for every generation::

    match(ids) -> open(match, ids, capacity) -> prefill(sequence, ids) -> transformers -> capture(sequence)

Exactness is tracked here: ``sequence.exact`` counts the leading tokens whose KV came from grid steps on exact
ancestors. A cold call computes the grid ``[0, 256), [256, 512) ...`` and leaves the rest to transformers, so a warm
call that reuses up to a block edge runs the very same forwards and gets the very same bits.
"""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed import hf
from kvembed._attention import AttentionSwitch
from kvembed._block import Block, BlockInfo
from kvembed._errors import UnsupportedModelError
from kvembed._fingerprint import Fingerprint
from kvembed._keys import PROBE_TOKENS, block_key, chain_keys, root_key
from kvembed._live import LivePool, LiveSequence
from kvembed._matching import Match, exact_run
from kvembed._oracle import OracleVerdict, run_oracle, static_refusal, trial_ids
from kvembed._restore import Piece, Restore

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed._keys import TokenIds
    from kvembed._store import KVStore, StoredBlock

__all__ = ["Engine"]

_WORTH_RESTORING = 64
"""Tokens a stored prefix must be ahead of a live one before all of it is restored in its place."""


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
        self.live = LivePool(max_live, self._live_budget())
        self.switch = AttentionSwitch(model)
        self._forward_arguments = self._find_forward_arguments()
        self.spec: hf.CacheSpec | None = None
        self.fingerprint: Fingerprint | None = None
        self.refusal: str | None = None
        self.verdict: OracleVerdict | None = None
        self._prepare()

    # --- the model -------------------------------------------------------------------------------------

    def _live_budget(self) -> int:
        device = self.model.device
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory // 4
        return self.store.max_cpu_bytes // 2 if device.type == "cpu" else 1 << 30

    def _find_forward_arguments(self) -> frozenset[str]:
        names = inspect.signature(self.model.forward).parameters
        return frozenset(n for n in ("position_ids", "logits_to_keep", "attention_mask") if n in names)

    def _prepare(self) -> None:
        """Probe the cache, take the fingerprint, and try reuse once (or read how the trial ended before)."""
        self.refusal = static_refusal(self.model)
        if self.refusal is None:
            try:
                cache = hf.new_stock_cache(self.model.config)
                self._forward(trial_ids(self.model)[:, :1], 0, cache, switch=False)
                self.spec = hf.probe_cache_spec(cache, self.block_size)
            except UnsupportedModelError as error:
                self.refusal = str(error)
            except Exception as error:  # a model we know nothing of: whatever it raises is its refusal
                self.refusal = f"a one-token forward with a DynamicCache failed ({type(error).__name__}: {error})"
        if self.spec is None:
            return
        self.fingerprint = Fingerprint(self.model, self.attn_implementation, self.spec.kinds, self.block_size)
        self._adopt_fingerprint()

    def _adopt_fingerprint(self) -> None:
        assert self.fingerprint is not None
        assert self.spec is not None
        digest = self.fingerprint.digest
        self.store.register_namespace(digest, dict(self.fingerprint.fields))
        noted = self.store.get_note(digest, "oracle")
        if isinstance(noted, dict):
            self.verdict = OracleVerdict(noted["reason"], noted["grouped_attention"], noted["relative_error"])
            self.switch.enabled = self.verdict.grouped_attention
        else:
            self.switch.enabled = True
            try:
                self.verdict = run_oracle(
                    self.model, self.spec, self.switch, lambda ids, start, cache: self._logits(ids, start, cache)
                )
            except Exception as error:  # a trial that fails is an answer, not an accident
                self.verdict = OracleVerdict(f"the trial failed ({type(error).__name__}: {error})", False, float("inf"))
            self.store.set_note(digest, "oracle", vars(self.verdict))
        self.refusal = self.verdict.reason
        self.root = root_key(digest, self.salt)

    @property
    def prefill_rate(self) -> float | None:
        """Tokens a second of a cold prefill on this machine, measured before; None until then."""
        if self.fingerprint is None:
            return None
        rate = self.store.get_note(self.fingerprint.digest, "prefill_tokens_per_second")
        return float(rate) if isinstance(rate, int | float) else None

    def note_prefill_rate(self, rate: float) -> None:
        """Remember a measured rate; a running mean, so that one noisy call does not stand for the machine."""
        known = self.prefill_rate
        value = rate if known is None else 0.7 * known + 0.3 * rate
        if self.fingerprint is not None:
            self.store.set_note(self.fingerprint.digest, "prefill_tokens_per_second", value)

    @property
    def attn_implementation(self) -> str:
        """What the user chose; kvembed's own name is never set between calls."""
        return str(getattr(self.model.config.get_text_config(decoder=True), "_attn_implementation", "eager"))

    def check_identity(self) -> None:
        """Notice weights, adapters or settings that changed since the last call, and start from their identity."""
        if self.fingerprint is not None and self.fingerprint.changed(self.attn_implementation):
            self.refresh()

    def refresh(self) -> None:
        """Take the full fingerprint again; live sequences of the old model are dropped."""
        before = self.fingerprint.digest if self.fingerprint else None
        if self.fingerprint is not None:
            self.fingerprint.refresh(self.attn_implementation)
        if self.fingerprint is None or self.fingerprint.digest != before:
            self.drop_live()
            # The dtype or device may be another one too, so the cache is probed again.
            self.spec = self.fingerprint = None
            self._prepare()

    def _forward(self, ids: torch.Tensor, start: int, cache: Any, *, switch: bool = True) -> Any:
        arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "return_dict": True}
        if "position_ids" in self._forward_arguments:
            arguments["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        if "logits_to_keep" in self._forward_arguments:
            arguments["logits_to_keep"] = 1
        with torch.no_grad():
            if switch:
                with self.switch.active():
                    return self.model(input_ids=ids, **arguments)
            return self.model(input_ids=ids, **arguments)

    def _logits(self, ids: torch.Tensor, start: int, cache: Any) -> torch.Tensor:
        # The oracle decides itself when the grouped path is on.
        return self._forward(ids, start, cache, switch=False).logits[:, -1].float()

    # --- one call --------------------------------------------------------------------------------------

    def match(self, ids: TokenIds, *, deterministic: bool) -> Match:
        """Find the longest usable prefix of ``ids``; at least one token is left to compute."""
        began = time.perf_counter()
        size = self.block_size
        wanted = ids[:-1]
        live, live_tokens = self.live.best(self.root, wanted, exact_only=deterministic, block_size=size)
        keys = chain_keys(self.root, wanted, size)
        blocks: list[StoredBlock] = []
        tail = None
        if live_tokens < len(wanted):
            blocks = self.store.lookup(keys, exact_only=deterministic)
            rest = wanted[len(blocks) * size :]
            if not deterministic and len(rest) >= PROBE_TOKENS and len(blocks) * size + len(rest) > live_tokens:
                tail = self.store.find_tail(keys[len(blocks) - 1] if blocks else self.root, rest)
        stored_tokens = len(blocks) * size + (tail[1] if tail else 0)
        gain = stored_tokens - live_tokens
        if live is None or gain <= 0:
            blocks, tail = (blocks, tail) if live is None else ([], None)
        elif self._is_takeover(live, live_tokens) and self.spec is not None and self.spec.extendable:
            # What is live stays where it is; only the blocks after it are read.
            live_tokens = live_tokens // size * size
            blocks = blocks[live_tokens // size :]
        elif gain >= _WORTH_RESTORING:
            live, live_tokens = None, 0
        else:
            blocks, tail = [], None
        seconds = time.perf_counter() - began
        return Match(self.root, keys, live, live_tokens, blocks, tail, size, self._live_tier, seconds)

    @staticmethod
    def _is_takeover(live: LiveSequence, live_tokens: int) -> bool:
        """True when a call takes the live cache itself; otherwise it gets a copy of the part it shares."""
        return 2 * live_tokens >= len(live.ids)

    @property
    def _live_tier(self) -> str:
        return "live" if self.model.device.type == "cpu" else "gpu"

    def open(self, match: Match, ids: TokenIds, capacity: int) -> tuple[LiveSequence, Restore | None, dict[str, int]]:
        """Return a sequence that holds (or is being filled with) the matched prefix.

        Args:
            match: What `match` found.
            ids: The prompt.
            capacity: Tokens to make room for: prompt and everything to be generated.

        Returns:
            The sequence, the restore still under way if any, and the tokens served by each tier.
        """
        if match.live is not None:
            sequence = self._open_live(match, ids, capacity)
            tiers = {self._live_tier: match.live_tokens} if match.live_tokens else {}
        else:
            sequence = LiveSequence(self._new_cache(capacity), self.root, ids[:0])
            tiers = {}
        pieces, stored_tiers = self._open_pieces(match, ids)
        if not pieces:
            return sequence, None, tiers
        exact_before = sequence.exact == match.live_tokens
        restore = Restore(sequence.cache, pieces, self.block_size)
        length = restore.length
        sequence.ids = ids[:length]
        full = length // self.block_size
        sequence.captured = full * self.block_size
        if exact_before:
            run = min(exact_run(match.blocks), full - match.live_tokens // self.block_size)
            sequence.exact = match.live_tokens + self.block_size * run
        sequence.keys = match.keys[:full]
        restore.start()
        return sequence, restore, {**tiers, **stored_tiers}

    def _new_cache(self, capacity: int) -> Any:
        assert self.spec is not None
        return self.spec.new_cache(self.model.config, capacity)

    def _open_live(self, match: Match, ids: TokenIds, capacity: int) -> LiveSequence:
        live = match.live
        assert live is not None
        n = match.live_tokens
        if self._is_takeover(live, n):
            # Most of it is wanted again: take it over. What is cut off is in blocks already.
            self.live.take(live)
            live.cut(n, self.block_size)
            return live
        fork = LiveSequence(self._new_cache(capacity), self.root, ids[:n], keys=match.keys[: n // self.block_size])
        hf.copy_prefix(live.cache, fork.cache, n, n // self.block_size * self.block_size)
        edge = n // self.block_size * self.block_size
        fork.exact, fork.captured = min(live.exact, edge), min(live.captured, edge)
        return fork

    def _open_pieces(self, match: Match, ids: TokenIds) -> tuple[list[Piece], dict[str, int]]:
        """Open the matched blocks, comparing token ids; the run ends at the first that is not what it was."""
        pieces: list[Piece] = []
        tiers: dict[str, int] = {}
        position = match.live_tokens
        for stored, n in match.stored:
            source = self.store.open(stored.info.key)
            if source is None:
                break
            same = source.info.start == position and np.array_equal(source.token_ids[:n], ids[position : position + n])
            assert self.spec is not None
            if not same or source.layout != self.spec.layout:
                source.close()
                self.store.discard(stored.info.key, "holds other tokens or another layout than its key says")
                break
            pieces.append(Piece(source, n))
            tiers[source.tier] = tiers.get(source.tier, 0) + n
            position += n
        return pieces, tiers

    def prefill(
        self,
        sequence: LiveSequence,
        ids: TokenIds,
        *,
        whole: bool = False,
        on_progress: Callable[[int, int], object] | None = None,
        put: Callable[[LiveSequence], object] | None = None,
    ) -> None:
        """Compute the prompt up to where transformers takes over, block by block.

        Args:
            sequence: Holds a prefix of ``ids``; grows with every step.
            ids: The prompt.
            whole: Compute all of it (a document), rather than leave the last piece to ``generate()``.
            on_progress: Called with (tokens done, tokens in all) after each step.
            put: Called after each step to store what is finished.
        """
        size, n = self.block_size, len(ids)
        device = self.model.get_input_embeddings().weight.device
        tensor = torch.from_numpy(ids.astype(np.int64))[None].to(device)
        last = n if whole else n - 1
        while (position := len(sequence.ids)) < last:
            edge = (position // size + 1) * size
            exact = sequence.exact == position
            if edge > last:
                if not whole:
                    break
                edge = last
            elif not exact and not whole and n - position <= size:
                break  # off the grid anyway: one forward for the rest is cheaper than two
            elif not exact and edge - position < size // 4 and edge + size <= last:
                edge += size  # likewise: no forward for a few tokens
            self._forward(tensor[:, position:edge], position, sequence.cache)
            sequence.ids = ids[:edge]
            if exact and edge % size == 0:
                sequence.exact = edge
            if put is not None:
                put(sequence)
            if on_progress is not None:
                on_progress(edge, n)

    def settle(self, sequence: LiveSequence, ids: TokenIds) -> bool:
        """Make the sequence agree with its cache after a forward ended, or broke off.

        Args:
            sequence: The sequence whose cache transformers appended to.
            ids: All ids that may have been fed: prompt and generated tokens.

        Returns:
            False when the cache is no longer ours to keep.
        """
        layers = hf.layers_of(sequence.cache)
        if not all(layer.attached for layer in layers):
            return False
        length = min(layer.get_seq_length() for layer in layers)
        if length > len(ids) or length < len(sequence.ids):
            return False
        hf.truncate(sequence.cache, length)
        sequence.ids = ids[:length]
        return True

    # --- blocks ----------------------------------------------------------------------------------------

    def capture(self, sequence: LiveSequence, *, tail: bool) -> int:
        """Store the finished full blocks of a sequence, and its tail; return the tokens newly stored."""
        size, ids = self.block_size, sequence.ids
        stored = 0
        while sequence.captured + size <= len(ids):
            start = sequence.captured
            stored += self._put(sequence, start, start + size, sequence.exact >= start + size)
            sequence.captured = start + size
            for layer in hf.layers_of(sequence.cache):
                layer.captured = sequence.captured
        rest = ids[sequence.captured :]
        if tail and len(rest) >= PROBE_TOKENS:
            parent = self._parent(sequence, sequence.captured)
            known = self.store.find_tail(parent, rest)
            if known is None or known[1] < len(rest):
                stored += self._put(sequence, sequence.captured, len(ids), False)
        return stored

    def _parent(self, sequence: LiveSequence, start: int) -> bytes:
        size = self.block_size
        while len(sequence.keys) * size < start:
            at = len(sequence.keys) * size
            parent = sequence.keys[-1] if sequence.keys else sequence.root
            sequence.keys.append(block_key(parent, sequence.ids[at : at + size]))
        return sequence.keys[start // size - 1] if start else sequence.root

    def _put(self, sequence: LiveSequence, start: int, end: int, exact: bool) -> int:
        assert self.spec is not None
        assert self.fingerprint is not None
        parent = self._parent(sequence, start)
        ids = np.ascontiguousarray(sequence.ids[start:end])
        key = block_key(parent, ids)
        known = self.store.lookup([key])
        if known and (known[0].info.exact or not exact):
            return 0
        data = hf.capture(sequence.cache, self.spec.layout, start, end)
        info = BlockInfo(key, parent, self.fingerprint.digest, start, end - start, exact, data.nbytes)
        self.store.put(Block(info, ids, self.spec.layout, data))
        return end - start

    def keep(self, sequence: LiveSequence) -> None:
        """Keep a finished sequence live."""
        self.live.add(sequence)
        self._account()

    def drop_live(self) -> None:
        """Forget the live sequences; their blocks stay stored."""
        self.live.clear()
        self._account()

    def _account(self) -> None:
        if self.store.closed:
            return  # nothing is counted any more
        on_host = self.model.device.type == "cpu"
        self.store.reserve(self._owner, self.live.nbytes if on_host else 0)

    def close(self) -> None:
        """Release the live sequences."""
        self.drop_live()
