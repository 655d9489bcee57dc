# SPDX-License-Identifier: Apache-2.0
"""test_diffusers_hosts.py - what else people do to a Wan model that wan_attn is switched on in."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_attn import attention, log
from wan_attn.integrations import _diffusers_backend
from wan_attn.integrations import diffusers as wan_diffusers

diffusers = pytest.importorskip("diffusers", reason="needs the packages of the extra `demo`")
pytest.importorskip(_diffusers_backend.DISPATCH, reason="diffusers before 0.35 has no backends")

from diffusers_models import make, predict  # noqa: E402 - imports diffusers
from test_diffusers import assert_same  # noqa: E402

LAYERS = 4


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """A test that leaves a model enabled leaves no log handler to the next."""
    log.forget()
    wan_diffusers.register_backend()
    yield
    wan_diffusers.unregister_backend()
    wan_diffusers._enabled.clear()
    log.disable("diffusers")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """query's dtype in every call that goes to wan_attn from here on."""
    seen: list[torch.dtype] = []
    sdpa = attention.sdpa

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append(query.dtype)
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(attention, "sdpa", watched)
    return seen


ROUTES: dict[str, Callable[[Any], object]] = {
    "enable": wan_diffusers.enable,
    "named": lambda model: model.set_attention_backend("wan_attn"),
}
by_both = pytest.mark.parametrize("route", ROUTES)


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Wrapper(torch.nn.Module):
    """DDP, FSDP: a module that holds the model and forwards nothing but the call."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def in_peft(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["to_q", "to_v"]))


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    model.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_v"]))
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": through_a_file,
    "peft": in_peft,
    "add_adapter": with_lora,
    "wrapper": Wrapper,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
}


@by_both
@pytest.mark.parametrize("way", WAYS)
def test_it_stays_on_and_disable_finds_it(route: str, way: str, calls: list[torch.dtype]) -> None:
    model, inputs = make("text")
    stock = predict(model, inputs)
    ROUTES[route](model)
    other = WAYS[way](model)
    assert_same(predict(other, inputs), stock)
    assert calls or way == "torch.compile"
    assert wan_diffusers.disable(other) == LAYERS
    calls.clear()
    assert torch.equal(predict(other, inputs), stock)
    assert not calls
    is_copy = way in ("deepcopy", "torch.save")
    assert wan_diffusers.disable(model) == (LAYERS if is_copy else 0)


@by_both
def test_a_saved_model_opens_in_a_process_that_registered_nothing(
    route: str, tmp_path: Path
) -> None:
    model, inputs = make("text")
    ROUTES[route](model)
    torch.save((model, inputs, predict(model, inputs)), tmp_path / "model.pt")
    code = (
        "import torch, diffusers;"
        f"model, inputs, out = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        "ours = model(**inputs, return_dict=False)[0];"
        "assert torch.allclose(ours, out, atol=1e-4);"
        "from wan_attn.integrations import diffusers as wan_diffusers;"
        f"assert wan_diffusers.disable(model) == {LAYERS}"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_weights_carry_nothing_of_ours(tmp_path: Path) -> None:
    model, inputs = make("text")
    stock = predict(model, inputs)
    wan_diffusers.enable(model)
    model.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.iterdir() if b"wan_attn" in p.read_bytes()]
    again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path).eval()
    assert wan_diffusers.disable(again) == 0
    assert torch.equal(predict(again, inputs), stock)


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_after_unregister_the_native_backend_takes_the_calls(
    way: str, calls: list[torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = make("text")
    stock = predict(model, inputs)
    model.set_attention_backend("wan_attn")
    other = WAYS[way](model)
    wan_diffusers.unregister_backend()
    with caplog.at_level(logging.INFO, "wan_attn"):
        assert torch.equal(predict(other, inputs), stock)
        copied = copy.deepcopy(other)
        assert torch.equal(predict(copied, inputs), stock)
    assert not calls and caplog.text.count("disable(model) sets") == 1
    with pytest.raises(ValueError, match="wan_attn"):
        copied.set_attention_backend("wan_attn")
    assert wan_diffusers.disable(other) == LAYERS
    caplog.clear()
    log.forget()
    assert torch.equal(predict(other, inputs), stock)
    assert "unregistered" not in caplog.text


# ---- dtypes


@by_both
def test_float64_is_left_to_diffusers(
    route: str, calls: list[torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = make("text")
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    stock = predict(model, inputs)
    ROUTES[route](model)
    with caplog.at_level(logging.INFO, "wan_attn"):
        assert torch.equal(predict(model, inputs), stock)
    assert not calls and caplog.text.count("takes a call: it is float64") == 1


@by_both
@pytest.mark.parametrize("name", ["text", "image", "animate"])
def test_autocast_computes_what_diffusers_computes(
    route: str, name: str, calls: list[torch.dtype]
) -> None:
    """bf16 out of the projections, float32 out of the norms and the rotation."""
    model, inputs = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        stock = predict(model, inputs)
        ROUTES[route](model)
        ours = predict(model, inputs)
    assert set(calls) == {torch.bfloat16} and ours.dtype == stock.dtype
    truth = predict(model, inputs)
    allowed = 2 * float((stock - truth).abs().max())
    assert 0 < float((ours - truth).abs().max()) <= allowed


@pytest.mark.parametrize("is_autocast", [False, True], ids=["", "autocast"])
def test_mixed_operands(is_autocast: bool, calls: list[torch.dtype]) -> None:
    dispatch = _diffusers_backend._dispatch()
    query, key, value = torch.randn(3, 1, 5, 2, 8).unbind()
    query = query.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        if is_autocast:
            stock = dispatch.dispatch_attention_fn(query, key, value)
            with dispatch.attention_backend("wan_attn"):
                ours = dispatch.dispatch_attention_fn(query, key, value)
            assert ours.dtype == stock.dtype and calls == [torch.bfloat16]
            torch.testing.assert_close(ours, stock, rtol=0.02, atol=0.02)
            assert wan_diffusers.attend(query, key, value).dtype == stock.dtype
            return
        # Without autocast diffusers cannot compute it either: the words are torch's, not ours.
        for function in (wan_diffusers.attend, _diffusers_backend.wan_attn_attention):
            with pytest.raises(RuntimeError, match="same dtype"):
                function(query, key, value)


# ---- guidance that reaches into attention


@pytest.fixture
def perturb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Perturbed-attention guidance for the first block's self-attention."""
    helpers = pytest.importorskip("diffusers.hooks._helpers")
    hooks = pytest.importorskip("diffusers.hooks")
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    table = helpers.AttentionProcessorRegistry
    # diffusers 0.42 knows Wan's processor by its former name only, and refuses Wan for that.
    known = table.get(wan.WanAttnProcessor2_0)
    monkeypatch.setattr(table, "_registry", table._registry | {wan.WanAttnProcessor: known})
    config = hooks.LayerSkipConfig(
        indices=[0], skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    return lambda model: hooks.apply_layer_skip(model, config)


@pytest.mark.parametrize("order", ["guidance first", "guidance last"])
@by_both
def test_perturbed_attention_guidance(
    route: str, order: str, perturb: Callable[[Any], None], calls: list[torch.dtype]
) -> None:
    model, inputs = make("text")
    plain = predict(model, inputs)
    perturb(model)
    stock = predict(model, inputs)
    assert float((stock - plain).abs().max()) > 0.1

    model, _ = make("text")
    if order == "guidance first":
        perturb(model)
    ROUTES[route](model)
    if order == "guidance last":
        perturb(model)
    assert_same(predict(model, inputs), stock)
    assert len(calls) == LAYERS - 1, "the others are ours"


# ---- memory savers and tracers


@by_both
def test_gradient_checkpointing(route: str) -> None:
    gradients = []
    for is_ours in (False, True):
        model, inputs = make("text")
        model.enable_gradient_checkpointing()
        model.train()
        if is_ours:
            ROUTES[route](model)
        model(**inputs, return_dict=False)[0].square().mean().backward()
        gradients.append(model.blocks[0].attn1.to_q.weight.grad)
        wan_diffusers.disable(model)
    assert_same(gradients[1], gradients[0])


@by_both
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(route: str, kind: str, calls: list[torch.dtype]) -> None:
    model, inputs = make("text")
    stock = predict(model, inputs)
    ROUTES[route](model)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **options)
    assert_same(predict(model, inputs), stock)
    assert len(calls) == LAYERS
    assert wan_diffusers.disable(model) == LAYERS
    assert torch.equal(predict(model, inputs), stock)


@by_both
def test_accelerate_offload_hooks(route: str, calls: list[torch.dtype]) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model, inputs = make("text")
    stock = predict(model, inputs)
    ROUTES[route](model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert_same(predict(model, inputs), stock)
    assert len(calls) == LAYERS
    assert wan_diffusers.disable(model) == LAYERS


@by_both
def test_export(route: str) -> None:
    model, inputs = make("text")
    stock = predict(model, inputs)
    ROUTES[route](model)
    options = {**inputs, "return_dict": False}
    with torch.no_grad():
        graph = torch.export.export(model, (), kwargs=options)
        assert_same(graph.module()(**options)[0], stock)
    ours = [node for node in graph.graph.nodes if "wan_attn" in str(node.target)]
    assert len(ours) == LAYERS


# ---- arguments


def sdpa_of_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "enable": wan_diffusers.enable,
    "disable": wan_diffusers.disable,
    "replace_processors": lambda target: wan_diffusers.replace_processors(target, sdpa_of_torch),
    "restore_processors": wan_diffusers.restore_processors,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("given, said", [(None, "None"), ("wan", "'wan'"), ([1], "a list")])
def test_what_is_no_model_is_refused(name: str, given: Any, said: str) -> None:
    with pytest.raises(RuntimeError, match=f"wan_attn: model_or_pipe must be .* got {said}"):
        FUNCTIONS[name](given)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(RuntimeError, match="function must be one of .* got None"):
        wan_diffusers.replace_processors(make("text")[0], None)  # type: ignore[arg-type]
