"""What a store leaves in its folder: modes, and no word of a prompt outside of block files."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvembed import CachedModel, KVEmbedError, KVStore
from kvembed._prompt import context_length
from kvembed._rebuild import rebuild
from kvembed._testing import FINGERPRINT, block_path, put_all, random_chain

if TYPE_CHECKING:
    from collections.abc import Iterator

POSIX = pytest.mark.skipif(os.name == "nt", reason="modes are a POSIX matter")


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def open_to_others(root: Path) -> list[str]:
    """Return what below ``root`` has any right for group or others, or a wrong mode."""
    wrong = []
    for path in [root, *root.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE(path.lstat().st_mode)
            if mode != (0o700 if path.is_dir() else 0o600):
                wrong.append(f"{path.relative_to(root)} {mode:o}")
    return wrong


@POSIX
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_every_file_and_folder_is_private(tmp_path: Path, mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "above" / "store"
    chain = random_chain(6)
    wrong: list[str] = []
    plain_replace = Path.replace

    def replace(self: Path, target: Any) -> Any:
        # Just before a rename the temporary file has its content.
        wrong.extend(open_to_others(tmp_path / "above"))
        return plain_replace(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with umask(mask):
        with KVStore(root, max_cpu_bytes=None) as store:
            store.register_namespace(FINGERPRINT, {"name": "tiny"})
            put_all(store, chain[:3])
            store.pin([chain[0].key], "doc")
            store.flush()
            store.discard(chain[2].key, "test")
            wrong += open_to_others(tmp_path / "above")
            assert (root / "kvembed.db-wal").exists()
            # A folder deleted under an open store is made again, and what is above it too.
            shutil.rmtree(root / "blocks")
            put_all(store, chain[3:])
            store.flush()
            assert block_path(store, chain[3]).exists()
            wrong += open_to_others(tmp_path / "above")
            store.verify(fix=True)
        (root / "kvembed.db").write_bytes(b"no database")
        with pytest.warns(UserWarning, match="made again"):
            KVStore(root).close()
        with KVStore(root) as store:
            assert store._catalog is not None
            import sqlite3

            store._catalog.note_damage(sqlite3.DatabaseError("malformed"))
        wrong += open_to_others(tmp_path / "above")
        rebuild(root)
        wrong += open_to_others(tmp_path / "above")
    assert wrong == []
    names = {path.name.split(".")[0] for path in root.rglob("*")}
    assert {"quarantine", "namespaces", "blocks", "kvembed"} <= names


# ------------------------------------------------------------------------------------- no prompt text

WORDS = "Zanzibar quokkas whistle marmalade overtures beneath phosphorescent umbrellas. "
TEXT = WORDS * 6


def needles(tokenizer: Any) -> dict[str, bytes]:
    """Return what must not be found: words as text, and runs of four of the text's ids as int32 and int64."""
    ids = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    found = {word: word.encode() for word in WORDS.replace(".", "").split()}
    for at in range(0, len(ids) - 4, 3):
        part = ids[at : at + 4]
        found[f"int32 {part}"] = np.asarray(part, "<i4").tobytes()
        found[f"int64 {part}"] = np.asarray(part, "<i8").tobytes()
        found[f"json {part}"] = ", ".join(map(str, part)).encode()
        found[f"compact json {part}"] = ",".join(map(str, part)).encode()
    return found


def found_in(data: bytes, wanted: dict[str, bytes]) -> list[str]:
    lowered = data.lower()
    return [name for name, needle in wanted.items() if needle in data or needle.lower() in lowered]


@pytest.fixture(scope="module")
def model(tiny_llama: Any) -> Any:
    return tiny_llama()


def use_everything(cached: CachedModel) -> None:
    """Do with a text what can be done, what goes wrong included."""
    document = cached.document(TEXT, pin=True)
    document.ask(f"Do {WORDS} again?", max_new_tokens=4)
    repr(document)
    cached.lookup(TEXT)
    cached.explain(TEXT)
    cached.score(TEXT, [WORDS])
    list(cached.stream(TEXT, max_new_tokens=2))
    cached.drop_live()
    store = cached.store
    store.flush()
    assert store._cpu is not None
    store._cpu.clear()
    disk = store._disk
    assert disk is not None
    # Damage: warnings, quarantine, problems.
    for path in sorted((disk.root / "blocks").rglob("*.safetensors"))[:3]:
        data = bytearray(path.read_bytes())
        data[-30] ^= 1
        path.write_bytes(data)
    cached.prefill(TEXT)
    store.flush()
    store.verify(fix=True)
    for entry in store.ls():
        str(entry)
    store.stats()
    store.prune(max_bytes="8KiB")


def test_no_prompt_text_outside_of_block_files(
    model: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wanted = needles(tiny_tokenizer)
    with warnings.catch_warnings(record=True) as caught, KVStore(tmp_path / "store") as store:
        warnings.simplefilter("always")
        cached = CachedModel(model, tiny_tokenizer, store=store, block_size=16, progress=False)
        use_everything(cached)
        cached.close()
        problems = " ".join(store.take_problems())
        said = [str(w.message) for w in caught] + [record.getMessage() for record in caplog.records] + [problems]
        assert said
        assert store.pins()  # the document's name is in the catalog, and is no text
        assert found_in(" ".join([*said, *store.pins()]).encode(), wanted) == []
        seen = set[str]()
        for path in (tmp_path / "store").rglob("*"):
            assert found_in(str(path.relative_to(tmp_path)).encode(), wanted) == []
            if path.is_file() and not path.name.endswith(".safetensors"):
                seen.add(path.name)
                assert found_in(path.read_bytes(), wanted) == [], path
        assert {"kvembed.db", "kvembed.db-wal"} <= seen
        assert any(name.endswith(".reason.txt") for name in seen)
    assert found_in((tmp_path / "store" / "kvembed.db").read_bytes(), wanted) == []


def test_the_scan_would_find_text_and_ids(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    wanted = needles(tiny_tokenizer)
    with KVStore(tmp_path / "store") as store:
        cached = CachedModel(model, tiny_tokenizer, store=store, block_size=16, progress=False)
        # A name the user chose is kept as it is.
        cached.document(TEXT, name="quokkas", pin=True)
        cached.close()
        store.flush()
        files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
        assert any(found_in(path.read_bytes(), wanted) == ["quokkas"] for path in files if "kvembed.db" in path.name)
        # Block files hold the ids: SECURITY.md says so.
        blocks = [path.read_bytes() for path in files if path.name.endswith(".safetensors")]
        assert any(name.startswith("int32") for data in blocks for name in found_in(data, wanted))
        assert not any(word in data for data in blocks for word in (b"Zanzibar", b"quokkas"))


def failures(cached: CachedModel, folder: Path) -> Iterator[Any]:
    """Yield calls that raise, each with the text at hand."""
    limit = context_length(cached.hf_model) or 0
    long = WORDS * (limit // len(WORDS) + 2)
    yield lambda: cached.prefill(long)
    yield lambda: cached.document(long)
    yield lambda: cached.lookup({"role": "user", "content": WORDS, "input_ids": [[1, 2], [3, 4]]})
    yield lambda: cached.prefill([WORDS, 1.5])
    yield lambda: cached.document(TEXT, prefill=False).ask("  ")
    yield lambda: cached.document(TEXT, prefill=False).ask(long)
    yield lambda: cached.score(WORDS, [WORDS, ""])
    yield lambda: cached.document(TEXT, pin=True, prefill=False)
    yield lambda: cached.store.forget(cached.document(TEXT, prefill=False).name)
    yield lambda: cached.store.pin("ffffffffffff")
    file = folder / "binary.txt"
    file.write_bytes(WORDS.encode() + b"\0\xff")
    yield lambda: cached.document(file)
    cached.store.close()
    yield lambda: cached.store.lookup([bytes(32)])


def test_no_prompt_text_in_exceptions(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    wanted = needles(tiny_tokenizer)
    cached = CachedModel(model, tiny_tokenizer, store=KVStore(tmp_path / "store"), block_size=16, progress=False)
    count = 0
    for call in failures(cached, tmp_path):
        with pytest.raises((KVEmbedError, ValueError)) as caught:
            call()
        error: BaseException | None = caught.value
        while error is not None:
            assert found_in(f"{error} {error.args!r}".encode(), wanted) == [], error
            # What a traceback shows without being asked: the cause, unless it was cut off on purpose.
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        count += 1
    assert count == 12
    gc.collect()
