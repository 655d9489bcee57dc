# SPDX-License-Identifier: Apache-2.0
"""run.py - runs a call on the backend that choose.py names, or on the next if that fails."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan_attn import config, log
from wan_attn.backends import REGISTRY, native, reads_float32
from wan_attn.backends._errors import is_device_error
from wan_attn.request import (
    Call,
    Refusal,
    Request,
    check,
    check_dense,
    check_scale,
    host_lengths,
    transforms,
    wants_grad,
)
from wan_attn.selection import profile, watched
from wan_attn.selection.choose import Choice, compute_dtype, select, title
from wan_attn.transient import is_interruption
from wan_attn.tuning import candidates
from wan_attn.tuning.turn import Turn

# What a backend may raise for reasons of its own: a missing symbol, a changed signature, a shape it
# did not expect.
_BACKEND_FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    LookupError,
    ImportError,
    OSError,
)


@dataclass(slots=True)
class _Plan:
    """What was found out about a kind of call, so that the next one of that kind costs a look-up.

    Attributes:
        settings: those it was made under; refresh() makes others, and plans are made anew.
        dtypes: what query, key and value are converted to.
        reads: whether the backend reads query, and key, of float32 beside a half value in place.
        turn: what it waits for until it is made anew by measurement; None: for nothing.
        failed: (backend or candidate, reason) for those that failed at run time.
        is_said: the log has described it.
    """

    settings: config.Settings
    request: Request
    choice: Choice
    run: Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor | None]]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    reads: tuple[bool, bool]
    turn: Turn | None = None
    failed: tuple[tuple[str, str], ...] = ()
    is_said: bool = False


_plans: dict[tuple[Any, ...], _Plan] = {}
_PLANS_MAX = 4096  # kinds of calls; shapes that never repeat must not grow this for ever
config.memory(_plans.clear)


def attend(operands: list[Tensor], call: Call) -> tuple[Tensor, Tensor | None]:
    """Run the call on the chosen backend; on the next ones where that fails.

    Args:
        operands: [query, key, value]. The list is emptied: whoever holds nothing else lets the
            memory of what is converted go before attention is computed, and that of the rest
            before the result is converted.

    Returns:
        out in call.out_dtype, else in query's dtype; lse or None.

    Raises:
        RuntimeError: a bad argument; no backend takes the call; or the device is in trouble.
    """
    query, key, value = operands
    operands.clear()
    query, key, value = _readable(query, key, value)
    if transforms.in_forward_mode():  # a known kind of call is not checked again
        transforms.without_tangent(query=query, key=key, value=value)
    settings = config.current()
    kind = _kind(query, key, value, call)
    plan = _plans.get(kind)
    if plan is not None and plan.settings is not settings:
        plan = None
    out_dtype = query.dtype if call.out_dtype is None else call.out_dtype
    dtypes = _dtypes(query, key, value, call, settings) if plan is None else plan.dtypes
    query = query if query.dtype == dtypes[0] else _converted(query, dtypes[0])
    key = key if key.dtype == dtypes[1] else _converted(key, dtypes[1])
    value = value if value.dtype == dtypes[2] else _converted(value, dtypes[2])
    if plan is None:
        plan = _make_plan(query, key, value, call, settings)
        _keep(kind, plan)
    pairs = _check_values(plan.request, call)
    if plan.turn is not None and plan.turn.take((query, key, value, call)) is not None:
        plan = _make_plan(query, key, value, call, settings, plan.failed)
        _keep(kind, plan)
    recorder = None if settings.profile is None else profile.recorder(settings.profile)
    ran = ""
    while True:
        begun = None if recorder is None else recorder.start(query.device)
        # Here and not in the backend, whose callers would still hold what it has converted.
        if not plan.reads[0] and query.dtype != value.dtype:
            query = _converted(query, value.dtype)
        if not plan.reads[1] and key.dtype != value.dtype:
            key = _converted(key, value.dtype)
        try:
            if watched.IN_BITS.active is None and watched.BLOCKS.active is None:
                out, lse = plan.run(query, key, value, call)
            else:
                by = (plan.run, plan.choice.backend, plan.request)
                out, lse, ran = watched.run(*by, (query, key, value), call)
        except (Refusal, config.ConfigError):
            raise  # of an argument, which every backend would refuse; or of a schedule
        except _BACKEND_FAILURES as error:
            if is_device_error(error) or is_interruption(error):
                raise
            plan = _next_plan(plan, error, call.version)
            # Under a transform it may be no fault of its own.
            if not transforms.is_transformed(query, key, value):
                _keep(kind, plan)
        else:
            if recorder is not None:
                recorder.stop(begun, plan.request, ran or _what_ran(plan.choice))
            if not plan.is_said and not ran:
                plan.is_said = True
                _say(plan, call.version, pairs)
            del query, key, value
            return out if out.dtype == out_dtype else out.to(out_dtype), lse


def _what_ran(choice: Choice, gradients: str | None = None) -> str:
    """As the log calls it: the row is the one that the op says it has run; and what will compute
    gradients, where that is said."""
    row = native.last_kernel() if choice.backend == native.NAME else None
    row = row or choice.variant
    return title(choice.backend, f"{row}; gradients: {gradients}" if gradients else row)


def _readable(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The contract wants head_dim to have stride 1; callers of Wan2.2's function need not know."""
    try:
        if query.stride(-1) == 1 and key.stride(-1) == 1 and value.stride(-1) == 1:
            return query, key, value
    except (RuntimeError, IndexError) as error:  # a layout without strides, or no dimension
        if is_interruption(error):
            raise
    check_dense(query, key, value)
    query, key, value = (
        x if x.dim() != 4 or x.stride(3) == 1 else x.contiguous() for x in (query, key, value)
    )
    return query, key, value


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype. torch keeps the order of its strides, in which, where rows overlap, the last
    dimension is not the innermost one."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _kind(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Any, ...]:
    """Everything about a call that a plan depends on; must cost next to nothing."""
    q_lens, k_lens = call.q_lens, call.k_lens
    return (
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        query.layout,
        key.layout,
        value.layout,
        None if q_lens is None else (q_lens.shape, q_lens.dtype, q_lens.device, q_lens.layout),
        None if k_lens is None else (k_lens.shape, k_lens.dtype, k_lens.device, k_lens.layout),
        wants_grad(query, key, value),
        call.is_causal,
        call.window,
        call.dropout_p,
        call.return_lse,
        call.dtype,
        call.version,
    )


def _keep(kind: tuple[Any, ...], plan: _Plan) -> None:
    if len(_plans) >= _PLANS_MAX:
        _plans.clear()
    _plans[kind] = plan


def _dtypes(
    query: Tensor, key: Tensor, value: Tensor, call: Call, settings: config.Settings
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """What query, key and value are converted to before any backend sees them.

    float32 beside a half value stays: some backends read it as it is, and attend() converts it for
    the others.
    """
    dtype = compute_dtype(value.dtype, call.dtype, query.device, settings.force_fp16)
    if call.dtype is None and not settings.force_fp16:
        return query.dtype, key.dtype, dtype
    # Before anything is converted, which for operands that do not fit may want endless memory.
    check(query, key, value, call, takes_any_strides=True, takes_any_float=True)
    query_dtype, key_dtype = (t.dtype if t.dtype == torch.float32 else dtype for t in (query, key))
    return query_dtype, key_dtype, dtype


def _make_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    settings: config.Settings,
    failed: tuple[tuple[str, str], ...] = (),
) -> _Plan:
    request = Request.from_tensors(query, key, value, call)
    native.prove(request.device)
    choice = select(request, settings, version=call.version, failed=failed)
    run = candidates.runner(choice.candidate, request)
    dtypes = (query.dtype, key.dtype, value.dtype)
    reads = reads_float32(choice.backend, request, choice.variant)
    return _Plan(settings, request, choice, run, dtypes, reads, choice.turn, failed)


def _check_values(request: Request, call: Call) -> int | None:
    """Check what a plan cannot: values. Returns query-key pairs, None for lengths on a device."""
    if call.scale is not None:
        check_scale(call.scale)
    if call.q_lens is None and call.k_lens is None:
        return request.batch * request.seqlen_q * request.seqlen_k
    q_host: list[int] | None
    k_host: list[int] | None
    if call.q_lens is None:
        q_host = [request.seqlen_q] * request.batch
    else:
        q_host = host_lengths("q_lens", call.q_lens, request.batch, request.seqlen_q)
    if call.k_lens is None:
        k_host = [request.seqlen_k] * request.batch
    else:
        k_host = host_lengths("k_lens", call.k_lens, request.batch, request.seqlen_k)
    if q_host is None or k_host is None:
        return None
    pairs: int = sum(map(operator.mul, q_host, k_host))
    return pairs


def _next_plan(plan: _Plan, error: Exception, version: int | None) -> _Plan:
    """The plan without the candidate that failed just now: a backend, or one kernel of it.

    Raises:
        RuntimeError: WAN_ATTN_STRICT=1. Exception: `error` itself, if no other backend is left.
    """
    name, failing = plan.choice.candidate.name, REGISTRY[plan.choice.backend].TITLE
    if plan.choice.variant:
        failing = title(plan.choice.backend, plan.choice.variant)
    said = " ".join(str(error).split())[:300] or "no message"
    reason = f"failed at run time ({type(error).__name__}: {said})"
    if plan.settings.strict:
        raise RuntimeError(
            f"wan_attn: {failing} {reason} (WAN_ATTN_STRICT=1: nothing else is tried)"
        ) from error
    failed = (*plan.failed, (name, reason))
    try:
        choice = select(plan.request, plan.settings, version=version, failed=failed)
    except RuntimeError as nothing_left:
        raise error from nothing_left
    following = choice.title if choice.variant else REGISTRY[choice.backend].TITLE
    log.once((name, reason), logging.WARNING, f"{failing} {reason}; trying {following}")
    run = candidates.runner(choice.candidate, plan.request)
    reads = reads_float32(choice.backend, plan.request, choice.variant)
    more = (reads, choice.turn, failed)
    return _Plan(plan.settings, plan.request, choice, run, plan.dtypes, *more)


def _say(plan: _Plan, version: int | None, pairs: int | None) -> None:
    """Log what just ran, once per configuration; louder where it is not what was asked for."""
    choice, request = plan.choice, plan.request
    level = logging.WARNING if choice.is_fallback else logging.INFO
    ran = _what_ran(choice, choice.gradient_name)
    log.configuration(ran, choice.backend, choice.reasons(), request, pairs, level)
    why_not_fa3 = dict(choice.refusals).get("fa3")
    if version == 3 and why_not_fa3 is not None:
        log.once(
            ("version=3", why_not_fa3),
            logging.WARNING,
            f"version=3 was asked for, but Flash Attention 3: {why_not_fa3}",
        )
