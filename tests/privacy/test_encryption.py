"""An encrypted store: every bit back with the key, nothing readable without it, and any change to a file a miss."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import (
    BlockFormatError,
    CachedModel,
    ConfigError,
    KVStore,
    StoreFormatError,
    StoreKeyError,
    StoreReadOnlyError,
    StoreWarning,
)
from kvembed._block import Layout, TensorSpec
from kvembed._blockfile import EncodedBlock, open_block
from kvembed._codec import Codec
from kvembed._encryption.sealed import SealedCodec
from kvembed._encryption.sources import key_text, new_key
from kvembed._files import open_regular, random_access
from kvembed._rebuild import rebuild
from kvembed._testing import (
    FINGERPRINT,
    SMALL_LAYOUT,
    assert_reads,
    block_path,
    forget_memory,
    keys_of,
    put_all,
    random_block,
    random_chain,
)
from tests.hostile.fuzz import fuzz

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY = bytes(range(100, 132))
OTHER = bytes(range(50, 82))
FIELDS = {"name": "marmalade-7b", "dtype": "float32", "config": "phosphorescent"}
WIDE = Layout(tuple(TensorSpec(layer, name, 2, 256, "F32") for layer in range(2) for name in ("k", "v")))
ODD = Layout((TensorSpec(0, "k", 3, 5, "F32"), TensorSpec(0, "v", 1, 7, "I32"), TensorSpec(11, "state", 2, 3, "U8")))


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def filled(root: Path, key: Any = KEY, **options: Any) -> list[Any]:
    chain = random_chain(4)
    with KVStore(root, key=key, max_cpu_bytes=None, **options) as store:
        store.register_namespace(FINGERPRINT, FIELDS)
        put_all(store, chain)
        store.pin(keys_of(chain), "umbrella")
    return chain


# ------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("layout", [SMALL_LAYOUT, WIDE, ODD])
@pytest.mark.parametrize("tokens", [1, 9, 16])
def test_every_bit_comes_back(tmp_path: Path, layout: Layout, tokens: int) -> None:
    chain = random_chain(3, layout=layout, tokens=tokens)
    with KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None) as store:
        put_all(store, chain)
        store.flush()
        for block in chain:
            assert_reads(store, block, "disk")
        source = store.open(chain[1].key)
        assert source is not None
        for index, spec in enumerate(layout.tensors):  # parts of tensors, into rows that lie apart
            rows = np.zeros((spec.heads, tokens + 3, spec.row_nbytes), np.uint8)
            part = tokens - tokens // 3
            source.read_into(index, [rows[:, 1 : 1 + part]], tokens // 3)
            assert np.array_equal(rows[:, 1 : 1 + part], chain[1].tensor(index)[:, tokens // 3 :])
            assert not rows[:, 0].any()
        source.close()
        assert store.verify().problems == ()
        assert store.encrypted
        assert store.stats().encrypted
    assert repr(store).endswith(", encrypted, closed)")
    with KVStore(tmp_path / "s", key=KEY, read_only=True) as store:
        for block in chain:
            assert_reads(store, block, "disk")


def test_any_range_into_any_buffers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codec = SealedCodec(KEY, b"")
    for number in range(60):
        nbytes, part = int(rng.integers(1, 400_000)), int(rng.integers(16 << 10, 70_000))
        head = int(rng.choice([0, 1, min(nbytes, 900), nbytes]))
        plain = rng.bytes(nbytes)
        cuts = np.sort(rng.integers(0, nbytes + 1, 3))
        pieces = [memoryview(piece) for piece in (plain[: cuts[0]], plain[cuts[0] : cuts[2]], plain[cuts[2] :])]
        sealed = b"".join(codec.encode(pieces, head, part, b"x"))
        assert len(sealed) == codec.file_nbytes(nbytes, head, part)
        path = tmp_path / f"{number}"
        path.write_bytes(sealed)
        fd, size = open_regular(path)
        file = random_access(fd, portable=bool(number % 2))
        decoded = codec.decode(file, size, b"x")
        assert (decoded.nbytes, decoded.file.read(nbytes + 9, 0)) == (nbytes, plain)
        for _ in range(20):
            start, stop = np.sort(rng.integers(0, nbytes + 1, 2))
            middle = int(rng.integers(start, stop + 1))
            buffers = [bytearray(int(middle - start)), bytearray(int(stop - middle))]
            decoded.file.read_into([memoryview(b) for b in buffers], int(start))
            assert b"".join(buffers) == plain[start:stop]
        with pytest.raises(BlockFormatError, match="ends before"):
            decoded.file.read_into([memoryview(bytearray(2))], nbytes - 1)
        with pytest.raises(BlockFormatError, match="does not decrypt"):
            codec.decode(file, size, b"y").file.read(1, 0)
        file.close()


def test_a_model_answers_the_same_from_every_tier(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 90, (1, 100), generator=generator)
    more = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answers: dict[str, Any] = {}
    for tier in ("none", "cpu", "disk", "disk again"):
        options: dict[str, Any] = {"max_cpu_bytes": None} if tier == "disk again" else {}
        with (
            KVStore(tmp_path / "s", key=KEY, **options) as store,
            CachedModel(
                model, tiny_tokenizer, store=store, block_size=16, deterministic=True, progress=False
            ) as cached,
        ):
            if tier == "cpu":
                cached.generate(prompt, **more)
                cached.drop_live()
                store.flush()  # what was read from disk is in memory then
            answers[tier] = cached.generate(prompt, **more)
            used = dict(cached.usage.cached_tokens_by_tier)
            assert used.get(tier.split()[0], 0) == (0 if tier == "none" else 96), (tier, used)
            if tier == "disk":
                assert cached.recheck().ok  # computes every stored block again and compares
    first = answers["none"]
    for answer in answers.values():
        assert torch.equal(answer.sequences, first.sequences)
        assert all(torch.equal(a, b) for a, b in zip(answer.logits, first.logits, strict=True))


def test_the_catalog_is_made_again_from_the_files(tmp_path: Path) -> None:
    chain = filled(tmp_path / "s")
    for name in ("kvembed.db", "kvembed.db-wal", "kvembed.db-shm"):
        (tmp_path / "s" / name).unlink(missing_ok=True)
    with pytest.raises(StoreKeyError):
        KVStore(tmp_path / "s", key=OTHER)
    with pytest.warns(StoreWarning, match="made again from 4"):
        store = KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None)
    with store:
        assert len(store.lookup(keys_of(chain))) == 4
        assert store.namespaces()[FINGERPRINT] == FIELDS
        assert store.find_tail(chain[-1].info.parent, chain[-1].token_ids) is not None
        assert [entry.key for entry in store.ls()] == [chain[-1].key]
        assert store.children(chain[0].key)[0].key == chain[1].key
        assert store._find(chain[-1].key.hex()[:7]) == chain[-1].key
        (row,) = store.prefixes().rows
        assert (row.keys, row.end, row.model) == (tuple(keys_of(chain)), 64, FIELDS["name"])
        codec = store._disk.codec if store._disk is not None else None
    assert rebuild(tmp_path / "s", codec=codec) == 4


def test_catalogs_of_other_stores_are_made_again(tmp_path: Path) -> None:
    chain = filled(tmp_path / "s")
    filled(tmp_path / "plain", None)
    filled(tmp_path / "other", OTHER)
    for name in ("plain", "other"):
        shutil.copy(tmp_path / name / "kvembed.db", tmp_path / "s" / "kvembed.db")
        with pytest.warns(StoreWarning, match="made again from 4 block files"):
            store = KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None)
        with store:
            assert_reads(store, chain[2], "disk")


# ------------------------------------------------------------------------------------- what can be read without the key


def traces(root: Path, chain: Sequence[Any]) -> list[str]:
    """Look for what must not be there, in names and bytes of every file below a folder."""
    wanted: dict[str, bytes] = {word: word.encode() for word in ("marmalade", "float32", "phosphorescent", "umbrella")}
    wanted |= {"fingerprint": FINGERPRINT[:8], "its digits": FINGERPRINT.hex()[:16].encode()}
    wanted |= {"root": chain[0].info.parent[:8]}
    for block in chain:
        name = block.key.hex()[:6]
        wanted |= {f"key {name}": block.key[:8], f"end of key {name}": block.key[-8:]}
        wanted |= {f"digits {name}": block.key.hex()[:12].encode(), f"tensors {name}": block.data[64:96].tobytes()}
        wanted |= {
            f"ids {name}": block.token_ids[:2].tobytes(),
            f"ids64 {name}": block.token_ids[:1].astype("<i8").tobytes(),
        }
    found = []
    for path in files_of(root):
        data = f"{path.relative_to(root)}".encode() + b"\0" + path.read_bytes()
        found += [f"{path.name}: {name}" for name, needle in wanted.items() if needle in data]
    return found


def use_all(store: KVStore, chain: Sequence[Any]) -> None:
    """Have a store write all it ever writes."""
    store.register_namespace(FINGERPRINT, FIELDS)
    put_all(store, chain)
    store.pin(keys_of(chain), "umbrella")
    store.touch(keys_of(chain))
    store.set_note(FINGERPRINT, "trial", {"verdict": "phosphorescent"})
    store.set_note(FINGERPRINT, "prefill_tokens_per_second", 100.0)
    assert store.get_note(FINGERPRINT, "trial") == {"verdict": "phosphorescent"}
    forget_memory(store)
    for block in chain:
        assert_reads(store, block, "disk")
    store.discard(chain[-1].key, "for a test")
    store.remove([chain[-2].key])
    store.flush()


def test_nothing_can_be_read_without_the_key(tmp_path: Path) -> None:
    chain = random_chain(6)
    with KVStore(tmp_path / "s", key=KEY, write_policy="seen-twice") as store:
        use_all(store, chain)
        use_all(store, chain)
        store.export(tmp_path / "s" / "export.tar", keys_of(chain[:3]))
        (store.path or tmp_path).joinpath("copy-of-wal").write_bytes((tmp_path / "s" / "kvembed.db-wal").read_bytes())
        assert (tmp_path / "s" / "quarantine").exists()
        assert store.pins() == {"umbrella": keys_of(chain)}
        assert store.why_missing(chain[-2].key) == "removed"
        assert store.hit_curve().calls == 2
    assert traces(tmp_path / "s", chain) == []
    assert len({path.suffix for path in files_of(tmp_path / "s")}) >= 5  # or the scan would prove little


def test_the_scan_finds_all_of_it_in_a_plain_store(tmp_path: Path) -> None:
    chain = random_chain(6)
    with KVStore(tmp_path / "s") as store:
        use_all(store, chain)
    kinds = {line.split(": ")[1].split()[0] for line in traces(tmp_path / "s", chain)}
    assert kinds >= {"marmalade", "umbrella", "fingerprint", "its", "root", "key", "end", "digits", "tensors", "ids"}


def test_names_of_two_keys_have_nothing_in_common(tmp_path: Path) -> None:
    chain = filled(tmp_path / "a", KEY)
    filled(tmp_path / "b", OTHER)
    names = [{path.name for path in files_of(tmp_path / name) if path.suffix == ".safetensors"} for name in "ab"]
    assert len(names[0]) == len(names[1]) == 4
    assert not names[0] & names[1]
    assert not {f"{block.key.hex()}.safetensors" for block in chain} & (names[0] | names[1])


def test_no_nonce_comes_twice_under_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []
    plain = SealedCodec._cipher

    class Recorder:
        def __init__(self, cipher: Any, salt: bytes) -> None:
            self.cipher, self.salt = cipher, salt

        def encrypt_into(self, nonce: bytes, *rest: Any) -> int:
            seen.append((self.salt, nonce))
            return self.cipher.encrypt_into(nonce, *rest)

        def decrypt_into(self, *args: Any) -> int:
            return self.cipher.decrypt_into(*args)

    def cipher(self: SealedCodec, prefix: bytes, salt: bytes, about: bytes) -> Any:
        assert salt in prefix
        real, more = plain(self, prefix, salt, about)
        return Recorder(real, salt), more

    monkeypatch.setattr(SealedCodec, "_cipher", cipher)
    chain = random_chain(40, layout=WIDE)
    with KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None) as one, KVStore(tmp_path / "s", key=KEY) as two:
        for store in (one, two):
            store.register_namespace(FINGERPRINT, FIELDS)
            threads = [threading.Thread(target=put_all, args=(store, chain)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            store.flush()
        one.clear()
        put_all(one, chain)  # the same blocks once more
        one.export(tmp_path / "export.tar", keys_of(chain))
    assert len(seen) > 1000
    assert len(set(seen)) == len(seen)
    assert len({salt for salt, _ in seen}) >= 120


# ------------------------------------------------------------------------------------- changed files


def test_tampering_is_a_miss(tmp_path: Path) -> None:
    counts, wrong, peak = fuzz(tmp_path, 400, 0, KEY)
    assert wrong == []
    assert peak < 48 << 20
    regions = {name.split(": ")[2] for name in counts if "flipped bit in" in name}
    assert regions >= {
        "magic",
        "version",
        "part size",
        "head size",
        "content size",
        "salt",
        "part 0",
        "tag 0",
        "part 4",
    }
    # Other bytes in place of some may by chance be the same.
    assert sum(count for name, count in counts.items() if name.startswith("right")) <= 2


def test_swapped_and_cut_files(tmp_path: Path) -> None:
    chain = filled(tmp_path / "s")
    with KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None) as store:
        first, second, third, fourth = (block_path(store, block) for block in chain)
        data = first.read_bytes(), second.read_bytes()
        first.write_bytes(data[1])
        second.write_bytes(data[0])
        third.write_bytes(third.read_bytes()[:-20])
        plain = EncodedBlock(chain[3], "plain")  # a file as a store without a key has it
        plain.write(fourth)
        for block in chain:
            assert store.open(block.key) is None
        problems = store.take_problems()
        for path, words in ((first, "another block"), (second, "another"), (third, "bytes"), (fourth, "not encrypted")):
            assert [problem for problem in problems if path.name in problem and words in problem], problems
            assert (tmp_path / "s" / "quarantine" / path.name).exists()
        assert len(problems) == 4
        put_all(store, chain)
        store.flush()
        assert_reads(store, chain[3], "disk")


def test_fields_of_models_that_were_swapped_are_not_believed(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    with KVStore(tmp_path / "s", key=KEY) as store:
        store.register_namespace(OTHER, {"name": "another"})
    one, two = files_of(tmp_path / "s" / "namespaces")
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    (tmp_path / "s" / "kvembed.db").unlink()
    with pytest.warns(StoreWarning, match="is missing"):
        store = KVStore(tmp_path / "s", key=KEY)
    with store:
        assert {fields.get("name") for fields in store.namespaces().values()} == {None}
        assert store.stats().tiers[-1].blocks == 4


# ------------------------------------------------------------------------------------- keys


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in files_of(root) if not path.name.startswith("kvembed.db-")}


@pytest.mark.parametrize("read_only", [None, True])
def test_a_wrong_key_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool | None) -> None:
    filled(tmp_path / "s")
    before = snapshot(tmp_path / "s")
    with pytest.raises(StoreKeyError, match="not the key"):
        KVStore(tmp_path / "s", key=OTHER, read_only=read_only)
    with pytest.raises(StoreKeyError, match="is encrypted: pass key= to KVStore"):
        KVStore(tmp_path / "s", read_only=read_only)
    monkeypatch.setenv("KVEMBED_KEY", key_text(OTHER))
    with pytest.raises(StoreKeyError, match="not the key"):
        KVStore(tmp_path / "s", read_only=read_only)
    assert snapshot(tmp_path / "s") == before


def test_where_a_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = filled(tmp_path / "s")
    held: dict[tuple[str, str], str] = {}
    fake: Any = types.ModuleType("keyring")
    fake.get_password = lambda service, name: held.get((service, name))
    fake.set_password = lambda service, name, text: held.update({(service, name): text})
    monkeypatch.setitem(sys.modules, "keyring", fake)

    def opens(key: Any, env: str | None = None) -> None:
        monkeypatch.setenv("KVEMBED_KEY", env or "")
        with KVStore(tmp_path / "s", key=key, max_cpu_bytes=None) as store:
            assert_reads(store, chain[1], "disk")

    opens(KEY)
    opens(bytearray(KEY))
    opens(lambda: KEY)
    for text in (
        KEY.hex(),
        KEY.hex().upper(),
        base64.b64encode(KEY).decode(),
        base64.urlsafe_b64encode(KEY).decode() + "\n",
    ):
        opens("env", text)
        opens(None, text)
    with pytest.raises(ConfigError, match="holds no key 'default'"):
        opens("keyring")
    held["kvembed", "default"] = key_text(KEY)
    held["kvembed", "work"] = KEY.hex()
    for key in ("keyring", "keyring:work"):
        opens(key)
        opens(None, key)
        opens("env", key)
    with pytest.raises(ConfigError, match="KVEMBED_KEY is not set"):
        opens("env")
    monkeypatch.setenv("KVEMBED_KEY", KEY.hex())
    with KVStore(tmp_path / "plain") as store:  # only where a store is encrypted
        assert not store.encrypted


@pytest.mark.parametrize(
    "key", [b"short", bytes(31), bytes(33), 32, "secret phrase", lambda: "text", lambda: b"short", "ENV", ""]
)
def test_what_is_no_key_is_said_without_showing_it(tmp_path: Path, key: Any) -> None:
    with pytest.raises(ConfigError, match="32 bytes") as caught:
        KVStore(tmp_path / "s", key=key)
    assert "secret" not in str(caught.value)
    assert "short" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["secret phrase", KEY.hex()[:-1], KEY.hex() + "0", "zz" * 32, base64.b64encode(KEY[:-1]).decode()]
)
def test_a_variable_that_holds_no_key_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KVEMBED_KEY", text)
    with pytest.raises(ConfigError, match="KVEMBED_KEY does not hold a key") as caught:
        KVStore(tmp_path / "s", key="env")
    assert text[:8] not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_failing_keyring_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType("keyring")

    def fail(*_: str) -> None:
        raise RuntimeError("no backend")

    fake.get_password = fail
    monkeypatch.setitem(sys.modules, "keyring", fake)
    with pytest.raises(ConfigError, match=r"keyring cannot be read \(RuntimeError: no backend\)"):
        KVStore(tmp_path / "s", key="keyring")
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvembed\[encryption\]'"):
        KVStore(tmp_path / "s", key="keyring")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvembed\[encryption\]'"):
        KVStore(tmp_path / "s", key=KEY)
    monkeypatch.setattr("kvembed._encryption.sealed.AESGCM", types.SimpleNamespace(), raising=False)
    code = "import sys, kvembed; kvembed.KVStore(sys.argv[1]).close(); sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "plain"], timeout=60).returncode == 0


def test_a_store_is_either(tmp_path: Path) -> None:
    chain = filled(tmp_path / "s", None)
    before = snapshot(tmp_path / "s")
    with pytest.raises(StoreKeyError, match="not encrypted, and a store has either"):
        KVStore(tmp_path / "s", key=KEY)
    with pytest.raises(StoreKeyError, match="is not encrypted; open it without a key"):
        KVStore(tmp_path / "s", key=KEY, read_only=True)
    assert snapshot(tmp_path / "s") == before
    with KVStore(tmp_path / "s") as store:
        assert_reads(store, chain[0], "disk")
        store.clear()
    with KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None) as store:  # an empty one becomes encrypted
        assert store.encrypted
        assert store.pins() == {}
        put_all(store, chain)
        store.flush()
        assert_reads(store, chain[0], "disk")
    assert traces(tmp_path / "s", chain) == []
    with pytest.raises(ConfigError, match="key are for blocks on disk"):
        KVStore(key=KEY, max_disk_bytes=None)
    with pytest.raises(StoreReadOnlyError):
        KVStore(tmp_path / "none", key=KEY, read_only=True)


def test_a_lost_marker_is_made_again_with_the_key(tmp_path: Path) -> None:
    chain = filled(tmp_path / "s")
    marker = tmp_path / "s" / "encryption.json"
    for content in (None, b"{}", b"\xff", b'{"format": 7}'):
        if content is not None:
            marker.write_bytes(content)
            with pytest.raises(StoreFormatError, match=r"encryption\.json"):
                KVStore(tmp_path / "s", key=KEY)
        marker.unlink()
        with pytest.raises(StoreKeyError, match=r"whose encryption\.json is missing"):
            KVStore(tmp_path / "s")
        with pytest.raises(StoreKeyError, match="not the key"):
            KVStore(tmp_path / "s", key=OTHER)
        assert not marker.exists()
        # Its catalog was marked with the salt that is lost.
        with pytest.warns(StoreWarning, match="made again"):
            store = KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None)
        with store:
            assert_reads(store, chain[3], "disk")


def test_encrypted_files_where_there_is_no_marker_are_left_alone(tmp_path: Path) -> None:
    chain = filled(tmp_path / "s")
    for path in (tmp_path / "s").glob("*.*"):
        path.unlink()
    with pytest.warns(StoreWarning, match="made again from 0"):
        store = KVStore(tmp_path / "s")
    with store:
        assert store.lookup(keys_of(chain)) == []
        report = store.verify(fix=True)
        assert len(report.problems) == 4
        assert report.fixed == 0
        assert all("can only be read with the key" in problem for problem in report.problems)
        path = files_of(tmp_path / "s" / "blocks")[0]
        assert store._disk is not None
        assert store._disk.open(bytes.fromhex(path.stem)) is None
        assert store.take_problems() == [
            f"{tmp_path / 's'} has encrypted blocks, which are not used: open it with its key"
        ]
    assert len(files_of(tmp_path / "s" / "blocks")) == 4


def test_a_store_that_others_encrypt_meanwhile_is_not_written_to(tmp_path: Path) -> None:
    chain = random_chain(4)
    with KVStore(tmp_path / "s", max_cpu_bytes=None) as early, KVStore(tmp_path / "s", key=KEY) as late:
        put_all(early, chain)
        early.flush()
        assert early.take_problems() == [
            f"the encryption of {tmp_path / 's'} has changed since it was opened: nothing more is read or stored; open "
            "it again"
        ]
        put_all(late, chain)
        late.flush()
        assert len(late.lookup(keys_of(chain))) == 4
    assert traces(tmp_path / "s", chain) == []


def test_a_store_that_was_given_another_key_meanwhile_is_not_judged(tmp_path: Path) -> None:
    chain = filled(tmp_path / "s")
    with KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None) as early:
        path = block_path(early, chain[1])
        os.replace(tmp_path / "s" / "encryption.json", tmp_path / "marker")  # noqa: PTH105
        shutil.copy(tmp_path / "marker", tmp_path / "s" / "encryption.json")
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # as if it had been written with that key
        source = early.open(chain[1].key)
        assert source is None
        assert path.exists()
        assert "changed since it was opened" in early.take_problems()[0]


# ------------------------------------------------------------------------------------- the verbs


def test_forgetting_finds_other_blocks_with_the_same_tokens(tmp_path: Path) -> None:
    chain = random_chain(3, seed=1)
    elsewhere = random_block(ids=list(chain[1].token_ids), salt="other", seed=9)
    with KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None) as store:
        put_all(store, [*chain, elsewhere])
        store.flush()
        paths = [block_path(store, block) for block in chain]
        left = paths[2].with_name(f".{paths[2].stem}.1.ab.tmp")
        left.write_bytes(paths[2].read_bytes())
        os.utime(left, (1e9, 1e9))
        store.discard(chain[2].key, "for a test")
        store._begin_change()
        from kvembed._forget import Eraser

        eraser = Eraser(store)
        eraser.sequence(keys_of(chain))
        report = eraser.report()
        assert report.ok, report
        assert report.elsewhere == 1  # which only decrypting it can tell
        assert report.scanned > 3
        assert not any(path.exists() for path in (*paths, left))
        assert list((tmp_path / "s" / "quarantine").iterdir()) == []
        assert_reads(store, elsewhere, "disk")


def test_exports_are_encrypted_unless_asked_otherwise(tmp_path: Path) -> None:
    chain = filled(tmp_path / "s")
    sealed, plain = tmp_path / "sealed.tar", tmp_path / "plain.tar"
    with KVStore(tmp_path / "s", key=KEY) as store:
        store.export(sealed, "umbrella")
        store.export(plain, "umbrella", plain=True)
    assert chain[0].token_ids.tobytes() in plain.read_bytes()
    assert chain[0].token_ids.tobytes() not in sealed.read_bytes()
    for name, key in (("same", KEY), ("another", OTHER), ("without", None)):
        with KVStore(tmp_path / name, key=key, max_cpu_bytes=None) as store:
            if name != "same":
                with pytest.raises(StoreKeyError, match="encrypted"):
                    store.import_(sealed)
                assert store.import_(sealed, key=KEY).new == 4
                store.clear()
            else:
                assert store.import_(sealed, pin="again").new == 4
                assert traces(tmp_path / name, chain) == []
                store.clear()
            assert store.import_(plain).new == 4
            for block in chain:
                assert_reads(store, block, "disk")
    for at in range(100, sealed.stat().st_size, 211):  # any byte of it
        data = bytearray(sealed.read_bytes())
        data[at] ^= 1
        (tmp_path / "bad.tar").write_bytes(data)
        with KVStore(tmp_path / "bad", key=KEY, max_cpu_bytes=None) as store:
            try:
                store.import_(tmp_path / "bad.tar")
            except (BlockFormatError, StoreKeyError):
                continue
            for block in chain:  # padding of the archive, its dates
                assert_reads(store, block, "disk")
            store.clear()


@pytest.mark.multiprocess
def test_processes_share_an_encrypted_store(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom kvembed import KVStore\nfrom kvembed._testing import *\n"
        "with KVStore(sys.argv[1], key='env') as store:\n"
        "    for seed in (int(sys.argv[2]), 9):\n"
        "        put_all(store, random_chain(5, seed=seed))\n"
        "        forget_memory(store)\n"
        "        for block in random_chain(5, seed=seed):\n"
        "            assert_reads(store, block, 'disk')\n"
        "    assert store.take_problems() == []\n"
    )
    environment = {**os.environ, "KVEMBED_KEY": key_text(KEY)}
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "s")]
    running = [
        subprocess.Popen([*command, str(seed)], env=environment, stderr=subprocess.PIPE, text=True)
        for seed in (1, 2, 3)
    ]
    for process in running:
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0
    with KVStore(tmp_path / "s", key=KEY, max_cpu_bytes=None) as store:
        assert store.verify().problems == ()
        assert store.stats().tiers[-1].blocks == 20
        for seed in (1, 2, 3, 9):
            for block in random_chain(5, seed=seed):
                assert_reads(store, block, "disk")


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_forked_children_use_an_encrypted_store(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom kvembed import KVStore\nfrom kvembed._testing import *\n"
        "with KVStore(sys.argv[1], key=bytes(range(100, 132)), max_cpu_bytes=None) as store:\n"
        "    put_all(store, random_chain(3))\n"
        "    for seed in range(1, 6):\n"
        "        put_all(store, random_chain(3, seed=10 * seed))\n"  # the writer is at work while it forks
        "        if not (pid := os.fork()):\n"
        "            signal.alarm(60)\n"
        "            put_all(store, random_chain(3, seed=seed))\n"
        "            store.flush()\n"
        "            assert_reads(store, random_chain(3, seed=seed)[2], 'disk')\n"
        "            os._exit(0)\n"
        "        assert os.waitpid(pid, 0)[1] == 0\n"
        "    store.flush()\n"
        "    for seed in (*range(6), *range(10, 60, 10)):\n"
        "        for block in random_chain(3, seed=seed):\n"
        "            assert_reads(store, block, 'disk')\n"
        "    assert store.take_problems() == []\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "s"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_new_keys_are_32_bytes_that_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {32}
    assert base64.b64decode(key_text(KEY)) == KEY


def test_a_plain_file_is_what_it_was(tmp_path: Path) -> None:
    block = random_chain(1)[0]
    EncodedBlock(block, "kvembed test", created=1.0).write(tmp_path / "a")
    EncodedBlock(block, "kvembed test", created=1.0, codec=Codec()).write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_block(tmp_path / "a").info == block.info
    with pytest.raises(BlockFormatError, match="not encrypted"):
        open_block(tmp_path / "a", SealedCodec(KEY, b""))
