"""The list of sessions: hiding and bringing back, what they begin with, files of older versions; without a model."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvembed import CachedModel, ConfigError, SessionDB
from kvembed._schema import statements
from kvembed._sessions import schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def db(tmp_path: Path) -> Iterator[SessionDB]:
    with SessionDB(tmp_path / "sessions.db") as db:
        yield db


def names(db: SessionDB) -> list[str]:
    return [info.name for info in db.sessions()]


def test_listing_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, kvembed; db = kvembed.SessionDB(sys.argv[1]); db.open('trip'); "
        "print([info.name for info in db.sessions()], 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "s.db"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['trip'] False False"


def test_hidden_sessions_come_back(model: CachedModel, db: SessionDB) -> None:
    session = model.session("trip", db=db)
    session.send("Where do the ships sleep?", max_new_tokens=4)
    turns = session.turns
    db.hide("trip")
    assert names(db) == []
    assert db.search("ships") == []
    assert [info.name for info in db.hidden()] == ["trip"]
    with pytest.raises(ConfigError, match="no session 'trip'"):
        session.send("More")
    assert db.unhide("trip").name == "trip"
    assert names(db) == ["trip"]
    assert [name for name, _ in db.search("ships")] == ["trip"]
    assert session.turns == turns
    with pytest.raises(ConfigError, match="no hidden session"):
        db.unhide("trip")


def test_the_name_of_a_hidden_session_can_be_taken(model: CachedModel, db: SessionDB) -> None:
    model.session("trip", system="One", db=db).send("First", max_new_tokens=3)
    db.hide("trip")
    assert model.session("trip", system="Two", db=db).turns == []
    db.hide("trip")
    model.session("trip", system="Three", db=db)
    assert [info.system for info in db.hidden()] == ["Two", "One"]
    back = db.unhide("trip")
    assert (back.name, back.system) == ("trip (2)", "Two")
    back = db.unhide("trip")
    assert (back.name, back.system) == ("trip (3)", "One")
    assert [turn.user for turn in model.session("trip (3)", db=db).turns] == ["First"]


def test_purging_leaves_no_bytes(model: CachedModel, db: SessionDB) -> None:
    model.session("secret", db=db).send("The password is swordfish " * 40, max_new_tokens=4)
    model.session("kept", db=db).send("Nothing to hide", max_new_tokens=4)
    db.hide("secret")
    assert b"swordfish" in _bytes(db)
    assert db.purge("another") == 0
    assert b"swordfish" in _bytes(db)
    assert db.purge() == 2
    assert db.hidden() == []
    assert b"swordfish" not in _bytes(db)
    assert b"Nothing to hide" in _bytes(db)


def _bytes(db: SessionDB) -> bytes:
    return b"".join(path.read_bytes() for path in db.path.parent.glob(f"{db.path.name}*"))


def test_another_system_message(model: CachedModel, db: SessionDB) -> None:
    session = model.session("trip", system="Be brief.", db=db)
    session.send("One?", max_new_tokens=5)
    before = session.prompt_ids("Two?")
    found = session.set_system("Be long, and take your time.")
    assert session.system == "Be long, and take your time."
    assert found.num_tokens < 20 < found.prompt_tokens  # only what the template puts before the system message
    assert "take your time" in model.tokenizer.decode(session.prompt_ids("Two?"))
    session.send("Two?", max_new_tokens=5)
    assert session.preview("Three?").num_tokens > found.prompt_tokens - 20
    assert model.session("trip", db=db).system == "Be long, and take your time."
    assert session.undo()  # the second turn
    assert session.undo()  # the system message
    assert session.system == "Be brief."
    assert np.array_equal(session.prompt_ids("Two?"), before)
    assert session.preview("Two?").num_tokens > 20  # and its KV is still there
    assert session.set_system("Be brief.").num_tokens > 20  # no change
    assert session.set_system(None).prompt_tokens < found.prompt_tokens


def test_settings_are_kept(model: CachedModel, db: SessionDB) -> None:
    session = model.session("kept", db=db, template_kwargs={"enable_thinking": False})
    session.set_settings(max_new_tokens=3, top_k=5)
    assert len(session.send("Hello").token_ids) == 3
    assert len(session.send("Hello", max_new_tokens=4).token_ids) == 4
    again = model.session("kept", db=db)
    assert again.settings == {"max_new_tokens": 3, "top_k": 5}
    assert db.info("kept").template == {"enable_thinking": False}
    assert db.info(again.fork("other").name).template == {"enable_thinking": False}
    again.set_settings(top_k=None)
    session.send("Once more")
    assert session.settings == {"max_new_tokens": 3}
    with pytest.raises(ConfigError, match="numbers, words"):
        session.set_settings(streamer=object())


def test_preview_never_waits_for_a_reply(model: CachedModel) -> None:
    session = model.session("busy")
    session.send("Hello", max_new_tokens=4)
    inside, go_on = threading.Event(), threading.Event()

    def hold(_: int, ids: object) -> list[int]:
        inside.set()
        assert go_on.wait(60)
        return [65]

    worker = threading.Thread(
        target=lambda: session.send("Slow", max_new_tokens=3, prefix_allowed_tokens_fn=hold), daemon=True
    )
    worker.start()
    try:
        assert inside.wait(60)
        # In this thread: were it to wait for the model, the test would never end.
        assert session.preview("Next", wait=False) is None
        assert [turn.user for turn in session.turns] == ["Hello"]
        assert session.export().startswith("# busy")
    finally:
        go_on.set()
        worker.join()
    assert [turn.user for turn in session.turns] == ["Hello", "Slow"]
    found = session.preview("Next", wait=False)
    assert found is not None
    assert found.num_tokens > 0
    assert session.preview("", turn=1).num_tokens > 0


def test_a_file_of_the_second_version(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    old = sqlite3.connect(path)
    for script in (schema._V1, schema._V2):
        for statement in statements(script):
            old.execute(statement)
    old.execute("PRAGMA user_version = 2")
    for role, meta in (("user", {}), ("assistant", {"tokenizer": "ab12", "finished": "end"})):
        values = (role, "Hello", json.dumps(meta), 1.0)
        old.execute("INSERT INTO messages (role, content, meta, created) VALUES (?, ?, ?, ?)", values)
    old.execute("UPDATE messages SET parent = 1 WHERE id = 2")
    old.commit()
    old.close()
    with SessionDB(path) as db:
        found = [(message.tokenizer, message.meta) for message in db.branch(2)]
    assert found == [("", {}), ("ab12", {"finished": "end"})]


def test_a_file_of_the_first_version(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    old = sqlite3.connect(path)
    old.executescript(schema._V1)
    old.execute("PRAGMA user_version = 1")
    old.execute("INSERT INTO messages (id, role, content, created) VALUES (7, 'user', 'Hello', 1.0)")
    values = "(3, 'trip', 'Be kind.', '{\"top_k\": 5}', 7, 1.0, 2.0)"
    old.execute(f"INSERT INTO sessions (id, name, system, settings, head, created, updated) VALUES {values}")
    old.execute("INSERT INTO moves (session, head) VALUES (3, NULL)")
    old.commit()
    old.close()
    for _ in range(2):  # the second time there is nothing to do
        with SessionDB(path) as db:
            info = db.info("trip")
            assert (info.system, info.settings, info.head) == ("Be kind.", {"top_k": 5}, 7)
            assert (info.template, info.date, info.hidden) == ({}, None, None)
            assert [message.content for message in db.branch(7)] == ["Hello"]
            assert [name for name, _ in db.search("hello")] == ["trip"]
    with SessionDB(path) as db:
        assert db.undo("trip")
        assert (db.info("trip").system, db.info("trip").head) == ("Be kind.", None)
        assert db.remove("trip") == 1
