"""F2: the tree of prefixes, with every key, over a source that is written down and over a real store."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from kvembed_chat._app import ChatApp
from kvembed_chat._prefixes import StorePrefixes
from kvembed_chat._screens.dialogs import Choice
from kvembed_chat._screens.inspector import InspectorScreen
from kvembed_chat._scripted import ScriptedEngine
from kvembed_chat._scripted_prefixes import ScriptedPrefixes
from textual.widgets import Button, Input, Static

from kvembed import CachedModel, KVStore, SessionDB
from kvembed._testing import FINGERPRINT, block_path, keys_of, put_all, random_block, random_chain

from ._pilot import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kvembed_chat._prefixes import PrefixSource
    from textual.pilot import Pilot
    from transformers import PreTrainedTokenizerFast

    from ..conftest import ModelFactory

REPORT, ANSWER, NOTES, TRIP, OLD = (row.id for row in ScriptedPrefixes().tree().rows)


class Looking:
    """The app with the inspector open."""

    def __init__(self, app: ChatApp, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    @property
    def screen(self) -> InspectorScreen:
        screen = next(s for s in self.app.screen_stack if isinstance(s, InspectorScreen))
        return screen

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.until(lambda: not self.screen._busy)

    async def until(self, condition: object) -> None:
        await until(self.pilot, condition)  # pyright: ignore[reportArgumentType]
        await self.pilot.pause()

    def text(self, selector: str) -> str:
        return str(self.screen.query_one(selector, Static).render())

    def ids(self) -> list[str]:
        return [row.id for row in self.screen._shown]

    def column(self, at: int) -> list[str]:
        table = self.screen.table
        return [str(table.get_row_at(row)[at]).strip() for row in range(table.row_count)]

    def notes(self) -> list[str]:
        return [note.message for note in self.app._notifications]


@contextlib.asynccontextmanager
async def look(source: PrefixSource, size: tuple[int, int] = (80, 24)) -> AsyncIterator[Looking]:
    engine = ScriptedEngine()
    engine.prefixes = source  # pyright: ignore[reportAttributeAccessIssue]
    app = ChatApp(engine)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        await pilot.press("f2")
        looking = Looking(app, pilot)
        await looking.until(lambda: isinstance(app.screen, InspectorScreen) and looking.screen._tree is not None)
        yield looking


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_what_is_shown(size: tuple[int, int]) -> None:
    async with look(ScriptedPrefixes(), size) as on:
        assert on.ids() == [REPORT, ANSWER, NOTES, TRIP, OLD]
        assert on.column(0) == ["0–2,048", "└ 2,048–2,411", "└ 2,048–2,250", "0–512", "0–4,096"]
        assert on.column(1) == ["45.0 MiB", "8.0 MiB", "4.4 MiB", "11.2 MiB", "90.0 MiB"]
        assert on.column(2) == ["█▓▒", "█▒", "▒", "▓▒", "▒"]  # readable without colour
        assert on.column(3) == ["12 s ago", "12 s ago", "2 h ago", "4 min ago", "2 days ago"]
        assert on.column(4)[:2] == ["● q3-report.txt", ""]
        assert on.column(5)[1:4] == ["Q3 report", "Kernel notes", "Trip plan"]
        assert " ".join(on.text("#cache-head").split()) == "Cache · 5 prefixes · as a tree █ live ▓ cpu ▒ disk"
        assert "Memory ▓" not in on.text("#cache-gauges")
        assert "Memory █▓········ 124.0 MiB / 4.0 GiB" in on.text("#cache-gauges")
        assert on.text("#cache-rates") == "Reused ▁▂▅▇██▁▅███ 64 % of the prompts of the latest 11 calls"
        details = on.text("#details")
        for words in ("0–2,048", "8 blocks", "bit-exact", "█ live 45.0 MiB", "▒ disk 45.0 MiB", "SmolLM2", REPORT):
            assert words in details
        assert "pinned as q3-report.txt" in details
        assert "in Q3 report, Kernel notes" in details
        # Nothing is wider than the screen: the table needs no scrolling from side to side.
        assert on.screen.table.virtual_size.width <= size[0]
        await on.pilot.press("down")
        assert "equal to rounding" in on.text("#details")


async def test_text_is_read_only_when_it_is_asked_for() -> None:
    source = ScriptedPrefixes()
    async with look(source) as on:
        await on.pilot.press("down")
        assert source.calls == []
        assert "t shows the first words" in on.text("#details")
        await on.pilot.press("t")
        await on.until(lambda: "“The words of tokens 2048 to 2411" in on.text("#details"))
        await on.pilot.press("down")
        await on.until(lambda: "“The words of tokens 2048 to 2250" in on.text("#details"))
        assert source.calls == [("words", ANSWER), ("words", NOTES)]
        await on.pilot.press("t", "up", "up")
        assert "t shows the first words" in on.text("#details")
        assert len(source.calls) == 2


async def test_pin_and_unpin() -> None:
    source = ScriptedPrefixes()
    async with look(source) as on:
        await on.press("p")
        await on.until(lambda: on.column(4)[0] == "")
        await on.press("p")
        await on.until(lambda: on.column(4)[0] == f"● {REPORT}")
        assert source.calls == [("unpin", REPORT), ("pin", REPORT)]
        assert on.notes()[-1] == f"pinned 8 blocks as {REPORT}"


@pytest.mark.parametrize(
    ("keys", "where", "column"),
    [(["enter"], "memory", "▒"), (["right", "enter"], "disk", "█▓"), (["right", "right", "enter"], "everywhere", None)],
)
async def test_evict(keys: list[str], where: str, column: str | None) -> None:
    source = ScriptedPrefixes()
    async with look(source) as on:
        await on.pilot.press("e")
        await on.until(lambda: isinstance(on.app.screen, Choice))
        question = str(on.app.screen.query_one(".text", Static).render())
        assert "tokens 0–2,048 (45.0 MiB) and the 2 prefixes that go on from it (12.4 MiB)" in question
        await on.press(*keys)
        await on.until(lambda: source.calls)
        assert source.calls == [("evict", REPORT, where)]
        if column is None:
            await on.until(lambda: on.ids() == [TRIP, OLD])
        else:
            await on.until(lambda: on.column(2)[0] == column)


async def test_a_row_of_one_tier_is_evicted_from_everywhere_or_not_at_all() -> None:
    source = ScriptedPrefixes()
    async with look(source) as on:
        await on.pilot.press("end", "e")
        await on.until(lambda: isinstance(on.app.screen, Choice))
        assert [str(button.label) for button in on.app.screen.query(Button)] == ["Everywhere", "Cancel"]
        await on.press("escape")
        assert isinstance(on.app.screen, InspectorScreen)
        assert source.calls == []


async def test_verify() -> None:
    source = ScriptedPrefixes()
    async with look(source) as on:
        await on.press("v")
        await on.until(lambda: on.notes())
        assert (source.calls, on.notes()) == ([("verify", REPORT)], ["8 blocks: all good"])


async def test_forget_asks_first() -> None:
    source = ScriptedPrefixes()
    async with look(source) as on:
        await on.pilot.press("x")
        await on.until(lambda: isinstance(on.app.screen, Choice))
        question = " ".join(str(on.app.screen.query_one(".text", Static).render()).split())
        assert "cannot be undone" in question
        assert "pinned as q3-report.txt" in question
        assert "The words of Q3 report, Kernel notes stay" in question
        await on.press("escape")
        assert source.calls == []
        await on.pilot.press("x")
        await on.until(lambda: isinstance(on.app.screen, Choice))
        await on.press("enter")
        await on.until(lambda: on.ids() == [TRIP, OLD])
        assert source.calls == [("forget", REPORT)]


async def test_filter() -> None:
    async with look(ScriptedPrefixes()) as on:
        await on.pilot.press("slash", *"kernel")
        await on.until(lambda: on.ids() == [REPORT, NOTES])
        assert "2 of 5 prefixes" in on.text("#cache-head")
        await on.pilot.press("enter", "down")
        assert on.screen.row is not None
        assert on.screen.row.id == NOTES
        await on.pilot.press("escape")
        await on.until(lambda: len(on.ids()) == 5)
        assert on.screen.row.id == NOTES  # the cursor stays on its row
        assert not on.screen.query_one("#cache-filter", Input).display
        await on.pilot.press("slash", *"zzz")
        await on.until(lambda: on.ids() == [])
        assert "Nothing matches" in on.text("#details")


async def test_sort() -> None:
    async with look(ScriptedPrefixes()) as on:
        await on.pilot.press("s")
        assert on.ids() == [REPORT, ANSWER, TRIP, NOTES, OLD]
        assert "sorted by used" in on.text("#cache-head")
        assert on.column(0)[1] == "2,048–2,411"  # no tree, no branches
        await on.pilot.press("s")
        assert on.ids() == [OLD, REPORT, TRIP, ANSWER, NOTES]
        await on.pilot.press("s", "s")
        assert "as a tree" in on.text("#cache-head")


async def test_an_error_is_a_toast() -> None:
    source = ScriptedPrefixes()
    source.error = OSError("the disk is [gone]")
    async with look(source) as on:
        await on.press("v")
        await on.until(lambda: on.notes())
        assert on.notes() == ["the disk is [gone]"]
        assert on.ids()[0] == REPORT
        assert "checking" not in on.text("#cache-head")


async def test_an_empty_store() -> None:
    async with look(ScriptedPrefixes((), (), ())) as on:
        await on.press("p", "e", "v", "x", "t", "s", "r")
        assert "Nothing is stored yet" in on.text("#details")
        assert on.text("#cache-rates") == "Reused no calls yet"
        assert on.notes() == []


@pytest.mark.parametrize("key", ["escape", "f2", "q"])
async def test_back_to_the_chat(key: str) -> None:
    async with look(ScriptedPrefixes()) as on:
        await on.pilot.press(key)
        await on.until(lambda: on.app.screen is on.app.chat)
        assert on.app.chat.prompt.has_focus


# --- over a store --------------------------------------------------------------------------------------


async def test_a_real_store(tmp_path: Path) -> None:
    db = SessionDB(tmp_path / "sessions.db")
    with KVStore(tmp_path / "store", max_cpu_bytes="1MiB", max_disk_bytes="16MiB") as store:
        store.register_namespace(FINGERPRINT, {"name": "tiny"})
        chain = random_chain(3)
        tail = random_block(chain[1].key, range(10), start=32)
        put_all(store, [*chain, tail])
        store.flush()
        source = StorePrefixes(lambda: store, lambda: None, lambda: db)
        async with look(source) as on:
            assert sorted(on.column(0)) == ["0–32", "└ 32–42", "└ 32–48"]
            assert on.column(2) == ["▓▒"] * 3
            await on.pilot.press("t")
            await on.until(lambda: "a model has to be loaded" in on.text("#details"))
            await on.press("p")
            await on.until(lambda: store.pins() == {chain[1].key.hex()[:12]: keys_of(chain[:2])})
            await on.until(lambda: on.column(4)[0] != "")
            await on.press("v")
            await on.until(lambda: any("2 blocks" in note and "all good" in note for note in on.notes()))
            await on.pilot.press("e")
            await on.until(lambda: isinstance(on.app.screen, Choice))
            await on.press("right", "right", "enter")  # everywhere: what is pinned stays on disk
            await on.until(lambda: on.column(0) == ["0–32"] and on.column(2) == ["▒"])
            assert block_path(store, chain[1]).exists()
            assert not block_path(store, chain[2]).exists()
            await on.pilot.press("x")
            await on.until(lambda: isinstance(on.app.screen, Choice))
            await on.press("enter")
            await on.until(lambda: on.ids() == [])
            assert store.pins() == {}
            assert not block_path(store, chain[0]).exists()
            assert any("erased 2 blocks" in note and "nothing of it is left" in note for note in on.notes())
        assert store.verify().ok
    db.close()


def test_a_store_with_a_model(
    tmp_path: Path, tiny_llama: ModelFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    db = SessionDB(tmp_path / "sessions.db")
    store = KVStore(tmp_path / "store", max_cpu_bytes="64MiB", max_disk_bytes="64MiB")
    with store, CachedModel(tiny_llama(), tiny_tokenizer, store=store, block_size=16, progress=False) as model:
        source = StorePrefixes(lambda: store, lambda: model, lambda: db)
        session = model.session("trip", db=db)
        session.send("Where to go in the north?", max_new_tokens=20)
        store.flush()
        tree = source.tree()
        row = tree.rows[0]
        assert (row.tier, row.users, row.start) == ("live", ("trip",), 0)
        assert source.words(row) == "user Where to g"  # of the first block: a mark and 15 bytes
        assert [tier.name for tier in source.tiers()] == ["live", "cpu", "disk"]
        assert source.hit_rates() == [0.0]
        source.evict(row, "memory")
        assert [each.nbytes.keys() for each in source.tree().rows] == [{"disk"}] * len(tree.rows)
        reused = session.preview("And in the south?")
        assert reused is not None
        assert set(reused.tokens_by_tier) == {"disk"}
        assert "nothing of it is left" in source.forget(source.tree(), source.tree().rows[0])
        assert source.tree().rows == ()
        assert source.tiers()[0].nbytes == 0
        assert [turn.user for turn in session.turns] == ["Where to go in the north?"]  # its words stay
        again = session.preview("And in the south?")
        assert again is not None
        assert again.num_tokens == 0
    db.close()
