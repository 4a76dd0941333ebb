"""`PrefixMatch`, `Explanation` and `classify`, with one token a byte."""

from __future__ import annotations

import json
import typing

import pytest

from kvembed import Explanation, PrefixMatch
from kvembed._match import _TITLES, ExplanationKind, classify, context

_LONG = " ".join(f"Section {i} deals with topic {i * i}." for i in range(60))


def _decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def _ids(text: str) -> list[int]:
    return list(text.encode())


def _first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _kind(now: str, was: str) -> tuple[str, str]:
    a, b = _ids(now), _ids(was)
    return classify(a, b, _first_difference(a, b), _decode)


@pytest.mark.parametrize(
    ("now", "was"),
    [
        ("Today is 2026-11-24. ", "Today is 2026-11-23. "),
        ("Today is 2026-11-24T09:30:00Z. ", "Today is 2026-11-24T09:31:12Z. "),
        ("Today Date: 24 Nov 2026\n\n", "Today Date: 3 December 2026\n\n"),
        ("On November 24, 2026 the ", "On November 3, 2026 the "),
        ("The time is 12:34. ", "The time is 9:07. "),
        ("The time is 12:34 pm. ", "The time is 12:34 am. "),
        ("It is Monday. ", "It is Thursday. "),
        ("Date 24.11.2026 ", "Date 25.11.2026 "),
    ],
)
def test_dates_are_recognised(now: str, was: str) -> None:
    kind, hint = _kind(now + _LONG, was + _LONG)
    assert kind == "date_changed"
    assert "behind" in hint


def test_a_date_is_recognised_when_only_a_few_tokens_of_template_follow() -> None:
    now = "Date: 24 Nov 2026\n<|user|>\nWhat is a tuple in this language?"
    was = "Date: 25 Nov 2026\n<|user|>\nHow do I write files with it, please?"
    assert _kind(now, was)[0] == "date_changed"


def test_a_date_that_only_stands_near_is_not_blamed() -> None:
    now = "Written 2026-11-24 by a careful author. " + _LONG
    was = "Written 2026-11-24 by a hasty one. " + _LONG
    assert _kind(now, was)[0] == "template_changed"


def test_numbers_are_not_dates() -> None:
    assert _kind("Room 1204, floor 3. " + _LONG, "Room 1219, floor 3. " + _LONG)[0] == "template_changed"


@pytest.mark.parametrize(
    ("now", "was", "words"),
    [
        ("You are a bot. ", "You are a kind bot. ", "5 tokens were left out"),
        ("You are a kind bot. ", "You are a bot. ", "5 tokens were put in"),
        ("You are a robot. ", "You are an agent. ", "were replaced by"),
    ],
)
def test_same_text_after_a_change_is_a_changed_template(now: str, was: str, words: str) -> None:
    kind, hint = _kind(now + _LONG, was + _LONG)
    assert kind == "template_changed"
    assert words in hint


def test_stripped_thinking_is_a_changed_template() -> None:
    was = "Q: why? <think>" + "hm, let me see. " * 20 + "</think>Because of the tides. " + _LONG
    now = "Q: why? Because of the tides. " + _LONG
    kind, hint = _kind(now, was)
    assert kind == "template_changed"
    assert "thinking" in hint


def test_text_that_comes_back_too_late_has_diverged() -> None:
    gap = " ".join(f"filler{i}" for i in range(200))
    assert len(gap) > 600
    assert _kind("Intro. " + _LONG, "Intro. " + gap + _LONG)[0] == "diverged"


def test_other_text_has_diverged() -> None:
    kind, hint = _kind("Shared start. What is a list?", "Shared start. How are files opened, then?")
    assert kind == "diverged"
    assert hint


def test_a_prefix_of_the_other_is_a_hit() -> None:
    assert _kind("abcdefgh", "abcdefghij") == ("hit", "")
    assert _kind("abcdefghij", "abcdefgh") == ("hit", "")
    assert classify([], [], 0, _decode) == ("hit", "")


def test_same_text_in_other_tokens() -> None:
    def decode(ids: list[int]) -> str:
        return "".join({1: "hel", 2: "lo ", 3: "hello ", 4: "world, again"}[i] for i in ids)

    kind, hint = classify([9, 1, 2, 4], [9, 3, 4], 1, decode)
    assert kind == "retokenized"
    assert "token ids" in hint


def test_half_characters_are_not_taken_for_equal_text() -> None:
    assert _kind("x" + "é" * 40, "x" + "è" * 40)[0] == "diverged"


def test_classify_is_quick_on_repetitive_text() -> None:
    import time

    now, was = [1] + [7] * 20_000, [2] + [7] * 20_000
    began = time.perf_counter()
    assert classify(now, was, 0, lambda ids: " ".join(map(str, ids)))[0] == "template_changed"
    assert time.perf_counter() - began < 1.0


def test_classify_takes_arrays() -> None:
    import numpy as np

    now, was = np.array(_ids("a tuple is a list"), dtype="<i4"), np.array(_ids("a tuple of two"), dtype="<i4")
    assert classify(now, was, 8, _decode)[0] == "diverged"  # pyright: ignore[reportArgumentType]


def test_context_points_at_the_token() -> None:
    text, at = context(_ids("The quick brown fox jumps"), 10, _decode, before=6, after=5)
    assert text == "quick brown"
    assert text[at:] == "brown"
    assert context(_ids("abc"), 0, _decode) == ("abc", 0)
    assert context(_ids("abc"), 3, _decode) == ("abc", 3)


def test_explanation_marks_the_differing_token() -> None:
    now, was = _ids("the margin was twelve percent"), _ids("the margin was eleven percent")
    at = _first_difference(now, was)
    here, offset = context(now, at, _decode)
    there, _ = context(was, at, _decode)
    report = str(
        Explanation(
            kind="diverged",
            position=at,
            prompt_tokens=len(now),
            cached_tokens=at,
            nearest_tokens=len(was),
            here=here,
            there=there,
            expected_token="e",
            actual_token="t",
            hint="Put it last.",
            here_offset=offset,
        )
    ).splitlines()
    caret = report[3].index("^")
    assert report[1][caret] == "t"
    assert report[2][caret] == "e"
    assert report[4] == "  token 15: stored 'e', now 't'"
    assert report[5] == "  Put it last."


def test_explanation_marker_survives_line_breaks_and_wide_characters() -> None:
    lines = str(Explanation(kind="diverged", here="日本\nx y", there="日本\nx z")).splitlines()
    assert lines[1] == "  prompt: 日本⏎x y"
    assert lines[3] == " " * (len("  prompt: ") + 4 + 3) + "^"


def test_explanation_without_a_stored_side() -> None:
    text = str(Explanation(kind="never_seen", prompt_tokens=9, here="hello there", here_offset=0, hint="Run it once."))
    assert text.splitlines() == [
        "never seen: 0 of 9 tokens reusable",
        "  prompt: hello there",
        "          ^",
        "  Run it once.",
    ]


def test_explanation_lists_fingerprint_differences() -> None:
    explanation = Explanation(
        kind="other_model", prompt_tokens=9, differences={"dtype": ("bfloat16", "float32")}, hint="Load it alike."
    )
    assert "  dtype: stored bfloat16, now float32" in str(explanation).splitlines()
    markup = explanation._repr_mimebundle_()["text/html"]
    assert "bfloat16" in markup


def test_explanation_html_is_escaped() -> None:
    markup = Explanation(
        kind="diverged", here="<script>1</script>", there="<script>2</script>", hint="a < b"
    )._repr_mimebundle_()["text/html"]
    assert "<script" not in markup
    assert "a &lt; b" in markup


def test_every_kind_has_words_and_one_line_reprs() -> None:
    assert set(typing.get_args(ExplanationKind)) == set(_TITLES)
    for kind in typing.get_args(ExplanationKind):
        explanation = Explanation(kind=kind, here="a\nb", there="a\nc")
        assert "\n" not in repr(explanation)
        json.dumps(explanation.to_dict())


def test_prefix_match_text_and_order() -> None:
    match = PrefixMatch(
        4129, 4096, {"disk": 256, "live": 3840, "gpu": 0}, exact_tokens=3840, blocks=16, lookup_s=0.0012
    )
    assert str(match) == (
        "4,096 of 4,129 tokens reusable (live 3,840 · disk 256) · 3,840 bit-exact · 16 blocks · found in 1.2 ms"
    )
    assert repr(match) == f"<PrefixMatch: {match}>"
    data = json.loads(json.dumps(match.to_dict()))
    assert data["tokens_by_tier"] == {"live": 3840, "disk": 256}
    assert "3,840" in match._repr_mimebundle_()["text/html"]


def test_prefix_match_of_nothing() -> None:
    assert str(PrefixMatch(12)) == "0 of 12 tokens reusable"
    assert "░" in PrefixMatch(12)._repr_mimebundle_()["text/html"]
