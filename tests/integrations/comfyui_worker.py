# SPDX-License-Identifier: Apache-2.0
"""comfyui_worker.py - real ComfyUI source on a CPU, with and without wan_attn; prints one JSON.

    python tests/integrations/comfyui_worker.py CHECKOUT

A process of its own: ComfyUI reads sys.argv when it is imported. Packages that it imports beside
attention, and that are not installed, are replaced by empty ones. Needs einops, psutil, safetensors
and transformers.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPTIONAL = ("av", "kornia", "sentencepiece", "spandrel", "torchaudio", "torchsde", "torchvision")
HEADS, DIM, FRAMES, SIZE = 2, 64, 3, 8


class _Anything(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in OPTIONAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _Anything(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def load_comfyui(checkout: Path) -> Any:
    """ComfyUI's attention module."""
    sys.argv = ["main.py", "--cpu"]
    sys.path.insert(0, str(checkout))
    sys.meta_path.append(_Absent())  # last: only what nobody else has
    importlib.import_module("comfy.options").enable_args_parsing()
    return importlib.import_module("comfy.ldm.modules.attention")


def make_model(kind: str, layers: int = 2) -> Any:
    """A tiny Wan transformer of ComfyUI's, with random weights."""
    operations = importlib.import_module("comfy.ops").disable_weight_init
    options: dict[str, Any] = {
        "model_type": "i2v" if kind == "i2v" else "t2v",
        "in_dim": 16,
        "dim": HEADS * DIM,
        "ffn_dim": 128,
        "freq_dim": 32,
        "text_dim": 48,
        "out_dim": 16,
        "num_heads": HEADS,
        "num_layers": layers,
        "dtype": torch.float32,
        "device": "cpu",
        "operations": operations,
    }
    torch.manual_seed(1)
    model = importlib.import_module("comfy.ldm.wan.model").WanModel(**options).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.4 if parameter.ndim < 2 else 0.08)
    return model


def run(model: Any, kind: str, transformer_options: dict[str, Any]) -> Tensor:
    torch.manual_seed(2)
    latent = torch.randn(1, 16, FRAMES, SIZE, SIZE)
    context = torch.randn(1, 20, 48)
    image = torch.randn(1, 257, 1280) if kind == "i2v" else None
    with torch.no_grad():
        result = model(
            latent,
            torch.tensor([500.0]),
            context,
            clip_fea=image,
            transformer_options=transformer_options,
        )
    assert isinstance(result, Tensor)
    return result


def error(found: Tensor, want: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((found - want).abs().max() / want.abs().max())


def load_node() -> Any:
    """As ComfyUI loads a folder of custom_nodes."""
    from wan_attn.cli import comfyui as command

    file = command.source() / "__init__.py"
    spec = importlib.util.spec_from_file_location("custom_nodes/wan", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def precision(model: Any) -> list[dict[str, Any]]:
    """Ten steps in 8 bits, as ComfyUI's sampler names them: what each layer was computed in."""
    from wan_attn import precision

    sigmas = torch.linspace(1.0, 0.0, 11)
    with precision.use("auto") as used:
        for sigma in sigmas[:-1]:
            run(model, "t2v", {"sample_sigmas": sigmas, "sigmas": sigma.reshape(1)})
    return used.report().layers


def main() -> None:
    host = load_comfyui(Path(sys.argv[1]))
    models = {kind: make_model(kind) for kind in ("t2v", "i2v")}
    default = host.optimized_attention
    pytorch = host.get_attention_function("pytorch")
    stock = {kind: run(model, kind, {}) for kind, model in models.items()}
    force = {"optimized_attention_override": lambda f, *args, **kwargs: pytorch(*args, **kwargs)}
    other = {kind: run(model, kind, force) for kind, model in models.items()}

    nothing = {"optimized_attention_override": lambda f, *args, **kwargs: torch.zeros_like(args[0])}
    without = {kind: run(model, kind, nothing) for kind, model in models.items()}

    said = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(said))
    node_class = load_node().NODE_CLASS_MAPPINGS["WanAttention"]
    from wan_attn import attention
    from wan_attn.integrations import comfyui

    calls = []
    sdpa = attention.sdpa

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return sdpa(*args, **kwargs)

    attention.sdpa = counting
    ours = {kind: run(model, kind, {}) for kind, model in models.items()}
    global_calls = len(calls)
    in_8_bits = precision(make_model("t2v", layers=4))
    calls[global_calls:] = []
    comfyui.unpatch(host)
    wan = importlib.import_module("comfy.ldm.wan.model").WanModel
    restored = {kind: run(model, kind, {}) for kind, model in models.items()}
    calls_after_restore = len(calls) - global_calls

    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    cpu = torch.device("cpu")
    plain = patcher(models["t2v"], load_device=cpu, offload_device=cpu)
    (patched,) = node_class().apply(plain, "wan_attn")
    options = patched.clone().model_options["transformer_options"]
    by_node = run(models["t2v"], "t2v", options)
    node_calls = len(calls) - global_calls
    (chosen,) = node_class().apply(plain, "sub_quad")
    by_sub_quad = run(models["t2v"], "t2v", chosen.model_options["transformer_options"])

    x = torch.randn(1, 12, HEADS * DIM)
    mask = torch.zeros(1, 12, 12).masked_fill(torch.rand(1, 12, 12) < 0.3, -1e4)
    registered = host.get_attention_function("wan_attn")
    print(
        json.dumps(
            {
                "default": default.__name__,
                "said": said.getvalue(),
                "yardstick": {kind: error(other[kind], stock[kind]) for kind in models},
                "without": {kind: error(without[kind], stock[kind]) for kind in models},
                "global": {kind: error(ours[kind], stock[kind]) for kind in models},
                "restored": all(torch.equal(restored[kind], stock[kind]) for kind in models),
                "in 8 bits": in_8_bits,
                "its call is torch's": "__call__" not in vars(wan),
                "calls": [global_calls, calls_after_restore, node_calls],
                "node": error(by_node, stock["t2v"]),
                "sub_quad": error(by_sub_quad, stock["t2v"]),
                "backends": node_class.INPUT_TYPES()["required"]["backend"][0],
                "mask": error(registered(x, x, x, HEADS, mask), pytorch(x, x, x, HEADS, mask)),
            }
        )
    )


if __name__ == "__main__":
    main()
