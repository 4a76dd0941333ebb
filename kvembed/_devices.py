"""The devices a model computes on: what is moved there and back, and what stays there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed import hf
from kvembed._block import Block, BlockInfo
from kvembed._codecs.names import LOSSLESS
from kvembed._transfer import Transfers
from kvembed._transfer.offload import Offload

if TYPE_CHECKING:
    import torch

    from kvembed._block import Layout
    from kvembed._cachespec import CacheSpec
    from kvembed._keys import TokenIds
    from kvembed._live import LiveSequence
    from kvembed._store import KVStore

__all__ = ["Devices"]


class Devices:
    """The devices of one model. Each layer's KV goes to and comes from the device that layer computes on.

    Args:
        store: Whose gpu tier keeps blocks there.
        main: The device of the model's inputs.
    """

    def __init__(self, store: KVStore, main: torch.device) -> None:
        self._store = store
        self._main = main
        self.transfers = Transfers()
        self._offload = Offload(self.transfers)

    @property
    def on_host(self) -> bool:
        """True where KV is computed in host memory, and not only kept there."""
        return self.transfers.of(self._main).direct

    def prepare(self, spec: CacheSpec, block_size: int) -> int:
        """Allocate what transfers go through, now and not in a call; return the budget that live caches share.

        Args:
            spec: Shape of the model's cache.
            block_size: Tokens of a full block.
        """
        rows_of = [rows for _, rows in spec.rows()]
        if rows_of:
            self._main = rows_of[0].device
        away: list[torch.device] = []
        for rows in rows_of:
            engine = self.transfers.of(rows.device)
            engine.prepare(block_size * rows.token_nbytes)
            if not engine.direct and rows.device not in away:
                away.append(rows.device)
        if away:
            self._offload.prepare(self.transfers.of(away[0]), block_size * spec.token_nbytes)
            self._store.use_devices(self.transfers, away)
        return self._store.max_cpu_bytes if self.on_host else self._store.max_gpu_bytes

    def block(self, cache: Any, info: BlockInfo, ids: TokenIds, layout: Layout) -> Block:
        """Take a block out of a cache, between two forwards; from a device it may still be arriving."""
        end = info.start + info.n_tokens
        if self.on_host:
            return Block(info, ids, layout, hf.capture(cache, layout, info.start, end))
        return self._offload.take(info, ids, layout, hf.layers_of(cache), info.start, end)

    def leave(self, sequence: LiveSequence, spec: CacheSpec, namespace: bytes) -> None:
        """Keep the full blocks of a sequence that is live no more on its devices, as far as there is room.

        Args:
            sequence: Has the keys of its captured blocks.
            spec: Shape of its cache.
            namespace: The model's digest.
        """
        if self.on_host or not self._store.max_gpu_bytes:
            return
        size, layers = spec.block_size, hf.layers_of(sequence.cache)
        keys = sequence.keys[: sequence.captured // size]
        for number, (key, is_there) in enumerate(zip(keys, self._store.on_device(keys), strict=True)):
            start, end = number * size, (number + 1) * size
            if is_there or any(layer.first > start for layer in layers):
                continue  # windows may have moved past it
            parent = keys[number - 1] if number else sequence.root
            ids = np.ascontiguousarray(sequence.ids[start:end])
            codec, nbytes = sequence.codec_at(end), spec.layout.nbytes(size)
            exact = sequence.exact >= end and codec == LOSSLESS
            info = BlockInfo(key, parent, namespace, start, size, exact, nbytes, codec)
            if not self._store.put_on_device(hf.device_block(sequence.cache, info, ids, spec.layout, self.transfers)):
                return  # what follows is only further from the root

    def close(self) -> None:
        """Give pinned memory back."""
        self._offload.close()
        self.transfers.close()
