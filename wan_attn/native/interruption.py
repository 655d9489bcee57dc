# SPDX-License-Identifier: Apache-2.0
"""interruption.py - tells what a signal handler raised from what a backend did; knows neither.

A program that limits its time sets SIGALRM's handler to raise TimeoutError, which arrives wherever
Python is just then: within our call. That says nothing against a backend, and must reach its owner.
"""

from __future__ import annotations

import functools
import signal
from types import CodeType, FrameType
from typing import Any

_VARARGS = 0x04  # inspect.CO_VARARGS; importing inspect costs more than all of this file


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
