# SPDX-License-Identifier: Apache-2.0
"""test_half_way.py - patch(), enable() and register() that fail half-way leave nothing behind."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import stub_comfy
import stub_wan
import torch
from patching import assert_all_ours, assert_all_stock, patch

from wan_attn import log
from wan_attn.integrations import comfyui, torch_flash, wan22
from wan_attn.integrations.wan22 import tf32

SESSION = importlib.import_module("wan_attn.integrations.wan22.patch")._Session


class Stubborn(types.ModuleType):
    """A module of somebody's that does not let its names be replaced."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError(f"{name} is final here")


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes such a module with one name in it."""

    def make(name: str, value: object) -> None:
        module = Stubborn("stubborn")
        vars(module)[name] = value
        monkeypatch.setitem(sys.modules, "stubborn", module)

    return make


def assert_nothing_left(finders: list[Any]) -> None:
    assert sys.meta_path == finders
    assert wan22.report() is None
    assert log._handler not in logging.getLogger("wan_attn").handlers
    assert_all_stock()


def test_patch_over_a_module_that_refuses(
    stubs: Path, stubborn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    stubborn("flash_attention", sys.modules["wan.modules.attention"].flash_attention)
    finders = list(sys.meta_path)
    restored: list[Any] = []
    monkeypatch.setattr(tf32, "restore", restored.append)
    with pytest.raises(RuntimeError, match="is final here"):
        patch()
    assert_nothing_left(finders)
    assert len(restored) == 1
    monkeypatch.delitem(sys.modules, "stubborn")
    patch()
    assert_all_ours()
    wan22.unpatch()
    assert_all_stock()


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_patch_whose_last_step_fails(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    finders = list(sys.meta_path)

    def fail(session: Any) -> Any:
        raise error

    monkeypatch.setattr(SESSION, "report", fail)
    with pytest.raises(type(error)):
        patch()
    monkeypatch.undo()
    assert_nothing_left(finders)


def test_a_second_patch_that_fails_leaves_the_first(
    stubs: Path, stubborn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_wan.write(stubs)
    importlib.import_module("wan")
    original = sys.modules["wan.modules.attention"].flash_attention
    patch()
    stubborn("theirs", original)
    with pytest.raises(RuntimeError, match="is final here"):
        patch()
    assert_all_ours()
    monkeypatch.delitem(sys.modules, "stubborn")
    wan22.unpatch()
    assert_all_stock()


def test_comfyui_over_a_module_that_refuses(stubs: Path, stubborn: Any) -> None:
    stub_comfy.write(stubs)
    host = importlib.import_module("comfy.ldm.modules.attention")
    before = host.optimized_attention
    stubborn("optimized_attention", before)
    with pytest.raises(RuntimeError, match="is final here"):
        comfyui.patch(host)
    assert host.optimized_attention is before and not comfyui._replaced


def test_torchs_operator_that_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    destroyed: list[int] = []

    class Library:
        def __init__(self, *arguments: Any) -> None:
            pass

        def impl(self, *arguments: Any, **options: Any) -> None:
            raise RuntimeError("not this operator")

        def _destroy(self) -> None:
            destroyed.append(1)

    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(torch_flash, "_own_kernel", lambda device: None)
    with pytest.raises(RuntimeError, match="not this operator"):
        torch_flash._activate()
    assert destroyed == [1]


def test_diffusers_with_a_layer_that_refuses() -> None:
    models = pytest.importorskip("diffusers_models")
    from wan_attn.integrations import diffusers

    model, _ = models.make("text")
    layers = [layer for layer, _ in diffusers._layers(model)]
    before = [layer.processor for layer in layers]

    def refuse(processor: Any) -> None:
        raise RuntimeError("not this layer")

    layers[-1].set_processor = refuse
    with pytest.raises(RuntimeError, match="not this layer"):
        diffusers.enable(model)
    assert [layer.processor for layer in layers] == before
    assert model not in diffusers._enabled


def test_transformers_with_a_part_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("transformers_models")
    from wan_attn.integrations import transformers

    model = models.make(*models.ENCODERS["clip vision"], "eager")
    parts = [model, models.make(*models.ENCODERS["clip vision"], "eager")]
    outer = torch.nn.ModuleList(parts)
    transformers.unregister()

    def refuse(key: str) -> None:
        raise ValueError("not this part")

    monkeypatch.setattr(outer[1], "set_attn_implementation", refuse)
    with pytest.raises(ValueError, match="not this part"):
        transformers.enable(outer)
    assert [part.config._attn_implementation for part in parts] == ["eager", "eager"]
    assert transformers._functions().get("wan_attn") is not transformers.attention_forward
