# SPDX-License-Identifier: Apache-2.0
"""transient.py - errors that say nothing of the next time: an interruption, and no memory left.

No lasting verdict may be made of one. A program that limits its time sets SIGALRM's handler to
raise TimeoutError, which arrives wherever Python is just then: within our call. That says nothing
against a backend, and must reach its owner. Knows no torch, as building the package needs none.
"""

from __future__ import annotations

import errno
import functools
import signal
from types import CodeType, FrameType
from typing import Any

# In the text of drivers, of torch's allocators (Linux, Windows), of the loader, of C++ (GCC,
# MSVC), of NVRTC, of cuBLAS and cuDNN, of torch.compile, which wraps what it got.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "out_of_memory",
    "alloc_failed",
    "allocation_failed",
    "memoryerror",
)
# The loader's room for thread-local data is fixed: its lack never gets well.
_NO_ROOM_FOR_GOOD = "static tls"

_VARARGS = 0x04  # inspect.CO_VARARGS; importing inspect costs more than all of this file


def is_transient(error: BaseException) -> bool:
    """Whether the same call may do well another time, so that `error` must be raised."""
    return is_interruption(error) or is_out_of_memory(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host, a device or its driver had no memory left, whoever says so."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError, which before torch 2.5 is torch.cuda's alone.
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    if not isinstance(error, (RuntimeError, OSError, ImportError)):
        return False
    if getattr(error, "errno", None) == errno.ENOMEM:
        return True
    text = str(error).lower()
    return _NO_ROOM_FOR_GOOD not in text and any(words in text for words in _NO_MEMORY)


def is_interruption(error: BaseException) -> bool:
    """Whether a signal handler raised `error`, or it is no Exception, as KeyboardInterrupt.

    A handler's frame is known by its code, which belongs to a handler that is set now, or by an
    argument that no other function has: the frame that called it, the one that was interrupted.
    """
    if not isinstance(error, Exception):
        return True
    handlers = _handlers()
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code in handlers or _is_given_its_caller(frame):
            return True
        trace = trace.tb_next
    return False


def _handlers() -> set[CodeType]:
    found = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        function: Any = handler if hasattr(handler, "__code__") else type(handler).__call__
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            found.add(code)
    return found


def _is_given_its_caller(frame: FrameType) -> bool:
    code = frame.f_code
    count = code.co_argcount + bool(code.co_flags & _VARARGS)
    if frame.f_back is None or count == 0:
        return False
    # Behind the positional parameters come those that are named, and then *args.
    names = code.co_varnames[: code.co_argcount]
    if code.co_flags & _VARARGS:
        names += (code.co_varnames[code.co_argcount + code.co_kwonlyargcount],)
    for name in names:
        value = frame.f_locals.get(name)
        given = value if isinstance(value, tuple) else (value,)
        if any(one is frame.f_back for one in given):
            return True
    return False
