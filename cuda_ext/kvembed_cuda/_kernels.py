"""`Kernels`: gather, scatter and quantise on one GPU."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from kvembed_cuda._errors import CudaUnavailableError
from kvembed_cuda._layouts import QUANT, SEGMENT, Code, Group, Type, check
from kvembed_cuda._library import kernels_path

if TYPE_CHECKING:
    from pathlib import Path

    from kvembed_cuda._driver import Driver

__all__ = ["Kernels"]

_THREADS = 256
_NAMES = ("kv_gather", "kv_scatter", "kv_quantise_rows", "kv_quantise_columns")
# As many items as fit into a kernel's arguments: KV_MOST_SEGMENTS, KV_MOST_QUANTS.
_TABLES = {
    dtype.itemsize: np.dtype([("count", "<u8"), ("items", dtype, (most,))])
    for dtype, most in ((SEGMENT, 64), (QUANT, 60))
}


class Kernels:
    """The kernels, loaded on one GPU. Launches return before they have run, like copies.

    Args:
        driver: The driver.
        device: Number of the GPU.
        path: The fat binary; that of the installed package when None.

    Raises:
        CudaUnavailableError: This package was built without kernels.
        CudaError: The driver cannot load them.
    """

    def __init__(self, driver: Driver, device: int, path: Path | None = None) -> None:
        self._module: int | None = None
        path = path or kernels_path()
        if path is None:
            raise CudaUnavailableError("kvembed-cuda was built without kernels: build it where nvcc is installed")
        self._driver = driver
        self._device = device
        module, image = ctypes.c_void_p(), ctypes.create_string_buffer(path.read_bytes())
        driver.call("kvc_module_load", device, image, ctypes.byref(module))
        self._module = module.value
        try:
            self._functions = {name: self._function(name) for name in _NAMES}
            self._blocks = 8 * max(1, driver.device(device).multiprocessors)
        except BaseException:
            self.close()
            raise

    def _function(self, name: str) -> int:
        function = ctypes.c_void_p()
        self._driver.call("kvc_module_function", self._device, self._module, name.encode(), ctypes.byref(function))
        return function.value or 0

    def gather(self, segments: np.ndarray, stream: int) -> None:
        """Queue copies of strided rows to packed ones.

        Args:
            segments: Array of `SEGMENT`; the addresses are the device's, or of host memory that was registered.
            stream: Any but the legacy default stream.
        """
        self._launch("kv_gather", segments, SEGMENT, _work(segments), stream)

    def scatter(self, segments: np.ndarray, stream: int) -> None:
        """Queue copies of packed rows to strided ones; see `gather`."""
        self._launch("kv_scatter", segments, SEGMENT, _work(segments), stream)

    def quantise(self, tensors: np.ndarray, stream: int) -> None:
        """Queue the quantising of tensors.

        Rounding is to nearest, ties to even. int8 codes are -127 to 127. e4m3 codes are held at 448, and what is not
        finite becomes not-a-number. A group with a value that is not finite gets not-a-number as its scale, and codes
        that mean nothing; a group of zeros gets scale 0.

        Args:
            tensors: Array of `QUANT`.
            stream: Any but the legacy default stream.

        Raises:
            ValueError: A field cannot be right.
        """
        check(tensors, QUANT, "tensors")
        sizes = np.where(tensors["type"] == Type.FLOAT32, 4, 2)
        for wrong, what in (
            (tensors["type"] > max(Type), "type"),
            (tensors["code"] > max(Code), "code"),
            (tensors["group"] > max(Group), "group"),
            ((tensors["group"] == Group.NONE) & (tensors["code"] == Code.INT8), "group: int8 needs scales"),
            ((tensors["group"] != Group.NONE) & (tensors["scales"] % 4 != 0), "scales"),
            ((tensors["group"] != Group.NONE) & (tensors["scales"] == 0), "scales"),
            ((tensors["src"] | tensors["head_pitch"] | tensors["token_pitch"]) % sizes != 0, "pitch"),
            ((tensors["src"] == 0) | (tensors["out"] == 0), "address"),
            ((tensors["group"] == Group.CHANNEL) & (tensors["span"] == 0), "span"),
            ((tensors["heads"] == 0) | (tensors["tokens"] == 0) | (tensors["width"] == 0), "shape"),
        ):
            if wrong.any():
                raise ValueError(f"tensor {int(np.argmax(wrong))} has a wrong {what}")
        columns = tensors["group"] == Group.CHANNEL
        by_column, by_row = tensors[columns], tensors[~columns]
        groups = -(-by_column["tokens"].astype(np.int64) // by_column["span"])
        self._launch("kv_quantise_columns", by_column, QUANT, groups * by_column["heads"] * by_column["width"], stream)
        lanes = 32 * by_row["tokens"].astype(np.int64)  # a warp for each token of each head
        self._launch("kv_quantise_rows", by_row, QUANT, lanes * by_row["heads"], stream)

    def _launch(self, name: str, items: np.ndarray, dtype: np.dtype, work: np.ndarray, stream: int) -> None:
        check(items, dtype, "items")
        kind = _TABLES[dtype.itemsize]
        table = np.zeros(1, kind)
        (most,) = kind["items"].shape
        for start in range(0, len(items), most):
            part = items[start : start + most]
            table["count"] = len(part)
            table["items"][0, : len(part)] = part
            blocks = -(-int(work[start : start + most].max()) // _THREADS)
            # Enough blocks to fill the device however the work is spread; the rest goes round in a loop.
            grid = (ctypes.c_uint32 * 3)(max(1, min(blocks, self._blocks)), len(part), 1)
            arguments = (ctypes.c_void_p * 1)(table.__array_interface__["data"][0])
            self._driver.call("kvc_launch", self._device, self._functions[name], grid, _THREADS, stream, arguments)

    def close(self) -> None:
        """Unload; no launch may be under way. Harmless when repeated."""
        module, self._module = self._module, None
        if module is not None and not self._driver.closed:
            self._driver.call("kvc_module_unload", self._device, module)


def _work(segments: np.ndarray) -> np.ndarray:
    """How many threads could have a 16-byte word each."""
    check(segments, SEGMENT, "segments")
    if len(segments) and not (segments["rows"].all() and segments["row_bytes"].all()):
        raise ValueError("a segment has no rows, or rows of no bytes")
    if len(segments) and not (segments["strided"].all() and segments["packed"].all()):
        raise ValueError("a segment has no address")
    return segments["rows"].astype(np.int64) * -(-segments["row_bytes"].astype(np.int64) // 16)
