from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvembed import ConfigError
from kvembed._units import format_bytes, format_count, format_seconds, parse_age, parse_bytes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (4096, 4096),
        (1.9, 1),
        ("17", 17),
        ("17B", 17),
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 KiB", 1536),
        (".5MiB", 1 << 19),
        ("2k", 2048),
        ("3T", 3 << 40),
        ("1_000", 1000),
        ("1,000 kb", 1_000_000),
        ("9007199254740993", 9007199254740993),  # more than a float holds
    ],
)
def test_sizes_are_read_as_people_write_them(value: int | float | str, expected: int) -> None:
    assert parse_bytes(value) == expected


def test_percentages_need_something_to_refer_to() -> None:
    assert parse_bytes("10%", of=2000) == 200
    assert parse_bytes("12.5 %", of=8 << 30) == 1 << 30
    with pytest.raises(ConfigError, match="max_cpu_bytes: a percentage has nothing to refer to"):
        parse_bytes("10%", name="max_cpu_bytes")
    with pytest.raises(ConfigError, match="more than all there is"):
        parse_bytes("101%", of=2000)


@pytest.mark.parametrize("value", ["", "GiB", "4 GiBB", "-1", "1e9", "4..5GB", "ten", "1 2", "5 %%", "1__0"])
def test_words_that_are_no_size_are_refused_with_an_example(value: str) -> None:
    with pytest.raises(ConfigError, match='cannot read .*"4GiB"'):
        parse_bytes(value, of=100)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, None, [1]])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="budget: "):
        parse_bytes(value, name="budget")  # pyright: ignore[reportArgumentType]


@given(st.integers(0, 1 << 60))
def test_whole_bytes_survive_as_text(n: int) -> None:
    assert parse_bytes(str(n)) == n
    assert parse_bytes(f"{n}B") == n
    assert parse_bytes(f"{n}KiB") == n * 1024


@given(st.integers(0, 1 << 55))
def test_printed_sizes_read_back_within_rounding(n: int) -> None:
    text = format_bytes(n)
    assert parse_bytes(text) == pytest.approx(n, rel=0.06, abs=1)
    assert float(text.split()[0]) < 1024


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1024 - 1, "1.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (-2048, "-2.0 KiB"),
        (5 << 50, "5.0 PiB"),
    ],
)
def test_format_bytes(n: int, expected: str) -> None:
    assert format_bytes(n) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (0.00085, "850 µs"),
        (0.0042, "4.2 ms"),
        (0.012, "12 ms"),
        (0.0996, "0.10 s"),
        (0.214, "0.21 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (-0.5, "-0.50 s"),
    ],
)
def test_format_seconds(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


def test_format_count() -> None:
    assert format_count(4129) == "4,129"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 2_592_000), ("12h", 43_200), ("90m", 5400), ("2 W", 1_209_600), ("1.5s", 1.5), (60, 60), (0.5, 0.5)],
)
def test_ages(text: str | float, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "30", "30 years", "-1d", "1e9d", -1, float("nan"), True])
def test_ages_that_cannot_be_read(text: str | float) -> None:
    with pytest.raises(ConfigError, match="ttl: .*30d"):
        parse_age(text, name="ttl")
