# SPDX-License-Identifier: Apache-2.0
"""cuda_driver.py - tells libwan_attn where CUDA and our machine code are; asks about devices.

Nothing is opened here: the driver is, at the first question about a CUDA device, and machine code
is looked for when a kernel is first launched there.
"""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import c_size_t, c_void_p
from dataclasses import dataclass

from wan_attn.config import current
from wan_attn.cuda import images
from wan_attn.native import library as native
from wan_attn.transient import is_interruption

# What has been handed to C, for good: C holds the address while it loads, and the second device of
# a kind asks for the same.
_images: dict[tuple[str, int], bytes] = {}

# What ended _find_image in this thread and is no failure of it: Ctrl-C while it compiled.
_here = threading.local()


@dataclass(frozen=True, slots=True)
class Device:
    """One CUDA device as its driver describes it.

    Attributes:
        arch: compute capability * 10.
        is_half_rate: its tensor cores sum float32 at half the rate of float16 (GeForce RTX 30 to
            50); known by name.
        driver_version: the newest CUDA that the driver supports, (major, minor).
    """

    index: int
    name: str
    arch: int
    num_sms: int
    is_half_rate: bool
    driver_version: tuple[int, int]


def _find_image(
    kernel: bytes,
    arch: int,
    image: ctypes._Pointer[c_void_p],
    size: ctypes._Pointer[c_size_t],
    message: ctypes._Pointer[ctypes.c_char],
    message_size: int,
) -> int:
    """wan_attn_image_fn. No exception can pass through C, so each becomes words."""
    key = (kernel.decode(), arch)
    try:
        # Two threads may come here at once, and both answers must live on: the first stays.
        found = _images.get(key) or _images.setdefault(key, images.image(*key))
    except BaseException as error:  # noqa: BLE001 - see above
        if is_interruption(error):
            _here.interruption = error
        words = str(error) if isinstance(error, images.ImageError) else repr(error)
        text = words.encode("utf-8", "replace")[: message_size - 1] + b"\0"
        ctypes.memmove(message, text, len(text))
        return 1
    image[0] = ctypes.cast(ctypes.c_char_p(found), c_void_p)
    size[0] = len(found)
    return 0


def raise_interruption() -> None:
    """Raises what C could not pass on, if the call that just failed was interrupted by it."""
    interruption = vars(_here).pop("interruption", None)
    if interruption is not None:
        raise interruption


# Kept for good: C calls it as long as the library is loaded.
_FIND_IMAGE = native.ImageFn(_find_image)


def configure(library: ctypes.CDLL) -> None:
    """Tells libwan_attn its driver (WAN_ATTN_LIBCUDA, or the system's) and where images are found.

    Raises:
        RuntimeError: too late, it has opened another driver.
    """
    path = current().libcuda
    config = native.CudaConfig(
        ctypes.sizeof(native.CudaConfig), os.fsencode(path) if path else None, _FIND_IMAGE
    )
    error = native.Error()
    if library.wan_attn_cuda_configure(ctypes.byref(config), ctypes.byref(error)) != native.OK:
        raise RuntimeError(f"wan_attn: {error.text()}")


def device(index: int) -> Device | str:
    """What cuda:`index` is, or why there is no such device. Opens the driver, makes no context."""
    library = native.load()
    if library is None:
        return native.load_error() or "the native library does not load"
    found, error = native.CudaDevice(ctypes.sizeof(native.CudaDevice)), native.Error()
    status = library.wan_attn_cuda_device_at(index, ctypes.byref(found), ctypes.byref(error))
    if status != native.OK:
        return error.text()
    return Device(
        index=index,
        name=found.name.decode("utf-8", "replace"),
        arch=found.arch,
        num_sms=found.num_sms,
        is_half_rate=bool(found.is_half_rate),
        driver_version=(found.driver_version // 1000, found.driver_version % 1000 // 10),
    )
