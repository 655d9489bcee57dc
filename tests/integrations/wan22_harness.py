# SPDX-License-Identifier: Apache-2.0
"""wan22_harness.py - runs stock Wan2.2 on a machine without a GPU, its files unedited.

Import this in a process of its own (tests start one): it changes torch for good. Why each change is
needed stands beside it. Nothing here knows wan_attn.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Wan2.2 imports these at the top of its pipelines but attention needs none of them.
OPTIONAL = ("cv2", "dashscope", "decord", "librosa", "peft", "torchvision")
# What it cannot do without: einops and easydict run while the models do, ftfy cleans prompts.
REQUIRED = (
    "diffusers",
    "transformers",
    "einops",
    "easydict",
    "ftfy",
    "imageio",
    "numpy",
    "PIL",
    "tqdm",
)
# What Wan2.2 takes from libraries that adapt to what is installed, and load lazily.
LOOKING_AROUND = {
    "transformers": ("AutoTokenizer", "Wav2Vec2ForCTC", "Wav2Vec2Processor"),
    "diffusers.loaders": ("FromOriginalModelMixin", "PeftAdapterMixin"),
    "diffusers.models.attention": ("AdaLayerNorm",),
    "diffusers.models.modeling_utils": ("ModelMixin",),
    "diffusers.schedulers.scheduling_utils": ("SchedulerMixin",),
}


def missing() -> list[str]:
    """The required packages that are not installed."""
    return [name for name in REQUIRED if importlib.util.find_spec(name) is None]


class _Anything(types.ModuleType):
    """A module with every name in it."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of OPTIONAL that are not installed."""

    def __init__(self) -> None:
        self.absent = {name for name in OPTIONAL if importlib.util.find_spec(name) is None}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in self.absent:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


# --- autocast ------------------------------------------------------------------------------------

_GEMMS = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_FLOAT32_OPS = {F.layer_norm, F.softmax, torch.softmax, Tensor.softmax}
_levels: list[torch.dtype | None] = []


def _to_float32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


class _CudaRules(TorchFunctionMode):
    """What CUDA's autocast does and the CPU's does not: norms in float32, autocast to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        level = _levels[-1] if _levels else None
        if (level == torch.float32 and func in _GEMMS) or (level and func in _FLOAT32_OPS):
            args = tuple(_to_float32(a) for a in args)
            kwargs = {k: _to_float32(v) for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


class CpuAutocast(contextlib.ContextDecorator):
    """`torch.amp.autocast("cuda")`, a no-op without CUDA, done on the CPU."""

    def __init__(
        self, dtype: torch.dtype | None = None, enabled: bool = True, cache_enabled: Any = None
    ) -> None:
        self.dtype = (dtype or torch.float16) if enabled else None
        self._stacks: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        stack = contextlib.ExitStack()
        half = self.dtype in (torch.bfloat16, torch.float16)
        stack.enter_context(torch.autocast("cpu", dtype=self.dtype if half else None, enabled=half))
        if not _levels:
            stack.enter_context(_CudaRules())
        _levels.append(self.dtype)
        stack.callback(_levels.pop)
        self._stacks.append(stack)

    def __exit__(self, *error: Any) -> None:
        self._stacks.pop().close()


_autocast = torch.amp.autocast


def _amp_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    made = CpuAutocast if device_type == "cuda" else lambda *a, **k: _autocast(device_type, *a, **k)
    return made(*args, **kwargs)


def _cuda_amp_autocast(
    enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True
) -> Any:
    return CpuAutocast(dtype, enabled)


# --- the whole -----------------------------------------------------------------------------------


def prepare(wan22_dir: str | None = None) -> None:
    """Make `import wan` work here."""
    warnings.filterwarnings("ignore")
    sys.path.insert(0, wan22_dir or os.environ["WAN22_DIR"])
    # First what looks around for optional packages, and must not take a stub for one.
    for module, names in LOOKING_AROUND.items():
        imported = importlib.import_module(module)
        for name in names:
            getattr(imported, name)
    sys.meta_path.append(_StubFinder())
    if not torch.cuda.is_available():
        # T5EncoderModel takes it as a default argument, so that importing asks for a GPU.
        torch.cuda.current_device = lambda: 0
    vars(torch.amp).update(autocast=_amp_autocast)
    vars(torch.cuda.amp).update(autocast=_cuda_amp_autocast)
    torch.set_grad_enabled(False)


def redraw(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter random values at which attention matters.

    As constructed the heads are zero, and the output is 0 whatever attention does. Matrices keep
    the variance of what they multiply; norms get gains above 1, so that some keys win clearly.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(p: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(p.shape, generator=generator)

    for name, p in model.named_parameters():
        if p.ndim >= 2 and "modulation" not in name:
            p.copy_(normal(p, p[0].numel() ** -0.5))
        elif "norm" in name and name.endswith("weight"):
            p.copy_(1.5 + normal(p, 0.3).abs())
        else:
            p.copy_(normal(p, 0.3))
    return model.eval()


# --- sequence parallel over gloo -----------------------------------------------------------------


def all_to_all_by_gather(outputs: list[Tensor], inputs: list[Tensor], group: Any = None) -> None:
    """dist.all_to_all, which gloo does not have, from all_gather, which it has."""
    import torch.distributed as dist

    mine = torch.stack(inputs)
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, mine, group=group)
    for output, theirs in zip(outputs, everybody, strict=True):
        output.copy_(theirs[dist.get_rank(group)])


def start_gloo(rank: int, world_size: int, file: str) -> None:
    """Join a process group of this machine's processes."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    vars(dist).update(all_to_all=all_to_all_by_gather)


# --- the names -----------------------------------------------------------------------------------


def binding_names() -> dict[str, Any]:
    """The 8 + 2 names and what each holds now."""
    holders = {
        "flash_attention": (
            "modules modules.attention modules.model modules.animate.clip"
            " modules.animate.model_animate modules.s2v.model_s2v modules.s2v.motioner"
            " distributed.ulysses"
        ),
        "flash_attn_func": "modules.animate.face_blocks modules.s2v.auxi_blocks",
    }
    return {
        f"wan.{module}.{attribute}": vars(sys.modules[f"wan.{module}"])[attribute]
        for attribute, modules in holders.items()
        for module in modules.split()
    }
