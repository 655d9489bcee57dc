# SPDX-License-Identifier: Apache-2.0
"""_diffusers_backend - the name `wan_attn` among diffusers' attention backends.

diffusers keeps them in an enumeration and a registry that are both closed, so this touches private
names: it checks what it did, and takes it back if diffusers does not play along. enable() of
diffusers.py needs none of it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable
from types import ModuleType
from typing import Any, cast

import torch.nn.functional as F
import torch.overrides
from torch import Tensor

from wan_attn import attention, config, log
from wan_attn.integrations import _enum_member as _member
from wan_attn.selfcheck import proof
from wan_attn.signatures import _operands

NAME = "wan_attn"
MEMBER = "WAN_ATTN"
DISPATCH = "diffusers.models.attention_dispatch"

# What a registry that has changed under us answers with.
_CHANGED = (AttributeError, TypeError, ValueError, KeyError)


def _dispatch() -> ModuleType:
    return importlib.import_module(DISPATCH)


def why_not_operands(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why diffusers' own way takes a call with these operands; None: wan_attn does."""
    if value.shape[-1] != query.shape[-1]:
        return "its value has another head_dim than its query"
    # Perturbed-attention guidance replaces the call of SDPA by its value, and finds no other call.
    for mode in torch.overrides._get_current_function_mode_stack():
        if type(mode).__module__.partition(".")[0] == "diffusers":
            return f"{type(mode).__name__} is there to change SDPA's result"
    return _operands.why_not_dtypes(query, key, value)


def by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What diffusers computes by default; everything [batch, seqlen, heads, head_dim]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _why_not(query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> str | None:
    if call["attn_mask"] is not None:
        return "it has an attn_mask"
    if call["dropout_p"] > 0:
        return "it has dropout"
    if call["is_causal"] and query.shape[1] > key.shape[1]:
        return "it is causal and has more queries than keys"
    return why_not_operands(query, key, value)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool, lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if is_causal and key.shape[1] > query.shape[1]:
        # diffusers means torch's causal: aligned top-left, so that no row sees the keys behind.
        key, value = key[:, : query.shape[1]], value[:, : query.shape[1]]
    result = attention.sdpa(query, key, value, scale=scale, is_causal=is_causal, return_lse=lse)
    if not lse:
        return result
    out, log_sum_exp = result
    return out, log_sum_exp.transpose(1, 2).contiguous()  # [batch, seqlen, heads]: what rings merge


def wan_attn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What diffusers calls; its argument names decide what it passes. All tensors are BSHD."""
    call = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "return_lse": return_lse,
    }
    if _parallel_config is not None:
        parallel = _dispatch()._templated_context_parallel_attention(
            query,
            key,
            value,
            **call,
            forward_op=_forward_op,
            backward_op=_backward_op,
            _parallel_config=_parallel_config,
        )
        return cast(Tensor, parallel)
    query, key, value = _operands.under_autocast(query, key, value)
    reason = _why_not(query, key, value, call)
    if reason is None:
        return _attend(query, key, value, scale, is_causal, return_lse)
    log.traced(logging.WARNING, f"diffusers: its backend `native` takes a call: {reason}")
    return _native(query, key, value, call)


def _retired(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """What stands under the name after unregister(), for models that are still set to it."""
    log.traced(
        logging.WARNING,
        f"diffusers: its backend `native` takes a call: `{NAME}` is unregistered, and"
        " disable(model) sets a model back to diffusers' default",
    )
    call = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "_parallel_config": _parallel_config,
    }
    return _native(query, key, value, call)


def _native(query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> Tensor:
    dispatch = _dispatch()
    native = dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName.NATIVE]
    known = inspect.signature(native).parameters
    return cast(Tensor, native(query, key, value, **{k: v for k, v in call.items() if k in known}))


def _forward_op(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One part of a context-parallel call: all heads of some keys, or some heads of all keys."""
    call = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    query, key, value = _operands.under_autocast(query, key, value)
    reason = _why_not(query, key, value, call)
    if reason is not None:
        raise ValueError(f"wan_attn cannot take this call under context parallelism: {reason}")
    return _attend(query, key, value, scale, is_causal, return_lse)


def _backward_op(ctx: Any, grad_out: Tensor, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError("wan_attn is forward only under context parallelism")


def _add(dispatch: ModuleType) -> None:
    enumeration, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    member = _member.add(enumeration, MEMBER, NAME, restored)
    options: dict[str, Any] = {"constraints": [dispatch._check_device, dispatch._check_shape]}
    if "supports_context_parallel" in inspect.signature(registry.register).parameters:
        options["supports_context_parallel"] = True
    registry.register(member, **options)(wan_attn_attention)
    # The three ways in which diffusers looks a name up.
    found = (enumeration(NAME), enumeration.__members__[MEMBER], enumeration[MEMBER])
    if not all(one is member for one in found) or registry._backends[NAME] is not (
        wan_attn_attention
    ):
        raise ValueError("the name was added, and is not found")


def _remove(dispatch: ModuleType) -> None:
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        getattr(registry, table, {}).pop(NAME, None)
    parallel = getattr(registry, "_supports_context_parallel", None)
    if isinstance(parallel, set):
        parallel.discard(NAME)
    elif isinstance(parallel, dict):
        parallel.pop(NAME, None)
    _leave_active(dispatch)
    _member.remove(dispatch.AttentionBackendName, MEMBER, NAME)


def _retire(dispatch: ModuleType) -> None:
    """Take the name from whoever asks for it, and leave a function to the models that hold it:
    copies and loaded models are nobody's to find, and diffusers would call None for them."""
    registry, name = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName(NAME)
    known = list(inspect.signature(_retired).parameters)
    _remove(dispatch)
    registry._backends[name] = _retired
    registry._constraints[name] = []
    registry._supported_arg_names[name] = set(known)


def _leave_active(dispatch: ModuleType) -> None:
    """If ours is what diffusers falls back on, let it be what the user's environment says."""
    registry = dispatch._AttentionBackendRegistry
    if registry._active_backend == NAME:
        registry._active_backend = dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND)


def register() -> None:
    """Let diffusers know the backend `wan_attn`, for all of its models. Twice is once.

    Then `model.set_attention_backend("wan_attn")` and `with attention_backend("wan_attn"):` work,
    and so does context parallelism with it. The variable DIFFUSERS_ATTN_BACKEND cannot name it:
    diffusers reads that while it is imported.

    Raises:
        RuntimeError: this version of diffusers has no such registry, or does not let us in.
    """
    try:
        dispatch = _dispatch()
    except ImportError as error:
        raise RuntimeError(f"wan_attn: no backends in this diffusers: {error}") from error
    if is_registered(dispatch):
        return
    level = config.current().log_level
    try:
        _add(dispatch)
    except BaseException as error:
        _remove(dispatch)
        if not isinstance(error, _CHANGED):
            raise
        raise RuntimeError(
            f"wan_attn: this diffusers takes no further backend ({type(error).__name__}: {error});"
            " wan_attn.integrations.diffusers.enable(pipe) needs none"
        ) from error
    log.enable(level, "diffusers backend")
    text = "diffusers: the attention backend `wan_attn` is registered"
    log.once(text, logging.INFO, text)
    proof.before_work()


def is_registered(dispatch: ModuleType) -> bool:
    """Whether this module of diffusers knows the name."""
    return MEMBER in dispatch.AttentionBackendName.__members__


def restored() -> Any:
    """The member `wan_attn` of diffusers' enumeration, for pickle: a model that is set to it brings
    it along into a process that has not registered it."""
    register()
    return _dispatch().AttentionBackendName(NAME)


def unregister() -> None:
    """Take the name away again; without register(), do nothing.

    Models that are still set to it go on with diffusers' backend `native`, which the log says once.
    disable() sets a model back to diffusers' default.
    """
    try:
        dispatch = _dispatch()
    except ImportError:
        return
    if is_registered(dispatch):
        _retire(dispatch)
        log.disable("diffusers backend")


def release(processors: Iterable[Any]) -> int:
    """Take the name out of these processors, and out of diffusers' default; returns how many."""
    count = 0
    for processor in processors:
        if getattr(processor, "_attention_backend", None) == NAME:
            processor._attention_backend = None
            count += 1
    try:
        dispatch = _dispatch()
    except ImportError:
        return count
    if is_registered(dispatch):
        _leave_active(dispatch)
    return count
