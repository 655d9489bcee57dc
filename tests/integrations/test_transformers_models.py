# SPDX-License-Identifier: Apache-2.0
"""test_transformers_models.py - enable() and disable() of copies, loaded and wrapped models."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_attn import attention, log
from wan_attn.integrations import _transformers_choice
from wan_attn.integrations import transformers as wan_transformers

transformers = pytest.importorskip("transformers", reason="needs the packages of the extra `demo`")

import transformers_models as models  # noqa: E402 - imports transformers


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    log.forget()
    wan_transformers.register()
    yield
    wan_transformers.unregister()


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """query's dtype in every call that goes to wan_attn from here on."""
    seen: list[torch.dtype] = []
    sdpa = attention.sdpa

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append(query.dtype)
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(attention, "sdpa", watched)
    return seen


def chosen(model: Any) -> set[str]:
    parts = _transformers_choice.model_parts(model)
    return {part.config._attn_implementation for _, part, _ in parts}


TOKENS = torch.arange(20).view(2, 10) + 3


def logits(model: Any) -> Tensor:
    ids, mask = models.tokens("right")
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return out


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_peft(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


def out_of_peft(model: Any) -> Any:
    """Enabled while it was wrapped, taken out since."""
    wan_transformers.disable(model)
    wrapper = in_peft(model)
    wan_transformers.enable(wrapper)
    return wrapper.merge_and_unload()


class Wrapper(torch.nn.Module):
    """DDP, FSDP: a module that holds the model and forwards nothing but the call."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": through_a_file,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "peft": in_peft,
    "out of peft": out_of_peft,
    "wrapper": Wrapper,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("attention_before", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_disable_finds_what_was_enabled(
    way: str, attention_before: str, dtypes: list[torch.dtype]
) -> None:
    model = models.make_language_model("llama", attention_before)
    theirs = logits(model)
    wan_transformers.enable(model)
    other = WAYS[way](model)
    assert chosen(other) == {"wan_attn"}
    ours = logits(other)
    assert torch.allclose(ours, theirs, atol=1e-4)
    # While torch.compile traces, sdpa takes what comes with a mask.
    assert dtypes or way == "torch.compile"
    wan_transformers.disable(other)
    assert chosen(other) == {attention_before}
    dtypes.clear()
    assert torch.equal(logits(other), theirs)
    assert not dtypes
    if way in ("deepcopy", "torch.save"):
        assert chosen(model) == {"wan_attn"}, "a copy's business is not the original's"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, dtypes: list[torch.dtype]) -> None:
    gradients = []
    for is_ours in (False, True):
        model = models.make_language_model("llama", "sdpa").train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if is_ours:
            wan_transformers.enable(model)
        model.enable_input_require_grads()
        model(TOKENS, use_cache=False).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert len(dtypes) == 4, "each of two layers once more"
    plain, checkpointed = gradients
    assert torch.allclose(plain, checkpointed, atol=1e-4 * float(plain.abs().max()))


def test_offload_hooks(dtypes: list[torch.dtype]) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = models.make_language_model("llama", "sdpa")
    theirs = logits(model)
    wan_transformers.enable(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.allclose(logits(model), theirs, atol=1e-4) and dtypes
    wan_transformers.disable(model)
    assert torch.equal(logits(model), theirs)


def test_export() -> None:
    """While a graph is traced transformers hands over a mask, and such calls are sdpa's."""
    model = models.make_language_model("llama", "sdpa")
    with torch.no_grad():
        theirs = model(TOKENS, use_cache=False).logits
    wan_transformers.enable(model)
    with torch.no_grad():
        graph = torch.export.export(model, (TOKENS,), {"use_cache": False}, strict=False)
        assert torch.allclose(graph.module()(TOKENS, use_cache=False).logits, theirs, atol=1e-4)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("scaled_dot_product_attention" in target for target in targets) == 2


def test_save_pretrained_does_not_write_it(tmp_path: Path) -> None:
    model = models.make_language_model("llama", "sdpa")
    wan_transformers.enable(model)
    model.save_pretrained(tmp_path)
    assert "wan_attn" not in (tmp_path / "config.json").read_text()
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert chosen(load(tmp_path)) == {"sdpa"}
    named = load(tmp_path, attn_implementation="wan_attn")
    assert chosen(named) == {"wan_attn"}
    wan_transformers.disable(named)
    assert chosen(named) == {"sdpa"}


def test_a_later_choice_stays() -> None:
    model = models.make_language_model("llama", "sdpa")
    wan_transformers.enable(model)
    wan_transformers._set(model, "eager")
    wan_transformers.disable(model)
    assert chosen(model) == {"eager"}
    wan_transformers.enable(model)
    wan_transformers.disable(model)
    assert chosen(model) == {"eager"}


@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "peft"])
def test_after_unregister_sdpa_takes_the_calls_and_the_log_says_so(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make_language_model("llama", "sdpa")
    theirs = logits(model)
    wan_transformers.enable(model)
    other = WAYS[way](model)
    wan_transformers.unregister()
    with caplog.at_level(logging.INFO, "wan_attn"):
        assert torch.equal(logits(other), theirs)
        logits(other)
    said = [record.getMessage() for record in caplog.records]
    (line,) = [text for text in said if "takes a call" in text]
    assert "unregistered" in line and "disable(model)" in line
    wan_transformers.disable(other)
    assert chosen(other) == {"sdpa"}


def test_autocast_computes_in_its_dtype(dtypes: list[torch.dtype]) -> None:
    """As for SDPA, whose place it takes; q and k come out of a rotation in float32."""
    model = models.make_language_model("llama", "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        theirs = logits(model)
        wan_transformers.enable(model)
        ours = logits(model)
    assert set(dtypes) == {torch.bfloat16} and ours.dtype == theirs.dtype
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < 0.05 * scale


def test_float64_and_mixed_operands_are_left_to_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    model = models.make_language_model("llama", "sdpa").double()
    theirs = logits(model)
    wan_transformers.enable(model)
    with caplog.at_level(logging.INFO, "wan_attn"):
        assert torch.equal(logits(model), theirs)
    assert "its sdpa takes a call of LlamaAttention: it is float64" in caplog.text

    layer = torch.nn.Module()
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(RuntimeError, match="same dtype"):  # torch's SDPA refuses, so it did ask
        wan_transformers.attention_forward(layer, query, key, value.double(), None)


@pytest.mark.parametrize("function", ["enable", "disable"])
@pytest.mark.parametrize("given, said", [(None, "None"), ("gpt2", "'gpt2'"), ([1], "a list")])
def test_what_is_no_model_is_refused(function: str, given: Any, said: str) -> None:
    with pytest.raises(RuntimeError, match=f"wan_attn: model must be .* got {said}"):
        getattr(wan_transformers, function)(given)


def test_a_module_without_such_a_model_is_refused() -> None:
    with pytest.raises(RuntimeError, match="model must be one of transformers, got a Linear"):
        wan_transformers.enable(torch.nn.Linear(1, 1))
    wan_transformers.disable(torch.nn.Linear(1, 1))
