"""The weights of a model as bytes: a checksum over all of them, and what a quick look at them can see.

Packed tensors of quantised models are looked at as the tensors they are made of, and what a layer keeps beside its
parameters (scales, packed weights) is read from where it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["sample_view", "scan", "tensors_of", "weights_checksum"]

_SAMPLED_WORDS = 8


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all parameters and buffers once, with their names (tied ones under the first name)."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _flat_bytes(tensor: torch.Tensor) -> np.ndarray:
    flat = tensor.detach().contiguous().view(-1)
    if not flat.numel():
        return np.empty(0, np.uint8)
    return flat.view(torch.uint8).numpy()


def _device_checksum(tensor: torch.Tensor) -> bytes:
    """Order-sensitive checksum computed where the tensor lives; only eight bytes cross the bus."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = data.numel() // 8
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if words:
        body = data[: words * 8].view(torch.int64)
        # 2^22 words at a time bounds the memory of the weights; odd weights lose no bit of any word.
        for start in range(0, words, 1 << 22):
            part = body[start : start + (1 << 22)]
            index = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
            weight = ((index * -7046029254386353131) ^ (index >> 7)) | 1
            total += (part * weight).sum()
    tail = data[words * 8 :].cpu().numpy().tobytes()
    return int(total.item()).to_bytes(8, "little", signed=True) + tail


def weights_checksum(model: torch.nn.Module) -> str:
    """Return a hex checksum over all bytes of all parameters and buffers, and of what modules keep beside them."""
    total = xxhash.xxh3_128()

    def add(name: str, tensor: torch.Tensor) -> None:
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.device.type == "meta":
            total.update(b"meta")
        elif tensor.device.type == "cpu":
            total.update(_flat_bytes(tensor).data)
        else:
            total.update(_device_checksum(tensor))

    seen = set()
    for name, tensor in _tensors(model):
        seen.update((name, id(tensor)))
        parts, text = _parts(tensor)
        total.update(text.encode())
        for part in parts:
            add(name, part)
    # Quantised layers keep scales, or all of their weights, where only their state_dict() shows them.
    for name, value in model.state_dict(keep_vars=True).items():
        if name in seen or id(value) in seen:
            continue
        if isinstance(value, torch.Tensor) and not value.is_quantized:
            add(name, value)
        else:
            total.update(f"{name}|{_quantised_text(value)}".encode())
    return total.hexdigest()


def _quantised_text(value: Any) -> str:
    """Write down what is not a plain tensor: weights that torch quantised itself, and settings."""
    if isinstance(value, torch.Tensor):
        data = _flat_bytes(value.dequantize())
        return f"{value.dtype} {value.qscheme()} {tuple(value.shape)} {xxhash.xxh3_128_hexdigest(data.data)}"
    if isinstance(value, tuple | list):
        return str([_quantised_text(item) for item in value])
    return str(value)


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _parts(tensor: torch.Tensor) -> tuple[list[torch.Tensor], str]:
    """Return the plain tensors that a packed one is made of, and in words how.

    Nothing of the whole shows an edit of its parts, neither version nor address; and what it shows as values does not
    tell whether inputs are quantised too.
    """
    kind = type(tensor)
    if kind in _PLAIN:
        return [tensor], ""
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = getattr(tensor, "__tensor_flatten__")()  # noqa: B009, for those that have it
        inner = [_parts(getattr(tensor, name)) for name in names if getattr(tensor, name) is not None]
        text = f"{kind.__qualname__}|{names}|{context}|{''.join(text for _, text in inner)}"
        return [part for parts, _ in inner for part in parts], text
    tensors, settings = _attached(tensor)
    return [tensor, *tensors], f"{kind.__qualname__}|{settings}"


def _attached(owner: Any) -> tuple[list[torch.Tensor], list[str]]:
    """Return tensors and settings among the attributes of an object, and of objects there."""
    tensors: list[torch.Tensor] = []
    settings: list[str] = []
    for name, value in sorted(vars(owner).items()):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, bool | int | float | str | torch.dtype | torch.Size):
            settings.append(f"{name}={value}")
        elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module | type):
            more = _attached(value)
            tensors += more[0]
            settings += more[1]
    return tensors, settings


def tensors_of(modules: list[tuple[str, torch.nn.Module]]) -> list[torch.Tensor]:
    """Return all parameters and buffers once, packed ones as their parts."""
    tensors = {id(t): t for _, module in modules for t in module._parameters.values()}
    tensors |= {id(t): t for _, module in modules if module._buffers for t in module._buffers.values()}
    found: list[torch.Tensor] = []
    for tensor in tensors.values():
        if tensor is not None:
            found += [tensor] if type(tensor) in _PLAIN else _parts(tensor)[0]
    for _, module in modules:
        if "state" in module.__dict__ and type(module).__module__.startswith("bitsandbytes."):
            found += _attached(module.__dict__["state"])[0]  # the scales of int8
    return found


def scan(tensors: list[torch.Tensor]) -> list[list[int]]:
    return [
        [id(t) for t in tensors],
        [_version(t) for t in tensors],
        [t.data_ptr() if t.device.type != "meta" else 0 for t in tensors],
    ]


def _version(tensor: torch.Tensor) -> int:
    # Inference tensors keep no version counter.
    return -1 if tensor.is_inference() else tensor._version


def sample_view(tensor: torch.Tensor) -> np.ndarray | None:
    """Return a view of a few words spread over the tensor's memory, or None where the CPU cannot see it."""
    if tensor.device.type != "cpu" or type(tensor.data) is not torch.Tensor or not tensor.is_contiguous():
        return None
    flat = _flat_bytes(tensor)
    step = max(8, len(flat) // _SAMPLED_WORDS // 8 * 8)
    usable = len(flat) // 8 * 8
    # Eight bytes at every step: still a view, so it follows the memory.
    return np.lib.stride_tricks.as_strided(
        flat, shape=(max(0, -(-(usable - 7) // step)), 8), strides=(step, 1), writeable=False
    )
