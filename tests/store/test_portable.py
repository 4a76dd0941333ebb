"""Portable files: what is exported is imported bit for bit, another model is refused, hostile files are data."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import BlockFormatError, CachedModel, ConfigError, KVStore, ModelMismatchError, StoreFormatError
from kvembed._blockfile import EncodedBlock
from kvembed._testing import FINGERPRINT, assert_reads, block_path, keys_of, put_all, random_block, random_chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvembed._block import Block

FIELDS = {"name": "tiny", "dtype": "float32", "weights": "abc"}
Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    with KVStore(tmp_path / "store", max_cpu_bytes="4MiB", max_disk_bytes="64MiB") as store:
        store.register_namespace(FINGERPRINT, FIELDS)
        yield store


@pytest.fixture
def target(tmp_path: Path) -> Iterator[KVStore]:
    with KVStore(tmp_path / "target", max_cpu_bytes=None, max_disk_bytes="64MiB") as store:
        yield store
        if not store.closed:
            assert store.verify().problems == ()


def text(store: KVStore) -> list[Block]:
    chain = random_chain(3, seed=1)
    tail = random_block(chain[2].key, range(20), start=48, exact=False)
    state = random_block(chain[1].key, [-1], start=32)
    blocks = [*chain[:2], state, chain[2], tail]
    put_all(store, [*blocks, *random_chain(3, seed=2)])
    return blocks


def test_what_goes_out_comes_in_bit_for_bit(store: KVStore, target: KVStore, tmp_path: Path) -> None:
    blocks = text(store)
    store.pin(keys_of(blocks), "report")
    file = tmp_path / "report.kvembed"
    report = store.export(file, "report")
    assert (report.blocks, report.n_tokens) == (5, 68)
    assert report.nbytes == file.stat().st_size
    assert json.loads(json.dumps(report.to_dict()))["blocks"] == 5
    taken = target.import_(file, pin="report")
    assert (taken.blocks, taken.new, taken.left_out) == (5, 5, 0)
    for block in blocks:
        assert_reads(target, block, "disk")
    assert target.pins() == {"report": keys_of(blocks)}
    assert target.namespaces() == {FINGERPRINT: FIELDS}
    again = target.import_(file)
    assert (again.new, again.left_out) == (0, 0)
    assert "5 were here already" in str(again)
    assert target.stats().tiers[0].blocks == 5


@pytest.mark.skipif(os.name == "nt", reason="modes are a POSIX matter")
def test_the_file_is_private_and_whole_or_not_there(store: KVStore, tmp_path: Path, monkeypatch: Any) -> None:
    blocks = text(store)
    file = tmp_path / "out" / "a"
    file.parent.mkdir()
    old = os.umask(0)
    try:
        store.export(file, blocks[-1].key.hex()[:12])
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    calls = []

    def fail(self: EncodedBlock) -> Any:
        calls.append(self)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return plain(self)

    plain: Any = EncodedBlock.buffers
    monkeypatch.setattr(EncodedBlock, "buffers", fail)
    with pytest.raises(Exception, match="No space"):
        store.export(file, keys_of(blocks))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_tar_reads_it_and_every_file_in_it_is_a_block(store: KVStore, tmp_path: Path) -> None:
    blocks = text(store)
    file = tmp_path / "a.tar"
    store.export(file, keys_of(blocks))
    with tarfile.open(file) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "out", filter="data")
    assert names == ["kvembed.json", *(f"{block.key.hex()}.safetensors" for block in blocks)]
    from kvembed._blockfile import read_block

    for block in blocks:
        found = read_block(tmp_path / "out" / f"{block.key.hex()}.safetensors")
        assert found.info == block.info
        assert np.array_equal(found.data, block.data)


def test_what_cannot_be_exported_is_said(store: KVStore, tmp_path: Path) -> None:
    blocks = text(store)
    for what, words in (
        ([], "no keys"),
        ([bytes(32)], "not stored any more"),
        ("ffffffffffff", "no stored sequence"),
    ):
        with pytest.raises(ConfigError, match=words):
            store.export(tmp_path / "a", what)
    store.flush()
    assert store._cpu is not None
    store._cpu.clear()
    path = block_path(store, blocks[0])
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        store.export(tmp_path / "a", keys_of(blocks))
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------------------- other models


def test_a_store_of_other_models_refuses_and_says_what_differs(store: KVStore, target: KVStore, tmp_path: Path) -> None:
    blocks = text(store)
    store.export(tmp_path / "a", keys_of(blocks))
    target.register_namespace(b"x" * 32, {"name": "other", "dtype": "bfloat16", "weights": "abc"})
    target.register_namespace(b"y" * 32, {"name": "far", "dtype": "int8", "weights": "def", "adapter": "z"})
    with pytest.raises(ModelMismatchError) as caught:
        target.import_(tmp_path / "a")
    assert caught.value.differences == {"dtype": ("float32", "bfloat16")}
    assert "dtype is 'float32' there, 'bfloat16' here" in str(caught.value)
    assert target.stats().tiers[0].blocks == 0
    assert target.import_(tmp_path / "a", any_model=True).new == 5
    assert target.import_(tmp_path / "a").new == 0  # its model is known now


def test_budgets_hold_and_the_beginning_stays(store: KVStore, tmp_path: Path) -> None:
    chain = random_chain(40, seed=3)
    put_all(store, chain)
    store.export(tmp_path / "a", keys_of(chain))
    with KVStore(tmp_path / "small", max_cpu_bytes=None, max_disk_bytes="160KiB") as small:
        report = small.import_(tmp_path / "a", pin="as far as it goes")
        assert report.new + report.left_out == 40
        assert 5 < report.new < 20
        assert list(report.keys) == keys_of(chain)[: report.new]
        assert len(small.lookup(keys_of(chain))) == report.new
        disk = small.stats().tiers[0]
        assert disk.nbytes <= disk.max_bytes
        assert small.pins() == {"as far as it goes": list(report.keys)}


def test_a_store_in_memory_only(store: KVStore, tmp_path: Path) -> None:
    blocks = text(store)
    store.export(tmp_path / "a", keys_of(blocks))
    with KVStore(max_disk_bytes=None, max_cpu_bytes="1MiB") as memory:
        assert memory.import_(tmp_path / "a").new == 5
        for block in blocks:
            assert_reads(memory, block, "cpu")
        memory.export(tmp_path / "b", keys_of(blocks))
    assert members(tmp_path / "b")[1:] != []


# ------------------------------------------------------------------------------------- hostile files


def members(file: Path) -> Members:
    with tarfile.open(file) as archive:
        return [(entry, (archive.extractfile(entry) or io.BytesIO()).read()) for entry in archive.getmembers()]


def pack(file: Path, parts: Members, kind: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(file, "w", format=kind) as archive:
        for entry, data in parts:
            archive.addfile(entry, io.BytesIO(data))


def manifest(parts: Members, change: Callable[[dict[str, Any]], object]) -> None:
    entry, data = parts[0]
    fields = json.loads(data)
    change(fields)
    data = json.dumps(fields).encode()
    entry.size = len(data)
    parts[0] = (entry, data)


def named(parts: Members, at: int, name: str) -> None:
    parts[at][0].name = name


def kind(parts: Members, at: int, value: bytes, link: str = "/etc/passwd") -> None:
    parts[at][0].type = value
    parts[at][0].linkname = link


def damage(parts: Members, at: int, byte: int) -> None:
    entry, data = parts[at]
    raw = bytearray(data)
    raw[byte] ^= 1
    parts[at] = (entry, bytes(raw))


ATTACKS: dict[str, tuple[Callable[[Members], object], str]] = {
    "a path that leads out": (lambda p: named(p, 1, "../../evil.safetensors"), "other than blocks"),
    "an absolute path": (lambda p: named(p, 1, "/tmp/evil.safetensors"), "other than blocks"),
    "a block in a folder": (lambda p: named(p, 1, f"blocks/{p[1][0].name}"), "other than blocks"),
    "a symbolic link": (lambda p: kind(p, 1, tarfile.SYMTYPE), "other than blocks"),
    "a hard link": (lambda p: kind(p, 1, tarfile.LNKTYPE), "other than blocks"),
    "a device": (lambda p: kind(p, 1, tarfile.CHRTYPE), "other than blocks"),
    "a FIFO": (lambda p: kind(p, 1, tarfile.FIFOTYPE), "other than blocks"),
    "a folder": (lambda p: kind(p, 1, tarfile.DIRTYPE), "other than blocks"),
    "a manifest that is a link": (lambda p: kind(p, 0, tarfile.SYMTYPE), "other than blocks"),
    "the name of another block": (lambda p: named(p, 1, p[2][0].name), "not those of its manifest"),
    "two blocks exchanged": (lambda p: p.insert(1, p.pop(2)), "not those of its manifest"),
    "exchanged in the manifest too": (
        lambda p: (p.insert(1, p.pop(2)), manifest(p, lambda m: m["blocks"].insert(0, m["blocks"].pop(1)))),
        "before what it follows",
    ),
    "content of another block": (lambda p: p.__setitem__(1, (p[1][0], p[2][1])), "holds another block"),
    "a block left out": (lambda p: p.pop(2), "not those of its manifest"),
    "the last block left out": (lambda p: p.pop(), "are missing"),
    "a block twice": (lambda p: p.append(p[-1]), "not those of its manifest"),
    "a flipped bit of KV": (lambda p: damage(p, 2, -300), "checksum"),
    "a flipped bit of an id": (lambda p: damage(p, 2, -3), "checksum"),
    "a flipped bit of a header": (lambda p: damage(p, 2, 40), "tensor"),
    "no manifest": (lambda p: p.pop(0), "no manifest"),
    "nothing": (lambda p: p.clear(), "no manifest"),
    "a manifest of something else": (lambda p: manifest(p, lambda m: m.update(blocks="abc")), "manifest"),
    "a manifest without blocks": (lambda p: manifest(p, lambda m: m.update(blocks=[])), "names no blocks"),
    "a manifest that is nested too deep": (
        lambda p: (p[0][0].__setattr__("size", 200_000), p.__setitem__(0, (p[0][0], b"[" * 200_000))),
        "manifest",
    ),
    "a manifest with escapes for the terminal": (
        lambda p: manifest(p, lambda m: m["namespaces"][FINGERPRINT.hex()].update(name="\x1b]0;x\x07")),
        "other than text",
    ),
    "a model it does not name": (
        lambda p: manifest(p, lambda m: m.update(namespaces={"00" * 32: {}})),
        "does not name",
    ),
}


@pytest.fixture
def exported(store: KVStore, tmp_path: Path) -> Path:
    file = tmp_path / "good"
    store.export(file, keys_of(text(store)))
    return file


def test_packing_without_a_change_is_accepted(exported: Path, target: KVStore, tmp_path: Path) -> None:
    pack(tmp_path / "a", members(exported))
    assert target.import_(tmp_path / "a").new == 5


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(exported: Path, target: KVStore, tmp_path: Path, attack: str) -> None:
    change, words = ATTACKS[attack]
    parts = members(exported)
    names = [entry.name for entry, _ in parts]
    change(parts)
    bad = tmp_path / "bad"
    pack(bad, parts)
    around = {path for path in tmp_path.rglob("*") if "target" not in path.parts}
    with pytest.raises(BlockFormatError, match=words) as caught:
        target.import_(bad)
    assert str(caught.value).startswith("bad cannot be imported: ")
    assert {path for path in tmp_path.rglob("*") if "target" not in path.parts} == around
    # Whatever was taken before the damage is sound, and reaches back to the beginning.
    for entry in target.ls():
        assert {key.hex() for key in entry_keys(target, entry.key)} <= {name[:64] for name in names}
    assert target.verify().problems == ()


def entry_keys(store: KVStore, last: bytes) -> list[bytes]:
    chain = store._chain(last)
    assert chain[0].start == 0
    return [info.key for info in chain]


def text_blocks() -> list[Block]:
    return random_chain(3, seed=1)


def test_long_names_and_extended_headers_are_refused(exported: Path, target: KVStore, tmp_path: Path) -> None:
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        parts = members(exported)
        parts[1][0].name = "x" * 300
        pack(tmp_path / f"a{number}", parts, form)
        with pytest.raises(BlockFormatError, match="other than blocks"):
            target.import_(tmp_path / f"a{number}")


def test_cut_off_anywhere(exported: Path, target: KVStore, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    end = len(whole) - 1024
    for cut in [0, 1, 511, 512, 513, 1024, *range(2000, end, 1777), end - 1, end]:
        (tmp_path / "cut").write_bytes(whole[:cut])
        if cut == end:  # only the two empty records at its end are missing
            with pytest.raises(BlockFormatError, match="cut off"):
                target.import_(tmp_path / "cut")
            continue
        with pytest.raises(BlockFormatError):
            target.import_(tmp_path / "cut")
    assert target.import_(exported).left_out == 0


@pytest.mark.parametrize("what", ["manifest", "block", "whole"])
def test_holes_of_a_terabyte_cost_no_memory(exported: Path, target: KVStore, tmp_path: Path, what: str) -> None:
    parts = members(exported)
    first, size = parts[0][0], 1 << 40
    file = tmp_path / "huge"
    with file.open("wb") as out:
        if what == "manifest":
            first.size = size
            out.write(first.tobuf(tarfile.GNU_FORMAT))
        elif what == "block":
            out.write(first.tobuf(tarfile.USTAR_FORMAT))
            out.write(parts[0][1] + bytes(-len(parts[0][1]) % 512))
            parts[1][0].size = size
            out.write(parts[1][0].tobuf(tarfile.GNU_FORMAT))
        try:
            out.truncate(out.tell() + size + 1024)
        except OSError:
            pytest.skip("no holes of this size here")
    tracemalloc.start()
    with pytest.raises(BlockFormatError):
        target.import_(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_random_damage_never_gives_wrong_bytes(exported: Path, target: KVStore, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    rng = np.random.default_rng(4)
    refused = 0
    for _ in range(300):
        raw = bytearray(whole)
        raw[int(rng.integers(len(raw)))] ^= int(rng.integers(1, 256))
        (tmp_path / "bad").write_bytes(raw)
        try:
            target.import_(tmp_path / "bad", any_model=True)
        except (BlockFormatError, StoreFormatError):
            refused += 1
    assert refused > 200
    for block in text_blocks():
        if target.lookup([block.key]):
            assert_reads(target, block, "disk")


def test_another_version_is_named(exported: Path, target: KVStore, tmp_path: Path) -> None:
    parts = members(exported)
    manifest(parts, lambda m: m.update(format=2))
    pack(tmp_path / "a", parts)
    with pytest.raises(StoreFormatError, match="format 2.*reads 1"):
        target.import_(tmp_path / "a")


def test_what_is_no_file(target: KVStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        target.import_(tmp_path / "absent")
    with pytest.raises(BlockFormatError, match="regular"):
        target.import_(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(BlockFormatError, match="regular"):
            target.import_(tmp_path / "fifo")


# ------------------------------------------------------------------------------------- with a model

BLOCK = 16
TEXT = "The lighthouse keeper counts the ships at dusk. " * 4


@pytest.fixture(scope="module")
def model(tiny_llama: Any) -> Any:
    return tiny_llama()


def wrap(model: Any, store: KVStore, tokenizer: Any, **options: Any) -> CachedModel:
    return CachedModel(model, tokenizer, store=store, block_size=BLOCK, progress=False, max_live=0, **options)


def test_a_document_answers_from_an_imported_file_like_a_run_without_cache(
    model: Any, tiny_tokenizer: Any, store: KVStore, target: KVStore, tmp_path: Path
) -> None:
    here, there = wrap(model, store, tiny_tokenizer), wrap(model, target, tiny_tokenizer)
    document = here.document(TEXT)
    document.ask("A secret question about ships?", max_new_tokens=4)
    here.export(tmp_path / "a", document)
    # The question is nobody else's business.
    question = tiny_tokenizer("secret question", add_special_tokens=False)["input_ids"]
    for _, data in members(tmp_path / "a"):
        assert np.asarray(question[:6], "<i4").tobytes() not in data
        assert b"secret" not in data
    there.import_(tmp_path / "a", pin="report")
    answer = there.document(TEXT, prefill=False).ask("How many?", max_new_tokens=8)
    assert answer.usage.cached_tokens >= document.tokens - BLOCK
    assert set(answer.usage.cached_tokens_by_tier) == {"disk"}
    ids = torch.from_numpy(answer.prompt_ids.astype(np.int64))[None]
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert answer.token_ids.tolist() == plain[0, ids.shape[1] :].tolist()
    assert there.recheck().ok


def test_another_model_or_salt_is_refused(
    model: Any, tiny_llama: Any, tiny_tokenizer: Any, store: KVStore, target: KVStore, tmp_path: Path
) -> None:
    here = wrap(model, store, tiny_tokenizer)
    here.prefill(TEXT)
    here.export(tmp_path / "a", TEXT)
    with pytest.raises(ModelMismatchError) as caught:
        wrap(tiny_llama(seed=1), target, tiny_tokenizer).import_(tmp_path / "a")
    assert "weights" in " ".join(caught.value.differences)
    with pytest.raises(ModelMismatchError, match="block_size is '16' there, '32' here"):
        CachedModel(model, tiny_tokenizer, store=target, block_size=32, progress=False).import_(tmp_path / "a")
    with pytest.raises(BlockFormatError, match="cache_salt"):
        wrap(model, target, tiny_tokenizer, cache_salt="x").import_(tmp_path / "a")
    assert target.stats().tiers[0].blocks == 0
    with pytest.raises(ConfigError, match="nothing of this text"):
        here.export(tmp_path / "b", "Something that was never prefilled, at all.")
