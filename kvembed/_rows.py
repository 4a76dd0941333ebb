"""The rows of one cache layer: two buffers, allocated once, that tokens are appended to and restored into.

What is here does not depend on the kind of attention; ``hf.py`` makes transformers' cache layers of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    import numpy as np

    from kvembed._tiers._base import BlockSource

__all__ = ["Fence", "Gate", "Place", "Rows", "Span", "as_bytes"]


class Gate(Protocol):
    """Holds a layer back until its rows have been restored."""

    def wait(self, layer: int) -> None:
        """Return when rows of ``layer`` are complete; raise when they cannot be."""
        ...


class Fence(Protocol):
    """A copy out of the rows that is under way."""

    def wait_compute(self) -> None:
        """Have the device finish it before anything that is queued from now on."""
        ...


class Place(NamedTuple):
    """Where a buffer's rows lie. Asking a tensor costs microseconds, of which a block of many layers has none to spare.

    Args:
        address: Of the first row, on the buffer's device.
        heads: How many.
        head_pitch: Bytes from one head to the next.
        row_nbytes: Bytes of a row; rows touch.
    """

    address: int
    heads: int
    head_pitch: int
    row_nbytes: int


class Span(NamedTuple):
    """Some rows of a buffer.

    Args:
        buffer: ``[1, heads, capacity, width]``.
        place: Where it is.
        start: First row.
        end: Row after the last one.
    """

    buffer: torch.Tensor
    place: Place
    start: int
    end: int


def _place(buffer: torch.Tensor) -> Place:
    _, heads, capacity, width = buffer.shape
    assert buffer.is_contiguous()  # as they are allocated
    row_nbytes = width * buffer.element_size()
    return Place(buffer.data_ptr(), heads, capacity * row_nbytes, row_nbytes)


def as_bytes(tensor: torch.Tensor) -> np.ndarray | None:
    """Return ``[heads, rows, row_nbytes]`` over the same memory, or None off the CPU."""
    if tensor.device.type != "cpu":
        return None
    return tensor[0].view(torch.uint8).numpy()


class Rows:
    """The two buffers of one layer, and the part of our layers that does not depend on attention kind.

    Row r holds the token at position ``first + r``; ``length`` tokens have been seen in all.
    """

    index: int
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def _init_rows(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.index = index
        self.dtype, self.device = k.dtype, k.device
        self.is_initialized = True
        self.first = 0
        self.captured = 0  # tokens before this one may be dropped once they leave the window
        self._length = 0
        self._gate: Gate | None = None
        self._leaving: Fence | None = None
        self._set_buffers(k, v)

    def _set_buffers(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._k, self._v = k, v
        self._k8, self._v8 = as_bytes(k), as_bytes(v)
        self._k_place, self._v_place = _place(k), _place(v)

    @property
    def capacity(self) -> int:
        """Rows allocated."""
        return self._k.shape[2]

    @property
    def buffer_nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._k.nbytes + self._v.nbytes

    @property
    def attached(self) -> bool:
        """False once something replaced ``keys`` (reorder, repeat, another dtype): then it is a plain layer."""
        return self.keys is self._k_view

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> int:
        """Write new rows; return the row after them."""
        row = self._length - self.first
        end = row + key_states.shape[-2]
        self._k[:, :, row:end] = key_states
        self._v[:, :, row:end] = value_states
        return end

    def _show(self, start: int, end: int) -> None:
        self.keys = self._k_view = self._k[:, :, start:end]
        self.values = self._v[:, :, start:end]

    def _fits_rows(self, key_states: torch.Tensor) -> bool:
        return self.attached and key_states.shape[0] == 1 and key_states.dtype == self.dtype

    def _grow(self, rows: int) -> None:
        """Move to buffers with at least ``rows`` rows: a quarter more, so that growth stays rare."""
        rows = max(rows, self.capacity + self.capacity // 4)
        used = self._length - self.first
        grown = []
        for old in (self._k, self._v):
            new = torch.empty((*old.shape[:2], rows, old.shape[3]), dtype=old.dtype, device=old.device)
            new[:, :, :used] = old[:, :, :used]
            grown.append(new)
        self._set_buffers(*grown)

    def hold(self, gate: Gate) -> None:
        """Make the next ``update`` wait until the restored rows are complete."""
        self._gate = gate

    def _pass_gate(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.wait(self.index)

    def protect(self, fence: Fence) -> None:
        """Say that rows are being copied out: they are not overwritten before that has ended."""
        self._leaving = fence

    def _before_overwriting(self) -> None:
        fence, self._leaving = self._leaving, None
        if fence is not None:
            fence.wait_compute()

    def rows(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values ``[1, heads, end - start, width]`` of tokens ``start..end`` as views."""
        a, b = start - self.first, end - self.first
        return self._k[:, :, a:b], self._v[:, :, a:b]

    def spans(self, start: int, end: int) -> tuple[Span, Span]:
        """Return the rows of keys and values of tokens ``start..end``."""
        a, b = start - self.first, end - self.first
        return Span(self._k, self._k_place, a, b), Span(self._v, self._v_place, a, b)

    def load_rows(self, source: BlockSource, spec_index: int, start: int, end: int, skip: int) -> None:
        """Fill rows of tokens ``start..end`` from a block; only on the CPU.

        Args:
            source: The block.
            spec_index: Number of the keys in its layout; the values follow them.
            start: Position of the first token.
            end: Position after the last one.
            skip: Tokens of the block before ``start``.
        """
        a, b = start - self.first, end - self.first
        assert self._k8 is not None
        assert self._v8 is not None
        source.read_into(spec_index, [self._k8[:, a:b], self._v8[:, a:b]], skip)
