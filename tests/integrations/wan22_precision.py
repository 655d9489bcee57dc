# SPDX-License-Identifier: Apache-2.0
"""wan22_precision.py - a denoise by stock Wan2.2's models and scheduler, exact and in 8 bits.

Two models and guidance, as WanT2V.generate() of A14B runs them. Part of wan22_worker.py's process.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import wan22_models
from torch import Tensor
from wan22_harness import redraw

import lossy_faults
from wan_attn import precision
from wan_attn.integrations import wan22

STEPS, LAYERS = 10, 4


def denoise(models: list[Any], shape: tuple[int, int, int] = (3, 8, 12)) -> Tensor:
    """The latents, of so many frames, rows and columns; the first model takes the first half of the
    steps."""
    from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

    random = wan22_models.Random(3)
    latents, text, nothing = random(16, *shape), random(24, 48), random(9, 48)
    tokens = shape[0] * shape[1] * shape[2] // 4
    scheduler = FlowUniPCMultistepScheduler(
        num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
    )
    scheduler.set_timesteps(STEPS, device="cpu", shift=5.0)
    with torch.no_grad():
        for number, t in enumerate(scheduler.timesteps):
            model = models[2 * number // STEPS]
            given = {"x": [latents], "t": torch.stack([t]), "seq_len": tokens}
            with_text, without = (
                model(context=[context], **given)[0] for context in (text, nothing)
            )
            noise = without + 4.0 * (with_text - without)
            stepped = scheduler.step(noise[None], t, latents[None], return_dict=False)
            latents = stepped[0][0]
    return latents


def lossy() -> dict[str, Any]:
    """What the test judges: errors of the latents, and the reports."""
    wan22.patch()
    from wan.modules.model import WanModel

    small = wan22_models.SMALL | {"num_layers": LAYERS}
    models: list[Any] = [redraw(WanModel(model_type="t2v", **small)) for _ in range(2)]
    stock_forward, exact = vars(WanModel)["forward"].__wrapped__, denoise(models)
    result: dict[str, Any] = {"modes": {}, "off": {}}
    for mode in ("balanced", "auto"):
        with precision.use(mode) as used:
            found = denoise(models)
        result["off"][mode] = float((found - exact).norm() / exact.norm())
        result["modes"][mode] = used.report().layers
        result["text"] = used.report().as_text()
    with pytest.MonkeyPatch.context() as monkeypatch:
        planted = lossy_faults.plant(monkeypatch, math.inf, lambda call: True)
        with precision.use("auto") as used:
            found = denoise(models)
    result["faults"] = {
        "planted": len(planted),
        "same": torch.equal(found, exact),
        "events": [event for layer in used.report().layers for event in layer["events"]],
    }
    result["exact again"] = torch.equal(denoise(models), exact)
    wan22.unpatch()
    result["restored"] = vars(WanModel)["forward"] is stock_forward and not any(
        block._forward_pre_hooks for model in models for block in model.blocks
    )
    return result
