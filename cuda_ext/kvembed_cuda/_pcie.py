"""The PCIe link of a GPU, from the system: the driver's interface has no word for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Link", "link_of"]

_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}


@dataclass(frozen=True)
class Link:
    """A PCIe link at its best; links rest at a lower speed while nothing is copied.

    Args:
        generation: 3, 4, 5 ...
        lanes: Its width.
    """

    generation: int
    lanes: int

    @property
    def bytes_per_second(self) -> float:
        """What its wires carry each way after line coding; protocol takes 10 to 15 % of that."""
        transfers = next(rate for rate, generation in _GENERATIONS.items() if generation == self.generation) * 1e9
        coding = 0.8 if self.generation < 3 else 128 / 130 if self.generation < 6 else 242 / 256
        return transfers * coding * self.lanes / 8


def link_of(bus_id: str, devices: Path = Path("/sys/bus/pci/devices")) -> Link | None:
    """Return the link of the device with this PCI bus id; None where the system does not say.

    The slower of what the device and its neighbour can do counts, where both are known.
    """
    folder = devices / bus_id.lower()
    links = [link for place in (folder, folder.resolve().parent) if (link := _read(place)) is not None]
    if not links:
        return None
    return Link(min(link.generation for link in links), min(link.lanes for link in links))


def _read(folder: Path) -> Link | None:
    try:
        speed = float((folder / "max_link_speed").read_text().split()[0])
        lanes = int((folder / "max_link_width").read_text())
    except (OSError, ValueError, IndexError):
        return None
    return Link(_GENERATIONS[speed], lanes) if speed in _GENERATIONS and 0 < lanes <= 32 else None
