# SPDX-License-Identifier: Apache-2.0
"""cuda_driver.py - tells libwan_attn where CUDA and our machine code are, and which rows
are proven; asks about devices.

Nothing is opened here: the driver is, at the first question about a CUDA device, and machine code
is looked for when a kernel is first launched there.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from ctypes import c_size_t, c_void_p
from dataclasses import dataclass

from wan_attn import log
from wan_attn.config import current
from wan_attn.cuda import images
from wan_attn.native import library as native
from wan_attn.transient import is_interruption

# What has been handed to C, for good: C holds the address while it loads, and the second device of
# a kind asks for the same.
_images: dict[tuple[str, int], bytes] = {}

# Of this thread: what ended a callback and is no failure of it (Ctrl-C while it compiled), and
# whether the library is only being asked, so that nothing may take long.
_here = threading.local()

# find_proof(device index, row, dtype of value) -> one of library.PROOF_...; see selfcheck/proof.py.
FindProof = Callable[[int, str, int], int]
_find_proof: FindProof | None = None


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


def _proof(index: int, row: bytes, dtype: int) -> int:
    """wan_attn_proof_fn. What goes wrong leaves the row without a proof."""
    if _find_proof is None:
        return native.PROOF_MISSING
    try:
        return _find_proof(index, row.decode(), dtype)
    except BaseException as error:  # noqa: BLE001 - no exception can pass through C
        if is_interruption(error):
            _here.interruption = error
        log.once(("proof", repr(error)), logging.ERROR, f"the proof of {row.decode()}: {error!r}")
        return native.PROOF_MISSING


def prove_with(find_proof: FindProof) -> None:
    """Lets this function say, from now on, which rows are proven on which device."""
    global _find_proof
    _find_proof = find_proof
    ask_again()


def ask_again() -> None:
    """What is known of proofs has changed: the library forgets what it was told."""
    library = native.load()
    if library is not None and _path is not None:
        configure(library)


@contextlib.contextmanager
def question() -> Iterator[None]:
    """Within it the library is asked about a call that need not come: no proof is made for it."""
    before = vars(_here).get("is_question", False)
    _here.is_question = True
    try:
        yield
    finally:
        _here.is_question = before


def is_question() -> bool:
    """Whether this thread is within question()."""
    return bool(vars(_here).get("is_question", False))


# Kept for good: C calls them as long as the library is loaded.
_FIND_IMAGE = native.ImageFn(_find_image)
_FIND_PROOF = native.ProofFn(_proof)
_path: str | None = None  # of the driver; "": the system's; None: nothing is configured yet


def configure(library: ctypes.CDLL) -> None:
    """Tells libwan_attn its driver (WAN_ATTN_LIBCUDA, or the system's), where images are found, and
    who knows of proofs. The driver stays the one of the first time.

    Raises:
        RuntimeError: it has opened another driver.
    """
    global _path
    path = (current().libcuda or "") if _path is None else _path
    config = native.CudaConfig(
        ctypes.sizeof(native.CudaConfig), os.fsencode(path) or None, _FIND_IMAGE, _FIND_PROOF
    )
    error = native.Error()
    if library.wan_attn_cuda_configure(ctypes.byref(config), ctypes.byref(error)) != native.OK:
        raise RuntimeError(f"wan_attn: {error.text()}")
    _path = path


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
