"""The long random run of ``benchmarks/soak.py``, for a few seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.multiprocess
@pytest.mark.skipif(os.name == "nt", reason="du counts blocks of POSIX file systems")
@pytest.mark.parametrize(("mode", "seconds", "processes"), [("blocks", 5, 4), ("model", 3, 2)])
def test_processes_at_random_keep_the_budget_and_never_answer_wrong(mode: str, seconds: int, processes: int) -> None:
    options = ["--mode", mode, "--minutes", str(seconds / 60), "--processes", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert seen["wrong"] == seen["du_over"] == seen["failed"] == 0
    assert seen["largest_du"] <= seen["allowed"]
    # It was full, blocks went, and others were served.
    assert seen["largest_du"] > 0.8 * seen["budget"]
    assert seen["evicted_or_dropped"] > 0
    assert seen["reads" if mode == "blocks" else "reused"] > 0
