# SPDX-License-Identifier: Apache-2.0
"""_errors.py - tells a device in trouble from a backend that merely cannot; knows no backend."""

from __future__ import annotations

import torch

from wan_attn.transient import is_interruption, is_out_of_memory

# After one of these the device is the problem: another backend would fail too, or hide the cause.
# torch >= 2.8 has a type for it.
_DEVICE_ERROR_TYPES = tuple(filter(None, (getattr(torch, "AcceleratorError", None),)))
_DEVICE_ERROR_WORDS = (
    "cuda error",
    "hip error",
    "cuda driver error",
    "illegal memory access",
    "device-side assert",
    "device_error",  # status of wan_attn's own C ABI
)
# These say what a library or a driver cannot do, whatever words of the driver's follow.
_NO_DEVICE_ERROR_WORDS = (
    "no kernel image",  # a library built for other cards; this one is well
    "there is no usable nvidia driver",  # it does not start: no context of the caller's is lost
)


def why_it_failed(error: BaseException) -> str:
    """Its words, in one line, where something else may stand in for what has failed.

    Raises:
        the error itself: where nothing may, of a device in trouble or an interruption.
    """
    if is_device_error(error) or is_interruption(error):
        raise error
    return " ".join(str(error).split())[:300]


def is_device_error(error: BaseException) -> bool:
    """Whether `error`, of a device in trouble or of its memory or the host's, must be raised rather
    than answered by the next backend."""
    text = str(error).lower()
    if any(word in text for word in _NO_DEVICE_ERROR_WORDS):
        return False
    if is_out_of_memory(error) or isinstance(error, _DEVICE_ERROR_TYPES):
        return True
    return isinstance(error, RuntimeError) and any(word in text for word in _DEVICE_ERROR_WORDS)
