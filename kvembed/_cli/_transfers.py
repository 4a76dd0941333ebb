"""What ``kvembed doctor`` says of the way KV takes between host memory and the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["describe", "inspect_transfer"]

_NAMES = {"extension": "CUDA extension", "torch": "PyTorch streams", "plain": "plain copies"}
_MEASURED_BYTES = 64 << 20


def inspect_transfer(device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """Look at how a device's KV is moved.

    Args:
        device: The device.
        quick: Leave out the measurements.

    Returns:
        ``engine`` (``"extension"``, ``"torch"`` or ``"plain"``), ``reason``, ``extension`` (why that is not used, where
        it could be), ``batch`` and ``kernels`` (of the extension, in words), ``link`` (``generation``, ``lanes`` and
        ``bytes_per_second`` of the GPU's PCIe link), ``to_device`` and ``to_host`` (measured bytes a second), ``error``
        (why nothing could be measured), ``ignored`` (what ``KVEMBED_TRANSFER`` says, where that is no engine). What
        does not apply is None.
    """
    from kvembed._transfer.choose import choose, engine_for

    choice = choose(device)
    facts: dict[str, Any] = {
        "engine": choice.kind,
        "reason": choice.reason,
        "extension": choice.extension,
        "ignored": choice.ignored,
        **dict.fromkeys(("batch", "kernels", "link", "to_device", "to_host", "error")),
    }
    if choice.kind == "extension":
        facts.update(_of_extension(device.index or 0, load_kernels=not quick))
    if not quick:
        from kvembed._transfer.measure import measure

        try:
            engine = engine_for(device)
            try:
                facts["to_device"], facts["to_host"] = measure(engine, _MEASURED_BYTES)
            finally:
                engine.close()
        except RuntimeError as error:  # the device's: out of memory, most likely
            facts["error"] = str(error)
    return facts


def _of_extension(index: int, *, load_kernels: bool) -> dict[str, Any]:
    from kvembed_cuda import status

    # Loading makes a context on the GPU, which a measurement does anyhow.
    found = status(load_kernels=load_kernels)
    link = found.devices[index].link if index < len(found.devices) else None
    return {
        "batch": found.batch,
        "kernels": found.kernels_reason,
        "link": link
        and {"generation": link.generation, "lanes": link.lanes, "bytes_per_second": link.bytes_per_second},
    }


def describe(facts: dict[str, Any]) -> str:
    """Say in a line or some what `inspect_transfer` found."""
    lines = [f"{_NAMES[facts['engine']]}: {facts['reason']}"]
    if facts["to_device"]:
        link = facts["link"]
        into, out = (_rate(facts[way], link) for way in ("to_device", "to_host"))
        of = f" of PCIe {link['generation']} x{link['lanes']}" if link else ""
        lines.append(f"in {into}, out {out}{of}")
    if facts["error"]:
        lines.append(f"not measured: {facts['error']}")
    if facts["extension"]:
        lines.append(f"CUDA extension: {facts['extension']}")
    if facts["engine"] == "extension":
        lines.append(f"batched copies: {facts['batch']}; kernels: {facts['kernels']}")
    return "\n".join(lines)


def _rate(value: float, link: dict[str, Any] | None) -> str:
    share = f" ({value / link['bytes_per_second']:.0%})" if link else ""
    return f"{value / 1e9:.1f} GB/s{share}"
