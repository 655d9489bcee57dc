# SPDX-License-Identifier: Apache-2.0
"""compile.py - WAN_COMPILE=1: torch.compile for a transformer block, which switches itself off.

Compiles the block, not the model: all blocks of a model then share one graph, and the model's own
Python (lists, ``tolist``) stays outside.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from wan_attn import log
from wan_attn.backends._errors import is_device_error
from wan_attn.transient import is_interruption

SHAPE_LIMIT = 8
"""Different input shapes after which compiling costs more than it gives: torch's own limit for
recompilations of one function."""

# What a missing or broken compiler raises; torch wraps the rest in RuntimeError.
COMPILE_ERRORS = (RuntimeError, ImportError, OSError, subprocess.SubprocessError)


def _raise_at_recompile_limit() -> contextlib.AbstractContextManager[object]:
    """Where torch can, let its silent retreat to eager at the recompile limit be an exception."""
    from torch._dynamo import config  # slow to import, and only compiling needs it

    if not hasattr(config, "fail_on_recompile_limit_hit"):
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[object] = config.patch(
        fail_on_recompile_limit_hit=True
    )
    return patched


def _compile_errors() -> tuple[type[BaseException], ...]:
    """What compiling may raise: COMPILE_ERRORS and, where torch has it, the recompile limit."""
    from torch._dynamo import exc

    limit = getattr(exc, "FailOnRecompileLimitHit", None)
    return COMPILE_ERRORS if limit is None else (*COMPILE_ERRORS, limit)


def _unwrapped(error: BaseException) -> BaseException:
    """What interrupted torch.compile, which wraps what it does not know in an error of its own."""
    if type(error).__module__ != "torch._dynamo.exc":
        return error
    return getattr(error, "inner_exception", None) or error.__context__ or error


def _signature(values: Iterable[object]) -> tuple[object, ...]:
    """The shapes and dtypes in a call's arguments, as deep as lists and tuples go."""
    found: list[object] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append((tuple(value.shape), value.dtype))
        elif isinstance(value, (list, tuple)):
            found.append(_signature(value))
    return tuple(found)


class CompiledForward:
    """Replaces ``cls.forward`` by a compiled one for as long as that works."""

    def __init__(self, cls: type[torch.nn.Module]) -> None:
        self.cls = cls
        self.title = f"{cls.__module__}.{cls.__qualname__}"
        self.why_off: str | None = None
        self._original: Callable[..., Any] = cls.forward
        self._compiled: Callable[..., Any] | None = None
        self._shapes: set[tuple[object, ...]] = set()
        self._lock = threading.Lock()

        def forward(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Inside another torch.compile the plain block is what has to be traced.
            if self.why_off is not None or torch.compiler.is_compiling():
                return self._original(block, *args, **kwargs)
            return self._call(block, args, kwargs)

        self._forward = forward

    def install(self) -> None:
        """Put the compiled forward into the class."""
        self.cls.forward = self._forward

    def remove(self) -> None:
        """Put the original back, unless ours was replaced since."""
        if self.cls.__dict__.get("forward") is self._forward:
            self.cls.forward = self._original

    def _call(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._accepts(_signature((*args, *kwargs.values()))):
            try:
                compiled = self._get_compiled()
                with _raise_at_recompile_limit():
                    return compiled(block, *args, **kwargs)
            except _compile_errors() as error:
                # These say nothing about compiling, and a second call would hide them.
                if is_interruption(error):
                    raise _unwrapped(error) from None
                if is_device_error(error):
                    raise
                # If the model itself is at fault, the plain call below raises its own error.
                lines = str(error).strip().splitlines() or [""]
                self._switch_off(f"{type(error).__name__}: {lines[0]}")
        return self._original(block, *args, **kwargs)

    def _accepts(self, signature: tuple[object, ...]) -> bool:
        """Count these shapes; False once there have been too many."""
        with self._lock:
            self._shapes.add(signature)
            accepted = len(self._shapes) <= SHAPE_LIMIT
        if not accepted:
            self._switch_off(f"shapes keep changing (more than {SHAPE_LIMIT} so far)")
        return accepted

    def _get_compiled(self) -> Callable[..., Any]:
        with self._lock:
            if self._compiled is None:
                log.compile_enabled()
                self._compiled = torch.compile(self._original)
            return self._compiled

    def _switch_off(self, reason: str) -> None:
        with self._lock:
            if self.why_off is not None:
                return
            self.why_off = reason
        log.LOGGER.warning(
            "%s torch.compile switched off for %s: %s", log.PREFIX, self.title, reason
        )
