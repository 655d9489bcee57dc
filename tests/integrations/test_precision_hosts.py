# SPDX-License-Identifier: Apache-2.0
"""test_precision_hosts.py - hosts tell steps, layers and experts, and whole runs keep the budget.

Stock Wan2.2 and ComfyUI are asked in their own processes: test_wan22_real.py, test_comfyui_real.py.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import diffusers_models as models
import pytest
import torch
from torch import Tensor

import dense_error
import lossy_faults
from wan_attn import precision
from wan_attn.integrations import _places
from wan_attn.integrations import diffusers as host
from wan_attn.observe import place

pytestmark = pytest.mark.usefixtures("native", "as_in_a_new_process")

STEPS, LAYERS = 8, 4
INNER = LAYERS - 2


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
        with dense_error.measured() as dense:
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
        if is_inner:
            assert 0 < own["largest_error"] <= used.report().found["budget"]
            assert all(2 <= one["step"] < STEPS - 2 for one in own["measured"])
    dense_error.agrees(dense, used)
    assert len(used.report().layers) == 2 * LAYERS
    assert not [r for r in caplog.records if "no host tells" in r.message]
    assert torch.equal(models.denoise(pipe, STEPS), exact), "as before, once it is over"


def test_heads_that_8_bits_spoil(pipe: Any) -> None:
    """In `balanced` the report says so; in `auto` they are exact, from the first call on."""
    budget = 0.002
    with torch.no_grad():
        pipe.transformer.blocks[2].attn1.norm_q.weight.mul_(60.0)
    found: dict[str, list[tuple[float, ...]]] = {}
    for mode in ("balanced", "auto"):
        with precision.use(mode, budget=budget) as used, dense_error.measured() as dense:
            models.denoise(pipe, STEPS)
        found[mode] = [one.heads for one in dense if one.is_lossy and one.where.layer == 2]
        (own,) = layers(used, kind="self", layer=2)
        assert len(own["events"]) == (mode == "auto")
        assert ((own["largest_error"] or 0.0) > budget) == (mode == "balanced")
    assert used.watch is not None
    over = used.watch.layers[0, 2, "self"].why_exact  # groups of heads, here of one each
    for head in over:
        assert head is not None and found["balanced"][0][head] > 0.7 * budget
        assert all(call[head] < 1e-5 for call in found["auto"])
    assert over


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


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "constant channel": lambda v: v[..., 3].fill_(2.0),
    "constant": lambda v: v.fill_(-2.0),
    "rows of zeros": lambda v: v[:, ::5].zero_(),
    "float16's limit": lambda v: v.copy_(torch.where(v > 0, 65504.0, -65504.0)),
    "+inf": lambda v: v[:, 7, 2].fill_(math.inf),
    "-inf": lambda v: v[:, 7, 2].fill_(-math.inf),
    "NaN": lambda v: v[:, 7, 2].fill_(math.nan),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_whose_values_are_odd(fault: str, pipe: Any) -> None:
    """One layer's, in one step. What is not finite is caught: that layer's later calls and the
    latents are those of the exact run. The rest is no fault, and stays in the budget."""

    def spoil(module: Any, args: Any, v: Tensor) -> Tensor:
        if place.here(1, 1).step == 3:
            FAULTS[fault](v)
        return v

    pipe.transformer.blocks[1].attn1.to_v.register_forward_hook(spoil)
    with precision.use("exact", guard="all"):  # so that places are told
        exact = models.denoise(pipe, STEPS)
    with precision.use("auto") as used, dense_error.measured() as dense:
        found = models.denoise(pipe, STEPS)
    assert exact.isfinite().all() == (fault not in ("+inf", "-inf", "NaN"))
    if exact.isfinite().all():
        dense_error.agrees(dense, used)
        assert not [event for layer in used.report().layers for event in layer["events"]]
        assert 0 < off(found, exact) < 0.05
        return
    torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)
    (own,) = layers(used, kind="self", layer=1)
    (event,) = own["events"]
    assert event.startswith("layer 1 (self), step 3: ") and "NaN or infinite" in event
    assert own["lossy_calls"] == 2, "those of step 2"


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
    stock = vars(Model).get("__call__")

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
    assert vars(Model).get("__call__") is stock
    assert not any(block._forward_pre_hooks for block in model.blocks)
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize("is_before", [True, False])
def test_a_model_with_a_forward_of_its_own(is_before: bool) -> None:
    """As Wan2.2's pipelines give it one for sequence parallelism, before patch() or after it."""
    model: Any = Model()

    def own(self: Any, x: Tensor, t: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x + 1

    if is_before:
        model.forward = types.MethodType(own, model)
    places = _places.ClassPlaces(Model, lambda _, arguments: arguments["t"])
    model.forward = types.MethodType(own, model)
    seen.clear()
    with precision.use("balanced"):
        assert model(torch.zeros(1), 9.0) == 1.0
    assert [(w.layer, w.layers, w.step) for w in seen] == [(layer, 3, 0) for layer in range(3)]
    places.remove()
    assert "__call__" not in vars(Model)


def test_a_class_that_tells_is_one_graph() -> None:
    places = _places.ClassPlaces(Silent, lambda _, arguments: arguments["t"])
    compiled: Any = torch.compile(Silent(), backend="eager", fullgraph=True)
    with precision.use("balanced"):
        assert compiled(torch.ones(3), 9.0).tolist() == [2.0] * 3
    places.remove()


class Silent(torch.nn.Module):
    def forward(self, x: Tensor, t: Any) -> Tensor:
        return 2 * x
