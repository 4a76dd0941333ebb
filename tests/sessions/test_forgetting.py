"""Forgetting a conversation: its words, in every byte of the file, and what other sessions keep."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvembed import CachedModel, ConfigError, KVStore, SessionDB
from kvembed._sessions.messages import message_now

from .test_sessions import plain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


LETTER = "".join(f"Paragraph {n}: the lighthouse keeper counts {n * n} gulls. " for n in range(400))


@pytest.fixture
def db(tmp_path: Path) -> Iterator[SessionDB]:
    with SessionDB(tmp_path / "data" / "sessions.db") as db:
        yield db


def raw_bytes(db: SessionDB) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in db.path.parent.iterdir() if not path.name.endswith("-shm")}


def found(db: SessionDB, words: list[str]) -> list[str]:
    return [word for word in words for data in raw_bytes(db).values() if word.encode() in data]


def test_nothing_of_a_forgotten_session_is_left_in_any_byte(model: CachedModel, db: SessionDB) -> None:
    session, other = (
        model.session(name, system=system, db=db)
        for name, system in (("smugglers", "You are a harbour clerk."), ("other", "Be kind."))
    )
    other.send("Hi", max_new_tokens=4)
    session.attach(LETTER[:1200], name="letter", pin=False)
    head = db.info("smugglers").head
    db.add("smugglers", [message_now("user", LETTER)], head)  # over many pages, on a branch that was left
    db.move("smugglers", head)
    session.send("Where is the contraband?", max_new_tokens=6)
    session.regenerate(max_new_tokens=6, do_sample=True)
    session.send("Hi", max_new_tokens=4)
    session.send("Über das Märchenschloß, bitte", max_new_tokens=6)
    session.edit(1, "Quite different: watchtowers", max_new_tokens=6)
    session.set_system("You are a watchmaker.")
    session.send("Springs", max_new_tokens=3)
    turns = other.turns
    stored = len(db._db.execute("SELECT id FROM messages").fetchall())
    words = [
        *("contraband", "harbour clerk", "watchmaker", "Märchen", "marchen", "watchtowers", "smugglers", "Springs"),
        *(LETTER[at : at + 40] for at in range(0, len(LETTER) - 40, 40)),
    ]
    assert {*found(db, words)} >= {"contraband", "harbour clerk", LETTER[:40]}  # or the scan could not fail
    report = session.forget()
    assert report.ok, str(report)
    assert (report.messages, report.messages_kept, report.sharers) == (stored - 2, 0, ())
    assert report.blocks > 0
    assert report.scanned > 2
    assert found(db, words) == []
    assert db.search("contraband") == []
    assert other.turns == turns
    assert [name for name, _ in db.search("hi")] == ["other"]
    with pytest.raises(ConfigError, match="no session 'smugglers'"):
        session.send("Still there?")
    with pytest.raises(ConfigError, match="no session"):
        session.forget()
    assert model.session("smugglers", db=db).turns == []


@pytest.mark.parametrize("text", ["Hi", "contraband", LETTER])
@pytest.mark.parametrize("left", ["words", "index"])
def test_the_scan_finds_what_is_left(
    model: CachedModel, db: SessionDB, monkeypatch: pytest.MonkeyPatch, text: str, left: str
) -> None:
    model.session("other", db=db).send("Hi", max_new_tokens=3)
    session = model.session("s", db=db)
    db.add("s", [message_now("user", text)], None)
    if left == "words":
        # Rows are taken off their page, but not wiped, and nothing is written anew.
        monkeypatch.setattr("kvembed._sessions.db.scrub", lambda _: None)
        db._db.execute("PRAGMA secure_delete = OFF")
    elif text != "Hi":  # words that others have too are no trace
        db._db.execute("CREATE TABLE leftover AS SELECT lower(content) AS x FROM messages")
    report = session.forget()
    assert report.messages == 1
    if (left, text) == ("index", "Hi"):
        assert report.ok
    else:
        assert not report.ok
        assert any(trace.startswith("sessions.db") and trace.endswith("words") for trace in report.traces)
        assert "traces are left" in str(report)


def test_a_reader_that_keeps_the_log_is_reported(model: CachedModel, db: SessionDB) -> None:
    session = model.session("s", db=db)
    session.send("Where is the contraband?", max_new_tokens=3)
    db._db.execute("PRAGMA busy_timeout = 20")
    with closing(sqlite3.connect(db.path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM messages").fetchone()
        report = session.forget()
        assert not report.ok
        assert found(db, ["contraband"]) != []
    model.session("s", db=db).send("Anything", max_new_tokens=3)
    assert model.session("s", db=db).forget().ok
    assert found(db, ["contraband"]) == []


def test_forks_keep_what_they_share(model: CachedModel, db: SessionDB) -> None:
    session = model.session("trunk", system="Shared by both.", db=db)
    session.send("A question that both have", max_new_tokens=6)
    fork, hidden = session.fork("fork"), session.fork("hidden one")
    hidden.send("Which is hidden", max_new_tokens=4)
    db.hide("hidden one")
    session.send("What only the trunk was asked", max_new_tokens=6)
    fork.send("What only the fork was asked", max_new_tokens=6)
    turns = fork.turns
    report = session.forget()
    assert report.ok, str(report)
    assert (report.messages, report.messages_kept, report.sharers) == (2, 2, ("fork", "hidden one"))
    assert "2 messages kept, which fork, hidden one have too" in str(report)
    assert report.to_dict()["sharers"] == ["fork", "hidden one"]
    assert found(db, ["only the trunk"]) == []
    assert fork.turns == turns
    reply = fork.send("Go on", max_new_tokens=6)
    assert reply.token_ids.tolist() == plain(model, reply, 6)
    assert db.unhide("hidden one").name == "hidden one"
    assert [turn.user for turn in hidden.turns] == ["A question that both have", "Which is hidden"]
    assert fork.forget().messages == 4
    assert found(db, ["What only the fork"]) == []


def test_only_the_kv(model: CachedModel, db: SessionDB) -> None:
    session = model.session("s", db=db)
    session.send("A question long enough for some blocks", max_new_tokens=20)
    turns = session.turns
    assert session.preview("Next").num_tokens > 0
    for report in (session.forget(words=False), model.forget(session, words=False)):
        assert report.ok
        assert report.messages == 0
    assert session.preview("Next").num_tokens == 0
    assert session.turns == turns
    reply = session.send("Next", max_new_tokens=5)
    assert reply.usage.cached_tokens == 0
    assert reply.token_ids.tolist() == plain(model, reply, 5)


def test_every_way_to_name_it(model: CachedModel, db: SessionDB) -> None:
    one, two = (model.session(name, db=db) for name in ("one", "two"))
    for session in (one, two):
        session.send("Where is the contraband?", max_new_tokens=20)
    with KVStore(max_disk_bytes=None) as elsewhere, pytest.raises(ConfigError, match="another store"):
        elsewhere.forget(one)
    other = CachedModel(model.hf_model, model.tokenizer, store=model.store, progress=False)
    with other, pytest.raises(ConfigError, match="another model"):
        other.forget(one)
    assert model.store.forget(one) > 0
    assert model.forget(two).messages == 2
    assert db.sessions() == []
    assert found(db, ["contraband"]) == []
