"""Fingerprint: everything that changes the KV a model computes, as readable fields and one digest.

Peers key their caches by a model *name*; then an adapter, an edited weight or another dtype returns wrong text
without an error. Here the key chain starts from a digest over

* every parameter and buffer, all bytes (xxh3-128 on the CPU, a weighted sum modulo 2^64 on other devices),
* the config (rope, window and layer types included), module classes, their settings, hooks and active adapters,
* dtype, device type, attention implementation, quantisation, cache layer kinds, block size,
* versions of torch and transformers, and the processor's instruction set.

The full checksum runs when a model is wrapped. Before each call `Fingerprint.changed` looks for edits in about a
millisecond: version counters and data pointers see in-place operations, loading and casting; eight sampled words
of every tensor see what those miss (``param.data += ...``, NumPy writes: how adapters are merged). What it cannot
see is an edit through ``.data`` or NumPy that touches none of the sampled words; `CachedModel.refresh` forces the
full checksum. ``docs/design.md`` lists all that is missed.
"""

from __future__ import annotations

import functools
import json
import os
from typing import Any

import blake3
import torch

from kvembed._compiled import is_compiled
from kvembed._weights import WeightsWatch, weights_checksum

__all__ = ["FORMAT", "Fingerprint", "adapter_refusal", "describe_difference"]

FORMAT = 1
"""Version of the KV byte format; a new one makes every older block a miss."""

_every_module = torch.nn.modules.module
_NO_SETTINGS = ("training", "name_or_path", "active_adapter")  # adapters switch on their layers
_LIBRARIES = ("transformers", "torch", "peft", "accelerate", "torchao", "bitsandbytes")
_RECORDERS = "transformers.utils.output_capturing"
_NOISE = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation_autoset",
)


def _config_text(config: Any) -> str:
    fields = config.to_dict()
    for name in _NOISE:
        fields.pop(name, None)
    return json.dumps(fields, sort_keys=True, default=str)


_Named = tuple[str, torch.nn.Module]
_State = tuple[Any, ...]
_ADAPTER_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def _walk(model: torch.nn.Module) -> list[_Named]:
    """Return what ``named_modules()`` does, without a generator inside a generator at every level."""
    found: list[_Named] = []
    seen: set[int] = set()
    stack: list[_Named] = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        children = module._modules
        if children:
            prefix = name + "." if name else ""
            stack.extend([(prefix + key, child) for key, child in children.items() if child is not None][::-1])
    return found


def _hook_ids(module: torch.nn.Module) -> list[int]:
    """Return the handle ids of hooks that may change a forward; torch gives each out once in a process."""
    # transformers' recorders only look on, and stay for good after one call that asked for hidden states.
    ids = [i for i, hook in module._forward_hooks.items() if getattr(hook, "__module__", "") != _RECORDERS]
    return ids + list(module._forward_pre_hooks)


def _switches(own: dict[str, Any]) -> str | None:
    """Return the adapter switches among a module's attributes, or None."""
    if "_disable_adapters" not in own and "_active_adapter" not in own:
        return None
    # What is off and what was never set are the same.
    return repr({key: own[key] for key in _ADAPTER_SWITCHES if own.get(key)})


def _global_hook_ids() -> list[int]:
    """Return the handle ids of hooks on all modules there are."""
    return [*_every_module._global_forward_hooks, *_every_module._global_forward_pre_hooks]


def _own_forward(own: dict[str, Any]) -> Any:
    """Return the function that replaces a module's forward, or None; accelerate's own hooks only move tensors."""
    forward = own.get("forward")
    if forward is None or _is_its_own(forward, own):
        return None
    wrapped = getattr(getattr(forward, "func", None), "__module__", "") == "accelerate.hooks"
    return None if wrapped and _only_moves(own.get("_hf_hook")) else forward


def _is_its_own(forward: Any, own: dict[str, Any]) -> bool:
    """True for what a module would run anyhow: libraries that take a patch off set it again."""
    module: Any = getattr(forward, "__self__", None)
    return getattr(module, "__dict__", None) is own and forward.__func__ is type(module).forward


def _only_moves(hook: Any) -> bool:
    return type(hook).__module__ == "accelerate.hooks" and all(map(_only_moves, getattr(hook, "hooks", ())))


def _settings(module: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return numbers, switches and words among a module's attributes: scale, window, number of heads.

    Modules copy them from the config and then read only their own. What starts with an underscore is left out: such
    attributes tell how a model came about rather than what it computes. What a class says already is no setting.
    """
    kind = type(module)
    if kind is torch.nn.Linear:  # most modules of most models; the shape of its weight says the same
        return ()
    return tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if isinstance(value, int | float | str | torch.dtype)
        and name[0] != "_"
        and name not in _NO_SETTINGS
        and getattr(kind, name, None) != value
        and not isinstance(getattr(kind, name, None), functools.cached_property)  # worked out by the first forward
    )


def _module_states(modules: list[_Named]) -> list[_State]:
    """Return class, mode, hooks, forward, adapter switches and settings of every module.

    They change a forward without changing a weight. The functions themselves are kept, so that one that took the
    place, and perhaps the name and the address, of another is seen.
    """
    return [
        (
            *(module, type(module), own["training"], _hook_ids(module), _own_forward(own), _switches(own)),
            own.get("_compiled_call_impl") is not None,
            _settings(module),
            len(own),
        )
        for module, own in ((module, module.__dict__) for _, module in modules)
    ]


def _same_states(states: list[_State]) -> bool:
    """True when every module is in the state it was in.

    Nothing is allocated for most modules: thousands of new tuples would wake the garbage collector, which costs more.
    """
    for module, kind, training, hooks, forward, switches, compiled, settings, attributes in states:
        own = module.__dict__
        if type(module) is not kind or own["training"] is not training or len(own) != attributes:
            return False
        if (own["_forward_hooks"] or own["_forward_pre_hooks"] or hooks) and _hook_ids(module) != hooks:
            return False
        if (forward is not None or "forward" in own) and _own_forward(own) != forward:
            return False
        if (switches is not None or "_active_adapter" in own) and _switches(own) != switches:
            return False
        if (compiled or "_compiled_call_impl" in own) and (own.get("_compiled_call_impl") is not None) is not compiled:
            return False
        for name, value in settings:
            now = own.get(name)
            if now is not value and now != value:
                return False
    return True


def adapter_refusal(model: torch.nn.Module) -> str | None:
    """Return why an active adapter keeps a model from being served, or None.

    An activated LoRA (aLoRA) starts at a phrase that PEFT looks for in the whole prompt. A step of a prefill sees only
    a piece of the prompt, so there it would start elsewhere.
    """
    for module in model.modules():
        own = module.__dict__
        variants = own.get("lora_variant")
        if not variants or own.get("_disable_adapters"):
            continue
        active = own.get("_active_adapter") or []
        for name in [active] if isinstance(active, str) else active:
            if type(variants.get(name)).__name__.startswith("ALora"):
                return f"adapter {name!r} is an activated LoRA, which depends on where a phrase is in the prompt"
    return None


def _adapters(model: torch.nn.Module) -> str:
    active = sorted(
        {str(m.__dict__["_active_adapter"]) for m in model.modules() if "_active_adapter" in m.__dict__}
        | {f"merged {m.__dict__['merged_adapters']}" for m in model.modules() if m.__dict__.get("merged_adapters")}
    )
    return ", ".join(active) or "none"


class Fingerprint:
    """Identity of one model as it is now.

    Args:
        model: The transformers model.
        attn_implementation: What the user chose (kvembed's own name never enters).
        cache_kinds: One word per cache layer.
        block_size: Tokens of a full block.

    Attributes:
        fields: Readable parts, each a string; compared to say *why* another model's blocks do not serve.
        digest: 32 bytes, BLAKE3 over ``fields``.
        compiled: Whether the model, or a part of it, was compiled in place. To look means a walk over all modules,
            and `changed` sees it change.
    """

    def __init__(self, model: Any, attn_implementation: str, cache_kinds: list[str], block_size: int) -> None:
        self._model = model
        self._salt = os.urandom(8).hex()
        self._patches: list[Any] = []
        self._extra = (attn_implementation, cache_kinds, block_size)
        self._compute()

    def _compute(self) -> None:
        model = self._model
        attn, kinds, block_size = self._extra
        quantisation = getattr(model.config, "quantization_config", None)
        self._modules = _walk(model)
        self._watch = WeightsWatch(self._modules)  # first: an edit from now on is seen later
        device = self._watch.device
        processor = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else _device_name(device)
        self._tree = [(module, dict(module._modules)) for _, module in self._modules]
        self._states = _module_states(self._modules)
        self.compiled = is_compiled(model)
        self._global_hooks = _global_hook_ids()
        self._classes = {type(module): type(module).forward for _, module in self._modules}
        self._config = _config_text(model.config)
        self.fields: dict[str, str] = {
            "weights": weights_checksum(self._modules, self._salt),
            "model_class": type(model).__qualname__,
            "name": str(getattr(model.config, "_name_or_path", "")),
            "config": blake3.blake3(self._config.encode()).hexdigest()[:32],
            "modules": blake3.blake3(self._states_text().encode()).hexdigest()[:32],
            "adapters": _adapters(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": attn,
            "quantisation": "none" if quantisation is None else str(quantisation),
            "cache": _compress(kinds),
            "block_size": str(block_size),
            "device": device.type,
            "processor": processor,
            "torch": torch.__version__,
            "transformers": _transformers_version(),
            "format": str(FORMAT),
        }
        # The name is for people: the same weights under another folder name are the same model.
        identity = {k: v for k, v in self.fields.items() if k != "name"}
        self.digest = blake3.blake3(json.dumps(identity, sort_keys=True).encode()).digest()

    def _states_text(self) -> str:
        """Write the states down, for the digest.

        What a hook computes cannot be read from outside, nor can a function made on the spot: KV made with one serves
        nobody else, least of all another process whose function may be another. So a salt enters with them.
        """
        parts = [
            f"{kind.__qualname__}.forward is {self._code_name(forward)}" for kind, forward in self._classes.items()
        ]
        if self._global_hooks:
            parts.append(f"hooks on all modules {self._global_hooks} {self._salt}")
        for (name, _), state in zip(self._modules, self._states, strict=True):
            _, kind, training, hooks, forward, switches, compiled, settings, _ = state
            entry = f"{name}:{kind.__qualname__}{':training' if training else ''}{':compiled' if compiled else ''}"
            if settings:
                entry += f":{sorted(settings)}"
            if hooks:
                entry += f":hooks {hooks} {self._salt}"
            if forward is not None:
                entry += f":forward {self._code_name(forward)}"
            parts.append(f"{entry}:{switches}" if switches else entry)
        return "\n".join(parts)

    def _code_name(self, forward: Any) -> str:
        """Name a function by its code, or where that does not tell what it computes, by a name in this process."""
        name, sure = _code(forward)
        if sure:
            return name
        if forward not in self._patches:
            self._patches.append(forward)
        return f"{name} {self._patches.index(forward)} {self._salt}"

    def changed(self, attn_implementation: str, *, tensors: bool = True) -> bool:
        """Return True when the model may compute other KV than the digest says.

        Args:
            attn_implementation: What the user chose.
            tensors: Whether to look at weights and buffers too.
        """
        if attn_implementation != self._extra[0]:
            return True
        # Adapters make thousands of modules: to look whether the tree is the same is much cheaper than to walk it.
        if any(module._modules != children for module, children in self._tree):
            return True
        if tensors and self._watch.changed():
            return True
        if _global_hook_ids() != self._global_hooks:
            return True
        if not _same_states(self._states) or any(kind.forward is not f for kind, f in self._classes.items()):
            return True
        return _config_text(self._model.config) != self._config

    def refresh(self, attn_implementation: str) -> None:
        """Compute the full checksum again."""
        self._extra = (attn_implementation, *self._extra[1:])
        self._compute()


def _code(function: Any) -> tuple[str, bool]:
    """Return the name of the code of a function and of those it wraps, and whether that tells what they compute.

    Not ``__qualname__``, which a wrapper takes over from what it wraps. What a function made inside another one has
    from there cannot be read, nor what a method or a partial is bound to.
    """
    parts: list[str] = []
    sure = True
    while function is not None:
        inner = getattr(function, "__func__", getattr(function, "func", None))
        if inner is None:
            code = getattr(function, "__code__", None)
            if code is None:
                return f"{' '.join(parts)} {type(function).__qualname__}", False
            module = str(function.__globals__.get("__name__"))
            parts.append(f"{module}.{code.co_qualname}")
            if module.partition(".")[0] not in _LIBRARIES:
                # Its owner may write it anew under the same name; of a library the version is known.
                parts.append(blake3.blake3(code.co_code + repr(code.co_names).encode()).hexdigest()[:16])
                sure = sure and "<" not in code.co_qualname
            inner = function.__dict__.get("__wrapped__")
        else:
            sure = False
        function = inner
    return " ".join(parts), sure


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


def _compress(kinds: list[str]) -> str:
    """Return ``"full x30"`` rather than thirty words."""
    return ", ".join(f"{kind} x{kinds.count(kind)}" for kind in dict.fromkeys(kinds)) + (
        "" if len(set(kinds)) < 2 else f" in order {blake3.blake3(repr(kinds).encode()).hexdigest()[:8]}"
    )


def describe_difference(stored: dict[str, Any], now: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return the fields in which two fingerprints differ, as (stored, now); the name never counts."""
    return {k: (str(stored.get(k, "?")), v) for k, v in now.items() if k != "name" and str(stored.get(k, "?")) != v}
