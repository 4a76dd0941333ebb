"""Sessions: every turn computes only what is new, and says what plain transformers would."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed import CachedModel, ConfigError, KVStore, PromptError, SessionDB, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvembed import Reply

BLOCK = 16


def plain(model: CachedModel, reply: Reply, new: int) -> list[int]:
    """Return what transformers answers to the same ids."""
    ids = torch.from_numpy(reply.prompt_ids.astype(np.int64))[None]
    hf_model: Any = model.hf_model
    result = hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return result[0, ids.shape[1] :].tolist()


def new_tokens(model: CachedModel, text: str) -> int:
    """Tokens of what the user says and of the template around it, and one more."""
    around = "<|im_end|>\n<|im_start|>user\n" + text + "<|im_end|>\n<|im_start|>assistant\n"
    return len(model.tokenizer(around, add_special_tokens=False)["input_ids"]) + 1


def test_every_turn_computes_only_what_is_new(model: CachedModel) -> None:
    session = model.session("trip", system="Be brief.")
    for number in range(12):
        text = f"Question number {number}?"
        expected = session.preview(text).num_tokens
        reply = session.send(text, max_new_tokens=9)
        assert reply.token_ids.tolist() == plain(model, reply, 9)
        assert reply.usage.cached_tokens == expected
        if number:
            assert reply.usage.computed_tokens <= new_tokens(model, text)
    assert len(session.turns) == 12
    assert session.turns[3].user == "Question number 3?"


def test_another_process_goes_on(model: CachedModel, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    first = model.session("trip", system="Be brief.")
    for text in ("One?", "Two?", "Three?"):
        first.send(text, max_new_tokens=9)
    turns, ids = first.turns, first.prompt_ids("Four?")
    model.close()
    with KVStore(tmp_path / "store") as store:
        again = CachedModel(tiny_llama(), model.tokenizer, store=store, block_size=BLOCK, progress=False)
        session = again.session("trip")
        assert session.system == "Be brief."
        assert session.turns == turns
        assert np.array_equal(session.prompt_ids("Four?"), ids)
        reply = session.send("Four?", max_new_tokens=9)
        assert reply.token_ids.tolist() == plain(again, reply, 9)
        assert reply.usage.computed_tokens <= new_tokens(again, "Four?") + 8  # the last tail may be too short to store
        again.close()


def test_two_objects_of_one_session_see_each_other(model: CachedModel) -> None:
    one, two = model.session("shared"), model.session("shared")
    one.send("First", max_new_tokens=4)
    two.send("Second", max_new_tokens=4)
    assert [turn.user for turn in one.turns] == ["First", "Second"]


def test_a_reply_that_tokenises_differently_is_reused(model: CachedModel) -> None:
    # The byte tokenizer cannot show bytes that are no text: such a reply decodes to a mark, which encodes otherwise.
    session = model.session("bytes")
    reply = session.send("Hello", max_new_tokens=24)
    again = model.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
    assert again != reply.token_ids.tolist()
    following = session.send("More", max_new_tokens=5)
    assert following.prompt_ids[: len(reply.prompt_ids) + 24].tolist() == [*reply.prompt_ids, *reply.token_ids]
    assert following.usage.computed_tokens <= new_tokens(model, "More")


def test_stopping_keeps_what_was_said(model: CachedModel) -> None:
    session = model.session("stopped")
    letter, space = model.tokenizer("a ", add_special_tokens=False)["input_ids"]
    # Words, because a streamer passes text on at the end of each.
    words = {"prefix_allowed_tokens_fn": lambda _, ids: [space if len(ids) % 3 == 0 else letter]}
    whole = session.send("Tell me", max_new_tokens=300, **words).text
    session.undo()
    stream = session.stream("Tell me", max_new_tokens=300, **words)
    pieces = [next(stream), next(stream)]
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    said = session.turns[-1].reply
    assert said is not None
    assert said.startswith("".join(pieces))
    assert whole.startswith(said)
    assert len(said) < len(whole)
    assert session.last is not None
    assert not session.last.finished
    following = session.send("Go on", max_new_tokens=4)
    assert following.usage.computed_tokens <= new_tokens(model, "Go on") + 1


def test_streaming_says_the_same(model: CachedModel) -> None:
    session = model.session("streams")
    text = "".join(session.stream("Hello", max_new_tokens=12))
    assert session.last is not None
    assert session.last.text == session.turns[0].reply
    assert session.last.token_ids.tolist() == plain(model, session.last, 12)
    assert text.strip() == session.last.text.strip()


def test_regenerate_edit_delete_and_undo(model: CachedModel) -> None:
    session = model.session("changes")
    for text in ("One", "Two", "Three"):
        session.send(text, max_new_tokens=6)
    before = session.turns
    torch.manual_seed(3)
    session.regenerate(max_new_tokens=6, do_sample=True)
    assert [turn.user for turn in session.turns] == ["One", "Two", "Three"]
    assert session.undo()
    assert session.turns == before

    shown = session.preview("Zwei", turn=1).num_tokens
    reply = session.edit(1, "Zwei", max_new_tokens=6)
    assert reply.usage.cached_tokens == shown > 0
    assert [turn.user for turn in session.turns] == ["One", "Zwei"]
    assert session.undo()
    assert session.turns == before

    session.delete(0)
    assert [turn.user for turn in session.turns] == ["Two", "Three"]
    reply = session.send("Four", max_new_tokens=6)
    assert reply.token_ids.tolist() == plain(model, reply, 6)
    assert session.undo()
    assert session.undo()
    assert session.turns == before
    with pytest.raises(ConfigError, match="no turn 7"):
        session.edit(7, "x")


def test_undo_to_the_beginning(model: CachedModel) -> None:
    session = model.session("undo")
    session.send("One", max_new_tokens=3)
    assert session.undo()
    assert session.turns == []
    assert not session.undo()


def test_forks_share_what_they_have_in_common(model: CachedModel) -> None:
    session = model.session("trunk")
    session.send("A question that is long enough to fill some blocks", max_new_tokens=8)
    branch = session.fork("branch")
    assert branch.turns == session.turns
    reply = branch.send("Left", max_new_tokens=4)
    assert reply.usage.computed_tokens <= new_tokens(model, "Left")
    reply = session.send("Right", max_new_tokens=4)
    assert reply.usage.computed_tokens <= new_tokens(model, "Right")
    assert [turn.user for turn in branch.turns][1:] == ["Left"]
    assert [turn.user for turn in session.turns][1:] == ["Right"]
    with pytest.raises(ConfigError, match="already"):
        session.fork("branch")


def test_documents_are_shared_by_sessions(model: CachedModel) -> None:
    text = "The harbour opens at nine and closes at five. " * 6
    one, two = model.session("one", system="S"), model.session("two", system="S")
    one.attach(text, name="harbour")
    usage = two.attach(text, name="harbour")
    assert usage.computed_tokens <= 1
    first = one.send("When?", max_new_tokens=5)
    assert first.usage.computed_tokens <= new_tokens(model, "When?")
    assert first.token_ids.tolist() == plain(model, first, 5)
    assert two.send("Where?", max_new_tokens=5).usage.computed_tokens <= new_tokens(model, "Where?")
    document = model.document(text, system="S")
    assert document.usage.computed_tokens <= 1
    assert one.documents == ["harbour"]
    # And in the middle of a conversation.
    later = one.attach("Another text, about ships. " * 4)
    assert later.cached_tokens >= len(first.prompt_ids)
    reply = one.send("And?", max_new_tokens=5)
    assert reply.token_ids.tolist() == plain(model, reply, 5)
    assert reply.usage.computed_tokens <= new_tokens(model, "And?")
    assert model.store.stats().pins > 0


def test_a_template_that_strips_thinking(model: CachedModel, tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}"
    )
    cached = CachedModel(model.hf_model, tokenizer, store=model.store, block_size=BLOCK, progress=False)
    session = cached.session("thinks")
    session.send("Hello", max_new_tokens=6)
    # As if the model had thought: the message says so, its ids are those of the whole.
    from dataclasses import replace

    branch = session._branch
    thought = "<think>well</think>Hi"
    ids = np.asarray(tokenizer(thought, add_special_tokens=False)["input_ids"], dtype="<i4")
    kept = replace(
        branch[-1], content=thought, token_ids=ids.tobytes(), ids_rest=branch[-1].ids_rest[: -6 * 4] + ids.tobytes()
    )
    session._db.add("thinks", [kept], branch[-2].id)
    session.send("Next", max_new_tokens=6)
    prompt = session.prompt_ids("Last")
    text = tokenizer.decode(prompt.tolist(), skip_special_tokens=False)
    assert "well" not in text
    assert "Hi<|im_end|>" in text
    reply = session.send("Last", max_new_tokens=6)
    assert reply.token_ids.tolist() == plain(cached, reply, 6)
    cached.close()


def test_a_full_context(model: CachedModel) -> None:
    hf_model: Any = model.hf_model
    hf_model.config.max_position_embeddings = 120
    refusing = model.session("refuses")
    refusing.send("a" * 20, max_new_tokens=8)
    with pytest.raises(PromptError, match="oldest turns"):
        refusing.send("b" * 60, max_new_tokens=8)
    assert len(refusing.turns) == 1
    dropping = model.session("drops", when_full="drop")
    dropping.send("a" * 20, max_new_tokens=8)
    reply = dropping.send("b" * 60, max_new_tokens=8)
    assert reply.dropped_turns == 1
    assert reply.token_ids.tolist() == plain(model, reply, 8)
    with pytest.raises(PromptError, match="alone does not fit"):
        dropping.send("c" * 200, max_new_tokens=8)


def test_settings_and_export(model: CachedModel) -> None:
    session = model.session("kept", system="Be kind.", settings={"repetition_penalty": 1.2})
    session.set_settings(max_new_tokens=None, top_k=5)
    assert model.session("kept").settings == {"repetition_penalty": 1.2, "top_k": 5}
    session.send("Hello *there*", max_new_tokens=5)
    assert "Hello *there*" in session.export("md")
    found = json.loads(session.export("json"))
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    assert found["system"] == "Be kind."
    with pytest.raises(ConfigError, match="md"):
        session.export("pdf")
    with pytest.raises(ConfigError, match="another system message"):
        model.session("kept", system="Be rude.")
    session.rename("renamed")
    assert model.session("renamed").turns == session.turns
    assert repr(session).startswith("<Session 'renamed': 1 turns")


def test_why_it_missed(model: CachedModel) -> None:
    session = model.session("why")
    session.send("A long enough first message", max_new_tokens=8)
    assert session.explain("Next").kind in ("hit", "diverged")
    assert "nothing to send" in _error(lambda: session.send("  "))


def _error(call: Callable[[], object]) -> str:
    with pytest.raises(PromptError) as raised:
        call()
    return str(raised.value)


# --- the file of sessions ------------------------------------------------------------------------------


def test_the_file_is_private_and_searchable(model: CachedModel, tmp_path: Path) -> None:
    db = SessionDB(tmp_path / "data" / "sessions.db")
    session = model.session("harbour trip", db=db)
    session.send("Where do the ships sleep?", max_new_tokens=4)
    model.session("other", db=db).send("Unrelated", max_new_tokens=4)
    assert stat.S_IMODE(db.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(db.path.parent.stat().st_mode) == 0o700
    assert [name for name, _ in db.search("ships sleep")] == ["harbour trip"]
    assert [name for name, _ in db.search("harbour")] == ["harbour trip"]
    assert db.search('"odd OR syntax') == []
    assert [info.name for info in db.sessions()] == ["other", "harbour trip"]
    db.close()


def test_a_removed_session_leaves_nothing_behind(model: CachedModel, tmp_path: Path) -> None:
    db = SessionDB(tmp_path / "sessions.db")
    session = model.session("secret", db=db)
    session.send("The password is swordfish", max_new_tokens=4)
    kept = session.fork("kept")
    assert db.remove("secret") == 0  # all of it is the fork's too
    assert kept.turns[0].user == "The password is swordfish"
    assert db.remove("kept") == 2
    db.close()
    files = [path for path in tmp_path.iterdir() if path.name.startswith("sessions.db")]
    assert not any(b"swordfish" in path.read_bytes() for path in files)


def test_files_that_are_none(tmp_path: Path) -> None:
    bad = tmp_path / "bad.db"
    bad.write_bytes(b"this is no database, but long enough to be looked at" * 40)
    with pytest.raises(StoreError, match="cannot be used"):
        SessionDB(bad)
    newer = tmp_path / "newer.db"
    db = SessionDB(newer)
    db._db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="newer kvembed"):
        SessionDB(newer)
