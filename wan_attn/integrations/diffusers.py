# SPDX-License-Identifier: Apache-2.0
"""diffusers.py - diffusers' Wan models through wan_attn: enable() and disable().

Uses nothing but diffusers' public processor interface: an attention layer hands itself and its
inputs to its processor. The other way in, the backend of the name `wan_attn`, is
_diffusers_backend.py. Importing this file imports neither diffusers nor transformers.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from wan_attn import attention, config, log
from wan_attn import sparse as _sparse
from wan_attn.integrations import _diffusers_backend as _backend
from wan_attn.integrations import _diffusers_layers as _around
from wan_attn.integrations import _diffusers_places as _places
from wan_attn.request import gate, refuse
from wan_attn.selfcheck import proof
from wan_attn.signatures import _operands

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, key, value), each [batch, seqlen, heads, head_dim] -> the same shape as query."""

TEXT_TOKENS = 512  # image-to-video: what precedes the last 512 rows of the context is the image


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`wan_attn.sdpa` as Wan uses it: everything attends to everything, and lse is not wanted.

    What diffusers computes and wan_attn does not (float64) goes to PyTorch's SDPA, which the log
    says once.
    """
    query, key, value = _operands.under_autocast(query, key, value)
    reason = _backend.why_not_operands(query, key, value)
    if reason is None:
        operands = [query, key, value]
        del query, key, value  # as in flash_attention: no frame keeps them for longer
        return cast(Tensor, attention.sdpa(operands.pop(0), operands.pop(0), operands.pop(0)))
    log.traced(logging.WARNING, f"diffusers: PyTorch's SDPA takes a call: {reason}")
    return _backend.by_torch(query, key, value)


class _Processor(ABC):
    """The processor of one layer; keeps the one it replaced, and hands it what is not ours to do.

    diffusers writes `_attention_backend` and `_parallel_config` into every processor that has them:
    both belong to the replaced one, which reads them.
    """

    def __init__(self, replaced: Any, function: AttentionFunction, may_fuse: bool) -> None:
        self.replaced = replaced
        self.function = function
        self._is_overruled = False
        self.norm_and_rotate = functools.partial(_around.norm_and_rotate, may_fuse=may_fuse)

    @property
    def _attention_backend(self) -> Any:
        return getattr(self.replaced, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        # Set after enable(): the later wish counts. reset_attention_backend() sets None.
        self.replaced._attention_backend = backend
        self._is_overruled = backend is not None

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.replaced, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, parallel_config: Any) -> None:
        self.replaced._parallel_config = parallel_config

    def _is_ours(self, attention_mask: Tensor | None) -> bool:
        """Whether this call is; if not, the log says why, once."""
        if self._is_overruled:
            return False  # a backend was named: that is no surprise
        if self._parallel_config is not None:
            reason = "context parallelism is on, which set_attention_backend('wan_attn') serves"
        elif attention_mask is not None:
            reason = "it comes with an attention_mask, which Wan never passes"
        else:
            return True
        name = type(self.replaced).__name__
        log.traced(logging.WARNING, f"diffusers: {name} keeps a call: {reason}")
        return False

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
        **others: Any,
    ) -> Any:
        # diffusers before 0.35 passes what this signature names, and face blocks know no rotation.
        rotary = () if rotary_emb is None else (rotary_emb,)
        if not self._is_ours(attention_mask):
            context = (encoder_hidden_states, attention_mask)
            return self.replaced(layer, hidden_states, *context, *rotary, **others)
        return self.compute(layer, hidden_states, encoder_hidden_states, *rotary, **others)

    @abstractmethod
    def compute(self, layer: Any, hidden_states: Tensor, context: Any, *rotary: Any) -> Tensor:
        """What the replaced processor computes, with `function` for the attention in it."""


class _WanProcessor(_Processor):
    """Self-attention, and cross-attention to the text and, where there is one, the image."""

    def compute(
        self,
        layer: Any,
        hidden_states: Tensor,
        context: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor] | Tensor | None = None,
    ) -> Tensor:
        image = None
        if layer.add_k_proj is not None and context is not None:
            image, context = context[:, :-TEXT_TOKENS], context[:, -TEXT_TOKENS:]
        query, key, value = _around.project(layer, hidden_states, context)
        # One after the other, so that what was there before is not kept.
        query = self.norm_and_rotate(layer.norm_q, query, layer.heads, rotary_emb)
        key = self.norm_and_rotate(layer.norm_k, key, layer.heads, rotary_emb)
        value = value.unflatten(2, (layer.heads, -1))
        dtype, operands = query.dtype, [query, key, value]
        again = query if image is not None else None
        del query, key, value
        out = self.function(operands.pop(0), operands.pop(0), operands.pop(0)).flatten(2).to(dtype)
        if image is not None and again is not None:
            key, value = _around.project_image(layer, image)
            key, value = (x.unflatten(2, (layer.heads, -1)) for x in (key, value))
            _places.kind("image")
            out = out + self.function(again, key, value).flatten(2).to(dtype)
            _places.kind(None)
            del again, key, value
        for module in layer.to_out:  # the projection, and dropout
            out = module(out)
        return out


class _FaceProcessor(_Processor):
    """Wan-Animate's face blocks: the tokens of a frame attend to that frame's motion tokens."""

    def compute(self, layer: Any, hidden_states: Tensor, context: Tensor) -> Tensor:
        batch, frames, motion_tokens, _ = context.shape
        hidden_states = layer.pre_norm_q(hidden_states)
        motion = layer.pre_norm_kv(context).flatten(1, 2)
        query, key, value = _around.project(layer, hidden_states, motion)
        query, key, value = (x.unflatten(2, (layer.heads, -1)) for x in (query, key, value))
        query, key = layer.norm_q(query), layer.norm_k(key)
        query = query.unflatten(1, (frames, -1)).flatten(0, 1)
        key, value = (x.unflatten(1, (frames, motion_tokens)).flatten(0, 1) for x in (key, value))
        out = self.function(query, key, value).flatten(2).type_as(query)
        out = out.unflatten(0, (batch, frames)).flatten(1, 2)
        return cast(Tensor, layer.to_out(out))


_OURS: dict[str, type[_Processor]] = {
    "WanAttnProcessor": _WanProcessor,
    "WanAttnProcessor2_0": _WanProcessor,  # its name before diffusers 0.35
    "WanAnimateFaceBlockAttnProcessor": _FaceProcessor,
}
"""diffusers' own processors, by name: its files for Animate have copies of the class."""


def _models(target: Any) -> list[torch.nn.Module]:
    """The models of a pipeline, or the model itself.

    Raises:
        RuntimeError: it is neither.
    """
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        rule = "a model or pipeline of diffusers"
        _operands.check_module("model_or_pipe", target, rule)
    parts = list(components.values()) if isinstance(components, dict) else [target]
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def _layers(target: Any) -> Iterator[tuple[Any, Any]]:
    """(attention layer, its processor), each layer once."""
    for model in _models(target):
        for layer in model.modules():
            processor = getattr(layer, "processor", None)
            if processor is not None and hasattr(layer, "set_processor"):
                yield layer, processor


def replace_processors(
    target: Any, function: AttentionFunction, *, rope: bool | None = None
) -> int:
    """Let `function` compute the attention of every layer that has diffusers' own processor.

    Args:
        rope: whether rms_norm_rope norms and rotates query and key; None: as WAN_ATTN_ROPE says.

    Returns:
        How many layers; 0 is no error. All or none: if one refuses, every one has what it had.
    """
    if not callable(function):
        refuse("function", "one of (query, key, value)", gate.kind_of(function))
    may_fuse = config.current().rope == "auto" if rope is None else gate.flag("rope", rope)
    done: list[tuple[Any, Any]] = []
    try:
        for layer, processor in list(_layers(target)):
            stock = processor.replaced if isinstance(processor, _Processor) else processor
            ours = _OURS.get(type(stock).__name__)
            if ours is not None and type(stock).__module__.partition(".")[0] == "diffusers":
                layer.set_processor(ours(stock, function, may_fuse))
                done.append((layer, processor))
                _let_layers_be_skipped(type(stock), ours)
    except BaseException:
        for layer, processor in done:
            layer.set_processor(processor)
        raise
    return len(done)


def _let_layers_be_skipped(stock: type, ours: type) -> None:
    """Skip-layer and perturbed-attention guidance ask a table of diffusers' about a processor's
    class: for ours it says what it says for the one that was replaced."""
    try:
        table = importlib.import_module("diffusers.hooks._helpers").AttentionProcessorRegistry
        table.register(ours, table.get(stock))
    except (ImportError, AttributeError, TypeError, ValueError):
        pass  # this diffusers has no such guidance, or not for this processor: it says so itself


def restore_processors(target: Any) -> int:
    """Undo replace_processors(); returns how many layers got their own processor back."""
    count = 0
    for layer, processor in list(_layers(target)):
        if isinstance(processor, _Processor):
            layer.set_processor(processor.replaced)
            count += 1
    return count


_enabled: weakref.WeakSet[Any] = weakref.WeakSet()
_uses: weakref.WeakKeyDictionary[Any, _sparse.Use] = weakref.WeakKeyDictionary()


def _end_sparse(target: Any) -> None:
    used = _uses.pop(target, None)
    if used is not None:
        used.end()


def enable(model_or_pipe: Any, *, sparse: str | Mapping[str, Any] | None = None) -> int:
    """Send the attention of diffusers' Wan models through wan_attn. Twice is once.

    Serves WanTransformer3DModel (text, image and first frame to video), WanVACETransformer3DModel
    and WanAnimateTransformer3DModel. Layers with another processor are left alone.

    Args:
        model_or_pipe: such a model, or a pipeline: then all of its models.
        sparse: a mode of wan_attn.sparse.use(), or its arguments, which hold in this process until
            disable(); see docs/sparse.md. None: as WAN_ATTN_SPARSE says.

    Returns:
        The number of attention layers that go through wan_attn.

    Raises:
        RuntimeError: no layer has a processor of diffusers' Wan models; or `sparse` is no mode.
    """
    level = config.current().log_level
    leaves_out = None if sparse is None else _sparse.use(**_sparse_options(sparse))
    try:
        return _enable(model_or_pipe, level, leaves_out)
    except BaseException:
        if leaves_out is not None:
            leaves_out.end()
        raise


def _sparse_options(sparse: Any) -> dict[str, Any]:
    if isinstance(sparse, str):
        return {"mode": sparse}
    known = list(inspect.signature(_sparse.use).parameters)
    if not isinstance(sparse, Mapping) or not set(sparse) <= set(known):
        refuse("sparse", f"None, a mode, or any of {', '.join(known)}", gate.shown(sparse))
    return dict(sparse)


def _enable(model_or_pipe: Any, level: str, leaves_out: _sparse.Use | None) -> int:
    count = replace_processors(model_or_pipe, attend)
    name = type(model_or_pipe).__name__
    if not count:
        rule = f"a Wan model or pipeline with diffusers' own processors ({', '.join(_OURS)})"
        refuse("model_or_pipe", rule, name)
    _enabled.add(model_or_pipe)
    _end_sparse(model_or_pipe)
    if leaves_out is not None:
        _uses[model_or_pipe] = leaves_out
    for model in _models(model_or_pipe):
        _places.watch(model, model_or_pipe)
    log.enable(level, "diffusers")
    text = f"diffusers: {count} attention layers of {name} go through wan_attn"
    log.once(text, logging.INFO, text)
    proof.before_work()
    return count


def disable(model_or_pipe: Any) -> int:
    """Give every layer that enable() took its own processor back.

    Layers that were set to the backend `wan_attn` go back to diffusers' default, too.

    Returns:
        The number of attention layers that went through wan_attn until now.
    """
    count = restore_processors(model_or_pipe)
    _enabled.discard(model_or_pipe)
    _end_sparse(model_or_pipe)
    for model in _models(model_or_pipe):
        _places.release(model)
    if not _enabled:
        log.disable("diffusers")
    return count + _backend.release(processor for _, processor in _layers(model_or_pipe))


register_backend = _backend.register
unregister_backend = _backend.unregister
