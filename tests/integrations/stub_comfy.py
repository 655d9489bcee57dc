# SPDX-License-Identifier: Apache-2.0
"""stub_comfy.py - a stand-in for ComfyUI: its attention module's interface, and who calls it.

Names, signatures and call forms as recorded from comfy/ldm/modules/attention.py, comfy/ldm/wan and
kijai's WanVideoWrapper; the bodies are written here. AttentionTensorContainer came in September
2026: the wrapper unpacks it where the function, or the override, has no container_function.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ATTENTION = """
import argparse, functools, logging
import torch
import torch.nn.functional as F

args = argparse.Namespace(
    use_split_cross_attention=False, use_quad_cross_attention=False,
    use_pytorch_cross_attention=False, use_sage_attention=False, use_flash_attention=False,
    use_ascii=True,
)
calls = []  # the names of the functions that ran
_registry = {}


def register_attention_function(name, func):
    if name in _registry:
        logging.warning("already registered")
    else:
        _registry[name] = func


def get_attention_function(name, default=...):
    if name == "optimized":
        return optimized_attention
    if default is ...:
        return _registry[name]
    return _registry.get(name, default)


class AttentionTensorContainer:
    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        if self.tensor is None:
            raise RuntimeError("attention tensor container has already been consumed")
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


def wrap_attn(func):
    def unpacked(args):
        if isinstance(args[0], AttentionTensorContainer):
            args = (*(box.take() for box in args[:3]), *args[3:])
        return args

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        is_boxed = isinstance(args[0], AttentionTensorContainer)
        if "_inside_attn_wrapper" not in kwargs:
            kwargs = {**kwargs, "_inside_attn_wrapper": True}
            override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
            if override is not None:
                if is_boxed and hasattr(override, "container_function"):
                    return override.container_function(*args, **kwargs)
                return override(func, *unpacked(args), **kwargs)
        if is_boxed and wrapper.container_function is not None:
            return wrapper.container_function(*args, **kwargs)
        return func(*unpacked(args), **kwargs)

    wrapper.container_function = None
    return wrapper


def _make(name):
    def attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                  skip_output_reshape=False, **kwargs):
        calls.append(name)
        if not skip_reshape:
            dim = q.shape[-1] // heads
            q, k, v = (x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in (q, k, v))
        if kwargs.get("enable_gqa"):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        if mask is not None:
            mask = mask.reshape(-1, 1, *mask.shape[-2:]) if mask.ndim < 4 else mask
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    attention.__name__ = f"attention_{name}"
    return wrap_attn(attention)


attention_pytorch = _make("pytorch")
attention_split = _make("split")
attention_sage = _make("sage")
optimized_attention = optimized_attention_masked = attention_pytorch
for _name in ("pytorch", "split", "sage"):
    register_attention_function(_name, globals()[f"attention_{_name}"])
"""

# Self-attention, and Animate's face blocks, which pass no transformer_options.
MODEL = """
from comfy.ldm.modules.attention import optimized_attention

def self_attention(q, k, v, heads, transformer_options={}):
    return optimized_attention(q, k, v, heads=heads, transformer_options=transformer_options)

def face_block(q, k, v, heads):
    return optimized_attention(q, k, v, heads=heads)
"""

# The branch of its attention() that mode "comfy" takes; [batch, seqlen, heads, head_dim].
KIJAI = """
from comfy.ldm.modules.attention import optimized_attention

def attention(q, k, v, heads=128, attention_mode="sdpa"):
    assert attention_mode == "comfy"
    return optimized_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), heads=heads, skip_reshape=True
    )
"""


def write(folder: Path) -> None:
    """The tree, to be imported as `comfy` and `kijai`."""
    for name, text in {
        "comfy/__init__.py": "",
        "comfy/ldm/__init__.py": "",
        "comfy/ldm/modules/__init__.py": "",
        "comfy/ldm/modules/attention.py": ATTENTION,
        "comfy/ldm/wan/__init__.py": "",
        "comfy/ldm/wan/model.py": MODEL,
        "kijai.py": KIJAI,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def load_node(folder: Path, name: str = "custom_nodes/ComfyUI-wan-attn") -> types.ModuleType:
    """As ComfyUI does: by path, under a module name that is the path."""
    path = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Model:
    """What a node receives: a ModelPatcher, as far as a node that chooses attention sees it."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.model_options = {"transformer_options": options or {}}

    def clone(self) -> Model:
        import copy

        other = Model()
        other.model_options = copy.deepcopy(self.model_options)
        return other

    @property
    def override(self) -> Callable[..., Any] | None:
        found = self.model_options["transformer_options"].get("optimized_attention_override")
        return found
