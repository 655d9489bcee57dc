# SPDX-License-Identifier: Apache-2.0
"""transformers.py - transformers' models through wan_attn: attn_implementation="wan_attn".

For the models around Wan: prompt extenders (Qwen), vision and text encoders (CLIP, SigLIP, DINOv2).
register() gives transformers the name; enable(model) also chooses, for each part of a model,
flash_attention_2 where it is usable, else wan_attn, else sdpa. Importing this file does not import
transformers.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wan_attn import attention, config, log
from wan_attn.integrations import _transformers_marks as _marks
from wan_attn.integrations import _written_out
from wan_attn.integrations._transformers_choice import choose, model_parts
from wan_attn.request import MAX_HEAD_DIM, refuse
from wan_attn.selfcheck import proof
from wan_attn.signatures import _mask_plan, _operands

NAME = "wan_attn"
_planner = _mask_plan.Planner()


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: means what its sdpa means, for the same arguments.

    Args:
        query: [batch, heads, seqlen_q, head_dim]; key, value: with as many heads or fewer.
        attention_mask: 4D, as transformers writes it for sdpa; None: all, or causal.
        scaling: of the scores; None: 1/sqrt(head_dim).
        is_causal: None: what the module says.

    Returns:
        ([batch, seqlen_q, heads, head_dim] contiguous, no weights). Rows that see no key are 0.
    """
    is_causal = _is_causal(module, query, attention_mask, is_causal)
    query, key, value = _operands.under_autocast(query, key, value)
    plan = None
    reason = _why_not(query, key, value, dropout, kwargs)
    if reason is None and attention_mask is not None:
        plan = _plan(attention_mask, query, key)
        reason = plan.reason or None
    if reason is None and is_causal and query.shape[2] > key.shape[2]:
        reason = "it is causal and has more queries than keys"
    if reason is not None:
        return _elsewhere(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, reason, kwargs
        )
    _warn_of_weights(kwargs)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if plan is not None:
        return _mask_plan.attend(query, key, value, plan, scaling).contiguous(), None
    if is_causal:
        # Without a mask transformers means torch's causal, aligned top-left: the keys behind are
        # the empty end of a static cache.
        key, value = key[:, : query.shape[1]], value[:, : query.shape[1]]
    out = attention.sdpa(query, key, value, scale=scaling, is_causal=is_causal)
    assert isinstance(out, Tensor)
    return out.contiguous(), None


def _is_causal(module: Any, query: Tensor, mask: Tensor | None, is_causal: bool | None) -> bool:
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    return is_causal and mask is None and query.shape[2] > 1


def retired_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What stands under the name after unregister(), for models that still have it."""
    is_causal = _is_causal(module, query, attention_mask, is_causal)
    reason = f"{NAME} is unregistered, and disable(model) gives a model its own attention back"
    call = (module, query, key, value, attention_mask, dropout, scaling, is_causal)
    return _elsewhere(*call, reason, kwargs)


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]
) -> str | None:
    """Why wan_attn cannot take this call, its mask aside; None: it can."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            return f"it has {name}"
    if dropout:
        return "it has dropout"
    if value.shape[-1] != query.shape[-1]:
        return "its value has another head_dim than its query"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"its head_dim {query.shape[-1]} is above {MAX_HEAD_DIM}"
    if query.shape[0] != key.shape[0]:
        return "its query has another batch than its key"
    return _operands.why_not_dtypes(query, key, value)


def _plan(mask: Tensor, query: Tensor, key: Tensor) -> _mask_plan.Plan:
    if torch.compiler.is_compiling():
        return _mask_plan.Plan(reason="its mask cannot be read while torch.compile traces")
    if not isinstance(mask, Tensor):
        return _mask_plan.Plan(reason=f"its mask is a {type(mask).__name__}")
    return _planner.plan(mask, query.shape[0], query.shape[2], key.shape[2])


def _elsewhere(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    reason: str,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """The call by transformers' own sdpa or, where that has no such thing, written out."""
    is_written_out = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    who = "plain torch operators take" if is_written_out else "its sdpa takes"
    text = f"transformers: {who} a call of {type(module).__name__}: {reason}"
    log.traced(logging.WARNING, text)
    if is_written_out:
        bias = options.get("position_bias")
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        call = (scaling, is_causal, dropout)
        return _written_out.attend(query, key, value, mask, bias, softcap, sinks, *call), None
    sdpa = _functions()["sdpa"]
    out, _ = sdpa(
        module,
        query,
        key,
        value,
        mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **options,
    )
    return out, None


def _warn_of_weights(options: dict[str, Any]) -> None:
    if options.get("output_attentions"):
        text = "transformers: output_attentions: wan_attn keeps no weights, as sdpa does not"
        log.traced(logging.WARNING, text)


def _modeling_utils() -> ModuleType:
    return importlib.import_module("transformers.modeling_utils")


def _functions() -> Any:
    """transformers' attention functions by name; a dict, or something that reads like one."""
    return _modeling_utils().ALL_ATTENTION_FUNCTIONS


def _masks() -> type[Any] | None:
    """Where transformers keeps its mask functions; None before 4.53, which has none."""
    try:
        module = importlib.import_module("transformers.masking_utils")
    except ModuleNotFoundError:
        return None
    return getattr(module, "AttentionMaskInterface", None)


def register() -> None:
    """Let transformers know `attn_implementation="wan_attn"`. Twice is once.

    Raises:
        RuntimeError: transformers is older than 4.48, which has no such names.
    """
    functions = getattr(_modeling_utils(), "ALL_ATTENTION_FUNCTIONS", None)
    if functions is None:
        raise RuntimeError("wan_attn: this transformers has no table of attention functions")
    if functions.get(NAME) is attention_forward:
        return
    level = config.current().log_level
    # A function without a mask function gets no mask at all, silently: the mask comes first.
    masks = _masks()
    if masks is not None:
        masks.register(NAME, masks()["sdpa"])
    _put(functions, attention_forward)
    log.enable(level, "transformers")
    text = f'transformers: attn_implementation="{NAME}" is registered'
    log.once(text, logging.INFO, text)
    proof.before_work()


def _put(functions: Any, function: Any) -> None:
    if hasattr(functions, "register"):
        functions.register(NAME, function)
    else:  # 4.48 and 4.49: a plain dict
        functions[NAME] = function


def unregister() -> None:
    """Take wan_attn away from the name; without register(), do nothing.

    Models that still have the name go on with transformers' own sdpa, which the log says once:
    copies and loaded models are nobody's to find. disable() gives one its own attention back.
    """
    functions = _functions()
    if functions.get(NAME) is attention_forward:
        # The mask function stays: without one a model gets no mask, silently.
        _put(functions, retired_forward)
        log.disable("transformers")


def _check(model: torch.nn.Module) -> list[tuple[str, Any, Any]]:
    rule = "a model of transformers, or a torch.nn.Module with one in it"
    _operands.check_module("model", model, rule)
    return list(model_parts(model))


def enable(model: torch.nn.Module) -> dict[str, str]:
    """Choose each part's attention: flash_attention_2 if usable, else wan_attn, else sdpa.

    Twice is once. DISABLE_FLASH_ATTN=1 leaves FlashAttention out.

    Args:
        model: of transformers, or one that has or wraps such a model (peft, DDP, torch.compile).

    Returns:
        What each part of the model got: {"model.visual": "wan_attn", ...}.

    Raises:
        RuntimeError: there is no model of transformers in it. What transformers raises where it
            does not let a part have its function; then every part has what it had.
    """
    parts = _check(model)
    if not parts:
        refuse("model", "one of transformers", f"a {type(model).__name__} without one in it")
    choices = {name: choose(part, whole) for name, part, whole in parts}
    is_new = _functions().get(NAME) is not attention_forward
    register()
    # All of them before any is set: setting one also sets what is below it.
    before = {name: _marks.before(model, part, whole) for name, part, whole in parts}
    had = [part.config._attn_implementation for _, part, _ in parts]
    try:
        for name, part, _ in parts:
            _set(part, choices[name][0])
    except BaseException:
        for (_, part, _), key in zip(parts, had, strict=True):
            part.config._attn_implementation_internal = key  # as it was: nobody need agree
        if is_new:
            unregister()
        raise
    for name, part, _ in parts:
        key, reason = choices[name]
        because = f" ({reason})" if reason else ""
        text = f"transformers: {name} ({type(part).__name__}): {key}{because}"
        log.once(text, logging.INFO, text)
        _marks.write(model, part, before[name], part.config._attn_implementation)
    return {name: key for name, (key, _) in choices.items()}


def disable(model: torch.nn.Module) -> None:
    """Give every part of the model back what it had before enable().

    What was chosen since stays. It need not be the object that was enabled: a deep copy, a wrapper
    (peft) and a model that torch.load gave back are told by what they carry. A part that was
    loaded with attn_implementation="wan_attn" gets transformers' default.
    """
    parts = _check(model)
    before = [_marks.before(model, part, whole) for _, part, whole in parts]
    # All of them, also those that stay: setting one also sets what is below it.
    for (_, part, _), key in zip(parts, before, strict=True):
        if part.config._attn_implementation != key:
            _set(part, key)
    _marks.erase(model)


def _set(part: Any, key: str) -> None:
    """The public method where there is one: it also sets what is below, so parts come from the
    outside in. Plain modules, and all before 4.54, read the configuration at every call."""
    if hasattr(part, "set_attn_implementation"):
        part.set_attn_implementation(key)
    else:
        part.config._attn_implementation_internal = key
