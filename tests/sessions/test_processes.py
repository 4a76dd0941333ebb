"""A conversation that goes on in a new process, and one document for several conversations."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvembed import CachedModel, KVStore
from tests.model._lab import environment_of_a_child

from .conftest import BLOCK
from .test_sessions import new_tokens, plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHILD = """
import json, sys
from kvembed import CachedModel, KVStore, SessionDB

folder, store, db, text = sys.argv[1:]
with KVStore(store) as store, SessionDB(db) as db:
    with CachedModel.from_pretrained(folder, store=store, block_size=16, progress=False, dtype="float32") as model:
        session = model.session("trip", db=db)
        reply = session.send(text, max_new_tokens=12)
        print(json.dumps({
            "turns": [turn.user for turn in session.turns], "prompt": reply.prompt_ids.tolist(),
            "ids": reply.token_ids.tolist(), "text": reply.text, "cached": reply.usage.cached_tokens_by_tier,
        }))
"""


@pytest.mark.multiprocess
def test_a_new_process_goes_on(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from kvembed import SessionDB

    folder, store_path, db_path = tmp_path / "model", tmp_path / "store", tmp_path / "sessions.db"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    capfd.readouterr()  # bars of transformers
    with (
        KVStore(store_path) as store,
        SessionDB(db_path) as db,
        CachedModel.from_pretrained(folder, store=store, block_size=BLOCK, progress=False, dtype="float32") as model,
    ):
        session = model.session("trip", system="Be brief.", db=db)
        for text in ("Where do ships sleep?", "And when?"):
            session.send(text, max_new_tokens=12)
        expected = session.prompt_ids("And who wakes them?")
        stream = session._renderer.history(session._branch).stream
        hf_model = model.hf_model
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, *map(str, (folder, store_path, db_path, "And who wakes them?"))],
        capture_output=True,
        text=True,
        env=environment_of_a_child(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["turns"] == ["Where do ships sleep?", "And when?", "And who wakes them?"]
    assert found["prompt"] == expected.tolist()
    # All that was computed before but the last token of the last reply, and what is too short for a block.
    most = len(stream) - 1
    assert most - BLOCK < sum(found["cached"].values()) <= most
    assert set(found["cached"]) == {"disk"}
    import torch

    ids = torch.from_numpy(expected.astype(np.int64))[None]
    result = hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert found["ids"] == result[0, ids.shape[1] :].tolist()
    assert found["text"] == tiny_tokenizer.decode(found["ids"], skip_special_tokens=True)


def test_one_document_of_two_sessions_is_stored_once(model: CachedModel) -> None:
    def blocks() -> set[bytes]:
        model.store.flush()
        disk = model.store._disk
        assert disk is not None
        return {row.info.key for row in disk.catalog.rows()}

    text = "The harbour opens at nine and closes at five. " * 6
    one, two, third = (model.session(name, system=name[0]) for name in ("same one", "same two", "third"))
    first = one.attach(text, name="harbour")
    assert first.cached_tokens == 0
    stored = blocks()
    assert len(stored) in (first.prompt_tokens // BLOCK, first.prompt_tokens // BLOCK + 1)
    usage = two.attach(text, name="harbour")
    assert usage.prompt_tokens == first.prompt_tokens
    assert usage.cached_tokens >= first.prompt_tokens - 1
    assert blocks() == stored
    shared = first.prompt_tokens
    for session in (one, two):
        reply = session.send(f"When, says {session.name}?", max_new_tokens=5)
        assert reply.usage.cached_tokens >= shared - 1
        assert reply.usage.computed_tokens <= new_tokens(model, f"When, says {session.name}?")
        assert reply.token_ids.tolist() == plain(model, reply, 5)
    assert stored <= blocks()
    # Another system message comes before the document: nothing of it can be shared, and the count above could differ.
    before = blocks()
    assert third.attach(text, name="harbour").cached_tokens < BLOCK + 16
    assert len(blocks() - before) >= len(stored) - 2
