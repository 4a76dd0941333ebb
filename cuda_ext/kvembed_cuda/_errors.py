"""What can go wrong."""

from __future__ import annotations

__all__ = ["CudaError", "CudaUnavailableError"]

# Errors after which nothing on the device works until the process ends.
_LOST = {46, 214, 220, 226, 700, 709, 714, 715, 716, 717, 718, 719, 721, 999}


class CudaUnavailableError(RuntimeError):
    """There is no library, no driver, or no driver that will do; the message says which, and what to do."""


class CudaError(RuntimeError):
    """A call failed.

    Attributes:
        call: What was called.
        code: The driver's CUresult, or below 0 a code of this package.
        name: CUDA's name of it, as ``CUDA_ERROR_OUT_OF_MEMORY``.
        text: CUDA's text for it.
    """

    def __init__(self, call: str, code: int, name: str, text: str, more: str = "") -> None:
        super().__init__(call, code, name, text, more)
        self.call = call
        self.code = code
        self.name = name
        self.text = text
        self._more = more

    def __str__(self) -> str:
        """Say all of it."""
        return f"{self.call}: {self.name} ({self.code}): {self.text}{self._more}"

    @property
    def is_out_of_memory(self) -> bool:
        """True when memory was the reason, so that less of it may help."""
        return self.name in ("CUDA_ERROR_OUT_OF_MEMORY", "KVC_NO_MEMORY")

    @property
    def is_lost(self) -> bool:
        """True when nothing on the device works any more in this process."""
        return self.code in _LOST
