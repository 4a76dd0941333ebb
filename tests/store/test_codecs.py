"""Blocks in a codec: bounds of the round trip, files that describe themselves, and who may read what."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvembed import ConfigError, KVStore, StoreWarning
from kvembed._block import Block, Layout, TensorSpec
from kvembed._blockfile import read_block
from kvembed._blockheader import build_header, parse_header
from kvembed._codecs.blocks import SPAN, DecodingSource, encoded_block
from kvembed._codecs.names import CODECS, fidelity, worst
from kvembed._codecs.quantise import FP8, INT8, dequantise_into, quantise
from kvembed._errors import BlockFormatError
from kvembed._keys import as_token_ids
from kvembed._testing import FINGERPRINT, block_path, forget_memory, keys_of, put_all, random_block, random_chain
from kvembed._tiers.cpu import MemorySource

LOSSY = ("bf16", "k16v8", "int8", "fp8")
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def layout_of(dtype: str, heads: int = 2, width: int = 16) -> Layout:
    return Layout(tuple(TensorSpec(layer, name, heads, width, dtype) for layer in range(2) for name in ("k", "v")))


def block_of(n: int, dtype: str = "F32", *, seed: int = 0, scale: float = 1.0, layout: Layout | None = None) -> Block:
    """A block of numbers that look like keys and values: some channels are much larger than others."""
    layout = layout or layout_of(dtype)
    base = random_block(ids=range(n), layout=layout, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for index, spec in enumerate(layout.tensors):
        sizes = scale * 4.0 ** torch.randint(-3, 3, (spec.width,), generator=generator)
        values = torch.randn((spec.heads, n, spec.width), generator=generator) * sizes
        torch.from_numpy(base.tensor(index)).view(TYPES[dtype]).copy_(values)
    return base


def values(block: Block) -> list[torch.Tensor]:
    """The tensors of a block, decoded."""
    source = MemorySource(block)
    opened: Any = source if block.layout.dtype is None else DecodingSource(source)
    dtypes = [TYPES[spec.dtype] for spec in opened.layout.tensors]
    rows = opened.read(0, len(dtypes))
    return [torch.from_numpy(part.copy()).view(dtype) for part, dtype in zip(rows, dtypes, strict=True)]


def error_bound(x: torch.Tensor, name: str, codec: str) -> torch.Tensor:
    """The most that each value may be off: half a step, and the rounding to the type of the cache."""
    x = x.float()
    own = x.abs() * (2.0**-8 if codec == "bf16" else 2.0**-7)
    if codec == "bf16" or (codec == "k16v8" and name == "k"):
        return own
    groups = [x] if name == "v" else list(x.split(SPAN, dim=1))
    most = torch.cat([g.abs().amax(2 if name == "v" else 1, keepdim=True).expand_as(g) for g in groups], dim=1)
    if codec == "fp8":
        return x.abs() * 2.0**-4 + most * 2.0**-10 / 448 + own
    return most / 127 * 0.5001 + own


@given(
    n=st.sampled_from([1, 7, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN]),
    codec=st.sampled_from(LOSSY),
    dtype=st.sampled_from(sorted(TYPES)),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 1.0, 100.0]),
)
@settings(max_examples=40, deadline=None)
def test_no_value_is_further_off_than_its_codec_says(n: int, codec: str, dtype: str, seed: int, scale: float) -> None:
    scale = max(scale, 1e-2) if dtype == "F16" else scale
    block = block_of(n, dtype, seed=seed, scale=scale)
    stored = encoded_block(block, codec)
    if (codec == "bf16" and dtype != "F32") or (n == 1 and stored is block):
        assert stored is block  # nothing to be gained
        return
    assert (stored.info.codec, stored.info.exact) == (codec, False)
    assert stored.info.nbytes == stored.data.nbytes < block.data.nbytes
    for spec, was, now in zip(block.layout.tensors, values(block), values(stored), strict=True):
        error = (now.float() - was.float()).abs()
        assert bool((error <= error_bound(was, spec.name, codec)).all()), (spec.name, float(error.max()))


@pytest.mark.parametrize(("dtype", "codec", "ratio"), [("F32", "int8", 3.6), ("BF16", "int8", 1.8), ("F32", "bf16", 2)])
def test_blocks_get_smaller(dtype: str, codec: str, ratio: float) -> None:
    block = block_of(2 * SPAN, layout=layout_of(dtype, 1, 64), dtype=dtype)
    assert block.data.nbytes / encoded_block(block, codec).data.nbytes >= ratio


@pytest.mark.parametrize("codec", ["int8", "fp8", "bf16"])
def test_storing_again_what_was_decoded_changes_nothing(codec: str) -> None:
    stored = encoded_block(block_of(2 * SPAN), codec)
    again = block_of(2 * SPAN)
    for index, tensor in enumerate(values(stored)):
        torch.from_numpy(again.tensor(index)).view(torch.float32).copy_(tensor)
    for a, b in zip(values(stored), values(encoded_block(again, codec)), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ["k16v8", "int8", "fp8"])
def test_a_tensor_with_a_value_that_is_not_finite_is_stored_as_it_is(codec: str, value: float) -> None:
    block = block_of(20)
    torch.from_numpy(block.tensor(1)).view(torch.float32)[0, 3, 5] = value
    was, now = values(block), values(encoded_block(block, codec))
    assert torch.equal(was[1].view(torch.int32), now[1].view(torch.int32))
    assert not torch.equal(was[3], now[3])  # the others are not
    every = block_of(20)
    for index in range(4):
        torch.from_numpy(every.tensor(index)).view(torch.float32)[0, 0, 0] = value
    assert encoded_block(every, "int8") is every  # nothing was changed: it is lossless, and as exact as it was


def test_codes_at_the_edges() -> None:
    x = torch.tensor([[[127.0, 0.5, 1.5, -126.5, -127.0], [0, 0, 0, 0, 0], [-1e-44, -0.0, 0, 0, 0]]])
    codes, scales = quantise(x, INT8, "token", 1)
    assert codes[0, 0].tolist() == [127, 0, 2, -126, -127]  # ties to even
    assert codes[0, 1:].tolist() == [[0] * 5] * 2
    assert scales[0, :, 0].tolist()[:2] == [1.0, 0.0]
    assert quantise(x, FP8, "token", 1)[0].view(torch.uint8)[0, 1:].tolist() == [[0] * 5, [128, 128, 0, 0, 0]]
    codes, _ = quantise(torch.tensor([[[448.0, 17.0, 19.0, 2.0**-9, 2.0**-10]]]), FP8, "token", 1)
    assert codes.float()[0, 0].tolist() == [448.0, 16.0, 20.0, 2.0**-9, 0.0]


@pytest.mark.parametrize(("first", "n"), [(0, 3), (5, 200), (SPAN - 1, 2), (SPAN, 60), (250, 6)])
def test_a_part_of_a_block_is_the_part_of_the_whole(first: int, n: int) -> None:
    source = DecodingSource(MemorySource(encoded_block(block_of(2 * SPAN), "int8")))
    whole = source.read(2, 2)
    wide = np.zeros((2, 2 * SPAN + 9, whole[0].shape[2]), np.uint8)  # heads lie apart, as in a cache
    part = [wide[:, 4 : 4 + n], np.zeros_like(wide)[:, :n]]
    source.read_into(2, part, first)
    for mine, all_rows in zip(part, whole, strict=True):
        assert np.array_equal(mine, all_rows[:, first : first + n])
    assert not wide[:, :4].any()
    with pytest.raises(ConfigError, match="do not fit"):
        source.read_into(0, [np.zeros((2, 3, 64), np.uint8)], 2 * SPAN - 2)


def test_decoding_writes_the_rows_it_is_given_and_no_others() -> None:
    codes, scales = quantise(torch.randn(2, 300, 8), INT8, "channel", SPAN)
    room = torch.zeros(2, 310, 8)
    dequantise_into(room[:, 5:305], codes, scales, SPAN)
    assert float(room[:, :5].abs().max()) == float(room[:, 305:].abs().max()) == 0.0
    assert bool(room[:, 5:305].abs().amax(2).gt(0).all())


# --------------------------------------------------------------------------------------------- in stores


def chain_of(length: int, n: int = 16) -> list[Block]:
    chain = random_chain(length, tokens=n, layout=layout_of("F32"))
    for number, block in enumerate(chain):
        block.data[:] = block_of(n, seed=number).data
    return chain


def read(store: KVStore, block: Block, **options: Any) -> tuple[str, list[np.ndarray]] | None:
    source = store.open(block.key, **options)
    if source is None:
        return None
    try:
        return source.info.codec, source.read(0, len(source.layout.tensors))
    finally:
        source.close()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["plain", "encrypted"])
def test_every_tier_gives_what_was_stored(tmp_path: Path, codec: str, key: bytes | None) -> None:
    chain = chain_of(3)
    wanted = [[part.view(torch.uint8).numpy() for part in values(encoded_block(block, codec))] for block in chain]
    with KVStore(tmp_path, codec=codec, key=key) as store:
        put_all(store, chain)
        for tier in ("cpu", "disk"):
            for block, parts in zip(chain, wanted, strict=True):
                found = read(store, block)
                assert found is not None, tier
                assert found[0] == codec
                assert all(np.array_equal(a, b) for a, b in zip(found[1], parts, strict=True))
            assert [b.info.codec for b in store.lookup(keys_of(chain))] == [codec] * 3
            assert store.lookup(keys_of(chain), exact_only=True) == []
            forget_memory(store)
        store.promote(keys_of(chain))
        assert store.flush()
        assert {b.tier for b in store.lookup(keys_of(chain))} == {"cpu"}
        assert store.verify().problems == ()
    with KVStore(tmp_path, codec=codec, key=key) as store:  # and in another process
        assert [b.info.codec for b in store.lookup(keys_of(chain))] == [codec] * 3


def test_a_lossless_store_never_reads_a_lossy_block(tmp_path: Path) -> None:
    chain = chain_of(2)
    tail = random_block(chain[1].key, range(12), start=32, exact=False, layout=layout_of("F32"))
    tail.data[:] = block_of(12).data
    with KVStore(tmp_path, codec="bf16") as store:
        put_all(store, [*chain, tail])
    for open_store in (lambda: KVStore(tmp_path), lambda: KVStore(tmp_path, codec="lossless")):
        with open_store() as store:
            assert store.lookup(keys_of(chain)) == []
            assert store.known(keys_of(chain)) == [None, None]
            assert store.find_tail(chain[1].key, as_token_ids(range(12))) is None
            assert store.children(chain[0].key) == []
            assert [info.codec for info in store.children(chain[0].key, any_codec=True)] == ["bf16"]
            assert [store.open(block.key) for block in (*chain, tail)] == [None] * 3
            assert store.verify().problems == ()  # not read is not wrong
            (entry,) = store.ls()
            assert (entry.codec, " bf16 " in str(entry)) == ("bf16", True)
            assert store.stats().blocks_by_codec == {"bf16": 3}
            assert "codec lossless · blocks on disk: bf16 3" in repr(store.stats())
            # A catalog that says otherwise changes nothing, and is put right.
            with store._disk.catalog.transaction() as db:  # type: ignore[union-attr]
                db.execute("UPDATE blocks SET codec = 'lossless', exact = 1")
            store._cpu.clear()  # type: ignore[union-attr]
            assert [store.open(block.key) for block in (*chain, tail)] == [None] * 3
            assert store.lookup(keys_of(chain)) == []


def test_what_a_store_may_read_by_codec(tmp_path: Path) -> None:
    blocks = {codec: random_block(seed=number, layout=layout_of("F32")) for number, codec in enumerate(CODECS)}
    for number, (codec, block) in enumerate(blocks.items()):
        block.data[:] = block_of(16, seed=number).data
        with KVStore(tmp_path, codec=codec) as store:
            store.put(block)
    for mine in CODECS:
        with KVStore(tmp_path, codec=mine) as store:
            read = {codec for codec, block in blocks.items() if store.open(block.key) is not None}
            assert read == {codec for codec in CODECS if fidelity(codec) >= fidelity(mine)}
            assert store.verify().problems == ()
    assert worst("bf16", "fp8", "lossless") == "fp8"
    with pytest.raises(ConfigError, match='"lossless", "bf16"'):
        KVStore(tmp_path, codec="zip")


def test_the_better_block_takes_the_place_of_the_worse_never_the_other_way(tmp_path: Path) -> None:
    (block,) = chain_of(1)
    for codec, kept in (
        ("fp8", "fp8"),
        ("int8", "int8"),
        ("fp8", "int8"),
        ("lossless", "lossless"),
        ("int8", "lossless"),
    ):
        with KVStore(tmp_path, codec=codec) as store:
            store.put(block)
            store.flush()
            forget_memory(store)
            found = read(store, block)
            assert found is not None
            assert found[0] == kept
    assert read_block(tmp_path / "blocks" / block.key.hex()[:2] / f"{block.key.hex()}.safetensors").info == block.info


def test_a_lossless_tail_stays_beside_a_longer_lossy_one(tmp_path: Path) -> None:
    short, long = (random_block(ids=range(n), exact=False, layout=layout_of("F32")) for n in (10, 14))
    for block in (short, long):
        block.data[:] = block_of(block.info.n_tokens).data
    with KVStore(tmp_path) as store:
        store.put(short)
    with KVStore(tmp_path, codec="int8") as store:
        store.promote([short.key])
        store.flush()
        store.put(long)
    with KVStore(tmp_path) as store:
        found = store.find_tail(short.info.parent, as_token_ids(range(14)))
        assert found is not None
        assert (found[0].info.key, found[1]) == (short.key, 10)


def test_bytes_of_a_lossless_store_are_those_of_format_one(tmp_path: Path) -> None:
    (block,) = chain_of(1)
    header = build_header(block, 0.0, "test")
    assert b'\\"format\\":1,' in header
    assert b"codec" not in header
    with KVStore(tmp_path, codec="int8") as store:
        state = random_block(block.key, [-1], start=16, layout=Layout((TensorSpec(0, "tree", 1, 9, "U8"),)))
        put_all(store, [block, state])
        store.flush()
        assert block_path(store, state).read_bytes()[: 1 << 12].count(b"codec") == 0
        found = read_block(block_path(store, block))
        assert found.layout.dtype == "F32"
        assert [spec.name for spec in found.layout.tensors[:4]] == ["k", f"k_scale_{SPAN}", "v", "v_scale_1"]


def test_damaged_scales_and_codes_are_a_miss(tmp_path: Path) -> None:
    (block,) = chain_of(1)
    with KVStore(tmp_path, codec="int8", max_cpu_bytes=None) as store:
        store.put(block)
        store.flush()
        path = block_path(store, block)
        whole = path.read_bytes()
        stored = read_block(path)
        start = len(whole) - 4 * 16 - stored.info.nbytes
        for number, _ in enumerate(stored.layout.tensors):
            raw = bytearray(whole)
            raw[start + stored.layout.offset(number, 16) + 2] ^= 16
            path.write_bytes(raw)
            source = store.open(block.key)
            assert source is not None
            with pytest.raises(BlockFormatError, match="checksum"):
                source.read(0, 4)
            source.close()


def test_blocks_written_in_format_2_read_as_they_did_then() -> None:
    """The files of the fixture were written when format 2 was new, and are never made again."""
    folder = Path(__file__).parent / "fixtures" / "codecs2"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    assert sorted(expected) == sorted(LOSSY)
    for codec, wanted in expected.items():
        block = read_block(folder / f"{codec}.safetensors")
        assert (block.info.codec, block.info.exact, block.info.n_tokens) == (codec, False, 140)
        decoded = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in values(block))
        assert hashlib.sha256(decoded).hexdigest() == wanted


def test_headers_that_no_codec_makes_are_refused() -> None:
    stored = encoded_block(block_of(16), "int8")

    def parsed(tensors: tuple[TensorSpec, ...], dtype: str | None = "F32", **changes: Any) -> None:
        layout = Layout(tensors, dtype)
        data = np.zeros(layout.nbytes(16), np.uint8)
        info = type(stored.info)(**{**vars(stored.info), "nbytes": data.nbytes, **changes})
        header = build_header(Block(info, stored.token_ids, layout, data), 0.0, "test")
        found = parse_header(header[8:], len(header) + data.nbytes + 64)
        assert found.layout == layout

    k, k_scale, v, v_scale = stored.layout.tensors[:4]
    parsed((k, k_scale, v, v_scale))
    parsed((k, v))  # codes without scales are rounded numbers
    scales = [TensorSpec(0, "k_scale_64", 3, 16, "F32"), TensorSpec(0, "k_scale_64", 2, 5, "F32")]
    scales += [TensorSpec(0, "k_scale_64", 2, 16, "F16"), TensorSpec(1, "k_scale_64", 2, 16, "F32"), v_scale]
    for wrong in [(k_scale, k), *((k, scale) for scale in scales), (k, k_scale, k_scale)]:
        with pytest.raises(BlockFormatError):
            parsed(wrong)
    with pytest.raises(BlockFormatError):
        parsed((k, k_scale), codec="zip")
    with pytest.raises(BlockFormatError):
        parsed((k, k_scale), exact=True)
    with pytest.raises(BlockFormatError):
        parsed((k, k_scale), "I8")
    with pytest.raises(BlockFormatError):
        parsed((k, k_scale), None)


def test_codecs_outlast_the_catalog_and_travel(tmp_path: Path) -> None:
    chain = chain_of(3)
    with KVStore(tmp_path / "a", codec="int8") as store:
        store.register_namespace(FINGERPRINT, {"name": "fixture"})
        put_all(store, chain)
        store.flush()
        whole = read(store, chain[1])
        assert whole is not None
        store.pin(keys_of(chain), "text")
        store.export(tmp_path / "file", "text")
    (tmp_path / "a" / "kvembed.db").unlink()
    for suffix in ("-wal", "-shm"):
        (tmp_path / "a" / f"kvembed.db{suffix}").unlink(missing_ok=True)
    with pytest.warns(StoreWarning, match="made again from 3 block files"):
        KVStore(tmp_path / "a").close()
    for name, codec, seen in (("a", "int8", 3), ("b", "int8", 3), ("c", "lossless", 0)):
        with KVStore(tmp_path / name, codec=codec) as store:
            if name != "a":
                store.register_namespace(FINGERPRINT, {"name": "fixture"})
                assert store.import_(tmp_path / "file").new == 3
            assert len(store.lookup(keys_of(chain))) == seen
            assert store.verify().problems == ()
            found = read(store, chain[1], any_codec=True)
            assert found is not None
            assert all(np.array_equal(a, b) for a, b in zip(found[1], whole[1], strict=True))
