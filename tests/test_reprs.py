"""What notebooks show: every object in both forms, hostile texts, and the prompt coloured by tier."""

from __future__ import annotations

import json
import pickle
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import CachedModel, KVStore, SessionDB, Usage
from kvembed._keys import chain_keys
from kvembed._prompt import decoder
from kvembed._prompt_view import prompt_view
from kvembed._spans import as_spans, tiers_of

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 16
HOSTILE = "<script>alert(1)</script></div> & \"quoted\" 'too' \u202eleft\u202c שלום \x1b[31mred\x1b[0m "
ALLOWED = {"div", "span", "table", "tr", "th", "td", "pre", "details", "summary"}


class Page(HTMLParser):
    """Reads markup as a front end would: text, tags in order, and no attribute but an inline style."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.text = ""
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED, tag
        assert {name for name, _ in attrs} <= {"style"}, attrs
        for _, style in attrs:
            # Colours of one theme would be unreadable in the other, and addresses would be fetched.
            assert style is not None
            assert not any(word in style for word in ("#", ":black", ":white", "url(", "expression")), style
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def model(tiny_cached: CachedModel) -> CachedModel:
    return tiny_cached


def both(shown: Any) -> tuple[str, str]:
    """Return the text and the text of the HTML, which must be well formed."""
    bundle = shown._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    assert set(shown._repr_mimebundle_(include={"text/plain"})) == {"text/plain"}
    return bundle["text/plain"], Page(bundle["text/html"]).text


def test_spans_join_neighbours_and_end_with_what_was_computed() -> None:
    runs = [("live", 0), ("cpu", 3), ("cpu", 4), ("disk", 5), ("cpu", 1)]
    assert as_spans(runs, 20) == (("cpu", 7), ("disk", 5), ("cpu", 1), ("computed", 7))
    assert as_spans([("computed", 4), ("disk", 6)], 10) == (("computed", 4), ("disk", 6))
    assert tiers_of(as_spans(runs, 20)) == {"cpu": 8, "disk": 5}
    # As they come back from JSON, of a session's file.
    assert Usage(spans=json.loads(json.dumps([["cpu", 7], ["computed", 1]]))).spans == (("cpu", 7), ("computed", 1))


def test_a_call_says_which_part_of_its_prompt_came_from_where(model: CachedModel) -> None:
    doc = model.document("abcdefgh" * 16, name="letters")
    cold = doc.ask("one two three four?", max_new_tokens=4)
    n = len(cold.prompt_ids)
    assert cold.usage.spans == (("live", doc.tokens), ("computed", n - doc.tokens))
    model.drop_live()
    asked = doc.ask("one two three four?", max_new_tokens=4)
    whole = n // BLOCK * BLOCK  # the few tokens after the last block are too few to be looked for
    assert asked.usage.spans == (("cpu", whole), ("computed", n - whole))
    # The first blocks in memory, the others on disk only.
    model.drop_live()
    model.store.flush()
    assert model.store._cpu is not None
    keys = chain_keys(model._engine.root, asked.prompt_ids, BLOCK)
    model.store._cpu.remove(keys[3:])
    found = model.lookup(asked.prompt_ids)
    assert [tier for tier, _ in found.spans] == ["cpu", "disk", "computed"]
    assert tiers_of(found.spans) == found.tokens_by_tier
    usage = doc.ask("one two three four?", max_new_tokens=4).usage
    assert usage.spans[0] == ("cpu", 3 * BLOCK)
    assert usage.spans[1][0] == "disk"
    assert tiers_of(usage.spans) == usage.cached_tokens_by_tier
    assert sum(tokens for _, tokens in usage.spans) == usage.prompt_tokens


def test_calls_are_kept_in_order(model: CachedModel) -> None:
    assert model.history == ()
    doc = model.document("abcdefgh" * 8)
    first = doc.ask("one?", max_new_tokens=2).usage
    second = doc.ask("two?", max_new_tokens=2).usage
    assert model.history == (doc.usage, first, second)


def test_everything_shows_itself_with_hostile_texts(model: CachedModel, tmp_path: Path) -> None:
    doc = model.document(HOSTILE * 4, name=HOSTILE)
    answer = doc.ask(HOSTILE, max_new_tokens=8)
    db = SessionDB(tmp_path / "sessions.db")
    chat = model.session(HOSTILE, system=HOSTILE, db=db)
    reply = chat.send(HOSTILE, max_new_tokens=8)
    model.store.pin(doc._keys(), HOSTILE)
    prompt = model.show_prompt(answer.prompt_ids)
    shown = [doc, answer, answer.usage, answer.prompt, chat, reply, model, model.store, model.store.stats(), prompt]
    shown += [model.lookup(HOSTILE), model.explain(HOSTILE + "x"), model.explain("never seen " * 20)]
    pages = [both(one) for one in shown]
    text, page = pages[1]
    assert text.startswith(answer.text)
    assert "<script>alert(1)</script></div>" in page  # as letters: Page would have met the tags
    assert "Prompt, by where its KV came from" in page
    assert "<script>alert(1)" in pages[3][1]
    assert "<script>alert(1)" in pages[4][1]
    assert pages[4][1].count("live") >= 1
    # Nothing that a terminal would obey.
    assert "\x1b" not in pages[3][0] + pages[3][1]
    chat.close()
    db.close()


def test_a_closed_store_still_shows_itself(tmp_path: Path) -> None:
    store = KVStore(tmp_path / "store")
    store.close()
    text, page = both(store)
    assert "closed" in text
    assert "closed" in page


def test_a_long_prompt_is_shortened_and_costs_no_more(tiny_tokenizer: Any) -> None:
    decoded: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return decoder(tiny_tokenizer)(ids)

    ids = tiny_tokenizer("start " + "x" * 100_000 + " end?", add_special_tokens=False)["input_ids"]
    view = prompt_view(ids, as_spans([("disk", 90_000), ("cpu", 9_000)], len(ids)), decode)
    assert view is not None
    text, page = both(view)
    assert sum(decoded) <= 600
    for form in (text, page):
        assert len(form) < 2_000
        assert form.index("start") < form.index("89,800 tokens") < form.index("end?")
    # Told apart without colour.
    assert [line[0] for line in text.splitlines() if not line.startswith(" ")] == ["▒", "▓", "░"]
    markup = view._repr_mimebundle_()["text/html"]
    assert "underline dashed" in markup
    assert "underline double" in markup
    assert pickle.loads(pickle.dumps(view)) == view


def test_a_prompt_in_many_parts_stays_short(tiny_tokenizer: Any) -> None:
    spans = as_spans([("cpu" if i % 2 else "disk", 10) for i in range(200)])
    view = prompt_view([65] * 2000, spans, decoder(tiny_tokenizer))
    assert view is not None
    assert len(view.parts) == 24
    assert sum(part.tokens for part in view.parts) == view.tokens == 2000
    both(view)


def test_nothing_is_coloured_where_nobody_knows(tiny_tokenizer: Any) -> None:
    assert prompt_view([1, 2, 3], (), decoder(tiny_tokenizer)) is None
    assert prompt_view([1, 2, 3], (("cpu", 2),), decoder(tiny_tokenizer)) is None
