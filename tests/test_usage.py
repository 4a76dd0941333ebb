"""`Usage`: arithmetic, forms and reprs."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from kvembed import Usage
from kvembed._html import bar_segments, bar_text, mimebundle, table_html

_WARM = Usage(
    prompt_tokens=4129,
    completion_tokens=48,
    cached_tokens_by_tier={"disk": 3840, "live": 0},
    ttft_s=0.21,
    decode_s=47 / 11.3,
    saved_s=10.9,
)


class _Tags(HTMLParser):
    """Collects text and checks that tags are closed in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.feed(markup)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.add(tag)
        assert {name for name, _ in attrs} <= {"style"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_counts_add_up() -> None:
    usage = Usage(prompt_tokens=100, cached_tokens_by_tier={"disk": 30, "live": 20, "gpu": 0})
    assert usage.cached_tokens == 50
    assert usage.computed_tokens == 50
    assert list(usage.cached_tokens_by_tier.items()) == [("live", 20), ("disk", 30)]


def test_unknown_tiers_are_kept_and_come_last() -> None:
    usage = Usage(prompt_tokens=10, cached_tokens_by_tier={"tape": 3, "remote": 1, "cpu": 2})
    assert list(usage.cached_tokens_by_tier) == ["cpu", "remote", "tape"]


def test_decode_speed_leaves_out_the_first_token() -> None:
    assert Usage(completion_tokens=11, decode_s=2.0).decode_tokens_per_second == 5.0
    assert Usage(completion_tokens=1, decode_s=2.0).decode_tokens_per_second is None
    assert Usage(completion_tokens=5, decode_s=0.0).decode_tokens_per_second is None


def test_openai_form() -> None:
    assert _WARM.to_openai() == {
        "prompt_tokens": 4129,
        "completion_tokens": 48,
        "total_tokens": 4177,
        "prompt_tokens_details": {"cached_tokens": 3840},
    }


def test_dict_form_is_json_with_every_field() -> None:
    data = json.loads(json.dumps(_WARM.to_dict()))
    assert {f.name for f in dataclasses.fields(Usage)} <= set(data)
    assert data["cached_tokens_by_tier"] == {"disk": 3840}
    assert (data["cached_tokens"], data["computed_tokens"]) == (3840, 289)
    assert data["decode_tokens_per_second"] == pytest.approx(11.3)


def test_dict_form_does_not_share_the_tiers() -> None:
    _WARM.to_dict()["cached_tokens_by_tier"]["disk"] = 1
    assert _WARM.cached_tokens == 3840


def test_text() -> None:
    assert str(_WARM) == (
        "4,129 prompt (disk 3,840 · computed 289) · TTFT 0.21 s · 48 out at 11.3 tok/s · saved ≈ 10.9 s"
    )


def test_text_says_why_on_a_second_line_and_repr_keeps_to_one() -> None:
    usage = dataclasses.replace(_WARM, miss_reason="a date changed", bypass_reason="beam search")
    assert str(usage).splitlines()[1:] == ["bypassed: beam search", "not reused: a date changed"]
    assert "\n" not in repr(usage)
    assert "a date changed" in repr(usage)


def test_nothing_is_claimed_saved_when_nothing_was_reused_or_measured() -> None:
    assert "saved" not in str(Usage(prompt_tokens=10, saved_s=3.0))
    assert "saved" not in str(Usage(prompt_tokens=10, cached_tokens_by_tier={"cpu": 5}))


def test_empty_usage_has_reprs() -> None:
    assert str(Usage()) == "0 prompt (computed 0) · 0 out"
    _Tags(Usage()._repr_mimebundle_()["text/html"])


def test_html_is_closed_escaped_and_without_script() -> None:
    usage = dataclasses.replace(
        _WARM, miss_reason="<script>alert('x')</script>", cached_tokens_by_tier={"disk": 9, "<b>": 1}
    )
    markup = usage._repr_mimebundle_()["text/html"]
    tags = _Tags(markup)
    assert not tags.seen & {"script", "style", "b", "link", "img"}
    assert "<script>alert('x')</script>" in tags.text
    assert "computed 4,119" in tags.text
    assert "▒" in tags.text
    assert "░" in tags.text


def test_mimebundle_honours_include_and_exclude() -> None:
    assert set(_WARM._repr_mimebundle_()) == {"text/plain", "text/html"}
    assert set(mimebundle("a", "b", include={"text/plain"})) == {"text/plain"}
    assert set(mimebundle("a", "b", exclude={"text/plain"})) == {"text/html"}


def test_usage_is_frozen_comparable_and_can_be_copied() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _WARM.prompt_tokens = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert copy.deepcopy(_WARM) == _WARM


@pytest.mark.parametrize("width", [1, 4, 10, 40])
@pytest.mark.parametrize(
    "tokens", [{"disk": 1}, {"disk": 10_000, "live": 1}, {"live": 3, "gpu": 3, "cpu": 3, "disk": 3}, {}]
)
def test_bar_fills_its_width_and_hides_no_part(tokens: dict[str, int], width: int) -> None:
    segments = bar_segments(tokens, 7, width)
    assert [name for name, _, _ in segments][-1] == "computed"
    assert {name for name, _, _ in segments} == {*tokens, "computed"}
    assert all(cells >= 1 for _, _, cells in segments)
    assert sum(cells for _, _, cells in segments) == max(width, len(segments))


def test_bar_is_in_proportion() -> None:
    assert bar_text({"cpu": 25, "disk": 50}, 25, width=8) == "▓▓▒▒▒▒░░"
    assert bar_text({}, 0) == ""


def test_table_cells_are_escaped_and_numbers_grouped() -> None:
    tags = _Tags(table_html([("a<b>", 12345)], header=("x&y", "n")))
    assert "a<b>" in tags.text
    assert "12,345" in tags.text
    assert "x&y" in tags.text


def test_import_is_light() -> None:
    code = (
        "import sys, kvembed; kvembed.Usage, kvembed.PrefixMatch, kvembed.Explanation;"
        "print(sorted({'torch','numpy','transformers','rich','typer','difflib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
