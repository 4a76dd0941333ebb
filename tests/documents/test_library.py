"""Documents by name: added to, forked, asked in another process without their file, and forgotten without a trace."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import kvembed
from kvembed import CachedModel, ConfigError, KVStore, PromptError
from kvembed._keys import PROBE_TOKENS
from kvembed._paths import documents_file

from .conftest import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvembed import Answer

TEXT = "The lighthouse keeper counts the ships at dusk. " * 6
MORE = "On Monday there were twelve, on Tuesday none. " * 2
QUESTION = "How many ships?"


def plain_reply(model: CachedModel, answer: Answer) -> list[int]:
    """Return what plain transformers answers to the same prompt."""
    prompt = torch.from_numpy(answer.prompt_ids.astype(np.int64))[None]
    new = len(answer.token_ids)
    found = model.hf_model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    return found[0, prompt.shape[1] :].tolist()


def bytes_of_the_file() -> bytes:
    return b"".join(path.read_bytes() for path in documents_file().parent.glob("documents.db*"))


def test_add_computes_only_what_is_new(model: CachedModel) -> None:
    document = model.document(TEXT)
    before = document.tokens
    usage = document.add(MORE)
    assert usage.computed_tokens == document.tokens - before == len(model.tokenizer(MORE + "\n\n")["input_ids"])
    answer = document.ask(QUESTION, max_new_tokens=12)
    assert answer.usage.cached_tokens == document.tokens
    assert answer.token_ids.tolist() == plain_reply(model, answer)
    words = model.tokenizer.decode(answer.prompt_ids.tolist())
    assert f"{TEXT}\n\n{MORE}\n\n{QUESTION}" in words


def test_what_does_not_fit_changes_nothing(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    with KVStore(tmp_path) as store:
        small = tiny_llama(max_position_embeddings=512)
        model = CachedModel(small, tiny_tokenizer, store=store, block_size=BLOCK, progress=False)
        document = model.document(TEXT, name="keeper")
        assert (document.context, document.room) == (512, 512 - document.tokens)
        with pytest.raises(PromptError, match=r"has \d+ tokens, but the model's context is 512: split it into parts"):
            document.add(TEXT)
        with pytest.raises(PromptError, match="about .* tokens"):
            document.add(TEXT * 1000)
        assert len(model.library.open("keeper").prefix_ids) == document.tokens
        assert document.ask(QUESTION, max_new_tokens=2).usage.cached_tokens == document.tokens


def test_a_fork_goes_its_own_way_and_shares_what_it_began_with(model: CachedModel) -> None:
    document = model.document(TEXT, name="keeper")
    fork = document.fork("Tuesday")
    assert fork.usage.computed_tokens == document.tokens, "nothing was computed, and nothing is claimed"
    ids = document.prefix_ids.copy()
    usage = fork.add(MORE)
    assert usage.cached_tokens == document.tokens
    assert np.array_equal(document.prefix_ids, ids)
    for one in (document, fork):
        answer = one.ask(QUESTION, max_new_tokens=8)
        assert answer.token_ids.tolist() == plain_reply(model, answer)
    with pytest.raises(ConfigError, match="already"):
        document.fork("Tuesday")


def test_a_pinned_document_is_pinned_with_what_was_added(model: CachedModel) -> None:
    document = model.document(TEXT, name="keeper", pin=True)
    document.add(MORE)
    model.store.flush()
    model.drop_live()
    model.store.prune(max_bytes=0)
    assert model.library.open("keeper", prefill=False).ask(QUESTION, max_new_tokens=2).usage.cached_tokens > (
        document.tokens - PROBE_TOKENS  # fewer are no block
    )


def test_names_lead_to_documents(model: CachedModel, tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_text(TEXT)
    model.document(path)  # without a name it is in no library
    assert len(model.library) == 0
    assert not documents_file().exists()
    document = model.document(path, name="report")
    (entry,) = model.library
    assert (entry.name, entry.tokens, entry.source) == ("report", document.tokens, str(path))
    assert entry.cached_tokens_by_tier == {"live": document.tokens}
    assert entry.same_model
    model.library.rename("report", "first")
    model.document(TEXT + MORE, name="second")
    with pytest.raises(ConfigError, match="already"):
        model.library.rename("first", "second")
    assert model.library.names() == ["second", "first"]
    assert "first" in model.library
    assert "<td" in model.library._repr_mimebundle_()["text/html"]
    assert "second: " in repr(model.library)
    model.document(MORE, name="second")  # the name is of this text now
    assert len(model.library["second"].prefix_ids) < document.tokens
    model.library.remove("second")
    with pytest.raises(ConfigError, match="no document 'second' in the library; it has 'first'"):
        model.library.open("second")
    if os.name == "posix":
        assert stat.S_IMODE(documents_file().stat().st_mode) == 0o600


def test_an_interrupted_document_goes_on_from_the_library(model: CachedModel) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 3 * BLOCK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.document(TEXT, name="keeper", progress=stop)
    model.drop_live()
    document = model.library.open("keeper")
    assert document.usage.cached_tokens == 3 * BLOCK
    answer = document.ask(QUESTION, max_new_tokens=8)
    assert answer.token_ids.tolist() == plain_reply(model, answer)


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from kvembed import CachedModel, KVStore
with KVStore({store!r}) as store:
    model = CachedModel(AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32),
                        AutoTokenizer.from_pretrained({model!r}), store=store, block_size=16, progress=False)
    answer = model.library.open("keeper").ask({question!r}, max_new_tokens=8)
    print(answer.token_ids.tolist(), answer.usage.computed_tokens)
    model.close()
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_another_process_opens_a_document_without_its_file(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "keeper.txt"
    path.write_text(TEXT)
    hf_model = tiny_llama()
    hf_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    with KVStore(tmp_path / "store") as store:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        model = CachedModel(loaded, tokenizer, store=store, block_size=BLOCK, progress=False)
        answer = model.document(path, name="keeper").ask(QUESTION, max_new_tokens=8)
        model.close()
    path.unlink()
    code = CHILD.format(
        tests=str(Path(kvembed.__file__).parents[1]),
        store=str(tmp_path / "store"),
        model=str(tmp_path / "model"),
        question=QUESTION,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ids, _, computed = done.stdout.strip().rpartition(" ")
    assert ids == str(answer.token_ids.tolist())
    assert int(computed) <= len(answer.prompt_ids) - answer.usage.cached_tokens


@pytest.mark.parametrize("way", ["document", "store", "library", "text"])
def test_forgetting_leaves_no_trace_in_the_file(model: CachedModel, way: str) -> None:
    document = model.document(TEXT, name="the keeper's log", pin=True)
    other = model.document(MORE, name="something else")
    document.ask(QUESTION, max_new_tokens=4)
    held = model.library._known(document.name).row.content
    assert isinstance(held, str)
    # Anything but the end: ids are padded to threes there.
    needles = [held[at : at + 40].encode() for at in range(40, len(held) - 80, 200)]
    assert all(needle in bytes_of_the_file() for needle in needles)
    if way == "store":
        model.store.forget(document)
    else:
        report = {
            "document": document.forget,
            "library": lambda: model.library.forget(document.name),
            "text": lambda: model.forget(TEXT),
        }[way]()
        assert report.ok, report
    assert not any(needle in bytes_of_the_file() for needle in needles)
    assert b"keeper's log" not in bytes_of_the_file()
    assert model.library.names() == [other.name]
    assert document.name not in model.store.pins() or way == "text"


def test_what_goes_on_from_a_forgotten_document_stays_and_is_named(model: CachedModel) -> None:
    document = model.document(TEXT, name="keeper")
    fork = document.fork("longer")
    fork.add(MORE)
    report = document.forget()
    assert report.sharers == ("longer",)
    assert "longer has its words too" in str(report)
    answer = model.library.open("longer").ask(QUESTION, max_new_tokens=6)
    assert answer.token_ids.tolist() == plain_reply(model, answer)


def test_another_salt_or_a_store_in_memory_sees_no_library(
    model: CachedModel, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model.document(TEXT, name="keeper")
    salted = CachedModel(model.hf_model, tiny_tokenizer, store=model.store, cache_salt="other", block_size=BLOCK)
    assert salted.library.names() == []
    with pytest.raises(ConfigError, match="it is empty"):
        salted.library.open("keeper")
    salted.close()
    with KVStore(max_disk_bytes=None) as store:
        memory = CachedModel(tiny_llama(), tiny_tokenizer, store=store, block_size=BLOCK, progress=False)
        memory.document(TEXT, name="fleeting")
        assert memory.library.names() == []
        memory.close()
    assert b"fleeting" not in bytes_of_the_file()


def test_another_model_with_the_tokenizer_computes_the_document_anew(
    model: CachedModel, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model.document(TEXT, name="keeper")
    other = CachedModel(tiny_llama(seed=1), tiny_tokenizer, store=model.store, block_size=BLOCK, progress=False)
    (entry,) = other.library
    assert not entry.same_model
    assert entry.cached_tokens == 0
    answer = other.library.open("keeper").ask(QUESTION, max_new_tokens=8)
    assert answer.token_ids.tolist() == plain_reply(other, answer)
    other.close()


def test_an_encrypted_store_keeps_an_encrypted_library(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    name, ids = "the keeper's secret", b""
    for number in range(2):  # the second time it is another process, as far as the library can tell
        with KVStore(tmp_path / "sealed", key=bytes(range(32))) as store:
            cached = CachedModel(tiny_llama(), tiny_tokenizer, store=store, block_size=BLOCK, progress=False)
            if not number:
                assert name not in cached.library
                cached.document(TEXT, name=name)
            assert name in cached.library
            assert "another" not in cached.library
            document = cached.library.open(name)
            assert document.name == name
            assert document.usage.cached_tokens > 0
            ids = document.prefix_ids.astype("<i4").tobytes()
            cached.close()
    data = bytes_of_the_file()
    assert data
    assert name.encode() not in data
    assert ids
    assert base64.b64encode(ids)[:40] not in data
    with KVStore(tmp_path / "other", key=bytes(32)) as store:  # with another key it is not there
        cached = CachedModel(tiny_llama(), tiny_tokenizer, store=store, block_size=BLOCK, progress=False)
        assert name not in cached.library
        assert cached.library.names() == []
        cached.close()
