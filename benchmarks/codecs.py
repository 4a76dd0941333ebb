"""Codecs: what they cost a model's predictions, how much smaller KV gets, and how fast they are; and whether lossless
compressors pay.

    python benchmarks/codecs.py                  # SmolLM2 and Gemma 3 270M, in float32 and bfloat16
    python benchmarks/codecs.py --compressors    # needs: pip install zstandard lz4 blosc2
"""

from __future__ import annotations

import argparse
import gc
import statistics
from importlib import import_module
from typing import TYPE_CHECKING, Any

import common
import numpy as np
import torch

from kvembed import CachedModel, KVStore
from kvembed._codecs.measure import measure_codecs
from kvembed._keys import as_token_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PREDICTED = 256


def loaded(names: list[str], dtypes: list[str]) -> Iterator[tuple[str, str, CachedModel]]:
    """Load one model after another over a store in memory, but for those that are passed through."""
    for name in names:
        for dtype in dtypes:
            store = KVStore(max_disk_bytes=0, max_cpu_bytes="512MiB")
            cached = CachedModel.from_pretrained(name, store=store, dtype=dtype, progress=False)
            if cached.support is None:
                yield name, dtype, cached
            else:
                print(f"{name} in {dtype} is passed through: {cached.support}", flush=True)
            cached.close()
            del cached
            gc.collect()


def figures(names: list[str], dtypes: list[str], tokens: int, texts: int) -> list[dict[str, Any]]:
    """Measure all codecs on several pieces of the text; one row for each model and codec."""
    rows: list[dict[str, Any]] = []
    for name, dtype, cached in loaded(names, dtypes):
        ids = common.text_ids(cached.tokenizer).numpy()
        starts = [number * (len(ids) - tokens - PREDICTED) // max(1, texts) for number in range(texts)]
        pieces = [as_token_ids(ids[start : start + tokens + PREDICTED]) for start in starts]
        runs = [measure_codecs(cached._engine, piece, predicted=PREDICTED) for piece in pieces]
        for of_codec in zip(*runs, strict=True):
            first = of_codec[0]
            rates = {
                what: max(getattr(f, f"{what}_rate") or 0.0 for f in of_codec) / 1e9 or None
                for what in ("encode", "decode")
            }
            rows.append(
                {
                    "model": name,
                    "dtype": dtype,
                    "codec": "(rounding)" if first.codec == "lossless" else first.codec,
                    "KL mean": statistics.fmean(f.kl_mean for f in of_codec),
                    "KL max": max(f.kl_max for f in of_codec),
                    "top-1": statistics.fmean(f.top1 for f in of_codec),
                    "smaller": first.ratio,
                    "encode GB/s": rates["encode"],
                    "decode GB/s": rates["decode"],
                }
            )
            print(rows[-1], flush=True)
        del cached
    return rows


def shuffled(data: np.ndarray, size: int) -> np.ndarray:
    """Bytes of numbers, first bytes first."""
    return np.ascontiguousarray(data.reshape(-1, size).T).reshape(-1)


def compressors(names: list[str], dtypes: list[str], tokens: int) -> list[dict[str, Any]]:
    """Compress the KV of one text losslessly, tensor by tensor, with the bytes shuffled."""
    blosc2, zstandard = import_module("blosc2"), import_module("zstandard")
    lz4_frame = import_module("lz4.frame")

    blosc2.set_nthreads(1)
    rows: list[dict[str, Any]] = []
    for name, dtype, cached in loaded(names, dtypes):
        ids = as_token_ids(common.text_ids(cached.tokenizer).numpy()[:tokens])
        engine = cached._engine
        cached.prefill(torch.from_numpy(ids.astype(np.int64))[None])
        keys = [stored.info.key for stored in engine.match(as_token_ids([*ids, 0]), deterministic=False).blocks]
        cached.drop_live()
        keys = keys or [b.info.key for b in engine.match(as_token_ids([*ids, 0]), deterministic=False).blocks]
        parts: list[np.ndarray] = []
        for key in keys:
            source = cached.store.open(key)
            assert source is not None
            parts += [np.ascontiguousarray(part).reshape(-1) for part in source.read(0, len(source.layout.tensors))]
        size = 4 if dtype == "float32" else 2
        ways: dict[str, tuple[Callable[[np.ndarray], Any], Callable[[Any], Any]]] = {
            "zstd -1 + shuffle": (
                lambda d, s=size: zstandard.ZstdCompressor(level=1).compress(shuffled(d, s)),
                lambda c, s=size: (
                    shuffled(np.frombuffer(zstandard.ZstdDecompressor().decompress(c), np.uint8), 1)
                    .reshape(s, -1)
                    .T.copy()
                ),
            ),
            "lz4 + shuffle": (
                lambda d, s=size: lz4_frame.compress(shuffled(d, s).data),
                lambda c, s=size: np.frombuffer(lz4_frame.decompress(c), np.uint8).reshape(s, -1).T.copy(),
            ),
        }
        for label, codec in (
            ("blosc2 zstd -1, shuffle", blosc2.Codec.ZSTD),
            ("blosc2 lz4, shuffle", blosc2.Codec.LZ4),
        ):
            ways[label] = (
                lambda d, s=size, k=codec: blosc2.compress2(
                    d.data, codec=k, clevel=1, filters=[blosc2.Filter.SHUFFLE], typesize=s, nthreads=1
                ),
                lambda c: blosc2.decompress2(c, nthreads=1),
            )
        whole = sum(part.nbytes for part in parts)
        for label, (pack, unpack) in ways.items():
            pack_s, packed = common.timed(lambda p=pack, all_parts=parts: [p(part) for part in all_parts])
            unpack_s, back = common.timed(lambda u=unpack, k=packed: [u(part) for part in k])
            for part, again in zip(parts, back, strict=True):
                assert np.array_equal(part, np.frombuffer(np.ascontiguousarray(again), np.uint8).reshape(-1)), label
            rows.append(
                {
                    "model": name,
                    "dtype": dtype,
                    "compressor": label,
                    "smaller": whole / sum(len(part) for part in packed),
                    "compress GB/s": whole / pack_s / 1e9,
                    "decompress GB/s": whole / unpack_s / 1e9,
                }
            )
            print(rows[-1], flush=True)
        del cached
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3-270m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=1024, help="tokens whose KV is stored")
    parser.add_argument("--texts", type=int, default=3, help="pieces of the Python reference")
    parser.add_argument("--compressors", action="store_true", help="measure lossless compressors instead")
    args = parser.parse_args()
    if args.compressors:
        rows = compressors(args.models, args.dtypes, args.tokens)
        common.report("compressors", rows, ["One thread; tensor by tensor of each block of 256 tokens."])
        return
    notes = [
        f"{PREDICTED} tokens predicted on top of {args.tokens:,}, {args.texts} pieces of text; KL in nats.",
        "(rounding): one plain forward of transformers in place of blocks: what a model differs by from itself.",
        "Rates count bytes of KV as the cache has it, in host memory.",
    ]
    common.report("codecs", figures(args.models, args.dtypes, args.tokens, args.texts), notes)


if __name__ == "__main__":
    main()
