"""A name to a model and its tokenizer, ready to run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError, ModelNotFoundError
from kvembed._loading.dtype import choose_dtype, default_device
from kvembed._loading.progress import no_bars
from kvembed._loading.resolve import Resolved, resolve

if TYPE_CHECKING:
    import os

    import torch

    from kvembed._loading.progress import ProgressCallback

__all__ = ["load"]

# What AutoTokenizer needs as well to find the same files.
_SHARED = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token", "trust_remote_code")


def load(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = "auto",
    device_map: Any = None,
    revision: str | None = None,
    tokenizer: Any = None,
    on_progress: ProgressCallback | None = None,
    **hf_kwargs: Any,
) -> tuple[Any, Any, Resolved]:
    """Load a model for generation, and its tokenizer.

    Args:
        name: Alias, folder, GGUF file or hub id; see `resolve`.
        dtype: ``"auto"`` for the fastest safe format on this hardware, a torch dtype or its name, or None for
            the format in which the weights are stored.
        device_map: As in transformers. None puts the whole model on the GPU if there is one, else on
            the CPU.
        revision: Hub branch, tag or commit.
        tokenizer: A tokenizer to use instead of the model's own, or a name to load it from.
        on_progress: Told of downloads and conversions of packaged weights.
        **hf_kwargs: Passed on to `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model in evaluation mode, the tokenizer, and where they came from.

    Raises:
        ModelNotFoundError: There is no such model, or it has no tokenizer.
        ConfigError: ``dtype`` is not a floating-point torch dtype.
    """
    if dtype == "auto" and "torch_dtype" in hf_kwargs:
        dtype = hf_kwargs.pop("torch_dtype")  # the name before transformers 5

    device: torch.device | None = None
    if device_map is None:
        device = default_device()
        # On the CPU no device_map: it would go through accelerate for nothing.
        device_map = None if device.type == "cpu" else device
    chosen = _dtype(dtype, device_map)
    resolved = resolve(name, revision=revision, on_progress=on_progress, **hf_kwargs)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    shared = {key: hf_kwargs[key] for key in _SHARED if key in hf_kwargs}
    if resolved.local_files_only:
        shared["local_files_only"] = True
    if resolved.revision is not None:
        shared["revision"] = resolved.revision
    # Bars stay when something is downloaded; else "Loading weights" alone would be drawn, for a second. Warnings
    # stay in any case: a weight that is missing from the files is only logged.
    with no_bars() if resolved.local_files_only else contextlib.nullcontext():
        if tokenizer is None or isinstance(tokenizer, str):
            try:
                tokenizer = AutoTokenizer.from_pretrained(tokenizer or resolved.path_or_id, **shared)
            except (OSError, ValueError) as error:
                raise ModelNotFoundError(
                    f"{resolved.name}: its tokenizer cannot be loaded ({error}). "
                    "Pass tokenizer=..., a name or an object."
                ) from error
        model = AutoModelForCausalLM.from_pretrained(
            resolved.path_or_id, dtype=chosen, device_map=device_map, **(hf_kwargs | shared)
        )
    return model.eval(), tokenizer, resolved


def _dtype(dtype: torch.dtype | str | None, device_map: Any) -> torch.dtype | str:
    import torch

    if dtype is None:
        return "auto"  # transformers' word for the format of the weights
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ConfigError(f'dtype: {dtype!r} is unknown; use "auto", "float32", "bfloat16" or "float16"')
        dtype = found
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype: {dtype} is not a floating-point format; use quantization_config to quantise")
        return dtype
    if isinstance(device_map, dict):
        places: set[Any] = set(device_map.values())
        device_map = places.pop() if len(places) == 1 else "auto"
    try:
        return choose_dtype(torch.device(device_map) if device_map is not None else torch.device("cpu"))
    except (RuntimeError, TypeError):
        return choose_dtype()  # "auto", "balanced" or a dict: accelerate places it on what there is
