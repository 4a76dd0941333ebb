"""`GpuTier`: blocks that stay in the memory of the device they were computed on, or of several devices."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed._block import Block
from kvembed._errors import ConfigError
from kvembed._memory import host_buffer
from kvembed._tiers.cpu import CpuTier
from kvembed._transfer import Strip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvembed._block import BlockInfo, Layout
    from kvembed._keys import TokenIds
    from kvembed._tiers.disk import DiskTier
    from kvembed._transfer import Transfers

__all__ = ["DeviceBlock", "DeviceSource", "GpuTier", "keeper"]


class DeviceBlock(Block):
    """A block whose tensors lie on devices, each where its layer computes.

    Args:
        info: As of `Block`.
        token_ids: Likewise.
        layout: Likewise.
        tensors: uint8 ``[heads, tokens, row_nbytes]``, one for each tensor of the layout.
        transfers: Engines of the devices.
    """

    _tensors: tuple[torch.Tensor, ...]
    _transfers: Transfers

    def __init__(
        self,
        info: BlockInfo,
        token_ids: TokenIds,
        layout: Layout,
        tensors: Sequence[torch.Tensor],
        transfers: Transfers,
    ) -> None:
        values = {"info": info, "token_ids": token_ids, "layout": layout, "_tensors": tuple(tensors)}
        for name, value in {**values, "_transfers": transfers}.items():
            object.__setattr__(self, name, value)

    def on_device(self, index: int) -> torch.Tensor:
        """Return tensor number ``index`` where it lies."""
        return self._tensors[index]

    @property
    def data(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A copy of the bytes in host memory."""
        data = host_buffer(self.info.nbytes)
        at = 0
        for index, tensor in enumerate(self._tensors):
            data[at : at + tensor.nbytes] = self.tensor(index).reshape(-1)
            at += tensor.nbytes
        return data

    def tensor(self, index: int) -> np.ndarray:
        """Return a copy of one tensor in host memory."""
        tensor = self._tensors[index]
        host = np.empty(tuple(tensor.shape), np.uint8)
        engine = self._transfers.of(tensor.device)
        engine.to_host([Strip(host, tensor)], engine.mark()).wait_host()
        return host


class DeviceSource:
    """A block on devices opened for reading: `kvembed._tiers._base.BlockSource`, and its tensors as they are.

    Args:
        block: The block; held, so that eviction meanwhile does not touch its bytes.
    """

    tier = "gpu"

    def __init__(self, block: DeviceBlock) -> None:
        self.info: BlockInfo = block.info
        self.token_ids: TokenIds = block.token_ids
        self.layout: Layout = block.layout
        self._block = block

    def on_device(self, index: int, n: int, skip: int) -> torch.Tensor:
        """Return ``n`` tokens of a tensor where it lies, uint8 ``[heads, n, row_nbytes]``, without a copy."""
        return self._block.on_device(index)[:, skip : skip + n]

    def read_into(self, index: int, rows: Sequence[np.ndarray], skip: int = 0) -> None:
        """Copy tensors to the host; see `kvembed._tiers._base.BlockSource.read_into`."""
        for number, target in enumerate(rows, start=index):
            spec, total, n = self.layout.tensors[number], self.info.n_tokens, target.shape[1]
            if target.shape != (spec.heads, n, spec.row_nbytes) or not 0 <= skip <= total - n:
                raise ConfigError(f"rows {target.shape} do not fit tensor {number} of a block of {total} tokens")
            np.copyto(target, self._block.tensor(number)[:, skip : skip + n], casting="no")

    def read(self, index: int, count: int) -> list[np.ndarray]:
        """Copy whole tensors to the host; see `kvembed._tiers._base.BlockSource.read`."""
        return [self._block.tensor(number) for number in range(index, index + count)]

    def close(self) -> None:
        """Do nothing: memory goes with the last reference."""


def keeper(cpu: CpuTier | None, disk: DiskTier | None) -> Callable[[Block], None]:
    """Return what puts a block that leaves the devices into host memory, if it is nowhere else."""

    def keep(block: Block) -> None:
        if cpu is None or cpu.get(block.key) is not None:
            return
        with contextlib.suppress(OSError, sqlite3.Error):  # then it is kept, to be sure
            if disk is not None and disk.contains([block.key])[0] is not None:
                return
        with contextlib.suppress(RuntimeError):  # the device failed: to the model that is a miss
            cpu.put(Block(block.info, block.token_ids, block.layout, block.data))

    return keep


class GpuTier(CpuTier):
    """Blocks in device memory, under one budget for all devices.

    What leaves a device is kept in host memory: blocks are there already as a rule, since every finished block is put
    to the store, and one that is nowhere else is copied out as it is evicted.

    Args:
        max_bytes: Budget, live caches included.
        transfers: Engines of the devices.
        device: Where blocks go that come from the host.
        keep: Called with a block that is evicted; it copies the bytes out if nothing else has them.
        seconds_per_token: Of a prefill, by a model's digest.
    """

    name = "gpu"

    def __init__(
        self,
        max_bytes: int,
        transfers: Transfers,
        device: torch.device,
        keep: Callable[[Block], object] = lambda block: None,
        seconds_per_token: Callable[[bytes], float | None] = lambda digest: None,
    ) -> None:
        super().__init__(max_bytes, seconds_per_token)
        self._transfers = transfers
        self._device = device
        self._keep = keep

    def put(self, block: Block, *, dirty: bool = False, on_disk: bool = False) -> bool:
        """Keep ``block``; one in host memory is copied to the device. False also when the device has no room."""
        try:
            return super().put(block, dirty=dirty, on_disk=on_disk)
        except RuntimeError:  # out of memory: the budget is a promise of ours, not of the device
            return False

    def _taken_in(self, block: Block) -> Block:
        return block if isinstance(block, DeviceBlock) else self._uploaded(block)

    def _uploaded(self, block: Block) -> DeviceBlock:
        engine = self._transfers.of(self._device)
        tensors: list[torch.Tensor] = []
        for index, spec in enumerate(block.layout.tensors):
            shape = (spec.heads, spec.rows(block.info.n_tokens), spec.row_nbytes)
            tensor = torch.empty(shape, dtype=torch.uint8, device=self._device)
            staging = engine.staging(tensor.nbytes)
            try:
                host = staging.array.reshape(shape)
                np.copyto(host, block.tensor(index))
                engine.to_device([Strip(host, tensor)], engine.mark(), staging).wait_compute()
            finally:
                staging.release()
            tensors.append(tensor)
        return DeviceBlock(block.info, block.token_ids, block.layout, tensors, self._transfers)

    def _leaves(self, block: Block) -> None:
        self._keep(block)

    def open(self, key: bytes) -> Any:
        """Open a block for reading, or None when it is not here."""
        block = self.get(key)
        return DeviceSource(block) if isinstance(block, DeviceBlock) else None
