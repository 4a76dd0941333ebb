"""A short trial when a model is wrapped: is reuse right for *this* model, whoever wrote it?

Comparing a warm call with a cold one proves nothing alone: some architectures continue wrongly with several
tokens at once, and then both are wrong together. So the trial compares with one plain forward over the whole
input, which never continues anything:

1. one plain forward of transformers, its own cache and attention;
2. the same input in pieces through our layers and the grouped attention path: logits equal to rounding, cache
   length right (else once more without that path);
3. a cache restored from captured bytes: its rows, or where there is more than rows the logits of the last piece on
   top of it, equal bit for bit to 2;
4. no buffer of the model changed meanwhile (state kept on modules cannot be restored).

In single precision, and where a cache is the rows of all tokens and nothing else, the input is one piece and the last
one, and 2 compares the last token's logits and the last piece's rows in every layer. They show more than the logits of
its other two tokens would, and cost less than a head over a large vocabulary.

A window longer than the trial would never be felt in it. So for a model with windows 1 to 3 are repeated with the
window in its config set to a few tokens while the trial runs; where that disagrees (the window may be written
elsewhere too), once more with the real window and an input that is longer.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kvembed import hf
from kvembed._block import Block, BlockInfo
from kvembed._cachespec import CacheSpec
from kvembed._keys import SNAPSHOT_IDS, as_token_ids
from kvembed._restore import Piece, Restore
from kvembed._tiers.cpu import MemorySource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from kvembed._attention import AttentionSwitch
    from kvembed._block import Layout

    Forward = Callable[[torch.Tensor, int, Any, int], torch.Tensor]

__all__ = ["OracleVerdict", "error_limit", "relative_error", "run_oracle"]

_STEP = 8
_LAST = 3
_TOKENS = 2 * _STEP + _LAST
_WINDOW = _STEP + 1
_MOST_TOKENS = 8192
_MAX_RELATIVE_ERROR = 1e-3
_MAX_ROUNDING = 5e-5
_MAX_RELATIVE_ERROR_HALF = 2e-2
_WINDOW_NAMES = ("sliding_window", "attention_chunk_size")
_START_OVER = frozenset({"MambaMixer", "FalconMambaMixer", "JambaMambaMixer", "ZambaMambaMixer"})


@dataclass(frozen=True)
class OracleVerdict:
    """What the trial found.

    Args:
        reason: Why the model is not served, or None.
        grouped_attention: Whether the grouped path gives the same bits.
        relative_error: Largest difference of blockwise from one-shot logits, relative to their spread.
        stepwise: Whether a prefix can only be continued one token at a time.
    """

    reason: str | None
    grouped_attention: bool
    relative_error: float
    stepwise: bool = False


def trial_ids(model: Any, tokens: int = _TOKENS) -> torch.Tensor:
    """Return ``[1, tokens]`` token ids spread over the vocabulary, the same for every run."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(1, tokens + 1) * 7919) % max(2, vocabulary - 1)
    return ids[None].to(model.get_input_embeddings().weight.device)


def run_oracle(model: Any, spec: CacheSpec, switch: AttentionSwitch, forward: Forward) -> OracleVerdict:
    """Try reuse on a short input.

    Args:
        model: The wrapped model.
        spec: Its cache shape.
        switch: Turns the grouped attention path on.
        forward: ``forward(ids, start, cache, last)`` runs the model and returns the logits of the ``last`` tokens.
    """
    before = _state(model)
    limit = error_limit(model)
    trial = _Trial(model, spec, switch, forward)
    stepwise = spec.has_state and _starts_over(model)
    found = _with_grouped_path(trial, stepwise)
    if not found.error <= limit and spec.has_state and not stepwise:
        # Some recurrent layers start from zero whenever they get several tokens; one at a time they are right.
        stepped = trial.run(trial_ids(model), stepwise=True)
        if stepped.error <= limit:
            found, stepwise = stepped, True
    if found.error <= limit and not stepwise:
        found = _with_windows(trial, found, limit)
    return OracleVerdict(_reason(found, limit, before, model), switch.enabled, found.error, stepwise)


def _with_grouped_path(trial: _Trial, stepwise: bool) -> _Found:
    """Run the trial with the grouped attention path, and without it where that is not right; leave the switch so.

    In float32 the path may differ from transformers' by rounding, and the trial itself shows that. In shorter types
    rounding hides too much: there the path has to give transformers' bits, in one forward and in a continuation.
    """
    model, switch, forward, ids = trial.model, trial.switch, trial.forward, trial.ids
    if not _is_precise(model):
        plain = forward(ids, 0, hf.new_stock_cache(model.config), _LAST)
        in_two = _in_two(model, ids, 2 * _STEP, forward)
        with switch.active():
            same = torch.equal(plain, forward(ids, 0, hf.new_stock_cache(model.config), _LAST))
            switch.enabled = switch.enabled and same and torch.equal(in_two, _in_two(model, ids, 2 * _STEP, forward))
        return trial.run(ids, stepwise=stepwise)
    found = trial.run(ids, stepwise=stepwise)
    if switch.enabled and not found.error <= _MAX_ROUNDING:
        switch.enabled = False
        without = trial.run(ids, stepwise=stepwise)
        # The path is not to blame for an error that stays.
        switch.enabled = not without.error < found.error / 2
        return found if switch.enabled else without
    return found


def _reason(found: _Found, limit: float, before: list[tuple[str, torch.Tensor]], model: Any) -> str | None:
    # "not <=" rather than ">": a NaN must be refused too.
    if not found.error <= limit:
        return f"continuing in blocks gives other logits than one forward (relative error {found.error:.2g})"
    if found.length != found.fed and found.length is not None:
        return f"the cache holds {found.length} tokens after {found.fed} were fed"
    if not found.same:
        return "a restored cache gives other logits than the cache it was stored from"
    if not _same_state(before, _state(model)):
        return "the model keeps state on its modules, which cannot be restored"
    return None


def error_limit(model: Any) -> float:
    """Return up to which `relative_error` logits count as equal to rounding, in this model's dtype."""
    return _MAX_RELATIVE_ERROR if _is_precise(model) else _MAX_RELATIVE_ERROR_HALF


def relative_error(plain: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the largest difference of logits from those of one forward, relative to their spread."""
    spread = float((plain.max() - plain.min()).abs()) or 1.0
    return float((logits - plain).abs().max()) / spread


def _is_precise(model: Any) -> bool:
    """True for single precision throughout: 4-bit layers of bitsandbytes may compute in half of it in between."""
    return model.dtype in (torch.float32, torch.float64) and not any(map(_halves, model.modules()))


def _halves(module: torch.nn.Module) -> bool:
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    if state is None:
        return False
    packed = getattr(state, "packing_format_for_cpu", False)  # for instructions of bfloat16
    return packed or vars(module).get("compute_dtype") in (torch.float16, torch.bfloat16)


def _starts_over(model: Any) -> bool:
    """True for transformers' Mamba-1 layers, whose error a trial in half precision could take for rounding."""
    return any(type(module).__name__ in _START_OVER for module in model.modules())


def _with_windows(trial: _Trial, found: _Found, limit: float) -> _Found:
    """Repeat the trial where windows matter; return the worse result."""
    windows = _windows(trial.model)
    if not windows or min(windows) < 2 * _STEP:
        return found
    with _short_windows(trial.model) as changed:
        if changed:
            short = trial.with_window(_WINDOW).run(trial_ids(trial.model), stepwise=False)
            if short.error <= limit and short.same:
                return found if found.error >= short.error else short
    tokens = max(windows) + _TOKENS
    if tokens > _MOST_TOKENS:
        return found  # longer than anyone would wait for; the short window was felt, or cannot be set
    return trial.run(trial_ids(trial.model, tokens), stepwise=False)


def _windows(model: Any) -> set[int]:
    """Return the windows of a new cache's layers, also of kinds nobody described."""
    windows = {getattr(layer, "sliding_window", None) for layer in hf.new_stock_cache(model.config).layers}
    return {window for window in windows if isinstance(window, int)}


@contextmanager
def _short_windows(model: Any) -> Iterator[bool]:
    """Set the windows in the model's config to a few tokens; yield whether its caches follow."""
    config = model.config.get_text_config(decoder=True)
    saved = {name: getattr(config, name) for name in _WINDOW_NAMES if isinstance(getattr(config, name, None), int)}
    try:
        for name in saved:
            setattr(config, name, _WINDOW)
        yield bool(saved) and _windows(model) <= {_WINDOW}
    finally:
        for name, value in saved.items():
            setattr(config, name, value)


@dataclass(frozen=True)
class _Found:
    """Outcome of one trial: error against one forward, bits of the restored cache, tokens held and fed."""

    error: float
    same: bool
    length: int | None
    fed: int


@dataclass(frozen=True)
class _Trial:
    """Continues an input in pieces, and again from what was stored in between."""

    model: Any
    spec: CacheSpec
    switch: AttentionSwitch
    forward: Forward

    def with_window(self, window: int) -> _Trial:
        """Return the same trial for a cache whose windows are so many tokens."""
        layers = tuple(
            replace(layer, rows=replace(layer.rows, window=window)) if layer.rows and layer.rows.window else layer
            for layer in self.spec.layers
        )
        return replace(self, spec=CacheSpec(layers, self.spec.block_size))

    def run(self, ids: torch.Tensor, *, stepwise: bool) -> _Found:
        """Compare with one forward."""
        n = ids.shape[1]
        edge = n - _LAST
        stock = hf.new_stock_cache(self.model.config)
        plain = self.forward(ids, 0, stock, self._compared)
        cache = hf.new_cache(self.spec, self.model.config, n)
        with self.switch.active():
            # Two continuations, for layers nobody described or with windows: some caches treat the first piece as
            # all there is to come. Plain rows need one.
            step = edge if stepwise or self._is_plain else max(_STEP, edge // 16)
            for start in range(0, edge, step):
                self.forward(ids[:, start : min(edge, start + step)], start, cache, 0)
            data = hf.capture(cache, self.spec.layout, *self._kept(cache, edge))
            layout, states = hf.capture_states(cache, self.spec)
            logits = self._finish(ids, edge, cache, stepwise)
            restored = self._restored(ids, edge, cache, data, layout, states)
            if self._is_plain:
                same = _same_rows(cache, restored, edge)  # all there is: no forward is needed to see it
            else:
                same = torch.equal(logits, self._finish(ids, edge, restored, stepwise))
        error = relative_error(plain, logits)
        if self._compares_rows:
            error = _worse(error, _row_error(stock, cache, edge, n))
        length = hf.common_length(cache) if hf.layers_of(cache) else None
        return _Found(error, same, length, n)

    @property
    def _is_plain(self) -> bool:
        return self.spec.full_only

    @property
    def ids(self) -> torch.Tensor:
        """The input: two pieces and a few tokens more, or one where nothing depends on how many there were."""
        return trial_ids(self.model, _STEP + _LAST if self._compares_rows else _TOKENS)

    @property
    def _compares_rows(self) -> bool:
        # In half precision rows of deep layers differ by more than logits do.
        return self._is_plain and _is_precise(self.model)

    @property
    def _compared(self) -> int:
        """Tokens whose logits are compared."""
        return 1 if self._compares_rows else _LAST

    @staticmethod
    def _kept(cache: Any, edge: int) -> tuple[int, int]:
        """Return the tokens all layers still hold."""
        return max((layer.first for layer in hf.layers_of(cache)), default=0), edge

    def _finish(self, ids: torch.Tensor, edge: int, cache: Any, stepwise: bool) -> torch.Tensor:
        step, last = (1, 1) if stepwise else (_LAST, self._compared)
        parts = [self.forward(ids[:, i : i + step], i, cache, last) for i in range(edge, ids.shape[1], step)]
        return torch.cat(parts, dim=1)

    def _restored(
        self, ids: torch.Tensor, edge: int, cache: Any, data: np.ndarray, layout: Layout, states: np.ndarray
    ) -> Any:
        """Return a cache that was filled from captured bytes."""
        restored = hf.new_cache(self.spec, self.model.config, ids.shape[1])
        start, _ = self._kept(cache, edge)
        token_ids = as_token_ids(ids[0, start:edge].cpu().numpy())
        info = BlockInfo(b"", b"", b"", start, edge - start, True, data.nbytes)
        if self.spec.has_state:
            snapshot = Block(BlockInfo(b"", b"", b"", edge, 1, True, states.nbytes), SNAPSHOT_IDS, layout, states)
            hf.load_states(restored, self.spec, MemorySource(snapshot))
        piece = Piece(MemorySource(Block(info, token_ids, self.spec.layout, data)), edge - start)
        restore = Restore(restored, [piece], edge)
        restore.start()
        restore.finish()
        return restored


def _same_rows(a: Any, b: Any, length: int) -> bool:
    pairs = zip(hf.layers_of(a), hf.layers_of(b), strict=True)
    return all(torch.equal(x, y) for p, q in pairs for x, y in zip(p.rows(0, length), q.rows(0, length), strict=True))


def _row_error(stock: Any, cache: Any, start: int, end: int) -> float:
    """Return the largest difference of the rows of tokens ``start..end``, relative to the spread of their tensor."""
    error = 0.0
    for theirs, ours in zip(stock.layers, cache.layers, strict=False):  # layers at the end may have no cache
        expected = theirs.keys[:, :, start:end].float(), theirs.values[:, :, start:end].float()
        for a, b in zip(expected, ours.rows(start, end), strict=True):
            error = _worse(error, relative_error(a, b))
    return error


def _worse(a: float, b: float) -> float:
    """Return the larger error; not a number is the largest of all."""
    return b if b > a or b != b else a


def _in_two(model: Any, ids: torch.Tensor, edge: int, forward: Forward) -> torch.Tensor:
    """A continuation on a stock cache: the case with a mask, where the two attention paths differ most."""
    cache = hf.new_stock_cache(model.config)
    forward(ids[:, :edge], 0, cache, 1)
    return forward(ids[:, edge:], edge, cache, _LAST)


def _state(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, t.detach().clone()) for name, t in model.named_buffers() if t.device.type != "meta"]


def _same_state(a: list[tuple[str, torch.Tensor]], b: list[tuple[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        na == nb and ta.shape == tb.shape and torch.equal(ta, tb) for (na, ta), (nb, tb) in zip(a, b, strict=True)
    )


def static_refusal(model: Any) -> str | None:
    """Return why a model is refused before any trial: what a short input cannot show."""
    text_config = model.config.get_text_config(decoder=True)
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    kinds = {str(rope.get("rope_type", rope.get("type")))} if "rope_type" in rope or "type" in rope else set()
    kinds |= {str(v.get("rope_type")) for v in rope.values() if isinstance(v, dict)}
    for kind in ("dynamic", "longrope"):
        if kind in kinds:
            return f"rope type {kind!r}: frequencies depend on the longest text seen, so KV cannot be reused exactly"
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder model: the prompt is in the encoder"
    for module in model.modules():
        # A long prompt may have outliers that the trial's few tokens lack, and in half precision rounding hides them.
        state = vars(module).get("state")
        threshold = getattr(state, "threshold", 0) if type(module).__module__.startswith("bitsandbytes.") else 0
        if threshold:
            return (
                f"bitsandbytes int8 with llm_int8_threshold={threshold:g}: which inputs are outliers depends on all "
                "tokens of a forward, so KV cannot be reused exactly (with 0 it can)"
            )
    return None
