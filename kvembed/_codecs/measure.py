"""What a codec costs a model's answers: predictions on KV that went through it, and on KV that did not.

All tokens but the last ones are computed as a cold call does it. Their KV is stored and read back in each codec, and
the last tokens are fed on top of it in one forward. What the model predicts after each of them is compared with what it
predicts on top of the KV as it was.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed import hf
from kvembed._block import Block, BlockInfo
from kvembed._codecs.blocks import DecodingSource, encoded_block
from kvembed._codecs.names import CODECS, LOSSLESS
from kvembed._errors import ConfigError, UnsupportedModelError
from kvembed._tiers.cpu import MemorySource

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvembed._engine import Engine
    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence

__all__ = ["CodecFigures", "measure_codecs"]

_LEAST_TOKENS = 64
_ROWS = 32  # of predictions compared at a time: a large vocabulary is a megabyte a row


@dataclass(frozen=True)
class CodecFigures:
    """What one codec did to the predictions of a model.

    Args:
        codec: Its name. For ``"lossless"`` the figures are those of the model's own rounding: the same text computed by
            one plain forward of transformers, in place of blocks.
        kl_mean: Kullback-Leibler divergence from the lossless predictions, mean over the tokens, in nats.
        kl_max: The largest.
        top1: Part of the tokens with the same most likely token.
        ratio: Bytes of the KV for each byte stored.
        encode_rate: Bytes of KV encoded a second.
        decode_rate: Bytes of KV decoded a second, into the rows of a cache.
        prefix_tokens: Tokens whose KV was stored.
        predicted_tokens: Tokens predicted on top of it.
    """

    codec: str
    kl_mean: float
    kl_max: float
    top1: float
    ratio: float
    encode_rate: float | None
    decode_rate: float | None
    prefix_tokens: int
    predicted_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON types."""
        return asdict(self)


def measure_codecs(
    engine: Engine,
    ids: TokenIds,
    codecs: Sequence[str] = tuple(reversed(CODECS)),
    *,
    predicted: int = 256,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[CodecFigures]:
    """Measure codecs on a model and a text; nothing is stored.

    Args:
        engine: Runs the model.
        ids: The text.
        codecs: Names of codecs.
        predicted: Tokens at the end to be predicted.
        on_progress: Called with (codecs done, codecs to do).

    Raises:
        ConfigError: The text is too short.
        UnsupportedModelError: The model has a state, which cannot be measured in this way.
    """
    if engine.has_state:
        raise UnsupportedModelError("codecs are measured on models whose layers keep keys and values only")
    size = engine.block_size
    held = (len(ids) - predicted) // size * size
    if predicted < _LEAST_TOKENS or held < size:
        raise ConfigError(f"the text has {len(ids):,} tokens, and {size + max(predicted, _LEAST_TOKENS):,} are needed")
    ids = ids[: held + predicted]
    sequence = engine.new_sequence(len(ids) + size)
    engine.prefill(sequence, ids, upto=held)
    blocks = [_block(engine, sequence, ids, start) for start in range(0, held, size)]
    as_it_was = _predictions(engine, sequence, ids, held)
    figures: list[CodecFigures] = []
    for done, codec in enumerate(codecs):
        on_progress(done, len(codecs))
        ratio, encode_rate, decode_rate = 1.0, None, None
        if codec == LOSSLESS:
            with torch.no_grad():
                whole = _tensor(engine, ids)
                now = engine.model(input_ids=whole, use_cache=False).logits[0, -predicted:]
        else:
            ratio, encode_rate, decode_rate = _through(codec, blocks, sequence)
            now = _predictions(engine, sequence, ids, held)
        mean, largest, same = _compare(as_it_was, now)
        figures.append(
            CodecFigures(codec, mean, largest, same, ratio, encode_rate, decode_rate, held, predicted),
        )
    on_progress(len(codecs), len(codecs))
    return figures


def _tensor(engine: Engine, ids: TokenIds) -> torch.Tensor:
    device = engine.model.get_input_embeddings().weight.device
    return torch.from_numpy(ids.astype(np.int64))[None].to(device)


def _block(engine: Engine, sequence: LiveSequence, ids: TokenIds, start: int) -> Block:
    """Copy a block out of the cache, as far as windows have kept it."""
    end, layout = start + engine.block_size, engine.spec.layout
    info = BlockInfo(bytes(32), bytes(32), bytes(32), start, end - start, False, layout.nbytes(end - start))
    data = np.zeros(info.nbytes, np.uint8)
    block = Block(info, ids[start:end], layout, data)
    for number, layer in enumerate(hf.layers_of(sequence.cache)):
        first = max(start, layer.first)
        for k, rows in enumerate(layer.rows(first, end) if first < end else ()):
            host = rows[0].contiguous().cpu().view(torch.uint8).numpy()
            block.tensor(2 * number + k)[:, first - start :] = host
    return block


def _through(codec: str, blocks: list[Block], sequence: LiveSequence) -> tuple[float, float, float]:
    """Fill the cache with what a codec makes of its blocks; return ratio, and bytes encoded and decoded a second."""
    stored = encode_s = decode_s = 0.0
    layers = hf.layers_of(sequence.cache)
    for block in blocks:
        began = time.perf_counter()
        encoded = encoded_block(block, codec)
        encode_s += time.perf_counter() - began
        stored += encoded.data.nbytes
        source = MemorySource(encoded)
        opened = source if encoded.layout.dtype is None else DecodingSource(source)
        for number, layer in enumerate(layers):
            start, end = block.info.start, block.info.start + block.info.n_tokens
            first = max(start, layer.first)
            if first >= end:
                continue
            targets = [rows[0] for rows in layer.rows(first, end)]
            hosts = [np.empty((t.shape[0], end - first, t.shape[2] * t.element_size()), np.uint8) for t in targets]
            began = time.perf_counter()
            opened.read_into(2 * number, hosts, first - start)
            decode_s += time.perf_counter() - began
            for target, host in zip(targets, hosts, strict=True):
                target.copy_(torch.from_numpy(host).view(target.dtype))
    whole = sum(block.data.nbytes for block in blocks)
    return whole / stored, whole / encode_s, whole / decode_s


def _predictions(engine: Engine, sequence: LiveSequence, ids: TokenIds, held: int) -> torch.Tensor:
    """Feed the tokens from ``held`` on and take them back; return the logits after each, ``[n, vocabulary]``."""
    n = len(ids) - held
    output = engine.wrapped.forward(_tensor(engine, ids[held:]), held, sequence.cache, logits=n)
    hf.truncate(sequence.cache, held)
    return output.logits[0, -n:]


def _compare(was: torch.Tensor, now: torch.Tensor) -> tuple[float, float, float]:
    divergences, same = [], 0
    for a, b in zip(was.split(_ROWS), now.split(_ROWS), strict=True):
        p, q = (torch.log_softmax(x.double(), dim=-1) for x in (a, b))
        divergences.append((p.exp() * (p - q)).sum(dim=-1).clamp_min_(0.0))
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    kl = torch.cat(divergences)
    return float(kl.mean()), float(kl.max()), same / len(kl)
