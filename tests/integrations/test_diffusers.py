# SPDX-License-Identifier: Apache-2.0
"""test_diffusers.py - diffusers' Wan models compute the same through wan_attn, by both routes."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_attn import config, log
from wan_attn.integrations import _diffusers_backend, _diffusers_layers
from wan_attn.integrations import diffusers as wan_diffusers

diffusers = pytest.importorskip("diffusers", reason="needs the packages of the extra `demo`")

import diffusers_models  # noqa: E402 - imports diffusers
from diffusers_models import MODELS, denoise, make, pipeline, predict  # noqa: E402

# float32 through two layers; a rotation or a head in the wrong place moves the output by some 0.1.
TOLERANCE = 2e-5


def assert_same(out: Tensor, stock: Tensor) -> None:
    scale = float(stock.abs().max())
    assert scale > 0.1
    assert float((out - stock).abs().max()) <= TOLERANCE * scale


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A test that leaves a model enabled leaves no log handler to the next."""
    yield
    wan_diffusers._enabled.clear()
    log.disable("diffusers")


@pytest.fixture
def dispatch() -> Iterator[Any]:
    """diffusers' registry with our name in it, and as it was afterwards."""
    module = pytest.importorskip(
        _diffusers_backend.DISPATCH, reason="diffusers before 0.35 has no backends"
    )
    tables = ("_backends", "_constraints", "_supported_arg_names", "_supports_context_parallel")

    def state() -> Any:
        registry, names = module._AttentionBackendRegistry, module.AttentionBackendName
        # Of a name that is gone a function stays, for the models that hold it.
        held = {
            t: sorted(
                {*map(str, getattr(registry, t, ()))}
                - {"wan_attn", "AttentionBackendName.WAN_ATTN"}
            )
            for t in tables
        }
        private = {k: list(v) for k, v in vars(names).items() if isinstance(v, (list, dict))}
        return held, private, list(names), sorted(vars(names)), registry._active_backend

    before = state()
    wan_diffusers.register_backend()
    wan_diffusers.register_backend()
    yield module
    wan_diffusers.unregister_backend()
    wan_diffusers.unregister_backend()
    assert state() == before


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    log.forget()
    caplog.set_level(logging.INFO, logger="wan_attn")
    yield lambda: [record.getMessage() for record in caplog.records]


# ---- enable() and disable()


@pytest.mark.parametrize("is_fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_that_of_the_stock_processor(
    name: str, is_fused: bool, calls: list[tuple[int, int]]
) -> None:
    model, inputs = make(name)
    stock = predict(model, inputs)
    if is_fused:
        try:
            model.fuse_qkv_projections()
        except AttributeError as error:
            pytest.skip(f"diffusers {diffusers.__version__} cannot fuse this model: {error}")
    assert wan_diffusers.enable(model) == MODELS[name][2]
    assert_same(predict(model, inputs), stock)
    assert sorted(calls) == sorted(MODELS[name][3])
    assert wan_diffusers.disable(model) == MODELS[name][2]


@pytest.mark.parametrize("name", MODELS)
def test_norm_and_rotation_are_one_op(name: str, binding: str) -> None:
    """Two for each self-attention and cross-attention: face blocks have a norm of their own."""
    if binding == "torch":
        pytest.skip("computed by torch: there is no kernel to fuse with")
    model, inputs = make(name)
    wan_diffusers.enable(model)
    with torch.profiler.profile() as profile:
        predict(model, inputs)
    wan_diffusers.disable(model)
    found = sum(e.count for e in profile.key_averages() if e.key == "wan_attn::rms_norm_rope")
    blocks = [*model.blocks, *getattr(model, "vace_blocks", [])]
    layers = sum(hasattr(b, "attn1") + hasattr(b, "attn2") for b in blocks)
    rotates = diffusers.__version__ >= "0.35"
    assert found == (2 * layers if rotates else found)


def test_the_table_of_angles_is_made_once_and_anew_when_they_change() -> None:
    cos, sin = torch.randn(2, 1, 6, 1, 8).unbind(0)
    first = _diffusers_layers._table(cos, sin)
    assert torch.equal(first[..., 0::2], cos[..., 0::2])
    assert torch.equal(first[..., 1::2], sin[..., 1::2])
    assert _diffusers_layers._table(cos, sin) is first
    assert _diffusers_layers._table(cos.clone(), sin) is not first
    again = _diffusers_layers._table(cos, sin)
    cos.zero_()
    assert torch.equal(_diffusers_layers._table(cos, sin)[..., 0::2], cos[..., 0::2])
    assert not torch.equal(again[..., 0::2], cos[..., 0::2])


def test_a_wrong_function_shows() -> None:
    model, inputs = make("image")
    stock = predict(model, inputs)
    wan_diffusers.replace_processors(model, lambda q, k, v: wan_diffusers.attend(1.05 * q, k, v))
    with pytest.raises(AssertionError):
        assert_same(predict(model, inputs), stock)


def test_disable_restores_the_very_processors_and_bits() -> None:
    model, inputs = make("image")
    stock = predict(model, inputs)
    layers = [layer for block in model.blocks for layer in (block.attn1, block.attn2)]
    before = [layer.processor for layer in layers]
    wan_diffusers.enable(model)
    assert wan_diffusers.enable(model) == 4, "twice is once"
    assert not {id(layer.processor) for layer in layers} & set(map(id, before))
    wan_diffusers.disable(model)
    assert wan_diffusers.disable(model) == 0
    assert all(layer.processor is own for layer, own in zip(layers, before, strict=True))
    assert torch.equal(predict(model, inputs), stock)


def test_other_models_are_refused() -> None:
    with pytest.raises(RuntimeError, match="model_or_pipe must be a Wan model .* got Linear"):
        wan_diffusers.enable(torch.nn.Linear(1, 1))


def test_processors_of_others_are_left_alone() -> None:
    class Theirs:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[1]

    model, _ = make("text")
    theirs = Theirs()
    model.blocks[0].attn1.set_processor(theirs)
    assert wan_diffusers.enable(model) == 3
    assert model.blocks[0].attn1.processor is theirs


def test_a_mask_goes_to_the_stock_processor(lines: Any, calls: list[tuple[int, int]]) -> None:
    model, _ = make("text")
    layer = model.blocks[0].attn1
    hidden = torch.randn(1, 5, diffusers_models.WIDTH)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        stock = layer(hidden, attention_mask=mask)
        wan_diffusers.enable(model)
        assert torch.equal(layer(hidden, attention_mask=mask), stock)
        layer(hidden, attention_mask=mask)
    assert not calls
    assert sum("attention_mask" in line for line in lines()) == 1


def test_a_backend_that_is_named_later_wins(
    dispatch: Any, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    model, inputs = make("text")
    wan_diffusers.enable(model)
    model.set_attention_backend("_native_math")
    predict(model, inputs)
    assert not calls
    model.set_attention_backend("wan_attn")
    predict(model, inputs)
    assert len(calls) == 4
    model.reset_attention_backend()
    predict(model, inputs)
    assert len(calls) == 8


def test_enable_says_so_and_shows_the_lines(lines: Any) -> None:
    model, _ = make("text")
    other, _ = make("text")
    wan_diffusers.enable(model)
    wan_diffusers.enable(other)
    text = "diffusers: 4 attention layers of WanTransformer3DModel go through wan_attn"
    assert sum(text in line for line in lines()) == 1
    wan_diffusers.disable(other)
    assert log.LOGGER.handlers, "one is still enabled"
    wan_diffusers.disable(model)
    assert not log.LOGGER.handlers


def test_a_gradient_reaches_the_weights() -> None:
    gradients = []
    for is_ours in (False, True):
        model, inputs = make("text")
        if is_ours:
            wan_diffusers.enable(model)
        model(**inputs, return_dict=False)[0].square().mean().backward()
        gradients.append(model.blocks[0].attn1.to_q.weight.grad)
    assert_same(gradients[1], gradients[0])


# ---- the backend of the name wan_attn


@pytest.mark.parametrize("name", MODELS)
def test_the_named_backend(name: str, dispatch: Any, calls: list[tuple[int, int]]) -> None:
    model, inputs = make(name)
    stock = predict(model, inputs)
    model.set_attention_backend("wan_attn")
    assert_same(predict(model, inputs), stock)
    assert sorted(calls) == sorted(MODELS[name][3])
    assert wan_diffusers.disable(model) == MODELS[name][2]
    assert torch.equal(predict(model, inputs), stock)


def test_the_context_manager(dispatch: Any, calls: list[tuple[int, int]]) -> None:
    model, inputs = make("text")
    stock = predict(model, inputs)
    with dispatch.attention_backend("wan_attn"):
        assert_same(predict(model, inputs), stock)
    assert len(calls) == 4
    assert torch.equal(predict(model, inputs), stock)


def _dispatched(dispatch: Any, *operands: Tensor, **options: Any) -> Tensor:
    with dispatch.attention_backend("wan_attn"):
        out: Tensor = dispatch.dispatch_attention_fn(*operands, **options)
    return out


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(6, 6), (4, 7), (7, 4)])
def test_causal_is_aligned_as_diffusers_means_it(
    dispatch: Any, seqlen_q: int, seqlen_k: int
) -> None:
    query = torch.randn(2, seqlen_q, 2, 8)
    key, value = torch.randn(2, 2, seqlen_k, 2, 8).unbind()
    native = dispatch.dispatch_attention_fn(query, key, value, is_causal=True)
    ours = _dispatched(dispatch, query, key, value, is_causal=True, scale=None)
    torch.testing.assert_close(ours, native, rtol=0, atol=1e-6)


def test_a_mask_goes_to_the_native_backend(dispatch: Any, lines: Any) -> None:
    query, key, value = torch.randn(3, 1, 5, 2, 8).unbind()
    mask = torch.rand(5, 5) > 0.3
    mask[:, 0] = True
    native = dispatch.dispatch_attention_fn(query, key, value, attn_mask=mask)
    assert torch.equal(_dispatched(dispatch, query, key, value, attn_mask=mask), native)
    assert sum("`native` takes a call: it has an attn_mask" in line for line in lines()) == 1


def test_lse_has_the_layout_of_a_ring(dispatch: Any) -> None:
    query, key, value = torch.randn(3, 2, 6, 3, 8).unbind()
    backend = dispatch._AttentionBackendRegistry._backends["wan_attn"]
    out, lse = backend(query, key, value, return_lse=True)
    assert out.shape == (2, 6, 3, 8) and lse.shape == (2, 6, 3) and lse.dtype == torch.float32
    scores = torch.einsum("bqhd,bkhd->bqhk", query.double(), key.double()) / 8**0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
    # Merged as diffusers' ring does it, two halves of the keys are the whole.
    out1, lse1 = backend(query, key[:, :2], value[:, :2], return_lse=True)
    out2, lse2 = backend(query, key[:, 2:], value[:, 2:], return_lse=True)
    weight = torch.sigmoid(lse2 - lse1).unsqueeze(-1)
    torch.testing.assert_close(out1 - weight * (out1 - out2), out, rtol=0, atol=1e-6)


def test_two_processes_share_the_tokens(tmp_path: Path) -> None:
    if not hasattr(diffusers, "ContextParallelConfig"):
        pytest.skip(f"diffusers {diffusers.__version__} has no context parallelism")
    worker = Path(__file__).with_name("diffusers_parallel.py")
    words = [sys.executable, "-W", "ignore", str(worker)]
    processes = [
        subprocess.Popen(
            [*words, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        found = dict(line.split() for line in out.splitlines() if "_degree" in line)
        assert found.keys() == {"ring_degree", "ulysses_degree"}
        assert all(float(difference) <= TOLERANCE for difference in found.values()), found


def test_unregistering_leaves_nothing_of_ours_active(
    dispatch: Any, calls: list[tuple[int, int]]
) -> None:
    model, _ = make("text")
    model.set_attention_backend("wan_attn")  # which also makes it diffusers' default
    wan_diffusers.unregister_backend()
    other, inputs = make("text")
    predict(other, inputs)
    assert not calls


def test_a_registry_that_changes_is_left_as_it_was(
    dispatch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan_diffusers.unregister_backend()
    names = list(dispatch.AttentionBackendName)
    monkeypatch.delattr(dispatch, "_check_shape")
    with pytest.raises(RuntimeError, match="takes no further backend .*enable"):
        wan_diffusers.register_backend()
    assert list(dispatch.AttentionBackendName) == names
    assert not _diffusers_backend.is_registered(dispatch)


# ---- a pipeline


def test_a_whole_denoise_by_both_routes(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    stock = denoise(pipe)
    truth = denoise(pipeline(torch.float64)).double()
    allowed = 2 * float((stock - truth).abs().max())
    assert 0 < allowed < 1e-3 * float(truth.abs().max())

    assert wan_diffusers.enable(pipe) == 4
    assert "diffusers: 4 attention layers of WanPipeline go through wan_attn" in str(lines())
    ours = denoise(pipe)
    assert wan_diffusers.disable(pipe) == 4
    assert not torch.equal(ours, stock), "another order of sums: it did run"
    assert float((ours - truth).abs().max()) <= allowed
    assert torch.equal(denoise(pipe), stock)

    if not hasattr(pipe.transformer, "set_attention_backend"):
        return  # diffusers before 0.35 has the one route only
    # A backend gets q and k when norm and rotation are done.
    monkeypatch.setenv("WAN_ATTN_ROPE", "off")
    config.refresh()
    wan_diffusers.enable(pipe)
    attention_alone = denoise(pipe)
    wan_diffusers.disable(pipe)
    monkeypatch.undo()
    config.refresh()
    assert not torch.equal(attention_alone, ours)
    wan_diffusers.register_backend()
    pipe.transformer.set_attention_backend("wan_attn")
    assert torch.equal(denoise(pipe), attention_alone)
    assert wan_diffusers.disable(pipe) == 4
    wan_diffusers.unregister_backend()
    assert torch.equal(denoise(pipe), stock)


def test_importing_it_does_not_hide_the_host() -> None:
    code = (
        "import sys, wan_attn.integrations.diffusers as ours;"
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules;"
        "import diffusers; assert diffusers is not ours and diffusers.WanPipeline"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
