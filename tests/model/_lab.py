"""What the tests of the model side share: stores that are checked at the end, plain runs, and comparisons."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvembed import CachedModel, KVStore

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Lab",
    "assert_close",
    "assert_equal_bits",
    "bits",
    "environment_of_a_child",
    "cut_texts",
    "leave_only",
    "random_ids",
    "run",
    "run_full",
    "tokens",
]

BLOCK = 16
"""Block size of most tests here: small, so that a short prompt has several blocks."""


def random_ids(n: int, seed: int = 0) -> torch.Tensor:
    """Return ``[1, n]`` token ids that are plain bytes (no special tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 250, (1, n), generator=generator)


def environment_of_a_child(**more: str) -> dict[str, str]:
    """Return an environment in which another Python imports what this one does."""
    root = str(Path(__file__).resolve().parents[2])
    # Also the folder of another version of transformers, where this run has one.
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}


def cat(*parts: torch.Tensor) -> torch.Tensor:
    """Join ``[1, n]`` id tensors."""
    return torch.cat(parts, dim=1)


def run(model: Any, ids: torch.Tensor, new: int = 12, **kwargs: Any) -> Any:
    """Call ``generate()`` of a plain model or a cached one: greedy unless told otherwise."""
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, **kwargs}
    return model.generate(ids, **arguments)


def run_full(model: Any, ids: torch.Tensor, new: int = 12, **kwargs: Any) -> Any:
    """Like `run`, with everything a caller can ask for: scores, logits, and the cache itself."""
    return run(model, ids, new, return_dict_in_generate=True, output_logits=True, output_scores=True, **kwargs)


def tokens(result: Any) -> list[int]:
    """Return the ids of a result, prompt included."""
    return getattr(result, "sequences", result)[0].tolist()


def bits(result: Any) -> list[torch.Tensor]:
    """Return what must agree: the ids, the logits of every step, keys and values of every layer."""
    kv = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
    return [result.sequences, torch.stack(result.logits), *kv]


def assert_equal_bits(a: Any, b: Any) -> None:
    """Fail unless two full results agree bit for bit."""
    for i, (x, y) in enumerate(zip(bits(a), bits(b), strict=True)):
        assert x.shape == y.shape, f"part {i}: shape {tuple(x.shape)}, not {tuple(y.shape)}"
        assert torch.equal(x, y), f"part {i}: largest difference {float((x - y).abs().max()):.3g}"


def assert_close(a: Any, b: Any, atol: float = 1e-4) -> None:
    """Fail unless two full results have the same tokens, and logits and KV that are equal to rounding."""
    assert tokens(a) == tokens(b)
    for i, (x, y) in enumerate(zip(bits(a), bits(b), strict=True)):
        assert x.shape == y.shape, f"part {i}: shape {tuple(x.shape)}, not {tuple(y.shape)}"
        error = float((x.double() - y.double()).abs().max()) if x.numel() else 0.0
        assert error <= atol, f"part {i}: largest difference {error:.3g}"


def leave_only(cached: CachedModel, tier: str) -> None:
    """Make ``tier`` the fastest one that still holds anything; "cold" stands for a model that has seen nothing yet."""
    if tier in ("cold", "live"):
        return
    cached.drop_live()
    if tier == "disk":
        cached.store.flush()
        assert cached.store._cpu is not None
        cached.store._cpu.clear()


def reference_text() -> str:
    """Return the Python reference, which every Python has: half a million letters of real text."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def cut_texts(tokenizer: Any, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return pieces of the Python reference, one after the other, as ``[1, n]`` ids."""
    ids = tokenizer(reference_text()[: 12 * sum(lengths)], add_special_tokens=False, verbose=False)["input_ids"]
    pieces, at = [], 0
    for length in lengths:
        pieces.append(join(ids[at : at + length]))
        assert pieces[-1].shape[1] == length
        at += length
    return pieces


class Lab:
    """Makes stores and cached models below one folder; `finish` closes and checks all of them.

    Args:
        folder: Where the stores are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._models: list[CachedModel] = []
        self._stores: list[KVStore] = []
        self.expect_sound = True
        """False for tests that damage a store on purpose."""

    def store(self, name: str = "store", **options: Any) -> KVStore:
        """Open a store; 64 MiB in memory and 256 MiB on disk unless told otherwise."""
        store = KVStore(self.folder / name, **{"max_cpu_bytes": 64 << 20, "max_disk_bytes": 256 << 20, **options})
        self._stores.append(store)
        return store

    def wrap(self, model: Any, store: KVStore | None = None, tokenizer: Any = None, **options: Any) -> CachedModel:
        """Wrap a model, in blocks of 16 tokens unless told otherwise."""
        store = self.store() if store is None else store
        cached = CachedModel(model, tokenizer, store=store, **{"block_size": BLOCK, "progress": False, **options})
        self._models.append(cached)
        return cached

    leave_only = staticmethod(leave_only)

    def finish(self) -> None:
        """Close everything; every store must be sound, and nothing may have gone wrong in the background."""
        for cached in self._models:
            cached.close()
        for store in self._stores:
            if store.closed:
                continue
            if self.expect_sound:
                assert store.verify().problems == ()
                assert store.take_problems() == []
            store.close()


def join(ids: Sequence[int]) -> torch.Tensor:
    """Return a list of ids as ``[1, n]``."""
    return torch.tensor([list(ids)])
