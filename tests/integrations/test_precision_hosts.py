# SPDX-License-Identifier: Apache-2.0
"""test_precision_hosts.py - hosts tell steps, layers and experts, and whole runs keep the budget.

Stock Wan2.2 and ComfyUI are asked in their own processes: test_wan22_real.py, test_comfyui_real.py.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Iterator
from typing import Any

import diffusers_models as models
import pytest
import torch
from torch import Tensor

import lossy_faults
from wan_attn import config, precision
from wan_attn.integrations import _places
from wan_attn.integrations import diffusers as host
from wan_attn.observe import place

pytestmark = pytest.mark.usefixtures("native")

STEPS, LAYERS = 8, 4
INNER = LAYERS - 2


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    config.forget()
    yield
    config.forget()


@pytest.fixture
def pipe() -> Iterator[Any]:
    made = models.pipeline(layers=LAYERS)
    host.enable(made)
    yield made
    host.disable(made)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def layers(used: Any, **known: Any) -> list[dict[str, Any]]:
    return [x for x in used.report().layers if known.items() <= x.items()]


@pytest.mark.parametrize("mode", ["balanced", "auto"])
def test_a_denoise(mode: str, pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The first and last two steps and the first and last layer are exact, all else is in 8 bits;
    the budget is kept, and the guard is quiet."""
    exact = models.denoise(pipe, STEPS)
    with precision.use(mode) as used, caplog.at_level(logging.INFO, "wan_attn"):
        found = models.denoise(pipe, STEPS)
    assert 0 < off(found, exact) < 0.05
    forwards = 2 * STEPS  # guidance
    for layer in range(LAYERS):
        (own,) = layers(used, kind="self", layer=layer)
        (text,) = layers(used, kind="text", layer=layer)
        is_inner = 0 < layer < LAYERS - 1
        assert own["lossy_calls"] == (2 * (STEPS - 4) if is_inner else 0)
        assert own["lossy_calls"] + own["exact_calls"] == forwards
        assert (text["lossy_calls"], text["exact_calls"]) == (0, forwards)
        assert own["expert"] == 0 and own["events"] == [] and own["exact_seconds"] > 0
        if mode == "auto" and is_inner:
            assert 0 < own["largest_error"] <= used.report().found["budget"]
            assert all(2 <= one["step"] < STEPS - 2 for one in own["measured"])
    assert len(used.report().layers) == 2 * LAYERS
    assert not [r for r in caplog.records if "no host tells" in r.message]
    assert torch.equal(models.denoise(pipe, STEPS), exact), "as before, once it is over"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_faults_in_a_denoise_are_caught(
    value: float, pipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every lossy call overflows: all are computed again, and the run has the exact run's bits."""
    exact = models.denoise(pipe, STEPS)
    planted = lossy_faults.plant(monkeypatch, value, lambda call: True)
    with precision.use("auto") as used, caplog.at_level(logging.INFO, "wan_attn"):
        found = models.denoise(pipe, STEPS)
    assert torch.equal(found, exact)
    assert len(planted) == INNER, "a layer that was hit is exact from then on"
    events = [event for layer in used.report().layers for event in layer["events"]]
    assert [event.partition(":")[0] for event in events] == [
        f"layer {layer} (self), step 2" for layer in range(1, LAYERS - 1)
    ]
    assert all(sum(event in r.message for r in caplog.records) == 1 for event in events)


def test_one_fault_in_a_denoise(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = models.denoise(pipe, STEPS)
    lossy_faults.plant(monkeypatch, math.nan, lambda call: call == 5)
    with precision.use("balanced") as used:
        found = models.denoise(pipe, STEPS)
    assert 0 < off(found, exact) < 0.05
    (event,) = [event for layer in used.report().layers for event in layer["events"]]
    assert event.startswith("layer 2 (self), step 3")


def test_without_the_guard_the_fault_is_seen(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two tests above can fail."""
    sdpa = torch.ops.wan_attn.sdpa
    x = [torch.randn(1, 40, 2, 32) for _ in range(3)]
    lossy_faults.plant(monkeypatch, math.nan, lambda call: True)
    from wan_attn.native import bindings

    assert bindings.ctypes_sdpa(*x, precision=1)[0].isnan().any()
    assert not sdpa(*x)[0].isnan().any()


def test_a_budget_that_is_too_small(pipe: Any) -> None:
    """Every group of heads goes exact at its first measurement, which is before its result is
    used: the run is the exact one."""
    exact = models.denoise(pipe, STEPS)
    with precision.use("auto", budget=1e-6) as used:
        found = models.denoise(pipe, STEPS)
    assert torch.equal(found, exact)
    for layer in range(1, LAYERS - 1):
        (own,) = layers(used, kind="self", layer=layer)
        assert len(own["events"]) == own["lossy_calls"] == 1
        assert f"heads 0-{models.HEADS - 1}, step 2" in own["events"][0]
        assert "is above the budget of 0.0001 %; computed again exactly" in own["events"][0]
        assert own["largest_error"] is None


def test_two_experts() -> None:
    pipe = models.pipeline(layers=3, experts=2)
    host.enable(pipe)
    with precision.use("balanced", rules=[{"precision": "exact", "experts": [1]}]) as used:
        models.denoise(pipe, STEPS)
    first, second = (layers(used, kind="self", layer=1, expert=expert)[0] for expert in (0, 1))
    assert first["lossy_calls"] > 0 and second["lossy_calls"] == 0
    assert first["exact_calls"] + first["lossy_calls"] + second["exact_calls"] == 2 * STEPS


@pytest.mark.parametrize("name", ["text", "image", "vace", "animate"])
def test_fast_leaves_images_exact(name: str) -> None:
    model, inputs = models.make(name)
    host.enable(model)
    with precision.use("fast") as used:
        models.predict(model, inputs)
    kinds = {layer["kind"]: layer["lossy_calls"] for layer in used.report().layers}
    assert ("image" in kinds) == (name in ("image", "animate"))
    assert kinds.pop("image", 0) == 0
    assert all(kinds.values()) and "self" in kinds


def test_a_model_alone_is_exact_and_the_log_says_what_is_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = models.make("text")
    host.enable(model)
    exact = models.predict(model, inputs)
    with precision.use("balanced"), caplog.at_level(logging.INFO, "wan_attn"):
        assert torch.equal(models.predict(model, inputs), exact)
    (line,) = [r.message for r in caplog.records if "no host tells" in r.message]
    assert "no host tells the number of steps of a call" in line


def test_nothing_stays_behind(pipe: Any) -> None:
    with precision.use("balanced"):
        models.denoise(pipe, 2)
    model = pipe.transformer
    assert any(block._forward_pre_hooks for block in model.blocks)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with precision.use("balanced"):
            models.predict(other, models.make("text")[1])
    host.disable(pipe)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert place.here(1, 1).layer is None


def test_compiled_models_are_exact_where_nothing_tells_the_layer(pipe: Any) -> None:
    exact = models.denoise(pipe, STEPS)
    pipe.transformer.compile(backend="eager")
    with precision.use("balanced"):
        found = models.denoise(pipe, STEPS)
    torch.testing.assert_close(found, exact)


# --- classes and models that hosts have ----------------------------------------------------------


class Block(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        seen.append(place.here(8, 8))
        return x


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, t: Any, **more: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if more.get("fails"):
            raise ValueError("planted")
        return x


seen: list[place.Place] = []


@pytest.mark.parametrize("by_class", [True, False])
def test_hooks(by_class: bool) -> None:
    model, x = Model(), torch.zeros(1)
    stock = vars(Model)["forward"]

    def tell(which: Any, arguments: dict[str, Any]) -> Any:
        assert which is model
        return arguments["t"]

    places = _places.ClassPlaces(Model, tell) if by_class else _places.ModelPlaces(model, tell)
    seen.clear()
    model(x, 9.0)
    assert [where.layer for where in seen] == [None] * 3, "nobody asks"
    assert not any(block._forward_pre_hooks for block in model.blocks)
    with precision.use("balanced"):
        seen.clear()
        model(x, 9.0)
        model(x, t=torch.tensor([5.0, 0.0]))
        assert [(w.layer, w.layers, w.step) for w in seen] == [
            (layer, 3, step) for step in (0, 1) for layer in range(3)
        ]
        with pytest.raises(ValueError, match="planted"):
            model(x, 4.0, fails=True)
        assert place.here(8, 8).layer is None
    places.remove()
    assert vars(Model)["forward"] is stock
    assert not any(block._forward_pre_hooks for block in model.blocks)
    assert not model._forward_pre_hooks and not model._forward_hooks
