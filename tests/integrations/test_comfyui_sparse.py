# SPDX-License-Identifier: Apache-2.0
"""test_comfyui_sparse.py - the node's options for leaving blocks out, and the grids of ComfyUI's
latents, against a stand-in of it. The fixtures are test_comfyui.py's."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stub_comfy
import torch
from test_comfyui import HEADS, close, exact, host, merged, root, start  # noqa: F401
from torch import Tensor

import wan_attn
from wan_attn.integrations import _comfyui_places
from wan_attn.observe import place
from wan_attn.sparse import state


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    yield
    place.want(_comfyui_places.WHO, False)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked for in each call of attention."""
    found: list[Any] = []
    stock = wan_attn.attention.sdpa

    def look(*args: Tensor, **options: Any) -> Any:
        found.append(state.uses.active and state.uses.active.wishes)
        return stock(*args, **options)

    monkeypatch.setattr(wan_attn.attention, "sdpa", look)
    return found


@pytest.mark.parametrize("in_containers", [False, True])
def test_a_node_asks_for_its_model_alone(
    root: Path,  # noqa: F811
    seen: list[Any],
    in_containers: bool,
) -> None:
    node = start(root).NODE_CLASS_MAPPINGS["WanAttention"]
    optional = node.INPUT_TYPES()["optional"]
    assert optional["sparse"][0] == ["as set", "off", "near_exact", "sparse"]
    (plain,) = node().apply(stub_comfy.Model(), "wan_attn")
    assert not place.is_wanted
    (sparse,) = node().apply(stub_comfy.Model(), "wan_attn", "sparse", 0.1)
    assert place.is_wanted and state.uses.active is None
    (off,) = node().apply(stub_comfy.Model(), "wan_attn", sparse="off")
    run = importlib.import_module("comfy.ldm.modules.attention")
    q, k, v = merged()
    with wan_attn.sparse.use("near_exact") as outer:
        for model in (plain, off, sparse.clone()):
            given = [q, k, v]
            if in_containers:
                given = [run.AttentionTensorContainer(x) for x in given]
            options = model.model_options["transformer_options"]
            out = run.optimized_attention(*given, heads=HEADS, transformer_options=options)
            assert close(out, exact(q, k, v)) and state.uses.active is outer.watch
    assert seen[0].mode == "near_exact", "as set"
    assert (seen[2].mode, seen[2].budget) == ("sparse", 0.1)
    assert seen[1] is None and state.uses.active is None


def test_what_the_node_refuses(root: Path, host: Any) -> None:  # noqa: F811
    node = start(root).NODE_CLASS_MAPPINGS["WanAttention"]()
    with pytest.raises(ValueError, match="backend must be wan_attn with sparse='sparse'"):
        node.apply(stub_comfy.Model(), "split", "sparse")
    with pytest.raises(RuntimeError, match="mode must be one of"):
        node.apply(stub_comfy.Model(), "wan_attn", "best")
    with pytest.raises(RuntimeError, match="budget must be between 0 and 1"):
        node.apply(stub_comfy.Model(), "wan_attn", "sparse", 2.0)
    assert state.uses.active is None


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [
        ({"x": (1, 16, 5, 24, 32)}, (5, 12, 16)),
        ({"x": (1, 16, 5, 23, 31)}, (5, 12, 16)),  # padded to whole patches
        ({"x": (1, 16, 5, 24, 32), "time_dim_concat": (1, 16, 2, 24, 32)}, (7, 12, 16)),
        ({"x": (1, 16, 5, 24, 32), "reference_latent": (1, 16, 24, 32)}, None),
        ({}, None),
    ],
)
def test_grids(arguments: dict[str, Any], grid: Any) -> None:
    model = type("Model", (), {"patch_size": (1, 2, 2)})()
    given = {name: torch.zeros(shape) for name, shape in arguments.items()}
    assert _comfyui_places._grid(model, given) == grid
