# SPDX-License-Identifier: Apache-2.0
"""_rope.py - torch.ops.wan_attn.rms_norm_rope for integrations: which calls it takes, and a line in
the log for those that it does and for those that it does not."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from wan_attn import config, log
from wan_attn.native import op, rope
from wan_attn.selection import profile

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALF)
MAX_HEAD_DIM = 256


def rms_norm_rope(*operands: Any, **options: Any) -> Tensor:
    """torch.ops.wan_attn.rms_norm_rope, and a line in the log that says so."""
    dtype = options["dtype"]
    log.traced(
        logging.INFO,
        f"RMS norm and RoPE: wan_attn, one pass, into {str(dtype).removeprefix('torch.')}",
    )
    path = None if torch.compiler.is_compiling() else config.current().profile
    if path is None:
        result: Tensor = torch.ops.wan_attn.rms_norm_rope(*operands, **options)
        return result
    x: Tensor = operands[0]
    title = _title(x.device, config.current())  # before the mark begins
    recorder = profile.recorder(path)
    begun = recorder.start(x.device)
    result = torch.ops.wan_attn.rms_norm_rope(*operands, **options)
    recorder.stop_rope(begun, x, title)
    return result


@functools.lru_cache(maxsize=16)
def _title(device: torch.device, settings: config.Settings) -> str:
    return rope.chosen(device) or "rms_norm_rope"


# On these devices a kernel takes an x of this dtype, which is asked once: the question costs more
# than the call. A "no" is asked again, because it is one only until the kernels are proven.
_taken: set[tuple[torch.device, torch.dtype]] = set()
config.memory(_taken.clear)


def _why_not_on_card(x: Tensor) -> str | None:
    kind = (x.device, x.dtype)
    why = None if kind in _taken else rope.why_not(x.device, dtype=x.dtype)
    if why is None:
        _taken.add(kind)
    return why


def why_not(*tensors: Tensor | None) -> str | None:
    """Why our kernels do not take a call with these operands; None: they do."""
    if op.binding() == "torch":
        return f"no native library: {op.binding_reason()}"
    for x in tensors:
        if x is None:
            continue
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return f"an operand is a {type(x).__name__}"
        if x.device.type not in ("cpu", "cuda"):
            return rope.why_not(x.device)
        if x.dim() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
            return "an operand has gaps between its elements"
        if x.requires_grad and torch.is_grad_enabled():
            return "a gradient is wanted"
    x = tensors[0]
    if x is not None and x.is_cuda and not torch.compiler.is_compiling():
        return _why_not_on_card(x)
    return None


def takes(*tensors: Tensor | None) -> bool:
    """Whether our kernels take the call; if not, the log says why, once."""
    why = why_not(*tensors)
    if why is not None:
        log.traced(logging.INFO, f"RMS norm and RoPE: the model's own ({why})")
    return why is None


def is_plain(x: Any) -> bool:
    """Whether it is [batch, seqlen, heads, head_dim] as the op takes it."""
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.dtype in FLOATS
        and 0 < x.shape[3] <= MAX_HEAD_DIM
        and x.shape[2] > 0
    )
