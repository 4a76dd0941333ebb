"""Finding and loading the C library."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_char, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

from kvembed_cuda._errors import CudaUnavailableError

__all__ = ["DeviceRecord", "IssuedRecord", "kernels_path", "library_path", "load"]

_FOLDER = Path(__file__).resolve().parent / "lib"
_ABI = 1


class IssuedRecord(ctypes.Structure):
    """``kvc_issued``."""

    _fields_ = [
        ("strips", c_uint64),
        ("calls", c_uint64),
        ("batched", c_uint64),
        ("refused", c_uint64),
        ("batch_error", c_int32),
        ("reserved", c_int32),
    ]


class DeviceRecord(ctypes.Structure):
    """``kvc_device_info``."""

    _fields_ = [
        ("name", c_char * 128),
        ("pci_bus_id", c_char * 32),
        ("total_bytes", c_uint64),
        ("max_pitch", c_uint64),
        ("compute_major", c_int32),
        ("compute_minor", c_int32),
        ("multiprocessors", c_int32),
        ("copy_engines", c_int32),
        ("host_register", c_int32),
        ("integrated", c_int32),
    ]


_OUT = POINTER(c_void_p)
_SIGNATURES: dict[str, tuple[list[object], object]] = {
    "kvc_abi": ([], c_int),
    "kvc_open": ([c_char_p, _OUT, c_char_p, c_size_t], c_int),
    "kvc_close": ([c_void_p], None),
    "kvc_error_text": ([c_void_p, c_int, c_char_p, c_size_t, c_char_p, c_size_t], None),
    "kvc_version": ([c_void_p], c_int),
    "kvc_batch_form": ([c_void_p], c_int),
    "kvc_batch_refused": ([c_void_p, c_int], c_int),
    "kvc_device_count": ([c_void_p], c_int),
    "kvc_device": ([c_void_p, c_int, POINTER(DeviceRecord)], c_int),
    "kvc_memory_info": ([c_void_p, c_int, POINTER(c_uint64), POINTER(c_uint64)], c_int),
    "kvc_copy": (
        [c_void_p, c_int, c_void_p, c_size_t, c_int, c_int, c_size_t, c_void_p, POINTER(IssuedRecord)],
        c_int,
    ),
    "kvc_stream_create": ([c_void_p, c_int, _OUT], c_int),
    "kvc_stream_destroy": ([c_void_p, c_int, c_void_p], c_int),
    "kvc_stream_synchronize": ([c_void_p, c_int, c_void_p], c_int),
    "kvc_stream_wait": ([c_void_p, c_int, c_void_p, c_void_p], c_int),
    "kvc_event_create": ([c_void_p, c_int, c_int, _OUT], c_int),
    "kvc_event_destroy": ([c_void_p, c_int, c_void_p], c_int),
    "kvc_event_record": ([c_void_p, c_int, c_void_p, c_void_p], c_int),
    "kvc_event_query": ([c_void_p, c_int, c_void_p, POINTER(c_int)], c_int),
    "kvc_event_synchronize": ([c_void_p, c_int, c_void_p], c_int),
    "kvc_event_elapsed": ([c_void_p, c_int, c_void_p, c_void_p, POINTER(c_float)], c_int),
    "kvc_host_register": ([c_void_p, c_int, c_void_p, c_size_t], c_int),
    "kvc_host_unregister": ([c_void_p, c_int, c_void_p], c_int),
    "kvc_memory_allocate": ([c_void_p, c_int, c_size_t, POINTER(c_uint64)], c_int),
    "kvc_memory_free": ([c_void_p, c_int, c_uint64], c_int),
    "kvc_module_load": ([c_void_p, c_int, c_void_p, _OUT], c_int),
    "kvc_module_unload": ([c_void_p, c_int, c_void_p], c_int),
    "kvc_module_function": ([c_void_p, c_int, c_void_p, c_char_p, _OUT], c_int),
    "kvc_launch": ([c_void_p, c_int, c_void_p, POINTER(c_uint32), c_uint32, c_void_p, _OUT], c_int),
}


def library_path() -> Path:
    """Return where the library lies in an installed package."""
    return _FOLDER / ("kvcuda.dll" if sys.platform == "win32" else "libkvcuda.so")


def kernels_path() -> Path | None:
    """Return where the kernels lie; None when this package was built without nvcc."""
    path = _FOLDER / "kernels.fatbin"
    return path if path.is_file() else None


def load(path: Path | None = None) -> ctypes.CDLL:
    """Load the library, which needs no driver. Its functions run without the interpreter's lock.

    Raises:
        CudaUnavailableError: It is missing, cannot be loaded, or belongs to another version.
    """
    path = path or library_path()
    if not path.is_file():
        raise CudaUnavailableError(
            f"{path} is missing: kvembed-cuda was not built; pip install kvembed-cuda, or build it from source"
        )
    try:
        library = ctypes.CDLL(str(path))
        abi = library.kvc_abi()
        if abi == _ABI:
            for name, (arguments, result) in _SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        raise CudaUnavailableError(f"{path} cannot be used: {error}") from error
    if abi != _ABI:
        raise CudaUnavailableError(f"{path} has interface {abi}, not {_ABI}: install kvembed-cuda anew")
    return library
