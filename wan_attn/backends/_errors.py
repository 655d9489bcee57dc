# SPDX-License-Identifier: Apache-2.0
"""_errors.py - tells a device in trouble from a backend that merely cannot; knows no backend."""

from __future__ import annotations

import torch

# After one of these the device (or its memory) is the problem: another backend would fail too, or
# hide the cause.
_DEVICE_ERROR_TYPES: tuple[type[BaseException], ...] = tuple(
    kind
    for kind in (
        MemoryError,
        getattr(torch, "OutOfMemoryError", None),  # torch >= 2.5; torch.cuda's is the same class
        torch.cuda.OutOfMemoryError,
        getattr(torch, "AcceleratorError", None),  # torch >= 2.8
    )
    if kind is not None
)
_DEVICE_ERROR_WORDS = (
    "cuda error",
    "hip error",
    "cuda driver error",
    "out of memory",
    "illegal memory access",
    "device-side assert",
    "can't allocate memory",  # DefaultCPUAllocator
    "not enough memory",  # DefaultCPUAllocator on Windows
    "device_error",  # status of wan_attn's own C ABI
)
# These say what a library or a driver cannot do, whatever words of the driver's follow.
_NO_DEVICE_ERROR_WORDS = (
    "no kernel image",  # a library built for other cards; this one is well
    "there is no usable nvidia driver",  # it does not start: no context of the caller's is lost
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the driver had no memory left, which torch's cache may hold."""
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def is_device_error(error: BaseException) -> bool:
    """Whether `error` must be raised rather than answered by the next backend."""
    text = str(error).lower()
    if any(word in text for word in _NO_DEVICE_ERROR_WORDS):
        return False
    if isinstance(error, _DEVICE_ERROR_TYPES):
        return True
    return isinstance(error, RuntimeError) and any(word in text for word in _DEVICE_ERROR_WORDS)
