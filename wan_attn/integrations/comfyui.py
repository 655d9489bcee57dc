# SPDX-License-Identifier: Apache-2.0
"""comfyui.py - ComfyUI's attention function by wan_attn: registered, global, or for one model.

Knows ComfyUI's calling convention; imports nothing of ComfyUI: the folder comfyui_node, which
ComfyUI loads, hands its attention module over as `host`. Signatures: comfy/ldm/modules/attention.py
of 0.3.64 and of 2026-11.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from wan_attn import attention, config, log
from wan_attn.integrations import _comfyui_places as _places
from wan_attn.integrations import _comfyui_sparse as _sparse
from wan_attn.integrations import _rebind
from wan_attn.integrations._rebind import Binding
from wan_attn.request import DTYPES, gate, refuse
from wan_attn.selfcheck import proof
from wan_attn.signatures._masked import REASON
from wan_attn.sparse import Use

NAME = "wan_attn"
"""What the function is registered as, and chosen by."""

NODE_ID, NODE_TITLE = "WanAttention", "Wan attention"

HOST_BACKENDS = (
    *("pytorch", "sage", "sage3", "flash", "xformers"),
    *("sub_quad", "split", "comfy_kitchen_int8"),
)
"""Names under which ComfyUI registers its own, where it has them; ComfyUI's order is by age."""

OVERRIDE = "optimized_attention_override"
GLOBAL_NAMES = ("optimized_attention", "optimized_attention_masked")

Attention = Callable[..., Tensor]

# scale and enable_gqa are honoured; the others say nothing about the result of an exact kernel.
_KNOWN = frozenset(
    (
        *("scale", "enable_gqa", "transformer_options", "low_precision_attention"),
        *("preferred_attention", "_inside_attn_wrapper"),
    )
)
_PARAMETERS = frozenset(("mask", "attn_precision", "skip_reshape", "skip_output_reshape"))


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Any) -> str | None:
    """Why wan_attn leaves this call to another function; None: it takes it."""
    if mask is not None:
        return REASON
    unknown = sorted(set(options) - _KNOWN)
    if unknown:
        return f"wan_attn does not know the option {unknown[0]!r}"
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
        names = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        return f"q, k and v must share float16, bfloat16 or float32, got {names}"
    if k.shape != v.shape or k.shape[0] != q.shape[0]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        return f"batches and head_dims must fit each other, got {shapes}"
    return None


def attend(
    fallback: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """One call of ComfyUI's, by wan_attn, or by `fallback` with a reason in the log, once.

    Args:
        fallback: of ComfyUI's signature: what takes a call with a mask, or with an option that
            wan_attn does not know.
        q, k, v: [batch, seqlen, heads * head_dim]; with skip_reshape [batch, heads, seqlen,
            head_dim]. With enable_gqa k and v have fewer heads.
        attn_precision: ComfyUI's wish for float32 scores; they always are.
        scale: multiplies the scores; None: 1/sqrt(head_dim).

    Returns:
        [batch, seqlen, heads * head_dim]; with skip_output_reshape [batch, heads, seqlen,
        head_dim].
    """
    operands = [q, k, v]
    del q, k, v  # see attend_containers
    options = {
        "mask": mask,
        "attn_precision": attn_precision,
        "skip_reshape": skip_reshape,
        "skip_output_reshape": skip_output_reshape,
        **kwargs,
    }
    return _attend(fallback, operands, heads, options)


def attend_containers(
    fallback: Attention, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any
) -> Tensor:
    """attend() for operands in ComfyUI's AttentionTensorContainer (of 2026-09): each is taken out,
    so that nothing keeps it alive once it is converted or has been read."""
    operands = [q.take(), k.take(), v.take()]
    names = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
    return _attend(fallback, operands, heads, {**dict(zip(names, args, strict=False)), **kwargs})


def _attend(
    fallback: Attention, operands: list[Tensor], heads: int, options: dict[str, Any]
) -> Tensor:
    """The list is emptied."""
    unknown = {name: x for name, x in options.items() if name not in _PARAMETERS}
    q, k, v = operands
    reason = why_not(q, k, v, options.get("mask"), unknown)
    del q, k, v
    if reason is not None:
        if not torch.compiler.is_compiling():
            log.once(("comfyui", reason), logging.INFO, f"Using {_title(fallback)} ({reason})")
        return fallback(operands.pop(0), operands.pop(0), operands.pop(0), heads, **options)
    if options.get("skip_reshape"):
        operands[:] = [x.transpose(1, 2) for x in operands]
    else:
        head_dim = operands[0].shape[-1] // heads
        operands[:] = [x.unflatten(-1, (-1, head_dim)) for x in operands]
    scale = options.get("scale")
    out = cast(
        Tensor, attention.sdpa(operands.pop(0), operands.pop(0), operands.pop(0), scale=scale)
    )
    return out.transpose(1, 2) if options.get("skip_output_reshape") else out.flatten(2)


def make_override(
    previous: Attention | None, fallback: Attention, used: Use | None = None
) -> Attention:
    """What ComfyUI calls in place of every attention function of one model.

    A closure, not an object: ComfyUI copies a model's options deeply, and a function stays itself.

    Args:
        previous: the override that was there; it takes the calls that wan_attn leaves, with its own
            first argument: the function that ComfyUI would have called.
        fallback: takes them if there was none.
        used: what leaves blocks out of this model's calls; None: as WAN_ATTN_SPARSE says.
    """

    def wan_attn_override(function: Attention, *args: Any, **kwargs: Any) -> Tensor:
        rest = fallback if previous is None else functools.partial(previous, function)
        return _sparse.within(used, attend, rest, *args, **kwargs)

    # With another override behind it ComfyUI unpacks containers: it tells only that way which
    # function it would have called.
    if previous is None:
        _take_containers(wan_attn_override, fallback, used)
    return wan_attn_override


def _take_containers(function: Any, fallback: Attention, used: Use | None = None) -> None:
    """Lets ComfyUI hand containers to this function as they are."""
    function.container_function = functools.partial(
        _sparse.within, used, attend_containers, fallback
    )


def register(host: Any) -> Attention:
    """Make the function known to ComfyUI by name; returns it as ComfyUI wraps it. Twice is once.

    Raises:
        RuntimeError: this ComfyUI is older than the registry.
    """
    for name in ("register_attention_function", "get_attention_function"):
        if not callable(getattr(host, name, None)):
            if not isinstance(getattr(host, "__name__", None), str):
                rule = "ComfyUI's module comfy.ldm.modules.attention"
                refuse("host", rule, gate.kind_of(host))
            raise RuntimeError(
                f"wan_attn: ComfyUI must be one whose comfy.ldm.modules.attention has {name},"
                " got an older one: update it"
            )
    function: Attention | None = host.get_attention_function(NAME, None)
    if function is None:
        fallback: Attention = host.get_attention_function("pytorch")

        def attention_wan_attn(*args: Any, **kwargs: Any) -> Tensor:
            return attend(fallback, *args, **kwargs)

        # ComfyUI's wrapper is what looks for a model's override.
        function = getattr(host, "wrap_attn", lambda plain: plain)(attention_wan_attn)
        _take_containers(function, fallback)
        host.register_attention_function(NAME, function)
    _places.install()
    return cast(Attention, host.get_attention_function(NAME))


def patch(host: Any) -> tuple[Binding, ...]:
    """Put the registered function wherever ComfyUI's choice for all models is bound.

    Every module imports that by name, so it is replaced by identity, in modules that are loaded and
    in the one that later modules take it from. All or none.
    """
    ours = register(host)
    originals = [getattr(host, name) for name in GLOBAL_NAMES]
    done: list[Binding] = []
    try:
        for original in originals:
            if original is not ours:
                for binding in _rebind.rebind(original, ours, names=GLOBAL_NAMES):
                    _replaced[binding.module, binding.attribute] = original
                    done.append(binding)
    except BaseException:
        for binding in done:
            original = _replaced.pop((binding.module, binding.attribute))
            setattr(sys.modules[binding.module], binding.attribute, original)
        raise
    return tuple(done)


def unpatch(host: Any) -> None:
    """Undo patch(), where the function is still ours."""
    ours = register(host)
    _places.remove()
    replaced = dict(_replaced)
    _replaced.clear()
    for (module, attribute), original in replaced.items():
        holder = sys.modules.get(module)
        if holder is not None and vars(holder).get(attribute) is ours:
            setattr(holder, attribute, original)
    # Modules that took ours from a patched one have no record of their own.
    if replaced:
        _rebind.rebind(ours, host.optimized_attention, names=GLOBAL_NAMES)


_replaced: dict[tuple[str, str], Attention] = {}


def start(host: Any) -> dict[str, type]:
    """What the node folder does when ComfyUI loads it; returns its NODE_CLASS_MAPPINGS.

    WAN_ATTN_COMFYUI=node registers the function and the node only. Otherwise wan_attn is also what
    all models use, unless ComfyUI was started with a flag that chooses another.
    """
    settings = config.current()
    log.enable(settings.log_level, "comfyui")
    register(host)
    chosen = [
        "--" + name.replace("_", "-")
        for name, value in vars(getattr(host, "args", object)).items()
        if value is True and name.startswith("use_") and name.endswith("attention")
    ]
    if settings.comfyui == "node":
        log.LOGGER.info("wan_attn: for the models behind its node (WAN_ATTN_COMFYUI=node)")
    elif chosen:
        log.LOGGER.info("wan_attn: for the models behind its node (%s stays)", chosen[0])
    else:
        patch(host)
        log.LOGGER.info("Using wan_attn attention")
    proof.before_work()
    return {NODE_ID: make_node(host)}


def make_node(host: Any) -> type:
    """The class of the node "Wan attention"."""

    class WanAttention:
        """Chooses the attention function of one model."""

        CATEGORY = "model/patch"
        DESCRIPTION = (
            "What computes this model's attention. Bypass the node to restore the previous one."
        )
        FUNCTION = "apply"
        RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            """Asked for at each look at the node: packs that load later register theirs later."""
            options = {"default": NAME, "tooltip": "wan_attn is exact and takes any card or CPU."}
            return {
                "required": {"model": ("MODEL",), "backend": (backends(host), options)},
                "optional": dict(_sparse.INPUTS),
            }

        def apply(
            self, model: Any, backend: str, sparse: str = _sparse.AS_SET, budget: float = 0.05
        ) -> tuple[Any]:
            return (enable(host, model, backend, sparse=sparse, budget=budget),)

    return WanAttention


def backends(host: Any) -> list[str]:
    """The names that this ComfyUI can choose from, ours first."""
    return [NAME, *(n for n in HOST_BACKENDS if host.get_attention_function(n, None) is not None)]


def enable(
    host: Any, model: Any, backend: str, *, sparse: str | None = None, budget: float = 0.05
) -> Any:
    """A clone of `model` whose attention is computed by `backend`.

    Args:
        sparse: a mode of wan_attn.sparse.use() for this model; None: as WAN_ATTN_SPARSE says.
        budget: the relative error that it may make.

    Raises:
        ValueError: this ComfyUI does not have the backend, or another than ours shall leave blocks
            out.
    """
    if backend not in backends(host):
        raise ValueError(
            f"wan_attn: backend must be one of {', '.join(backends(host))}, got {backend!r}"
        )
    if not callable(getattr(model, "clone", None)):
        refuse("model", "a ModelPatcher of ComfyUI's", gate.kind_of(model))
    used = _sparse.of_model(sparse, budget)
    if used is not None and backend != NAME:
        raise ValueError(
            f"wan_attn: backend must be {NAME} with sparse={sparse!r}, got {backend!r}"
        )
    patched = model.clone()
    options = dict(patched.model_options.get("transformer_options", {}))
    if backend == NAME:
        fallback = host.get_attention_function("pytorch")
        options[OVERRIDE] = make_override(options.get(OVERRIDE), fallback, used)
    else:
        options[OVERRIDE] = _always(host.get_attention_function(backend))
    patched.model_options["transformer_options"] = options
    log.LOGGER.info("Using %s attention for this model", backend)
    return patched


def _always(chosen: Any) -> Attention:
    """The override by which ComfyUI computes with one of its own functions."""

    def override(function: Attention, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, chosen(*args, **kwargs))

    containers = getattr(chosen, "container_function", None)
    if containers is not None:
        vars(override)["container_function"] = containers
    return override


def _title(function: Any) -> str:
    """A function by its name; of a partial, the function it calls."""
    function = getattr(function, "func", function)
    return str(getattr(function, "__name__", type(function).__name__))


# Their names in 0.1.
use_globally, restore, patch_model = patch, unpatch, enable
