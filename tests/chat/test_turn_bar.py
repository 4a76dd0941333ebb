"""What a reply cost, and how full the tiers are, as lines of text."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvembed_chat._tiers import FREE, gauges_of, sparkline, tier_bar
from kvembed_chat._widgets.gauges import TierGauges, gauge_lines
from kvembed_chat._widgets.turn_bar import TurnBar, reason_of, turn_lines
from textual.app import App, ComposeResult

from kvembed import Usage
from kvembed._stats import TierStats

MIB = 1 << 20
MIXED = Usage(
    prompt_tokens=14_336,
    completion_tokens=312,
    cached_tokens_by_tier={"gpu": 2102, "cpu": 2816, "disk": 9216},
    ttft_s=0.61,
    decode_s=7.5,
    saved_s=5.9,
)
TIERS = ("live", "gpu", "cpu", "disk", "remote")
GLYPHS = {"live": "█", "gpu": "█", "cpu": "▓", "disk": "▒", "remote": "▞"}


def plain(usage: Usage, width: int = 90, *, narrow: bool = False) -> list[str]:
    return [line.plain for line in turn_lines(usage, width, narrow=narrow)]


def test_a_turn_that_came_from_everywhere() -> None:
    bar, *figures = plain(MIXED)
    assert bar == "█" * 9 + "▓" * 13 + "▒" * 41 + "░" + " 98.6 % cached"
    assert figures == [
        "14,336 prompt · █ gpu 2,102 · ▓ cpu 2,816 · ▒ disk 9,216 · ░ computed 202 · TTFT 0.61 s",
        "saved ≈ 5.9 s · 41.5 tok/s · 312 out",
    ]


def test_the_page_shows_what_the_app_shows() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "howto" / "chat.md").read_text(encoding="utf-8")
    usage = replace(MIXED, cached_tokens_by_tier={"live": 2102, "cpu": 2816, "disk": 9216})
    assert "```\n" + "\n".join(plain(usage, 80)) + "\n```" in page
    narrow = Usage(prompt_tokens=14_336, cached_tokens_by_tier={"disk": 14_134}, ttft_s=0.61)
    assert f"`{plain(narrow, narrow=True)[0]}`" in page


def test_the_narrow_form_is_one_line() -> None:
    usage = Usage(prompt_tokens=14_336, cached_tokens_by_tier={"disk": 14_134}, ttft_s=0.61)
    assert plain(usage, 60, narrow=True) == ["98.6 % cached (disk) · TTFT 0.61 s"]
    cold = Usage(prompt_tokens=4096, ttft_s=4.2, miss_reason="new prefix")
    assert plain(cold, 60, narrow=True) == ["0 % cached · TTFT 4.20 s · new prefix"]
    assert plain(cold, 20, narrow=True) == ["0 % cached · TTFT 4…"]


@given(
    tokens=st.dictionaries(st.sampled_from(TIERS), st.integers(1, 10**7)),
    computed=st.integers(0, 10**7),
    width=st.integers(6, 200),
)
def test_a_bar_has_exactly_its_width_and_shows_every_part(tokens: dict[str, int], computed: int, width: int) -> None:
    bar = tier_bar(tokens, computed, width).plain
    total = sum(tokens.values()) + computed
    assert len(bar) == (width if total else 0)
    for tier, n in tokens.items():
        glyph = GLYPHS[tier]
        # live and gpu look alike.
        n += tokens.get({"live": "gpu", "gpu": "live"}.get(tier, ""), 0)
        cells = bar.count(glyph)
        assert cells >= 1
        # Within a cell of its share; what others were given as their least one comes off the widest.
        assert abs(cells - n * width / total) < 2 + len(tokens)
    assert ("░" in bar) == (computed > 0)
    order = [{"█": 0, "▓": 1, "▒": 2, "▞": 3, "░": 4}[glyph] for glyph in bar]
    assert all(a <= b for a, b in pairwise(order))


@given(
    tokens=st.dictionaries(st.sampled_from(TIERS), st.integers(1, 10**6)),
    computed=st.integers(1, 10**6),
    width=st.integers(30, 140),
    reason=st.none() | st.text(st.characters(codec="ascii", categories=["L", "Zs"]), max_size=200),
    narrow=st.booleans(),
)
def test_no_line_is_wider_than_it_may_be(
    tokens: dict[str, int], computed: int, width: int, reason: str | None, narrow: bool
) -> None:
    usage = Usage(
        prompt_tokens=sum(tokens.values()) + computed,
        completion_tokens=40,
        cached_tokens_by_tier=tokens,
        ttft_s=1.25,
        decode_s=3.0,
        saved_s=60.0,
        bypass_reason=reason,
    )
    lines = turn_lines(usage, width, narrow=narrow)
    assert all(line.cell_length <= width for line in lines)
    assert len(lines) == 1 or not narrow


@pytest.mark.parametrize(
    ("prompt", "cached", "shown"),
    [
        (100, 0, "0 % cached"),
        (100_000, 1, "<0.1 % cached"),
        (100_000, 99_999, "99.9 % cached"),
        (8, 4, "50.0 % cached"),
        (8, 8, "100.0 % cached"),
    ],
)
def test_shares_are_never_rounded_to_all_or_nothing(prompt: int, cached: int, shown: str) -> None:
    assert plain(Usage(prompt_tokens=prompt, cached_tokens_by_tier={"cpu": cached}))[0].endswith(f" {shown}")


def test_what_was_saved_is_hidden_until_it_can_be_told() -> None:
    text = "\n".join(plain(Usage(prompt_tokens=100, cached_tokens_by_tier={"cpu": 50}, ttft_s=0.1)))
    assert "saved" not in text
    assert "saved" not in "\n".join(plain(Usage(prompt_tokens=100, saved_s=0.0)))  # nothing was reused
    text = "\n".join(plain(Usage(prompt_tokens=100, cached_tokens_by_tier={"cpu": 50}, saved_s=-0.5)))
    assert "saved ≈ 0 s" in text


@pytest.mark.parametrize(
    ("usage", "reason"),
    [
        (Usage(miss_reason="new prefix"), "new prefix"),
        (Usage(miss_reason="recomputed: faster than loading"), "recomputed: faster than loading"),
        (Usage(miss_reason="evicted from token 512 on"), "evicted from token 512 on"),
        (Usage(miss_reason="model changed (dtype: float32 there, bfloat16 now)"), None),
        (Usage(bypass_reason="sliding layers", miss_reason="new prefix"), "bypassed: sliding layers"),
        (Usage(miss_reason="new text from token 512 on"), ""),
        (Usage(), ""),
    ],
)
def test_reasons(usage: Usage, reason: str | None) -> None:
    assert reason_of(usage) == ((usage.miss_reason if reason is None else reason) or None)


def test_nothing_is_shown_of_a_call_without_a_prompt() -> None:
    assert plain(Usage(), narrow=True) == []
    assert plain(Usage()) == []


# --- gauges --------------------------------------------------------------------------------------------


def stats(name: str, nbytes: int, max_bytes: int) -> TierStats:
    return TierStats(name, 1, nbytes, max_bytes, 0, 0)


CPU = [
    stats("live", 120 * MIB, 2048 * MIB),
    stats("cpu", 420 * MIB, 4096 * MIB),
    stats("disk", 11 << 30, 50 << 30),
]


def test_live_caches_on_the_cpu_are_part_of_its_memory() -> None:
    memory, disk = gauges_of(CPU)
    assert (memory.label, memory.parts, memory.budget) == ("Memory", {"live": 120 * MIB, "cpu": 300 * MIB}, 4096 * MIB)
    assert (disk.label, disk.parts, disk.used) == ("Disk", {"disk": 11 << 30}, 11 << 30)


def test_only_tiers_that_exist_are_shown() -> None:
    assert gauges_of([]) == []
    (memory,) = gauges_of([stats("live", MIB, 4 * MIB)])  # a store without a tier in memory
    assert (memory.parts, memory.budget) == ({"live": MIB}, 4 * MIB)
    gpu, memory, remote = gauges_of([stats("gpu", 1, 2), stats("cpu", 0, 8), stats("remote", 3, 9)])
    assert (gpu.label, gpu.parts, memory.parts, remote.parts) == ("GPU", {"gpu": 1}, {}, {"remote": 3})


def test_gauges_as_text() -> None:
    lines = [line.plain for line in gauge_lines(CPU, 28)]
    assert lines == [
        "Memory   420.0 MiB / 4.0 GiB",
        "█▓" + FREE * 20 + "  10 %",
        "Disk         11.0 / 50.0 GiB",
        "▒" * 5 + FREE * 17 + "  22 %",
        "█ live  ▓ cpu  ▒ disk",
    ]


def test_a_tier_over_its_budget_is_full() -> None:
    (gauge,) = gauges_of([stats("cpu", 300, 200)])
    assert gauge.bar(10).plain == "▓" * 10
    assert gauge.lines(20)[1].plain.endswith(" 150 %")
    (gauge,) = gauges_of([stats("cpu", 1, 1000)])
    assert gauge.bar(10).plain == "▓" + FREE * 9  # a little is not nothing
    assert gauge.lines(20)[1].plain.endswith(" <1 %")


def test_sparkline() -> None:
    assert sparkline([0.0, 0.001, 0.5, 0.999, 1.0], 10) == "▁▂▅██"
    assert sparkline([0.0, 1.0, 0.0], 2) == "█▁"
    assert sparkline([], 5) == sparkline([1.0], 0) == ""


# --- widgets -------------------------------------------------------------------------------------------


class Shown(App[None]):
    def compose(self) -> ComposeResult:
        yield TurnBar()
        yield TierGauges()


async def test_a_turn_bar_follows_the_width_of_the_terminal() -> None:
    app = Shown()
    async with app.run_test(size=(90, 20)) as pilot:
        bar = app.query_one(TurnBar)
        assert not bar.display
        bar.show(MIXED)
        await pilot.pause()
        assert bar.size.height == 3
        assert str(bar.render()).splitlines() == plain(MIXED)
        await pilot.resize_terminal(79, 20)
        await pilot.pause()
        assert bar.size.height == 1
        assert str(bar.render()) == "98.6 % cached (gpu+cpu+disk) · TTFT 0.61 s"
        bar.show(None)
        assert not bar.display


async def test_gauges_are_hidden_until_they_are_known() -> None:
    app = Shown()
    async with app.run_test(size=(30, 20)) as pilot:
        gauges = app.query_one(TierGauges)
        assert not gauges.display
        gauges.show(CPU)
        await pilot.pause()
        assert gauges.size.height == 5
        assert str(gauges.render()).splitlines() == [line.plain for line in gauge_lines(CPU, 28)]
        gauges.show(())
        assert not gauges.display
