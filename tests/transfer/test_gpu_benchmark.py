"""``benchmarks/gpu.py`` without a GPU: it goes through everything on a device that is none, and sees what is wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvembed._restore import Restore

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def test_a_dry_run(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    for tier in ("live", "gpu", "cpu", "disk"):
        assert f"ok    tokens and logits from tier {tier}, bit for bit: right" in shown
        assert f"ok    served from tier {tier}: right" in shown
    for figure in ("part of PCIe to the device", "overlap from host memory", "a generation that stores against"):
        assert figure in shown
    assert shown.splitlines()[-1] == "VERDICT: everything right (a dry run: no target)"


def test_a_missing_wait_fails_the_verdict(
    gpu: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Restore, "_arrive", lambda self, layer: None)
    monkeypatch.setattr(gpu, "check_offload", lambda bench, folder: None)
    assert gpu.main(["--dry-run"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL  tokens and logits from tier cpu, bit for bit: WRONG" in shown
    assert "VERDICT: failed: " in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().out


def test_targets_that_are_missed_fail_it(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = gpu.Verdict(speeds_count=True)
    verdict.reaches("speed", 0.9, least=0.85)
    verdict.reaches("slowdown", 1.01, most=1.02)
    assert verdict.end() == 0
    verdict.reaches("speed again", 0.8, least=0.85)
    assert verdict.end() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "VERDICT: failed: speed again"
