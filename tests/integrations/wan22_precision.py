# SPDX-License-Identifier: Apache-2.0
"""wan22_precision.py - a denoise by stock Wan2.2's models and scheduler, exact and in 8 bits.

Two models and guidance, as WanT2V.generate() of A14B runs them; alone, or sequence parallel on two
ranks. Part of wan22_worker.py's process.
"""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
import wan22_models
from torch import Tensor
from wan22_harness import CpuAutocast, redraw

import dense_error
import lossy_faults
from wan_attn import precision
from wan_attn.integrations import wan22

STEPS, LAYERS = 10, 4


def denoise(models: list[Any]) -> Tensor:
    """The latents; the first model takes the first half of the steps."""
    from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

    random = wan22_models.Random(3)
    latents, text, nothing = random(16, 3, 8, 12), random(24, 48), random(9, 48)
    scheduler = FlowUniPCMultistepScheduler(
        num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
    )
    scheduler.set_timesteps(STEPS, device="cpu", shift=5.0)
    with torch.no_grad(), CpuAutocast(torch.bfloat16):
        for number, t in enumerate(scheduler.timesteps):
            model = models[2 * number // STEPS]
            given = {"x": [latents], "t": torch.stack([t]), "seq_len": 72}
            with_text, without = (
                model(context=[context], **given)[0] for context in (text, nothing)
            )
            noise = without + 4.0 * (with_text - without)
            stepped = scheduler.step(noise[None], t, latents[None], return_dict=False)
            latents = stepped[0][0]
    return latents


def two_models() -> list[Any]:
    from wan.modules.model import WanModel

    small = wan22_models.SMALL | {"num_layers": LAYERS}
    return [redraw(WanModel(model_type="t2v", **small)) for _ in range(2)]


def lossy() -> dict[str, Any]:
    """What the test judges: errors of the latents, and the reports."""
    wan22.patch()
    models = two_models()
    exact = denoise(models)
    result = in_both_modes(models, exact)
    with pytest.MonkeyPatch.context() as monkeypatch:
        planted = lossy_faults.plant(monkeypatch, math.inf, lambda call: True)
        with precision.use("auto") as used:
            found = denoise(models)
    result["faults"] = {
        "planted": len(planted),
        "same": torch.equal(found, exact),
        "events": events(used),
    }
    result["exact again"] = torch.equal(denoise(models), exact)
    wan22.unpatch()
    result["restored"] = is_restored(models)
    return result


def parallel(rank: int) -> dict[str, Any]:
    """The same with Wan2.2's own sequence parallelism, as its pipelines set it up. One model is
    there before patch(), the other one comes after it."""
    from wan.distributed.sequence_parallel import sp_attn_forward, sp_dit_forward

    def of_this_rank(model: Any) -> Any:
        for block in model.blocks:
            block.self_attn.forward = types.MethodType(sp_attn_forward, block.self_attn)
        model.forward = types.MethodType(sp_dit_forward, model)
        return model

    first, second = two_models()
    models = [of_this_rank(first), second]
    wan22.patch()
    of_this_rank(second)
    exact = denoise(models)
    result = in_both_modes(models, exact)
    with pytest.MonkeyPatch.context() as monkeypatch:
        planted = lossy_faults.plant(monkeypatch, math.inf, lambda call: rank == 0)
        with precision.use("balanced") as used:
            found = denoise(models)
    result["faults"] = {
        "planted": len(planted),
        "off": off(found, exact),
        "events": events(used),
        "lossy": sum(layer["lossy_calls"] for layer in used.report().layers),
    }
    result["exact again"] = torch.equal(denoise(models), exact)
    wan22.unpatch()
    result["restored"] = is_restored(models)
    return result


def in_both_modes(models: list[Any], exact: Tensor) -> dict[str, Any]:
    """Beside what the reports say: what each call is off by, measured from outside."""
    result: dict[str, Any] = {"modes": {}, "off": {}, "dense": {}}
    for mode in ("balanced", "auto"):
        with precision.use(mode) as used, dense_error.measured() as dense:
            found = denoise(models)
        result["off"][mode] = off(found, exact)
        result["modes"][mode] = used.report().layers
        result["dense"][mode] = [
            {
                "expert": e.where.expert,
                "layer": e.where.layer,
                "lossy": e.is_lossy,
                "heads": e.heads,
            }
            for e in dense
        ]
    return result


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def events(used: precision.Use) -> list[str]:
    return [event for layer in used.report().layers for event in layer["events"]]


def is_restored(models: list[Any]) -> bool:
    return "__call__" not in vars(type(models[0])) and not any(
        block._forward_pre_hooks for model in models for block in model.blocks
    )
