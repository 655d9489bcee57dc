# SPDX-License-Identifier: Apache-2.0
"""wan2gp.py - Wan2GP's pay_attention by wan_attn: patch() and unpatch().

Interface: shared/attention.py of deepbeepmeep/Wan2GP. Its modes are a closed list, so the function
itself is replaced, wherever it is bound. Importing this file imports nothing of it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from wan_attn import attention, log
from wan_attn.integrations import _rebind
from wan_attn.integrations._rebind import Binding
from wan_attn.request import gate, refuse
from wan_attn.selfcheck import proof

MODULE, FUNCTION = "shared.attention", "pay_attention"

# Ours, and what it replaced. Not an attribute of the function: functools.wraps copies those to
# somebody's wrapper, which would then be taken for ours.
_replaced: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any]]
_replaced = weakref.WeakKeyDictionary()


def patch(module: ModuleType | None = None) -> tuple[Binding, ...]:
    """Replace pay_attention in every module that has it; twice is once.

    Args:
        module: the one that defines it; None: `shared.attention`, imported now. Modules that are
            imported later take it from there.

    Returns:
        The names that were replaced.

    Raises:
        RuntimeError: the module has no such function. ModuleNotFoundError: Wan2GP cannot be
            imported here.
    """
    original = _current(module)
    if original in _replaced:
        return ()
    ours = make_pay_attention(original)
    _replaced[ours] = original
    bindings = _rebind.rebind(original, ours)
    proof.before_work()
    return bindings


def _current(module: ModuleType | None) -> Callable[..., Any]:
    module = importlib.import_module(MODULE) if module is None else module
    function: Any = getattr(module, FUNCTION, None)
    if not isinstance(module, ModuleType) or not callable(function):
        got = f"the module {module.__name__}" if isinstance(module, ModuleType) else None
        refuse("module", f"one with {FUNCTION}", got or gate.kind_of(module))
    found: Callable[..., Any] = function
    return found


def unpatch(module: ModuleType | None = None) -> None:
    """Put Wan2GP's own function back; without patch(), do nothing.

    A function that somebody put around ours since stays, and the log says so.
    """
    current = _current(module)
    if current in _replaced:
        _rebind.rebind(current, _replaced[current])
        return
    inner: Any = getattr(current, "__wrapped__", None)
    if inner is not None and inner in _replaced:
        name = _rebind.describe(current)
        text = f"Wan2GP: {name} was put around wan_attn's function since, and still calls it"
        log.once(text, logging.WARNING, text)
        _rebind.rebind(inner, _replaced[inner])


def make_pay_attention(original: Any) -> Any:
    """pay_attention by wan_attn, which leaves to `original` what it does not do."""

    @functools.wraps(original)
    def pay_attention(
        qkv_list: list[Tensor],
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
        version: int | None = None,
        force_attention: str | None = None,
        attention_mask: Tensor | None = None,
        recycle_q: bool = False,
        q_lens: Tensor | Sequence[int] | None = None,
        k_lens: Tensor | Sequence[int] | None = None,
    ) -> Any:
        """Operands [batch, seqlen, heads, head_dim], which are taken out of the list; k and v may
        have a batch of 1. A mask, or a mode that the caller forces, is Wan2GP's own business.
        Rows beyond q_lens are 0. recycle_q allows q's memory for the result, and is not needed."""
        if attention_mask is not None or force_attention is not None:
            return original(
                qkv_list,
                dropout_p=dropout_p,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                deterministic=deterministic,
                version=version,
                force_attention=force_attention,
                attention_mask=attention_mask,
                recycle_q=recycle_q,
                q_lens=q_lens,
                k_lens=k_lens,
            )
        if len(qkv_list) != 3:
            refuse("qkv_list", "[q, k, v]", f"{len(qkv_list)} operands")
        operands = list(qkv_list)
        qkv_list.clear()  # Wan2GP expects it: nothing else may keep the operands alive
        batch, dtype = operands[0].shape[0], operands[2].dtype
        if operands[1].shape[0] != batch:
            operands[1:] = [x.expand(batch, -1, -1, -1) for x in operands[1:]]
        return attention.attend(
            operands,
            q_lens,
            k_lens,
            dropout_p,
            softmax_scale,
            causal=causal,
            window_size=window_size,
            deterministic=deterministic,
            dtype=dtype,
            version=version,
        )

    return pay_attention


# Their names in 0.1.
enable, disable = patch, unpatch
