"""A short trial when a model is wrapped: is reuse right for *this* model, whoever wrote it?

Comparing a warm call with a cold one proves nothing alone: some architectures continue wrongly with several
tokens at once, and then both are wrong together. So the trial compares with one plain forward over the whole
input, which never continues anything:

1. one plain forward of transformers, its own cache and attention;
2. the same with the grouped attention path: used only if the logits are equal bit for bit;
3. the same input in small blocks through our layers: logits equal to rounding, cache length right;
4. the last block again on a cache restored from captured bytes: logits equal bit for bit to 3;
5. no buffer of the model changed meanwhile (state kept on modules cannot be restored).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed import hf
from kvembed._block import Block, BlockInfo
from kvembed._restore import Piece, Restore

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed._attention import AttentionSwitch
    from kvembed._block import Layout
    from kvembed._keys import TokenIds

__all__ = ["OracleVerdict", "run_oracle"]

_STEP = 8
_TOKENS = 2 * _STEP + 3
_MAX_RELATIVE_ERROR = 1e-2


@dataclass(frozen=True)
class OracleVerdict:
    """What the trial found.

    Args:
        reason: Why the model is not served, or None.
        grouped_attention: Whether the grouped path gives the same bits.
        relative_error: Largest difference of blockwise from one-shot logits, relative to their spread.
    """

    reason: str | None
    grouped_attention: bool
    relative_error: float


class _MemorySource:
    """Captured bytes as a block source, without any tier in between."""

    tier = "oracle"

    def __init__(self, block: Block) -> None:
        self._block = block
        self.info: BlockInfo = block.info
        self.token_ids: TokenIds = block.token_ids
        self.layout: Layout = block.layout

    def read_into(self, index: int, rows: np.ndarray, skip: int = 0) -> None:
        np.copyto(rows, self._block.tensor(index)[:, skip : skip + rows.shape[1]])

    def close(self) -> None:
        pass


def trial_ids(model: Any) -> torch.Tensor:
    """Return ``[1, 19]`` token ids spread over the vocabulary, the same for every run."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(1, _TOKENS + 1) * 7919) % max(2, vocabulary - 1)
    return ids[None].to(model.get_input_embeddings().weight.device)


def run_oracle(
    model: Any,
    spec: hf.CacheSpec,
    switch: AttentionSwitch,
    forward: Callable[[torch.Tensor, int, Any], Any],
) -> OracleVerdict:
    """Try reuse on a short input.

    Args:
        model: The wrapped model.
        spec: Its cache shape.
        switch: Turns the grouped attention path on.
        forward: ``forward(ids, start, cache)`` runs the model with logits of the last token.
    """
    ids = trial_ids(model)
    edge = 2 * _STEP
    before = _state(model)
    plain = forward(ids, 0, hf.new_stock_cache(model.config))
    in_two = _in_two(model, ids, edge, forward)
    with switch.active():
        grouped = forward(ids, 0, hf.new_stock_cache(model.config))
        grouped_in_two = _in_two(model, ids, edge, forward)
    switch.enabled = switch.enabled and torch.equal(plain, grouped) and torch.equal(in_two, grouped_in_two)

    cache = spec.new_cache(model.config, _TOKENS)
    with switch.active():
        forward(ids[:, :_STEP], 0, cache)
        forward(ids[:, _STEP:edge], _STEP, cache)
        data = hf.capture(cache, spec.layout, 0, edge)
        blockwise = forward(ids[:, edge:], edge, cache)

        restored = spec.new_cache(model.config, _TOKENS)
        info = BlockInfo(b"", b"", b"", 0, edge, True, data.nbytes)
        block = Block(info, ids[0, :edge].cpu().numpy().astype(np.int32), spec.layout, data)
        restore = Restore(restored, [Piece(_MemorySource(block), edge)], edge)
        restore.start()
        again = forward(ids[:, edge:], edge, restored)
        restore.finish()

    spread = float((plain.max() - plain.min()).abs()) or 1.0
    error = float((blockwise - plain).abs().max()) / spread
    reason = None
    # "not <=" rather than ">": a NaN must be refused too.
    if not error <= _MAX_RELATIVE_ERROR:
        reason = f"continuing in blocks gives other logits than one forward (relative error {error:.2g})"
    elif hf.common_length(cache) != _TOKENS:
        reason = f"the cache holds {hf.common_length(cache)} tokens after {_TOKENS} were fed"
    elif not torch.equal(blockwise, again):
        reason = "a restored cache gives other logits than the cache it was stored from"
    elif not _same_state(before, _state(model)):
        reason = "the model keeps state on its modules, which cannot be restored"
    return OracleVerdict(reason, switch.enabled, error)


def _in_two(model: Any, ids: torch.Tensor, edge: int, forward: Callable[[torch.Tensor, int, Any], Any]) -> torch.Tensor:
    """A continuation on a stock cache: the case with a mask, where the two attention paths differ most."""
    cache = hf.new_stock_cache(model.config)
    forward(ids[:, :edge], 0, cache)
    return forward(ids[:, edge:], edge, cache)


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
    return None
