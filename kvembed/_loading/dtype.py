"""Which device and number format suit this machine.

The choice follows what the hardware says it has, not a timing: a probe that came out differently
at the next start would change the model's fingerprint, and every stored block would be missed. Measured on an AMD
EPYC with ``avx512_bf16``, SmolLM2, 2 cores: prefill of 512 tokens 0.92 s in float32 and 0.51 s in bfloat16,
decode 63 and 46 ms a token. float16 is never chosen on a CPU: there it was 4 times slower than float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["choose_dtype", "default_device", "explain_dtype"]

_CPU_FLAGS = ("avx512_bf16", "amx_bf16")


def default_device() -> torch.device:
    """Return the accelerator if there is one (CUDA, then Apple's GPU), else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """Return the number format to use on ``device``, by default on `default_device`."""
    return explain_dtype(device)[0]


def explain_dtype(device: torch.device | str | None = None) -> tuple[torch.dtype, str]:
    """Return the number format to use on ``device``, and why, in words."""
    import torch

    where = default_device() if device is None else torch.device(device)
    if where.type == "cuda":
        # Emulated bfloat16 (before Ampere) works, and is slow.
        if torch.cuda.get_device_capability(where)[0] >= 8 or torch.version.hip is not None:
            return torch.bfloat16, "the GPU computes in bfloat16"
        return torch.float16, "the GPU is too old for bfloat16"
    if where.type == "mps":
        if torch.backends.mps.is_macos_or_newer(14, 0):
            return torch.bfloat16, "Apple's GPU computes in bfloat16"
        return torch.float16, "bfloat16 on Apple's GPU needs macOS 14"
    if where.type == "cpu":
        flags = [flag for flag in _CPU_FLAGS if flag in _cpu_flags()]
        if flags and torch.backends.mkldnn.is_available():
            return torch.bfloat16, f"the CPU computes in bfloat16 ({', '.join(flags)})"
        return torch.float32, "the CPU has no fast bfloat16 (avx512_bf16 or amx_bf16)"
    return torch.float32, f"nothing faster is known to be safe on {where.type!r}"


def _cpu_flags() -> set[str]:
    import torch

    if capabilities := getattr(torch.cpu, "get_capabilities", None):
        found: dict[str, Any] = capabilities()
        return {name for name, there in found.items() if there is True}
    # Before torch 2.10; on other systems than Linux float32 is then the safe choice.
    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return set()
