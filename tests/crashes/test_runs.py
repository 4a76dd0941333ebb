"""Hundreds of processes killed and calls failed; see `driver`, which does more of it when asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "fork") or sys.platform != "linux", reason="written for Linux signals and limits"
    ),
]

REPO = Path(__file__).resolve().parents[2]


def drive(*args: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.crashes.driver", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=280)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_every_step(seed: int) -> None:
    found = drive("kill", "--runs", 300, "--seed", seed)
    assert found["wrong"] == []
    counts = found["counts"]
    # Or the runs would prove nothing: nearly all of them must have died where they were told to.
    assert counts.get("not killed", 0) < 30
    assert found["runs"] >= 300


def test_calls_that_fail() -> None:
    found = drive("fail", "--runs", 240, "--seed", 0)
    assert found["wrong"] == []


def test_encrypted_stores() -> None:
    for what, runs in (("kill", 120), ("fail", 60)):
        found = drive(what, "--runs", runs, "--seed", 2, "--encrypted")
        assert found["wrong"] == []
