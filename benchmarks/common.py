"""Shared by the benchmarks: the model, the text, paired rounds, and how results are printed and saved."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LENGTHS = (1024, 2048, 4096, 7500)
RESULTS = Path(__file__).parent / "results"


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """Parse the options all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2", help="alias, folder or hub id")
    parser.add_argument(
        "--rounds", type=int, default=defaults.get("rounds", 5), help="paired rounds; medians are printed"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(defaults.get("lengths", LENGTHS)))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def hardware() -> str:
    """One line: processor, cores, memory, versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    import transformers

    return (
        f"{name} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {memory:.0f} GiB; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; fp32"
    )


def load(name: str) -> tuple[Any, Any]:
    """Load model and tokenizer in fp32."""
    from kvembed._loading.load import load as load_model

    model, tokenizer, _ = load_model(name, dtype="float32")
    return model, tokenizer


def text_ids(tokenizer: Any) -> torch.Tensor:
    """Ids ``[n]`` of the Python language reference, about 113,000 of them."""
    from pydoc_data.topics import topics

    return tokenizer("\n".join(topics.values()), return_tensors="pt").input_ids[0]


def prompt(ids: torch.Tensor, length: int, suffix: int = 0, variant: int = 0) -> torch.Tensor:
    """Ids ``[1, length + suffix]``: the start of the text, then ``suffix`` tokens from elsewhere in it."""
    tail = ids[40_000 + 97 * variant : 40_000 + 97 * variant + suffix]
    return torch.cat([ids[:length], tail])[None]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds a call takes, and its result."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def median(values: Sequence[float]) -> float:
    """Median."""
    return statistics.median(values)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs: noise that both halves of a round share cancels."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])


def memcpy_gbps(nbytes: int = 256 << 20) -> float:
    """Speed of one thread copying touched memory, GB/s (median of 7)."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    return nbytes / median([timed(lambda: np.copyto(target, source))[0] for _ in range(7)]) / 1e9


def report(name: str, rows: list[dict[str, Any]], notes: Sequence[str] = ()) -> None:
    """Print a Markdown table and save it as JSON under ``benchmarks/results``."""
    print(f"\n## {name}\n{hardware()}\n")
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(c)) for c in columns) + " |")
    for note in notes:
        print(f"\n{note}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"hardware": hardware(), "rows": rows, "notes": list(notes)}, indent=1) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
