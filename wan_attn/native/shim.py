# SPDX-License-Identifier: Apache-2.0
"""shim.py - loads csrc/torch/shim.c and hands it the C functions of torch and of libwan_attn."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from ctypes import CFUNCTYPE, POINTER, c_char, c_char_p, c_int32, c_int64, c_size_t, c_uint32
from ctypes import c_void_p as address
from pathlib import Path

import torch

from wan_attn.native import library
from wan_attn.transient import is_interruption, is_transient
from wan_attn.version import REINSTALL

# Before 2.9 arguments were encoded otherwise: a shim made for 2.9 loads in 2.7 and computes
# nonsense, so the version decides and not whether it loads.
NEEDS_TORCH = (2, 9)

# The CPU features that the user allows, 0: all there are. The shim reads this variable at every
# call, and so does the ctypes binding; set_cpu_features() writes it.
CPU_FEATURES = c_uint32(0)

EXPORTED = tuple(
    f"wan_attn_shim_{name}" for name in ("wants", "configure", "register", "last_kernel")
)

_shim: ctypes.CDLL | None = None
_is_forked = False
_here = threading.local()


def torch_version() -> tuple[int, int]:
    """(major, minor) of the torch that runs."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def path() -> Path:
    """Where the shim is expected."""
    return library.shared_library("wan_attn_shim")


def why_not() -> str | None:
    """Why the shim cannot be used with this torch, or None."""
    if torch_version() < NEEDS_TORCH:
        return f"the shim needs torch >= 2.9, this is {torch.__version__}"
    if not path().exists():
        return f"{path().name} is not in the package; {REINSTALL}"
    return None


def load() -> str | None:
    """Loads the shim, which registers the op for CPU and CUDA; or says why it could not."""
    global _shim
    why = why_not()
    if why is not None:
        return why
    try:
        shim = ctypes.CDLL(str(path()))
        _declare(shim)
        configure(shim)
    except (OSError, AttributeError) as error:
        if is_transient(error):
            raise
        return f"{path().name} does not load: {error}"
    except _Missing as missing:
        return f"torch {torch.__version__} has no {missing}, which the shim calls"
    if shim.wan_attn_shim_register() != 0:
        return f"torch {torch.__version__} does not register the shim's op"
    _shim = shim
    return None


def last_kernel() -> int | None:
    """The row that the op ran last in this thread, -1 if none; None: the shim is not in use."""
    return None if _shim is None else int(_shim.wan_attn_shim_last_kernel())


class _Missing(LookupError):
    """A function that the shim cannot do without."""


def _declare(shim: ctypes.CDLL) -> None:
    shim.wan_attn_shim_wants.restype = c_char_p
    shim.wan_attn_shim_configure.restype = None
    shim.wan_attn_shim_configure.argtypes = [POINTER(address), POINTER(c_uint32)]


def configure(shim: ctypes.CDLL, **replaced: int) -> None:
    """Tells the shim the functions to use; a test may replace some of them.

    Raises:
        LookupError: names the function that is neither torch's, nor libwan_attn's, nor ours.
    """
    functions = list(_addresses(shim.wan_attn_shim_wants().decode().split(), replaced))
    table = (address * len(functions))(*functions)
    shim.wan_attn_shim_configure(table, ctypes.byref(CPU_FEATURES))


def _addresses(wanted: list[str], replaced: dict[str, int]) -> Iterator[int | None]:
    for name in wanted:
        is_optional, plain = name.startswith("?"), name.removeprefix("?")
        found = replaced.get(plain) or _function(plain)
        if found is None and not is_optional:
            raise _Missing(plain)
        yield found


def _function(name: str) -> int | None:
    if name.startswith("wan_attn_"):
        return ctypes.cast(getattr(library.lib(), name), address).value
    if name == "torch_parallel_for":
        return parallel_for()
    if name == "why_no_memory":
        return ctypes.cast(_WHY_NO_MEMORY, address).value
    found = torch_function(name)
    if found is None and name == "torch_get_num_threads":
        return ctypes.cast(_NUM_THREADS, address).value
    if found is None and name == "torch_delete_stable_ivalue":
        return _operator_delete()
    return found


@functools.cache
def _torch_libraries() -> tuple[ctypes.CDLL, ...]:
    """Handles through which torch's exported C functions can be found."""
    if sys.platform == "win32":
        folder = Path(torch.__file__).with_name("lib")
        names = [folder / "torch_cpu.dll", folder / "torch_cuda.dll"]
        return tuple(ctypes.CDLL(str(name)) for name in names if name.exists())
    # dlsym on torch._C walks its dependencies, under any name that a distribution gave them.
    return (ctypes.CDLL(torch._C.__file__),)


def torch_function(name: str) -> int | None:
    """Address of one of torch's C functions, or None where this torch does not have it."""
    for handle in _torch_libraries():
        try:
            return ctypes.cast(getattr(handle, name), address).value
        except AttributeError:
            continue
    return None


def _operator_delete() -> int | None:
    """C++'s delete in torch's runtime, for a torch (before 2.13) that exports nothing better."""
    if sys.platform == "win32":
        return ctypes.cast(ctypes.CDLL("ucrtbase").free, address).value
    return torch_function("_ZdlPv")


@functools.cache
def parallel_for() -> int | None:
    """torch_parallel_for (torch >= 2.10): kernels then run on torch's own threads."""
    return None if _is_forked else torch_function("torch_parallel_for")


def _leave_torchs_threads() -> None:
    """In a child of fork, torch's OpenMP would wait for ever for threads that the parent kept."""
    global _is_forked
    _is_forked = True
    parallel_for.cache_clear()
    if _shim is not None:
        configure(_shim)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_torchs_threads)


def _num_threads(out: ctypes._Pointer[c_uint32]) -> int:
    """torch_get_num_threads for torch 2.9, which does not export it."""
    out[0] = torch.get_num_threads()
    return 0


def _why_no_memory(
    size: int, cuda_index: int, message: ctypes._Pointer[c_char], message_size: int
) -> int:
    """Asks for memory that torch's C function did not get: 0 and torch's words, or it is there now.

    An exception cannot pass through C. raise_out_of_memory() raises it where the call is left.
    """
    device = "cpu" if cuda_index < 0 else f"cuda:{cuda_index}"
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except BaseException as error:  # noqa: BLE001 - see above
        # Without its frames, which hold tensors; a signal handler's is known by them.
        _here.out_of_memory = error if is_interruption(error) else error.with_traceback(None)
        text = str(error).encode("utf-8", "replace")[: message_size - 1] + b"\0"
        ctypes.memmove(message, text, len(text))
        return 0
    return 1


def raise_out_of_memory(error: RuntimeError) -> None:
    """Raises torch's own exception if `error` is all that the shim could make of it."""
    original = vars(_here).pop("out_of_memory", None)
    # One of an earlier call may still be here, if it was never asked for; a long text was cut.
    if original is not None and str(original).startswith(str(error)[:500]):
        raise original from None


# Kept for good: C calls them as long as the shim is loaded.
_NUM_THREADS = CFUNCTYPE(c_int32, POINTER(c_uint32))(_num_threads)
_WHY_NO_MEMORY = CFUNCTYPE(c_int32, c_int64, c_int32, POINTER(c_char), c_size_t)(_why_no_memory)
