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
import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wan_attn import attention, config, log
from wan_attn.integrations import _mask_plan
from wan_attn.integrations._transformers_choice import choose, model_parts
from wan_attn.request import DTYPES, MAX_HEAD_DIM

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
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    is_causal = is_causal and attention_mask is None and query.shape[2] > 1
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


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]
) -> str | None:
    """Why this is not a call for wan_attn, whatever its mask; None: it is."""
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
    if query.dtype not in DTYPES:
        return f"it is {str(query.dtype).removeprefix('torch.')}"
    return None


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
        return _written_out(query, key, value, mask, bias, softcap, sinks, *call), None
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


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    scaling: float | None,
    is_causal: bool,
    dropout: float,
) -> Tensor:
    """Attention as its formula, in float32: scores are capped, then biased, then masked.

    Args:
        sinks: [heads], one more score for each row, that of a key whose value is 0.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query.float() @ key.float().transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if is_causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    weights = torch.dropout(weights, dropout, train=True)
    return (weights @ value.float()).to(query.dtype).transpose(1, 2).contiguous()


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
    if NAME in functions:
        return
    # A function without a mask function gets no mask at all, silently: the mask comes first.
    masks = _masks()
    if masks is not None:
        masks.register(NAME, masks()["sdpa"])
    if hasattr(functions, "register"):
        functions.register(NAME, attention_forward)
    else:  # 4.48 and 4.49: a plain dict
        functions[NAME] = attention_forward
    log.enable(config.current().log_level, "transformers")
    text = f'transformers: attn_implementation="{NAME}" is registered'
    log.once(text, logging.INFO, text)


def unregister() -> None:
    """Take the name away again. Models that use it must be given to disable() before."""
    functions = _functions()
    getattr(functions, "_global_mapping", functions).pop(NAME, None)
    masks = _masks()
    if masks is not None:
        masks._global_mapping.pop(NAME, None)
    log.disable("transformers")


_before: weakref.WeakKeyDictionary[torch.nn.Module, list[tuple[Any, str]]]
_before = weakref.WeakKeyDictionary()


def enable(model: torch.nn.Module) -> dict[str, str]:
    """Choose each part's attention: flash_attention_2 if usable, else wan_attn, else sdpa.

    Twice is once. DISABLE_FLASH_ATTN=1 leaves FlashAttention out.

    Returns:
        What each part of the model got: {"model.visual": "wan_attn", ...}.
    """
    register()
    parts = list(model_parts(model))
    choices = {name: choose(part, whole) for name, part, whole in parts}
    # All of them before any is set: setting one also sets what is below it.
    _before.setdefault(model, [(part, part.config._attn_implementation) for _, part, _ in parts])
    for name, part, _ in parts:
        key, reason = choices[name]
        _set(part, key)
        because = f" ({reason})" if reason else ""
        text = f"transformers: {name} ({type(part).__name__}): {key}{because}"
        log.once(text, logging.INFO, text)
    return {name: key for name, (key, _) in choices.items()}


def disable(model: torch.nn.Module) -> None:
    """Give every part of the model back what it had before enable()."""
    for part, before in _before.pop(model, []):
        _set(part, before)


def _set(part: Any, key: str) -> None:
    """The public method where there is one: it also sets what is below, so parts come from the
    outside in. Plain modules, and all before 4.54, read the configuration at every call."""
    if hasattr(part, "set_attn_implementation"):
        part.set_attn_implementation(key)
    else:
        part.config._attn_implementation_internal = key
