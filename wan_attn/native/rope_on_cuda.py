# SPDX-License-Identifier: Apache-2.0
"""rope_on_cuda.py - torch.ops.wan_attn.rms_norm_rope for CUDA tensors: our kernel if one takes the
call and is right on this card, else torch's operators, and one line in the log says why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wan_attn import log
from wan_attn.native import cuda_driver, shim
from wan_attn.native.rope_call import OPERANDS

Kernel = Callable[..., Tensor]
# first_wrong(run, device, dtype of x): what our kernel gets wrong here; selfcheck/rope_calls.py.
FirstWrong = Callable[
    [Callable[[Mapping[str, Any]], Tensor], torch.device, torch.dtype], str | None
]

_first_wrong: FirstWrong | None = None
_is_device_error: Callable[[BaseException], bool] = lambda error: True  # noqa: E731


def guard_with(
    first_wrong: FirstWrong | None, is_device_error: Callable[[BaseException], bool]
) -> None:
    """Lets these say, from now on, whether a kernel is right on a card, and whether an error is one
    of the device, which is raised rather than answered by torch's operators."""
    global _first_wrong, _is_device_error
    _first_wrong, _is_device_error = first_wrong, is_device_error


def implementation(kernel: Kernel, by_torch: Kernel) -> Kernel:
    """The op for the key CUDA.

    Args:
        kernel: our kernel, by one of the bindings; raises RuntimeError where none takes the call.
        by_torch: torch's operators; raises RuntimeError for a call that breaks the contract.
    """

    def run(given: Mapping[str, Any]) -> Tensor:
        try:
            return kernel(**given)
        except RuntimeError as error:
            # What C could not pass on: Ctrl-C while a kernel was compiled, torch's own exception.
            cuda_driver.raise_interruption()
            shim.raise_out_of_memory(error)
            raise

    def rms_norm_rope(*operands: Tensor | None, **options: Any) -> Tensor:
        given = dict(zip(OPERANDS, operands, strict=False)) | options
        if options.get("kernel", -1) != -1:
            return run(given)
        why: str | None = None
        try:
            x = given["x"]
            if _first_wrong is not None:
                why = _first_wrong(run, x.device, x.dtype)
            if why is None:
                return run(given)
            why = f"it is wrong on this card: {why}"
        except RuntimeError as error:
            if _is_device_error(error):
                raise
            why = str(error).removeprefix("wan_attn: ")
        out = by_torch(*operands, **options)  # or what is wrong with the call, in its own words
        text = f"RMS norm and RoPE: torch's operators, not our kernel: {why}"
        log.once(("rope on cuda", why), logging.WARNING, text)
        return out

    return rms_norm_rope
