"""Snapshots: the state of recurrent layers, and of layers of a shape nobody described, as a block of its own.

Keys and values belong to tokens, and a prefix of them is as good as the whole. The state of a linear-attention,
state-space or otherwise opaque layer belongs to a position: it is copied whole, after a forward (never inside one,
when convolution and recurrence are out of step), and is good at that position only.

A snapshot is stored as a block of one pseudo-token, the child of the prefix it belongs to, so that tiers,
catalog, checksums and eviction need not know of it. Its first tensor is a JSON tree of the layers' attributes,
in which tensors are numbers of the tensors after it.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvembed._block import Layout, TensorSpec
from kvembed._errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvembed._tiers._base import BlockSource

__all__ = ["decode_states", "encode_states"]

_VERSION = 1
_TREE = "tree"
_STORED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "U8",
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORED}


class _Writer:
    """Collects tensors while a tree of attributes is turned into JSON."""

    def __init__(self) -> None:
        self.tensors: list[tuple[int, torch.Tensor]] = []
        self._layer = 0

    def layer(self, index: int, attributes: dict[str, Any]) -> dict[str, Any]:
        self._layer = index
        tree = {}
        for name, value in attributes.items():
            if _is_config(value):
                continue  # the layer that is restored was made from the same config
            tree[name] = self._value(value, f"layer {index}, {name}")
        return tree

    def _value(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return {"float": value.hex()}  # JSON has no infinity, and no promise of the last bit
        if isinstance(value, torch.Tensor):
            return self._tensor(value, where)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self._value(item, where) for item in value]}
        if type(value) is dict and all(isinstance(key, int | str) for key in value):
            return {"dict": [[key, self._value(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        raise UnsupportedModelError(f"{where} is a {type(value).__name__}, which cannot be kept")

    def _tensor(self, value: torch.Tensor, where: str) -> Any:
        if type(value) is not torch.Tensor or value.dtype not in _STORED or value.is_sparse:
            raise UnsupportedModelError(f"{where} is a {type(value).__name__} of {value.dtype}, which cannot be kept")
        shape, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
        tree = {"shape": shape, "type": dtype, "device": str(value.device)}
        if value.numel():
            tree["tensor"] = len(self.tensors) + 1
            self.tensors.append((self._layer, value))
        return tree


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict") and hasattr(value, "model_type")


def encode_states(layers: Iterable[tuple[int, dict[str, Any]]]) -> tuple[Layout, np.ndarray]:
    """Copy the attributes of layers into the bytes of a snapshot.

    Args:
        layers: (layer number, attributes) of each layer with a state.

    Returns:
        How the bytes are divided, and the bytes (uint8).

    Raises:
        UnsupportedModelError: An attribute is of a kind that cannot be brought back.
    """
    writer = _Writer()
    trees = {str(index): writer.layer(index, attributes) for index, attributes in layers}
    text = json.dumps({"version": _VERSION, "layers": trees}, separators=(",", ":")).encode()
    specs = [TensorSpec(0, _TREE, 1, len(text), "U8")]
    parts = [np.frombuffer(text, dtype=np.uint8)]
    for number, (index, tensor) in enumerate(writer.tensors, start=1):
        specs.append(TensorSpec(index, f"s{number}", 1, tensor.numel(), _STORED[tensor.dtype]))
        parts.append(tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy())
    return Layout(tuple(specs)), np.concatenate(parts)


def decode_states(source: BlockSource) -> dict[int, dict[str, Any]]:
    """Read a snapshot back.

    Returns:
        The attributes of each layer, by layer number. All tensors are fresh copies: recurrent layers change
        theirs in place.

    Raises:
        ValueError: The snapshot is not one, or its parts do not fit each other.
        BlockFormatError: The bytes are not those that were stored.
    """
    specs = source.layout.tensors
    if not specs or specs[0].name != _TREE or source.info.n_tokens != 1:
        raise ValueError("not a snapshot")
    document = json.loads(_read(source, 0).tobytes())
    if document["version"] != _VERSION:
        raise ValueError(f"snapshot of version {document['version']!r}, not {_VERSION}")
    return {
        int(index): {name: _restored(source, value) for name, value in tree.items()}
        for index, tree in document["layers"].items()
    }


def _read(source: BlockSource, number: int) -> np.ndarray:
    rows = np.empty((1, 1, source.layout.tensors[number].row_nbytes), dtype=np.uint8)
    source.read_into(number, [rows])
    return rows.reshape(-1)


def _restored(source: BlockSource, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "shape" in value:
        return _restored_tensor(source, value)
    ((kind, content),) = value.items()
    if kind == "float":
        return float.fromhex(content)
    if kind == "dtype":
        return _DTYPES[content]
    if kind == "device":
        return torch.device(content)
    if kind == "dict":
        return {key: _restored(source, item) for key, item in content}
    items = [_restored(source, item) for item in content]
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown part {kind!r} of a snapshot")
    return items if kind == "list" else tuple(items)


def _restored_tensor(source: BlockSource, value: dict[str, Any]) -> torch.Tensor:
    shape, dtype, device = value["shape"], _DTYPES[value["type"]], torch.device(value["device"])
    if "tensor" not in value:
        if math.prod(shape) != 0:
            raise ValueError("a tensor of the snapshot is missing")
        return torch.empty(shape, dtype=dtype, device=device)
    spec = source.layout.tensors[value["tensor"]]
    if spec.dtype != _STORED[dtype] or spec.width != math.prod(shape):
        raise ValueError("a tensor of the snapshot has another size than its tree says")
    flat = torch.from_numpy(_read(source, value["tensor"]))
    return flat.view(dtype).reshape(shape).to(device)
