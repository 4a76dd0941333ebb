"""The weights of a model as bytes: a checksum over all of them, and what a quick look at them can see.

Packed tensors of quantised models are looked at as the tensors they are made of. What a layer keeps beside its
parameters (scales, packed weights) is read from where it is, and never through ``state_dict()``: that is for saving,
and some layers change in it. bitsandbytes, on processors for which it packs 4-bit weights anew, unpacks them there and
quantises their scales once more, so that the model computes something else from then on.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    _Modules = Sequence[tuple[str, torch.nn.Module]]

__all__ = ["WeightsWatch", "weights_checksum"]

_SAMPLED_WORDS = 8
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SAVES = ("state_dict", "_save_to_state_dict", "get_extra_state")
_QUANTISED_LAYERS = ("bitsandbytes.", "transformers.integrations.")
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
_SETTINGS = (bool, int, float, str, torch.dtype, torch.Size, enum.Enum)
_OF_ONE_FORWARD = ("idx", "is_training")
"""Where bitsandbytes notes something of the last input, beside its weights."""


def _tensors(modules: _Modules) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all parameters, then all buffers, once, with their names (tied ones under the first name)."""
    seen: set[int] = set()
    for kind in ("_parameters", "_buffers"):
        for prefix, module in modules:
            for name, tensor in getattr(module, kind).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{prefix}.{name}" if prefix else name, tensor


def _kept_beside(modules: _Modules) -> _Modules:
    """Return the modules whose weights are not all parameters and buffers.

    They tell by how they are saved, or are layers of a library that quantises. The attributes of others are left alone:
    some note there what a forward has seen.
    """
    plain = torch.nn.Module
    kinds = {type(module) for _, module in modules}
    found = {
        kind
        for kind in kinds
        if any(getattr(kind, name) is not getattr(plain, name) for name in _SAVES)
        or kind.__module__.startswith(_QUANTISED_LAYERS)
    }
    return [(name, module) for name, module in modules if type(module) in found]


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


def weights_checksum(modules: _Modules, salt: str) -> str:
    """Return a hex checksum over all bytes of all parameters and buffers, and of what modules keep beside them.

    Args:
        modules: All modules and their names.
        salt: Enters with what nobody can look into: KV made with it is for this process only.
    """
    total = xxhash.xxh3_128()

    def add(name: str, tensor: torch.Tensor) -> None:
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.device.type == "meta":
            total.update(b"meta")
        elif tensor.device.type == "cpu":
            total.update(_flat_bytes(tensor).data)
        else:
            total.update(_device_checksum(tensor))

    def add_parts(name: str, parts: _Parts) -> None:
        for setting in parts.settings:
            total.update("|".join(map(str, setting)).encode())
        for part in parts.tensors:
            add(name, part)
        if parts.closed:
            total.update(f"{name}|{len(parts.closed)} of {salt}".encode())

    seen: dict[int, Any] = {}
    for name, tensor in _tensors(modules):
        parts = _Parts(seen, unpack=True)
        parts.add("", tensor)
        add_parts(name, parts)
    for name, module in _kept_beside(modules):
        parts = _Parts(seen, unpack=True)
        parts.add_attributes(module)
        add_parts(f"{name} keeps", parts)
    return total.hexdigest()


class _Parts:
    """The plain tensors that things are made of, settings that say how, and what cannot be looked into.

    Nothing of a packed tensor shows an edit of its parts, neither version nor address; and what it shows as values does
    not tell whether inputs are quantised too.

    Args:
        seen: Tensors and objects that were added before, by id; each is added once.
        unpack: Take packed weights of torch's own quantised layers apart, which copies them.
    """

    def __init__(self, seen: dict[int, Any], *, unpack: bool) -> None:
        self.tensors: list[torch.Tensor] = []
        self.settings: list[tuple[Any, ...]] = []
        self.closed: list[Any] = []
        self.owners: list[tuple[dict[Any, Any] | list[Any] | tuple[Any, ...], tuple[Any, ...], int | None]] = []
        """What things are kept in (attributes, dicts, lists), what was there, and how much if nothing may be added."""
        self._seen = seen
        self._unpack = unpack

    def add(self, name: str, value: Any) -> None:
        """Add a value: a tensor, a setting, a container or an object of these."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self._add_tensor(value)
        elif isinstance(value, _SETTINGS):
            self.settings.append((name, value))
        elif isinstance(value, dict):
            self.owners.append((value, (*value.items(),), len(value)))
            for key in sorted(value, key=str):
                self.add(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            self.owners.append((value, (*value,), len(value)))
            for item in value:
                self.add(name, item)
        elif isinstance(value, torch.ScriptObject):
            self._add_packed(name, value)
        elif hasattr(value, "__dict__") and not callable(value) and not hasattr(value, "to_dict"):
            self.add_attributes(value)  # no module, no function, no config

    def add_attributes(self, owner: Any) -> None:
        """Add what an object keeps in attributes, and objects there."""
        if id(owner) in self._seen:
            return
        self._seen[id(owner)] = owner
        own = vars(owner)
        kept = [name for name in sorted(own) if name not in _OF_EVERY_MODULE and name not in _OF_ONE_FORWARD]
        self.owners.append((own, tuple((name, own[name]) for name in kept), None))
        for name in kept:
            self.add(name, own[name])

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        kind = type(tensor)
        if kind in _PLAIN and tensor.layout is torch.strided:
            if tensor.is_quantized:
                self._add_quantised(tensor)
            else:
                self.tensors.append(tensor)
        elif hasattr(tensor, "__tensor_flatten__"):
            names, context = getattr(tensor, "__tensor_flatten__")()  # noqa: B009, for those that have it
            self.settings.append((kind.__qualname__, names, context))
            self.owners.append((vars(tensor), (*vars(tensor).items(),), None))
            for name in names:
                self.add(name, getattr(tensor, name))
        elif tensor.layout is torch.strided and _has_memory(tensor):
            self.settings.append((kind.__qualname__,))
            self.tensors.append(tensor)
            self.add_attributes(tensor)
        else:
            self.closed.append(tensor)

    def _add_quantised(self, tensor: torch.Tensor) -> None:
        """Add a tensor that torch quantised itself."""
        self.settings.append((tensor.dtype, tensor.qscheme()))
        if not self._unpack:
            self.closed.append(tensor)  # a copy of it shows nothing
        elif tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            self.settings.append((tensor.q_scale(), tensor.q_zero_point()))
            self.tensors.append(tensor.int_repr())
        else:
            scales = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
            self.tensors += [tensor.int_repr(), *scales]

    def _add_packed(self, name: str, value: Any) -> None:
        """Add the weights of torch's own quantised layers, which lie in an object of C++."""
        if not self._unpack:
            self.closed.append(value)
            return
        try:
            state = value.__getstate__()
        except Exception:  # whatever an object of C++ may raise that cannot be saved
            self.closed.append(value)
        else:
            parts = _Parts({}, unpack=True)  # copies: the next ones may come to lie at their address
            parts.add(name, state)
            self.tensors += parts.tensors
            self.settings += parts.settings
            self.closed += parts.closed


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # it only stands for others
        return False
    return True


class WeightsWatch:
    """Sees at little cost that weights were edited since it was made.

    Version counters and addresses show edits in place, loading and casting; a few words of every tensor show what those
    miss. What tensors are kept in is compared by identity: to take packed tensors apart again costs ten times as much.

    Args:
        modules: All modules and their names.

    Attributes:
        device: Where the first of the tensors is.
    """

    def __init__(self, modules: _Modules) -> None:
        self._modules = modules
        own = self._own()
        parts = _Parts({}, unpack=False)
        for tensor in own.values():
            if tensor is not None:
                parts.add("", tensor)
        for _, module in _kept_beside(modules):
            parts.add_attributes(module)
        # References, so that nothing new can come to lie at the address of one of them.
        self._tensors, self._closed, self._owners = parts.tensors, parts.closed, parts.owners
        self._held, self._ids = [*own.values()], [*own]
        self.device = self._tensors[0].device if self._tensors else torch.device("cpu")
        self._marks = self._look()
        self._views = [_sample_view(tensor) for tensor in self._tensors]
        self._sample = self._sampled()

    def changed(self) -> bool:
        """Return True when an edit was seen."""
        return (
            [*self._own()] != self._ids
            or not all(_holds(*item) for item in self._owners)
            or self._look() != self._marks
            or self._sampled() != self._sample
        )

    def _own(self) -> dict[int, torch.Tensor | None]:
        """Return all parameters and buffers, by id."""
        tensors = {id(t): t for _, module in self._modules for t in module._parameters.values()}
        return tensors | {id(t): t for _, module in self._modules if module._buffers for t in module._buffers.values()}

    def _look(self) -> list[list[int]]:
        return [
            [_version(t) for t in self._tensors],
            [t.data_ptr() if t.device.type != "meta" else 0 for t in self._tensors],
            [_version(item) for item in self._closed if isinstance(item, torch.Tensor)],
        ]

    def _sampled(self) -> int:
        return xxhash.xxh3_64_intdigest(b"".join(v.tobytes() for v in self._views if v is not None))


def _holds(owner: Any, kept: tuple[Any, ...], length: int | None) -> bool:
    """True when the attributes or items that were there are there."""
    if length is not None and len(owner) != length:
        return False
    if not isinstance(owner, dict):
        return all(map(_is_same, owner, kept))
    for name, value in kept:
        now = owner.get(name)
        if now is not value and not _is_same(now, value):
            return False
    return True


def _is_same(now: Any, before: Any) -> bool:
    return now is before or (isinstance(before, _SETTINGS) and type(now) is type(before) and now == before)


def _version(tensor: torch.Tensor) -> int:
    # Inference tensors keep no version counter.
    return -1 if tensor.is_inference() else tensor._version


def _sample_view(tensor: torch.Tensor) -> np.ndarray | None:
    """Return a view of a few words spread over the tensor's memory, or None where the CPU cannot see it."""
    if tensor.device.type != "cpu" or tensor.is_quantized or type(tensor.data) is not torch.Tensor:
        return None
    if not tensor.is_contiguous():
        return None
    flat = _flat_bytes(tensor)
    step = max(8, len(flat) // _SAMPLED_WORDS // 8 * 8)
    usable = len(flat) // 8 * 8
    # Eight bytes at every step: still a view, so it follows the memory.
    return np.lib.stride_tricks.as_strided(
        flat, shape=(max(0, -(-(usable - 7) // step)), 8), strides=(step, 1), writeable=False
    )
