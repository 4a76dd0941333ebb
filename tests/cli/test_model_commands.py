"""``warm``, ``doctor MODEL``, ``bench`` and ``demo``, with a tiny model of random weights in a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import KVEmbedError
from kvembed._cli import _sample, bench, demo
from kvembed._cli._steps import Steps
from kvembed._cli.bench import Measure, summarise
from kvembed._cli.demo import Plan, Row, judge
from kvembed._paths import cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

    Run = Callable[..., Any]


# ------------------------------------------------------------------------------------------- sample


def test_the_sample_text_is_long_and_begins_with_what_is_asked() -> None:
    text = _sample.reference_text()
    assert len(text) > 300_000
    assert text.startswith('The "assert" statement')
    for word in ('The "pass" statement', "Lambdas", 'The "while" statement'):
        assert 0 <= text.find(word) < 10_000
    assert text == _sample.reference_text()


def test_trim_to_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = _sample.reference_text()
    cut = _sample.trim_to_tokens(tiny_tokenizer, text, 2000)
    assert text.startswith(cut)
    assert 1500 < len(tiny_tokenizer(cut)["input_ids"]) <= 2000
    assert _sample.trim_to_tokens(tiny_tokenizer, "short", 2000) == "short"
    assert _sample.trim_to_tokens(tiny_tokenizer, "x" * 5000, 100) == "x" * 100


# --------------------------------------------------------------------------------------------- warm


def test_warm_stores_a_document_once(run: Run, run_json: Run, tiny_folder: Path, tmp_path: Path) -> None:
    file, store = tmp_path / "notes.txt", tmp_path / "store"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    args = ("warm", file, "--model", tiny_folder, "--dtype", "float32", "--dir", store)
    first = run_json(*args, "--pin")
    assert first["tokens"] > 900
    assert first["usage"]["cached_tokens"] == 0
    assert first["stored_bytes"] >= first["kv_bytes"] > 0
    assert run_json("stats", "--dir", store)["pins"] == 1
    assert [e["names"] for e in run_json("ls", "--dir", store)] == [["notes.txt"]]
    again = run_json(*args)
    assert again["usage"]["cached_tokens_by_tier"]["disk"] >= first["tokens"] - 1
    out = run(*args, "--name", "fox").stdout
    assert out.startswith("fox: ")
    assert "tokens in" in out


def test_verify_computes_again(run: Run, run_json: Run, tiny_folder: Path, tmp_path: Path) -> None:
    file, store = tmp_path / "notes.txt", tmp_path / "store"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    options = ("--model", tiny_folder, "--dtype", "float32", "--dir", store)
    run_json("warm", file, *options)
    report = run_json("verify", "--recompute", *options)
    assert report["ok"]
    assert report["blocks"] >= 3
    assert report["bad"] == []
    assert "computed again" in run("verify", "--recompute", *options).stdout


def test_warm_of_no_file(run: Run, tmp_path: Path) -> None:
    assert "FILE" in run("warm", tmp_path / "absent.txt", status=2).stderr


def test_warm_of_bytes_that_are_no_text(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "image.bin"
    file.write_bytes(bytes(range(256)) * 4)
    result = run("warm", file, "--model", tiny_folder, "--dir", tmp_path / "store", status=1)
    assert "not text but binary" in result.stderr


def test_warm_with_an_unknown_model(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    result = run("warm", file, "--model", "smollm", "--dir", tmp_path / "store", status=1)
    assert "smollm2" in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------- doctor


def test_doctor_says_that_a_model_can_be_cached(run: Run, run_json: Run, tiny_folder: Path, tmp_path: Path) -> None:
    args = ("doctor", tiny_folder, "--quick", "--dtype", "float32", "--dir", tmp_path / "store")
    facts = run_json(*args)["model"]
    assert facts["supported"] is True
    assert facts["reason"] is None
    assert facts["class"] == "LlamaForCausalLM"
    assert facts["dtype"] == "float32"
    assert facts["kv_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    assert "of KV a token" in run(*args).stdout
    assert not (tmp_path / "store").exists()


def test_doctor_measures_codecs(run: Run, run_json: Run, tiny_folder: Path, tmp_path: Path) -> None:
    args = ("doctor", tiny_folder, "--quick", "--dtype", "float32", "--dir", tmp_path / "store", "--text")
    texts = [tmp_path / "one.txt", tmp_path / "other.txt"]
    for text, words in zip(texts, ("Words of my own, again. ", "Some other sentences. "), strict=True):
        text.write_text(words * 20, encoding="utf-8")
    found = {f["codec"]: f for f in run_json(*args, texts[0], "--codec", "all")["model"]["codecs"]}
    assert list(found) == ["lossless", "bf16", "k16v8", "int8", "fp8"]
    errors = [f["kl_mean"] for f in found.values()]
    assert errors == sorted(errors)
    assert errors[0] < 1e-9 < errors[1]  # the model's own rounding, in float32
    assert found["lossless"]["ratio"] == 1
    assert found["bf16"]["ratio"] == 2
    shown = run(*args, texts[1], "--codec", "int8").stdout
    assert "(rounding)" in shown
    assert "int8" in shown
    assert "fp8" not in shown
    assert f"{found['int8']['kl_mean']:.1e}" not in shown  # of another text
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--codec", "zip", "MODEL"), "must be one of"),
        (("--codec", "int8"), "name a model"),
        (("--text", "x.txt", "MODEL"), "add --codec all"),
        (("--codec", "int8", "--text", "/nowhere", "MODEL"), "cannot be read"),
    ],
)
def test_doctor_says_what_is_wrong_with_a_codec(run: Run, tiny_folder: Path, args: tuple[str, ...], word: str) -> None:
    result = run("doctor", "--quick", *(str(tiny_folder) if a == "MODEL" else a for a in args), status=1)
    assert word in result.stderr


# -------------------------------------------------------------------------------------------- bench


def test_bench_measures_every_tier(run: Run, run_json: Run, tiny_folder: Path) -> None:
    args = ("bench", tiny_folder, "--tokens", 300, "--rounds", 2, "--new-tokens", 3, "--dtype", "float32")
    result = run_json(*args)
    rows = {row["case"]: row for row in result["rows"]}
    assert list(rows) == ["plain", "cold", "live", "cpu", "disk"]
    assert all(row["rounds"] == 2 and row["ttft_s"] > 0 for row in rows.values())
    assert rows["cold"]["cached_tokens"] == rows["plain"]["cached_tokens"] == 0
    assert rows["cold"]["times_faster"] == 1.0
    for tier in ("live", "cpu", "disk"):
        assert rows[tier]["cached_tokens"] >= 300
        assert rows[tier]["computed_tokens"] <= 20
    assert list(cache_dir().glob("bench-*")) == []
    assert "times faster than cold" in run(*args, "--no-plain").stdout


def test_bench_simulates_a_pipeline(run: Run, run_json: Run, tiny_folder: Path) -> None:
    args = ("bench", tiny_folder, "--simulate", "--tokens", 200, "--dtype", "float32", "--disk", "1GB")
    found = run_json(*args)
    assert (found["tokens"], found["disk_bytes_per_second"], found["pcie_bytes_per_second"]) == (200, 10**9, None)
    assert found["total_s"] >= found["compute_s"] > 0
    assert found["load_s"] == pytest.approx(found["nbytes"] / 10**9, rel=0.5)
    assert 0 <= found["hidden"] <= 1
    shown = run(*args, "--pcie", "10GB").stdout
    assert "of the loading hidden" in shown
    assert "copy" in shown
    assert list(cache_dir().glob("bench-*")) == []


def test_bench_that_needs_more_text_than_there_is(run: Run, tiny_folder: Path) -> None:
    result = run("bench", tiny_folder, "--tokens", 4000, "--rounds", 500, "--new-tokens", 1, status=1)
    assert "--tokens" in result.stderr


def test_bench_pairs_the_rounds() -> None:
    # The machine got twice as slow in the second round: the factor must not see it.
    measures = [
        *(Measure("cold", ttft, 0, 100, None) for ttft in (10.0, 20.0, 40.0)),
        *(Measure("disk", ttft, 90, 10, 5.0) for ttft in (1.0, 2.0, 4.0)),
    ]
    cold, disk = summarise(measures)
    assert (cold["case"], cold["ttft_s"], cold["times_faster"]) == ("cold", 20.0, 1.0)
    assert (disk["case"], disk["ttft_s"], disk["times_faster"]) == ("disk", 2.0, 10.0)
    assert (disk["cached_tokens"], disk["computed_tokens"], disk["decode_tokens_per_second"]) == (90, 10, 5.0)


def test_bench_cases_are_all_run() -> None:
    assert bench._CASES == ("plain", "cold", "live", "cpu", "disk")


# --------------------------------------------------------------------------------------------- demo


def _usage(**tiers: int) -> dict[str, Any]:
    return {
        "bypass_reason": None,
        "miss_reason": None,
        "cached_tokens_by_tier": tiers,
        "cached_tokens": sum(tiers.values()),
    }


@pytest.mark.parametrize(
    ("expected", "usage", "same", "word"),
    [
        ("cold", _usage(), True, None),
        ("live", _usage(live=1030), True, None),
        ("disk", _usage(disk=1024), True, None),  # whole blocks are enough
        ("any", _usage(cpu=512, disk=512), True, None),
        ("cold", _usage(), False, "differs"),
        ("live", _usage(live=1030), False, "differs"),
        ("live", _usage(), True, "only 0 of 1,024"),
        ("disk", _usage(disk=768), True, "only 768"),
        ("disk", _usage(live=1030), True, "expected the disk tier"),
        ("disk", {**_usage(), "miss_reason": "evicted"}, True, "evicted"),
        ("cold", {**_usage(), "bypass_reason": "no cache"}, True, "no cache"),
    ],
)
def test_judge(expected: str, usage: dict[str, Any], same: bool, word: str | None) -> None:
    problem = judge(expected, usage, document_tokens=1031, block_size=256, same_text=same)
    if word is None:
        assert problem is None
    else:
        assert problem is not None
        assert word in problem


def test_judge_of_a_document_shorter_than_a_block_wants_some_reuse() -> None:
    assert judge("live", _usage(), 100, 256, True) is not None
    assert judge("live", _usage(live=99), 100, 256, True) is None


@pytest.mark.multiprocess
def test_demo_end_to_end(run_json: Run, tiny_folder: Path) -> None:
    args = ("demo", "--model", tiny_folder, "--tokens", 700, "--max-new-tokens", 4)
    result = run_json(*args)
    assert result["ok"] is True
    rows = result["rows"]
    assert [(row["process"], row["expected"]) for row in rows] == [
        ("this", "cold"),
        ("this", "live"),
        ("this", "cpu"),
        ("new", "disk"),
        ("new", "any"),
    ]
    assert rows[0]["cached_tokens_by_tier"] == {}
    for row, tier in zip(rows[1:4], ("live", "cpu", "disk"), strict=True):
        assert row["cached_tokens_by_tier"][tier] >= 512
    assert len({row["question"] for row in rows[:4]}) == 4  # nothing asked before is asked again
    assert rows[4]["answer"] == rows[0]["answer"]
    assert all(row["same_text"] and row["ttft_s"] > 0 and row["plain_ttft_s"] > 0 for row in rows)
    assert 500 < result["document_tokens"] < 800
    assert result["store_bytes"] > 0
    assert list(cache_dir().glob("demo-*")) == []


def _row(**changes: Any) -> Row:
    row = Row("Why?", "this", "cold", 10, {"disk": 9}, 1, 0.1, 1.0, 10.0, True, None, "Because [x].")
    return dataclasses.replace(row, **changes)


_FACTS = {
    "model": "m",
    "dtype": "float32",
    "device": "cpu",
    "document_tokens": 9,
    "store_bytes": 1,
    "load_s": 1.0,
    "new_process_load_s": 1.0,
    "total_s": 2.0,
}


def test_demo_shows_rows_and_ends_with_0(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda plan, steps: ([_row()], _FACTS))
    out = run("demo").stdout
    for word in ("Why?", "Because [x].", "disk 9", "10.0", "yes"):
        assert word in out


def test_demo_ends_with_1_when_a_text_differs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = _row(same_text=False, problem="the text differs from plain transformers")
    monkeypatch.setattr(demo, "run_demo", lambda plan, steps: ([_row(), bad], _FACTS))
    result = run("demo", status=1)
    assert "NO" in result.stdout
    assert "differs" in result.stderr
    assert json.loads(run("demo", "--json", status=1).stdout)["ok"] is False


def test_demo_keeps_its_store_when_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(plan: Plan, steps: Steps) -> tuple[list[Row], dict[str, Any]]:
        plan.store.mkdir()
        (plan.store / "x").touch()
        return [_row()], _FACTS

    monkeypatch.setattr(demo, "run_demo", fake)
    run("demo")
    assert list(cache_dir().glob("demo-*")) == []
    assert "Store kept" in run("demo", "--keep").stdout
    assert len(list(cache_dir().glob("demo-*/store/x"))) == 1


def test_demo_removes_its_store_after_a_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Plan, steps: Steps) -> Any:
        plan.store.mkdir()
        raise KVEmbedError("no model")

    monkeypatch.setattr(demo, "run_demo", fail)
    assert run("demo", status=1).stderr == "error: no model\n"
    assert list(cache_dir().glob("demo-*")) == []


@pytest.mark.multiprocess
def test_a_new_process_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    plan = Plan("smollm2", 100, ("a", "b"), 2, "float32", file)  # fails before anything heavy is imported
    with pytest.raises(KVEmbedError, match=r"status 1.*is a file"):
        demo._in_new_process(plan, "text", ["a"])


def test_demo_where_nothing_can_be_written(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVEMBED_CACHE_DIR", str(tmp_path / "file"))
    for command in ("demo", "bench"):
        assert "KVEMBED_CACHE_DIR" in run(command, status=1).stderr
