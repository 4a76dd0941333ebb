"""``kvembed bench --simulate``: what overlap a model, a context and a machine should reach, without running it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvembed._cli import _common, _machine
from kvembed._units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvembed._model import CachedModel
    from kvembed._transfer.simulate import Timeline

__all__ = ["print_simulation", "restore_timeline"]

_READERS = 2


def restore_timeline(
    layer_nbytes: Sequence[int], compute_s: float, read_rate: float, copy_rate: float | None
) -> Timeline:
    """Return the timeline of a restore.

    Args:
        layer_nbytes: Bytes of each layer's keys and values.
        compute_s: Seconds the suffix computes, all layers together.
        read_rate: Bytes a second of the disk, for all readers together.
        copy_rate: Bytes a second to the device, or None where there is no device.
    """
    from kvembed._transfer.simulate import simulate

    layers = len(layer_nbytes)
    return simulate(
        [compute_s / layers] * layers,
        [_READERS * n / read_rate for n in layer_nbytes],
        None if copy_rate is None else [n / copy_rate for n in layer_nbytes],
        readers=_READERS,
    )


def _suffix_seconds(cached: CachedModel, ids: list[int], suffix: int) -> float:
    """Return the seconds a suffix takes above a live cache (the better of two)."""
    import torch

    seconds = []
    for end in (suffix, 2 * suffix, 3 * suffix):
        prompt = torch.tensor([ids[: len(ids) - 3 * suffix] + ids[len(ids) - end :][:suffix]])
        prompt = prompt.to(cached.hf_model.device)
        cached.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=1)
        seconds.append(cached.usage.ttft_s)
    return min(seconds[1:])


def print_simulation(
    cached: CachedModel,
    ids: list[int],
    suffix: int,
    folder: Path,
    *,
    disk_rate: float | None,
    pcie_rate: float | None,
    as_json: bool,
) -> None:
    """Measure what a suffix computes, and show what restoring the rest should take.

    Args:
        cached: The model.
        ids: The document, and three suffixes after it.
        suffix: Tokens of each.
        folder: A folder on the disk in question.
        disk_rate: Bytes a second it is read at; measured when None (from the page cache).
        pcie_rate: Bytes a second to the device; None where there is none.
        as_json: Print JSON.
    """
    tokens = len(ids) - 3 * suffix
    if disk_rate is None:
        rates = _machine.disk_rates(folder)
        disk_rate = rates[1] if rates else _machine.memcpy_rate()
    compute_s = _suffix_seconds(cached, ids, suffix)
    spec = cached._engine.spec
    nbytes = [spec.row_capacity(rows, tokens) * rows.token_nbytes for _, rows in spec.rows()]
    timeline = restore_timeline(nbytes, compute_s, disk_rate, pcie_rate)
    facts: dict[str, Any] = {
        "tokens": tokens,
        "suffix": suffix,
        "nbytes": sum(nbytes),
        "disk_bytes_per_second": disk_rate,
        "pcie_bytes_per_second": pcie_rate,
        "compute_s": compute_s,
        "total_s": timeline.total_s,
        "load_s": timeline.load_s,
        "hidden": timeline.hidden,
    }
    if as_json:
        _common.print_json({**facts, "timeline": asdict(timeline)})
        return
    out = _common.console()
    rates = f"disk {format_bytes(int(disk_rate))}/s" + (
        f", device {format_bytes(int(pcie_rate))}/s" if pcie_rate is not None else ""
    )
    out.print(
        f"{format_count(tokens)} tokens of KV in {len(nbytes)} layers ({format_bytes(sum(nbytes))}), a suffix of "
        f"{suffix}; {rates}",
        markup=False,
    )
    out.print(timeline.text(), markup=False, highlight=False)
