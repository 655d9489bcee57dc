# SPDX-License-Identifier: Apache-2.0
"""test_transformers.py - transformers computes the same through wan_attn as through its sdpa."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_attn import config, log
from wan_attn.backends import fa2
from wan_attn.integrations import _transformers_choice
from wan_attn.integrations import transformers as wan_transformers

transformers = pytest.importorskip("transformers", reason="needs the packages of the extra `demo`")

import transformers_models as models  # noqa: E402 - imports transformers

TOLERANCE = 5e-6  # float32, of the largest logit; without its padding mask a model is off by 0.1
NEW_TOKENS = 32


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    log.forget()
    wan_transformers.register()
    yield
    wan_transformers.unregister()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, logger="wan_attn")
    return lambda: [record.getMessage() for record in caplog.records]


def elsewhere(lines: Any) -> list[str]:
    return [line for line in lines() if " take a call" in line or " takes a call" in line]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    scale = float(theirs.abs().max())
    assert scale > 0.1
    assert float((ours - theirs).abs().max()) <= TOLERANCE * scale


def logits(model: Any, side: str) -> Tensor:
    """Of the real tokens: what a model says about padding means nothing."""
    ids, mask = models.tokens(side)
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    return out


# ---- language models


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("name", models.LANGUAGE_MODELS)
def test_logits_of_padded_batches(
    name: str, side: str, calls: list[tuple[int, int]], lines: Any
) -> None:
    theirs = logits(models.make_language_model(name, "sdpa"), side)
    assert not calls
    assert_same(logits(models.make_language_model(name, "wan_attn"), side), theirs)
    assert len(calls) >= 2 and not elsewhere(lines)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "name, side", [*((name, "left") for name in models.LANGUAGE_MODELS), ("llama", "none")]
)
def test_generated_tokens(
    name: str, side: str, cache: str, calls: list[tuple[int, int]], lines: Any
) -> None:
    ids, mask = models.tokens(side)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"

    def say(implementation: str) -> Tensor:
        model = models.make_language_model(name, implementation)
        out: Tensor = model.generate(ids, attention_mask=mask, **options)
        return out[:, models.LENGTH :]

    try:
        theirs = say("sdpa")
    except RuntimeError as error:
        pytest.skip(f"transformers {transformers.__version__}: its own sdpa cannot: {error}")
    assert theirs.shape == (3, NEW_TOKENS) and len(theirs.unique()) > 2
    assert torch.equal(say("wan_attn"), theirs)
    assert len(calls) >= 2 * NEW_TOKENS and not elsewhere(lines)


def test_decoding_is_described_once(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config.forget()  # plans remember that they were described
    ids, mask = (x[:1, :9] for x in models.tokens("none"))
    model = models.make_language_model("llama", "wan_attn")
    model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    said = [line for line in lines() if "Config: " in line]
    assert len(said) == 2 and "Lq=9" in said[0] and "Lq=1," in said[1], said


def test_a_prompt_in_two_parts(calls: list[tuple[int, int]], lines: Any) -> None:
    ids, mask = models.tokens("left")
    whole = logits(models.make_language_model("qwen2", "sdpa"), "left")
    model = models.make_language_model("qwen2", "wan_attn")
    with torch.no_grad():
        first = model(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        cache = first.past_key_values
        rest = model(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=cache)
    both = torch.cat((first.logits, rest.logits), dim=1)[mask.bool()]
    assert_same(both, whole)
    assert (4, 10) in calls and not elsewhere(lines)


def test_a_mask_of_the_users_own_goes_to_sdpa(calls: list[tuple[int, int]], lines: Any) -> None:
    ids, _ = models.tokens("none")
    allowed = torch.ones(models.LENGTH, models.LENGTH, dtype=torch.bool).tril()
    allowed[5:, 2] = False
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = mask.expand(3, 1, -1, -1)
    out = []
    for implementation in ("sdpa", "wan_attn"):
        model = models.make_language_model("llama", implementation)
        with torch.no_grad():
            out.append(model(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(out[0], out[1]) and not calls
    (line,) = elsewhere(lines)
    assert line.endswith("its sdpa takes a call of LlamaAttention: its mask has holes")


def test_without_its_mask_function_padding_would_be_seen() -> None:
    masks = wan_transformers._masks()
    if masks is None:
        pytest.skip(f"transformers {transformers.__version__} has no mask functions")
    theirs = logits(models.make_language_model("llama", "sdpa"), "left")
    del masks._global_mapping["wan_attn"]
    with pytest.raises(AssertionError):
        assert_same(logits(models.make_language_model("llama", "wan_attn"), "left"), theirs)


def test_half_precision_and_gradients() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        out, gradients = [], []
        for implementation in ("sdpa", "wan_attn"):
            model = models.make_language_model("qwen2", implementation).to(dtype)
            ids, mask = models.tokens("right")
            result = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            assert result.dtype == dtype
            result.float().square().mean().backward()
            out.append(result.detach().float())
            gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.float())
        for ours, theirs in (out, gradients):
            limit = 5e-2 if dtype == torch.bfloat16 else 1e-5
            assert float((ours - theirs).abs().max()) <= limit * float(theirs.abs().max())


@pytest.mark.compile
def test_compiled_models(lines: Any) -> None:
    torch._dynamo.reset()
    theirs = logits(models.make_language_model("llama", "sdpa"), "left")
    model = models.make_language_model("llama", "wan_attn")
    assert_same(logits(torch.compile(model, backend="eager"), "left"), theirs)
    (line,) = elsewhere(lines)
    assert line.endswith("its mask cannot be read while torch.compile traces")
    # Without a mask it is one graph with our op in it.
    layer = torch.nn.Module()

    def attend(query: Tensor, key: Tensor) -> Tensor:
        return wan_transformers.attention_forward(layer, query, key, key, None)[0]

    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(query, key), attend(query, key))


# ---- encoders


@pytest.mark.parametrize("name", models.ENCODERS)
def test_an_encoder_gives_the_same_through_wan_attn(
    name: str, calls: list[tuple[int, int]], lines: Any
) -> None:
    model = models.make(*models.ENCODERS[name], "sdpa")
    theirs = models.encode(model, name)
    assert not calls
    chosen = wan_transformers.enable(model)
    ours = models.encode(model, name)
    wan_transformers.disable(model)
    assert torch.equal(models.encode(model, name), theirs)
    if set(chosen.values()) == {"sdpa"}:
        assert torch.equal(ours, theirs)
        pytest.skip(f"transformers {transformers.__version__}: {lines()[-1]}")
    assert set(chosen.values()) == {"wan_attn"}
    assert_same(ours, theirs)
    assert len(calls) >= 2 and not elsewhere(lines)


def test_a_model_that_sees_and_speaks(lines: Any) -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this test's configuration is written as transformers 5 has it")
    model, inputs = models.make_qwen_vl()
    theirs = models.say(model, inputs)
    chosen = wan_transformers.enable(model)
    assert set(chosen.values()) == {"wan_attn"} and {"model.visual"} <= chosen.keys()
    assert_same(models.say(model, inputs), theirs)
    assert not elsewhere(lines)
    wan_transformers.disable(model)
    assert torch.equal(models.say(model, inputs), theirs)


# ---- what wan_attn cannot do


@pytest.mark.parametrize("what", models.UNABLE)
def test_what_it_cannot_do_is_done_elsewhere_and_said(
    what: str, calls: list[tuple[int, int]], lines: Any
) -> None:
    eager = models.make(*models.UNABLE[what], "eager")
    ids, mask = models.tokens("right")

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask)
        states: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
        return states[mask.bool()]

    theirs = run(eager)
    if "wan_attn" not in wan_transformers.enable(eager).values():
        pytest.skip(f"transformers {transformers.__version__} does not ask for its attention")
    assert_same(run(eager), theirs)
    assert not calls
    (line,) = elsewhere(lines)
    assert line.endswith(f": it has {what}")


def call(**options: Any) -> tuple[Tensor, Tensor]:
    """(ours, sdpa's) for one layer's call."""
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True  # type: ignore[assignment]
    query = torch.randn(2, 4, options.pop("rows", 6), options.pop("head_dim", 8))
    key = torch.randn(2, 2, 6, query.shape[-1])
    value = torch.randn(2, 2, 6, options.pop("head_dim_v", query.shape[-1]))
    arguments = {"attention_mask": None, "scaling": 0.4} | options
    torch.manual_seed(3)
    ours, weights = wan_transformers.attention_forward(layer, query, key, value, **arguments)
    assert weights is None and ours.is_contiguous()
    torch.manual_seed(3)
    return ours, wan_transformers._functions()["sdpa"](layer, query, key, value, **arguments)[0]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, ""),
        ({"rows": 1}, ""),
        ({"rows": 3}, ""),  # the start of a static cache
        ({"is_causal": False}, ""),
        ({"rows": 8, "is_causal": True}, "more queries than keys"),
        ({"dropout": 0.5}, "it has dropout"),
        ({"head_dim_v": 4, "is_causal": False}, "another head_dim"),
        ({"head_dim": 264}, "head_dim 264 is above 256"),
    ],
    ids=str,
)
def test_single_calls(options: dict[str, Any], reason: str, lines: Any) -> None:
    ours, theirs = call(**options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert all(reason in line for line in elsewhere(lines)) == bool(elsewhere(lines) or not reason)
    assert bool(elsewhere(lines)) == bool(reason)


def test_weights_are_said_not_to_come(lines: Any) -> None:
    call(output_attentions=True)
    assert sum("output_attentions" in line for line in lines()) == 1


# ---- the names, and who gets what


def test_register_and_unregister() -> None:
    functions, masks = wan_transformers._functions(), wan_transformers._masks()
    wan_transformers.register()
    assert functions["wan_attn"] is wan_transformers.attention_forward
    if masks is not None:
        assert masks()["wan_attn"] is masks()["sdpa"]
    wan_transformers.unregister()
    wan_transformers.unregister()
    assert functions["wan_attn"] is wan_transformers.retired_forward
    assert masks is None or masks()["wan_attn"] is masks()["sdpa"], "no mask would be silent"
    assert not log.LOGGER.handlers


def test_a_transformers_without_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wan_transformers.unregister()
    with monkeypatch.context() as patched:
        patched.delattr(wan_transformers._modeling_utils(), "ALL_ATTENTION_FUNCTIONS")
        with pytest.raises(RuntimeError, match="no table of attention functions"):
            wan_transformers.register()


def test_parts_of_a_model_are_restored_one_by_one(lines: Any) -> None:
    text = {name: models.TEXT[name] for name in models.TEXT}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config=dict(models.VISION), projection_dim=8
        )
    ).eval()
    if wan_transformers.enable(model).get("vision_model") != "wan_attn":
        pytest.skip(f"transformers {transformers.__version__}: CLIP has attention classes")
    wan_transformers.disable(model)
    wan_transformers._set(model.vision_model, "eager")
    before = {
        n: p.config._attn_implementation for n, p, _ in _transformers_choice.model_parts(model)
    }
    assert before["vision_model"] == "eager" and before["text_model"] == "sdpa"
    assert set(wan_transformers.enable(model).values()) == {"wan_attn"}
    assert wan_transformers.enable(model).keys() == before.keys(), "twice is once"
    wan_transformers.disable(model)
    wan_transformers.disable(model)
    after = {
        n: p.config._attn_implementation for n, p, _ in _transformers_choice.model_parts(model)
    }
    assert after == before
    said = [line for line in lines() if "vision_model (" in line]
    assert said == [
        "[Attention] transformers: vision_model (CLIPVisionModel): wan_attn"
        " (flash_attention_2: needs a CUDA device, the call is on cpu)"
    ] or (len(said) == 1 and "vision_model (CLIPVisionTransformer): wan_attn" in said[0])


def test_flash_attention_2_comes_first_where_it_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usable(request: Any) -> None:
        asked.append((request.device.type, request.dtype))

    on_card: Any = {"device": "cuda", "dtype": torch.bfloat16}
    monkeypatch.setattr(fa2, "why_not", usable)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert _transformers_choice.choose(**on_card) == ("flash_attention_2", "")
    assert asked == [("cuda", torch.bfloat16)]
    umt5 = models.make(*models.UNABLE["position_bias"], "eager")
    assert "does not support it" in _transformers_choice.choose(umt5, **on_card)[1]

    monkeypatch.setenv("DISABLE_FLASH_ATTN", "1")
    config.refresh()
    try:
        chosen = _transformers_choice.choose(**on_card)
    finally:
        monkeypatch.undo()
        config.refresh()
    assert chosen == ("wan_attn", "flash_attention_2: disabled by DISABLE_FLASH_ATTN=1")

    monkeypatch.setattr(fa2, "why_not", usable)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert _transformers_choice.choose(**on_card)[0] == "wan_attn"


def test_a_model_that_does_not_ask_keeps_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transformers_choice, "_has_interface", lambda part: False)
    model = models.make_language_model("llama", "sdpa")
    chosen, reason = _transformers_choice.choose(model)
    assert chosen == "sdpa" and "does not ask" in reason


def test_importing_it_does_not_hide_the_host() -> None:
    code = (
        "import sys, wan_attn.integrations.transformers as ours;"
        "assert 'transformers' not in sys.modules;"
        "import transformers; assert transformers is not ours and transformers.PreTrainedModel"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
