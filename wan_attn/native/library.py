# SPDX-License-Identifier: Apache-2.0
"""library.py - opens libwan_attn, and mirrors csrc/wan_attn.h in ctypes; knows no torch."""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from ctypes import (
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

from wan_attn.transient import is_transient
from wan_attn.version import REINSTALL

ABI_VERSION = 1

OK, INVALID_ARGUMENT, UNSUPPORTED, DEVICE_ERROR, INTERNAL = range(5)
F32, F16, BF16, I32, I64, F64, DTYPE_OTHER = range(7)
CPU, CUDA, DEVICE_OTHER = range(3)
EXACT, QK8 = range(2)
PROOF_MISSING, PROOF_PASSED, PROOF_FAILED = range(3)

CPU_KNOWN = 1 << 31

MAX_NDIM = 4

_PACKAGE = Path(__file__).parents[1]


class Tensor(ctypes.Structure):
    """wan_attn_tensor."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("ndim", c_int32),
        ("shape", c_int64 * MAX_NDIM),
        ("stride", c_int64 * MAX_NDIM),
    ]


class Params(ctypes.Structure):
    """wan_attn_params."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("kernel", c_int32),
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("out", Tensor),
        ("lse", Tensor),
        ("seqused_q", Tensor),
        ("seqused_k", Tensor),
        ("softmax_scale", c_double),
        ("has_softmax_scale", c_int32),
        ("is_causal", c_int32),
        ("window_size_left", c_int64),
        ("window_size_right", c_int64),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
        ("stream", c_void_p),
        ("parallel", c_void_p),
        ("num_threads", c_int32),
        ("cpu_features", c_uint32),
        ("guard", c_void_p),
        ("guard_size", c_uint32),
        ("precision", c_int32),
        ("block_counts", Tensor),
        ("block_indices", Tensor),
        ("pools_others", c_int32),
        ("skip_threshold", c_double),
    ]


class Guard(ctypes.Structure):
    """wan_attn_guard."""

    _fields_ = [
        ("largest_value", c_float),
        ("clipped_values", c_uint32),
        ("nonfinite_values", c_uint32),
        ("nonfinite_results", c_uint32),
        ("lost_mass", c_float),
    ]


class BackwardParams(ctypes.Structure):
    """wan_attn_backward_params."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("kernel", c_int32),
        ("forward", ctypes.POINTER(Params)),
        ("dout", Tensor),
        ("dlse", Tensor),
        ("dq", Tensor),
        ("dk", Tensor),
        ("dv", Tensor),
    ]


class RopeParams(ctypes.Structure):
    """wan_attn_rope_params."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("kernel", c_int32),
        ("x", Tensor),
        ("out", Tensor),
        ("weight", Tensor),
        ("table", Tensor),
        ("grid_sizes", Tensor),
        ("seqlen_offset", c_int64),
        ("eps", c_double),
        ("has_norm", c_int32),
        ("is_per_head", c_int32),
        ("rounds_norm", c_int32),
        ("num_threads", c_int32),
        ("parallel", c_void_p),
        ("stream", c_void_p),
        ("cpu_features", c_uint32),
    ]


class Error(ctypes.Structure):
    """wan_attn_error."""

    _fields_ = [("status", c_int32), ("message", c_char * 1020)]

    def text(self) -> str:
        return str(self.message, "utf-8", "replace")


class Call(ctypes.Structure):
    """wan_attn_call."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("kernel", c_int32),
        ("workspace_size", c_size_t),
        ("opaque", c_uint64 * 192),
    ]


class KernelInfo(ctypes.Structure):
    """wan_attn_kernel_info."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("device_type", c_int32),
        ("name", c_char_p),
        ("description", c_char_p),
        ("dtypes", c_uint32),
        ("head_dim_min", c_int32),
        ("head_dim_max", c_int32),
        ("head_dim_multiple", c_int32),
        ("arch_min", c_int32),
        ("arch_max", c_int32),
        ("cpu_features", c_uint32),
        ("is_lossy", c_int32),
        ("takes_block_lists", c_int32),
    ]


# wan_attn_image_fn: the image is an address, because ctypes would make bytes of a char pointer.
ImageFn = ctypes.CFUNCTYPE(
    c_int32,
    c_char_p,
    c_int32,
    ctypes.POINTER(c_void_p),
    ctypes.POINTER(c_size_t),
    ctypes.POINTER(c_char),
    c_size_t,
)


# wan_attn_proof_fn.
ProofFn = ctypes.CFUNCTYPE(c_int32, c_int32, c_char_p, c_int32)


class CudaConfig(ctypes.Structure):
    """wan_attn_cuda_config."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("driver", c_char_p),
        ("find_image", ImageFn),
        ("find_proof", ProofFn),
    ]


class CudaDevice(ctypes.Structure):
    """wan_attn_cuda_device."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("arch", c_int32),
        ("num_sms", c_int32),
        ("is_half_rate", c_int32),
        ("driver_version", c_int32),
        ("name", c_char * 100),
    ]


_R, _ROW = ctypes.POINTER(RopeParams), ctypes.POINTER(c_int32)
_B, _SIZE = ctypes.POINTER(BackwardParams), ctypes.POINTER(c_size_t)
_P, _C, _E = ctypes.POINTER(Params), ctypes.POINTER(Call), ctypes.POINTER(Error)
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "wan_attn_abi_version": (c_int32, []),
    "wan_attn_build_info": (c_char_p, []),
    "wan_attn_status_name": (c_char_p, [c_int32]),
    "wan_attn_cpu_features": (c_uint32, []),
    "wan_attn_cpu_feature_name": (c_char_p, [c_int32]),
    "wan_attn_cpu_feature_level": (c_uint32, [c_int32]),
    "wan_attn_kernel_count": (c_int32, []),
    "wan_attn_kernel_at": (c_int32, [c_int32, ctypes.POINTER(KernelInfo)]),
    "wan_attn_why_not": (c_int32, [_P, c_int32, _E]),
    "wan_attn_select": (c_int32, [_P, ctypes.POINTER(c_int32), _E]),
    "wan_attn_workspace_size": (c_int32, [_P, ctypes.POINTER(c_size_t), _E]),
    "wan_attn_cuda_configure": (c_int32, [ctypes.POINTER(CudaConfig), _E]),
    "wan_attn_cuda_device_at": (c_int32, [c_int32, ctypes.POINTER(CudaDevice), _E]),
    "wan_attn_prepare": (c_int32, [_P, _C, _E]),
    "wan_attn_run": (c_int32, [_P, _C, _E]),
    "wan_attn_forward": (c_int32, [_P, _E]),
    "wan_attn_backward_kernel_count": (c_int32, []),
    "wan_attn_backward_kernel_at": (c_int32, [c_int32, ctypes.POINTER(KernelInfo)]),
    "wan_attn_backward_select": (c_int32, [_B, _ROW, _SIZE, _E]),
    "wan_attn_backward": (c_int32, [_B, _ROW, _E]),
    "wan_attn_rope_kernel_count": (c_int32, []),
    "wan_attn_rope_kernel_at": (c_int32, [c_int32, ctypes.POINTER(KernelInfo)]),
    "wan_attn_rope_select": (c_int32, [_R, _ROW, _E]),
    "wan_attn_rms_norm_rope": (c_int32, [_R, _ROW, _E]),
}


def shared_library(stem: str) -> Path:
    """Where this library of ours is expected: in the package's folder."""
    prefix, suffix = {
        "win32": ("", ".dll"),
        "darwin": ("lib", ".dylib"),
    }.get(sys.platform, ("lib", ".so"))
    return _PACKAGE / f"{prefix}{stem}{suffix}"


def lib_path() -> Path:
    """Where libwan_attn is expected: in the package's folder."""
    return shared_library("wan_attn")


def opened(path: Path) -> ctypes.CDLL:
    """A copy of libwan_attn with its functions' types set.

    Raises:
        OSError: it does not load.
        AttributeError: it lacks a function.
    """
    lib = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


def left_out() -> list[str]:
    """What the build of this package has left out, and how to get it (setup.py's record)."""
    try:
        record = json.loads(_PACKAGE.joinpath("build_record.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ["its own record, so that nothing is known of it; " + REINSTALL]
    return list(record["left_out"])


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str | None]:
    path = lib_path()
    if not path.exists():
        return (
            None,
            f"{path.name} is not in the package; {REINSTALL}",
        )
    try:
        lib = opened(path)
    except (OSError, AttributeError) as error:
        if is_transient(error):
            raise
        return None, f"{path.name} does not load: {error}; {REINSTALL}"
    version = lib.wan_attn_abi_version()
    if version != ABI_VERSION:
        return None, f"{path.name} has ABI {version}, this package needs {ABI_VERSION}; {REINSTALL}"
    return lib, None


def load() -> ctypes.CDLL | None:
    """libwan_attn with its functions' types set, or None: see load_error()."""
    return _open()[0]


def binary() -> bytes:
    """The file of the library that is loaded: what was found out about kernels belongs to it. Empty
    if there is none."""
    loaded = load()
    return b"" if loaded is None else Path(loaded._name).read_bytes()


def load_error() -> str | None:
    """Why libwan_attn cannot be used here: what, why, what to do. None if it can."""
    return _open()[1]


def lib() -> ctypes.CDLL:
    """libwan_attn, for callers that have seen load() succeed."""
    library = load()
    if library is None:
        raise RuntimeError(f"wan_attn: {load_error()}")
    return library


@functools.cache
def cpu_features() -> dict[str, int]:
    """Name -> bit of a cpu_features word, for every feature that some row could use."""
    found: dict[str, int] = {}
    while (name := lib().wan_attn_cpu_feature_name(len(found))) is not None:
        found[name.decode()] = len(found)
    return found


def cpu_feature_level(name: str) -> int:
    """The bits of this feature and of all that it builds on: what who names it allows.

    Raises:
        KeyError: there is no such feature.
    """
    return int(lib().wan_attn_cpu_feature_level(cpu_features()[name]))


def feature_names(bits: int) -> tuple[str, ...]:
    """Names of the set bits of a cpu_features word."""
    return tuple(name for name, bit in cpu_features().items() if bits >> bit & 1)
