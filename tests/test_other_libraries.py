# SPDX-License-Identifier: Apache-2.0
"""test_other_libraries.py - xFormers, SageAttention and comfy-kitchen under the contract: what they
lack is refused, or done around them, and the lossy ones run only where they are named.

The stand-ins compute exactly, so that what the adapters do is judged as any backend's. How lossy
the real ones are is not known here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import other_libraries as libraries
import standins
import wan_attn
from calls import BF16, F16, F32, LAYOUTS, operands
from test_backends import CALLS, make
from tolerances import assert_close_to_oracle
from wan_attn import config
from wan_attn.backends import (
    LOSSY,
    REGISTRY,
    _at_lengths,
    comfy_kitchen,
    sage,
    xformers,
)
from wan_attn.config import Settings
from wan_attn.request import Call, Request
from wan_attn.selection.choose import order, select

MODULES: dict[str, tuple[Any, Callable[[], ModuleType], str]] = {
    "xformers": (xformers, libraries.make_xformers, "xformers.ops"),
    "sage": (sage, libraries.make_sage2, "sageattention"),
    "sage 1": (sage, libraries.make_sage1, "sageattention"),
    "comfy_kitchen": (comfy_kitchen, libraries.make_comfy_kitchen, "comfy_kitchen"),
}
A100, T4, RTX50 = (8, 0), (7, 5), (12, 0)
CUDA = Request(
    batch=1, seqlen_q=1024, seqlen_k=1024, num_heads_q=2, num_heads_k=2, head_dim=128, dtype=BF16,
    query_dtype=F32, key_dtype=F32, device=torch.device("cuda", 0),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _reset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("xformers", "sageattention", "comfy_kitchen", "flash_attn", "flash_attn_3"):
        monkeypatch.setitem(sys.modules, name, None)
    standins.install(monkeypatch, None, "flash_attn_interface")
    yield
    sys.modules.pop("xformers.ops", None)
    standins.reset()


def install(monkeypatch: pytest.MonkeyPatch, name: str, arch: Any = A100) -> Any:
    module, made, place = MODULES[name]
    standins.install(monkeypatch, made(), place)
    standins.pretend_card(monkeypatch, arch)
    return module


def but(**changes: Any) -> Request:
    return dataclasses.replace(CUDA, **changes)


def request_of(tensors: list[Tensor], call: Call) -> Request:
    """The call as if it were on a card."""
    query, key, value = tensors
    request = Request.from_tensors(query, key, value, call)
    return dataclasses.replace(request, device=CUDA.device)


@pytest.mark.parametrize("call_name", CALLS)
@pytest.mark.parametrize("name", MODULES)
def test_contract(name: str, call_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not refused is right; the short calls of the table are taken for long ones."""
    module = install(monkeypatch, name)
    monkeypatch.setattr(sage, "_KEYS_MIN", 0)
    shape, call = CALLS[call_name]
    tensors, arguments = make({"head_dim": 64, **shape}, call, BF16)
    for returns_lse in (False, True):
        wanted = Call(**arguments, return_lse=returns_lse)
        if module.why_not(request_of(tensors, wanted)) is not None:
            continue
        if call.get("scale", 1) <= 0 and module is not xformers:
            with pytest.raises(RuntimeError, match="needs a scale above 0"):
                module.run(*tensors, wanted)
            continue
        kept = [x.clone() for x in tensors]
        out, lse = module.run(*tensors, wanted)
        assert (lse is not None) == returns_lse
        assert_close_to_oracle(out, *tensors, lse=lse, **arguments)
        for after, before in zip(tensors, kept, strict=True):
            assert torch.equal(after.nan_to_num(5.0), before.nan_to_num(5.0)), "operands are read"


# How many of the calls, without and with lse: refusing everything would pass the test above.
TAKEN = {"xformers": (33, 33), "sage": (20, 19), "sage 1": (19, 0), "comfy_kitchen": (19, 0)}


@pytest.mark.parametrize("name", MODULES)
def test_most_calls_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(monkeypatch, name)
    monkeypatch.setattr(sage, "_KEYS_MIN", 0)
    taken = [0, 0]
    for shape, call in CALLS.values():
        tensors, arguments = make({"head_dim": 64, **shape}, call, BF16)
        for returns_lse in (False, True):
            wanted = Call(**arguments, return_lse=returns_lse)
            taken[returns_lse] += module.why_not(request_of(tensors, wanted)) is None
    assert tuple(taken) == TAKEN[name]


@pytest.mark.parametrize("name", MODULES)
def test_float32_beside_half_and_layouts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(monkeypatch, name)
    for layout in LAYOUTS:
        tensors = [layout(x) for x in operands(batch=2, seqlen_k=128, dtype=(F32, F32, BF16))]
        lens = torch.tensor([128, 128])
        out, _ = module.run(*tensors, Call(k_lens=lens))
        assert_close_to_oracle(out, *tensors, k_lens=lens)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}])
def test_nothing_to_do(name: str, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(monkeypatch, name)
    q, k, v = operands(**shape, dtype=BF16)
    out, _ = module.run(q, k, v, Call())
    assert out.shape == q.shape and not out.any()


@pytest.mark.parametrize("name", MODULES)
def test_samples_of_the_same_lengths_are_one_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, name)
    seen: list[int] = []
    real = _at_lengths.attend

    def spy(dense: Any, *given: Any) -> Any:
        def counted(q: Tensor, *rest: Any) -> Any:
            seen.append(q.shape[0])
            return dense(q, *rest)

        return real(counted, *given)

    monkeypatch.setattr(_at_lengths, "attend", spy)
    q, k, v = operands(batch=5, seqlen_q=3, seqlen_k=256, dtype=BF16)
    lens = torch.tensor([256, 256, 128, 128, 128])
    out, _ = module.run(q, k, v, Call(k_lens=lens))
    assert seen == [2, 3]
    assert_close_to_oracle(out, q, k, v, k_lens=lens)


@pytest.mark.parametrize("name", MODULES)
def test_lengths_on_a_device_are_left_to_the_next(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, name)
    monkeypatch.setattr(_at_lengths, "host_lengths", lambda *_: None)
    with pytest.raises(RuntimeError, match="these are on a device"):
        module.run(*operands(dtype=BF16), Call(k_lens=torch.tensor([3])))


@pytest.mark.parametrize(
    ("name", "arch", "request_", "reason"),
    [
        ("xformers", A100, CUDA, None),
        ("xformers", A100, but(is_causal=True, window=(3, 3), return_lse=True), None),
        ("xformers", A100, but(num_heads_q=8, head_dim=256), None),
        ("xformers", RTX50, CUDA, None),
        ("xformers", T4, but(dtype=F16), None),
        ("xformers", T4, CUDA, "bfloat16 needs compute capability 8.0 or newer, this is 7.5"),
        ("xformers", T4, but(dtype=F16, window=(3, 3)), "none of its kernels is made for .* 7.5"),
        ("xformers", A100, but(head_dim=100), "head_dim must be a multiple of 8, got 100"),
        ("xformers", A100, but(head_dim=264), "head_dim must be at most 256, got 264"),
        ("xformers", None, CUDA, "there is none"),
        ("sage", A100, CUDA, None),
        ("sage", A100, but(return_lse=True), None),
        ("sage", A100, but(is_causal=True, head_dim=80), None),
        ("sage", T4, CUDA, None),
        ("sage", (7, 0), CUDA, "needs compute capability 7.5 or newer, this is 7.0"),
        ("sage", A100, but(head_dim=136), "head_dim must be at most 128, got 136"),
        ("sage", A100, but(window=(3, -1)), "has no window"),
        ("sage", A100, but(is_causal=True, seqlen_q=1000), "as many queries as keys"),
        ("sage", A100, but(is_causal=True, has_k_lens=True), "has no lengths beside causal"),
        ("sage", A100, but(return_lse=True, num_heads_q=4), "not one of grouped heads"),
        ("sage", A100, but(seqlen_k=257), "may give NaN for 257 keys: below 1024 it needs"),
        ("sage", A100, but(seqlen_k=512), None),
        ("sage", A100, but(seqlen_k=32760), None),
        ("sage", RTX50, but(seqlen_k=104050), None),
        ("sage", RTX50, but(seqlen_k=170000), "gives noise on this card beyond 160000 keys"),
        ("sage", (8, 9), but(seqlen_k=170000), None),
        ("sage 1", A100, CUDA, None),
        ("sage 1", A100, but(return_lse=True), "this version has no log-sum-exp"),
        ("sage 1", A100, but(head_dim=80), "version 1 has head_dim 64, 96 and 128, not 80"),
        ("comfy_kitchen", T4, but(num_heads_q=8, head_dim=100), None),
        ("comfy_kitchen", A100, but(is_causal=True), "has no causal mask"),
        ("comfy_kitchen", A100, but(window=(0, 0)), "has no window"),
        ("comfy_kitchen", A100, but(return_lse=True), "has no log-sum-exp"),
        ("comfy_kitchen", A100, but(head_dim=264), "head_dim must be at most 256, got 264"),
        ("comfy_kitchen", None, CUDA, "there is none"),
    ],
)
def test_why_not(
    name: str, arch: Any, request_: Request, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = install(monkeypatch, name, arch).why_not(request_)
    assert said is None if reason is None else re.search(reason, said or ""), said


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "needs a CUDA device, the call is on cpu"),
        ({"dtype": F32}, "computes float16 and bfloat16, not float32"),
        ({"needs_grad": True}, "forward only here, and a gradient is wanted"),
        ({"dropout_p": 0.1}, "has no dropout here"),
    ],
)
def test_what_all_refuse_without_an_import(
    name: str, changes: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, name)
    monkeypatch.setattr(importlib, "import_module", None)
    assert module.why_not(but(**changes)) == reason


def test_xformers_without_flash_has_nothing_for_new_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(monkeypatch, libraries.make_xformers(has_flash=False), "xformers.ops")
    standins.pretend_card(monkeypatch, RTX50)
    assert xformers.why_not(CUDA) == "none of its kernels is made for compute capability 12.0"
    standins.pretend_card(monkeypatch, A100)
    assert xformers.why_not(CUDA) is None


def test_comfy_kitchen_is_asked_whether_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    made = libraries.make_comfy_kitchen(is_available=False)
    standins.install(monkeypatch, made, "comfy_kitchen")
    standins.pretend_card(monkeypatch, A100)
    assert "says that it is not available" in str(comfy_kitchen.why_not(CUDA))


@pytest.mark.parametrize("name", ("xformers", "sage", "comfy_kitchen"))
def test_not_installed_or_broken(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    module, _, place = MODULES[name]
    standins.install(monkeypatch, None, place.partition(".")[0])
    standins.pretend_card(monkeypatch, A100)
    assert module.why_not(CUDA) == "not installed"
    with pytest.raises(RuntimeError, match="not installed"):
        module.run(*operands(dtype=BF16), Call())
    for text, reason in (
        ("raise ImportError('DLL load failed')", "is installed but broken: ImportError: DLL load"),
        ("import missing_thing_of_theirs", "is installed but broken: No module named"),
        ("x = 1", "is installed but"),
    ):
        top = place.partition(".")[0]
        (tmp_path / top).mkdir(exist_ok=True)
        (tmp_path / top / "__init__.py").write_text(text)
        (tmp_path / top / "ops.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        for loaded in (top, f"{top}.ops"):
            monkeypatch.delitem(sys.modules, loaded, raising=False)
        standins.reset()
        assert reason in str(module.why_not(CUDA))


@pytest.mark.parametrize("name", ("sage", "sage 1"))
def test_sage_leaves_the_callers_device_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets the thread's current device; ours is entered and left around it."""
    module = install(monkeypatch, name)
    entered: list[str] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    class OnCuda(Tensor):
        @property
        def is_cuda(self) -> bool:  # type: ignore[override]
            return True

    monkeypatch.setattr(torch.cuda, "device", Device)
    real = module._load()[0].sageattn

    @functools.wraps(real)
    def sageattn(*given: Any, **options: Any) -> Any:
        assert entered[-1] == "in"
        return real(*(x.as_subclass(Tensor) for x in given), **options)

    monkeypatch.setattr(module._load()[0], "sageattn", sageattn)
    q, k, v = (x.as_subclass(OnCuda) for x in operands(seqlen_k=128, dtype=BF16))
    module.run(q, k, v, Call())
    assert entered == ["in", "out"]


def test_a_sample_too_short_for_sage_is_left_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "sage")
    q, k, v = operands(batch=2, seqlen_k=1024, dtype=BF16)
    with pytest.raises(RuntimeError, match="may give NaN for 100 keys"):
        sage.run(q, k, v, Call(k_lens=torch.tensor([1024, 100])))


class TestSelection:
    """Exact libraries in auto, lossy ones by name alone."""

    def test_auto_never_takes_a_lossy_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert LOSSY == {"sage", "comfy_kitchen"}
        for name in ("sage", "comfy_kitchen"):
            install(monkeypatch, name)
        for arch in (T4, A100, (8, 9), (9, 0), RTX50):
            standins.pretend_card(monkeypatch, arch)
            asked = order(CUDA, Settings())
            assert not LOSSY & set(asked)
            for exact in (*asked, "xformers"):
                behind = order(CUDA, Settings(backend=exact))
                assert behind[0] == exact and not LOSSY & set(behind)

    def test_a_named_lossy_one_falls_back_to_all_of_autos(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install(monkeypatch, "sage")
        for lossy in sorted(LOSSY):
            assert order(CUDA, Settings(backend=lossy)) == (lossy, *order(CUDA, Settings()))
        assert select(CUDA, Settings(backend="sage")).backend == "sage"
        choice = select(but(window=(3, 3)), Settings(backend="sage"))
        assert choice.backend not in LOSSY and choice.is_fallback
        assert choice.refusals[0] == ("sage", "has no window")

    def test_xformers_stands_behind_our_kernels_where_it_is_installed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        standins.pretend_card(monkeypatch, A100)
        assert "xformers" not in order(CUDA, Settings())
        install(monkeypatch, "xformers")
        asked = order(CUDA, Settings())
        assert asked.index("sdpa") + 1 == asked.index("xformers") < asked.index("torch")
        assert "xformers" not in order(but(device=torch.device("cpu")), Settings())
        standins.pretend_card(monkeypatch, (9, 0))
        assert order(CUDA, Settings()).index("torch") < order(CUDA, Settings()).index("xformers")

    def test_one_that_is_named_and_not_installed_says_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        standins.pretend_card(monkeypatch, A100)
        for name in ("xformers", *sorted(LOSSY)):
            choice = select(CUDA, Settings(backend=name))
            assert choice.refusals[0] == (name, "not installed")
            with pytest.raises(RuntimeError, match=f"USE_ATTENTION_BACKEND={name} cannot take"):
                select(CUDA, Settings(backend=name, strict=True))

    def test_available_names_them_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, "comfy_kitchen")
        found = wan_attn.available("cuda:0")
        assert list(found) == list(REGISTRY)
        assert found["comfy_kitchen"] is None
        assert found["sage"] == found["xformers"] == "not installed"

    @pytest.mark.parametrize("name", sorted(LOSSY))
    def test_the_log_says_that_it_is_lossy(
        self, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each time it starts: the line of the configuration."""
        module = install(monkeypatch, name)
        monkeypatch.setattr(module, "why_not", lambda request: None)  # there is no card here
        monkeypatch.setenv("USE_ATTENTION_BACKEND", name)
        config.refresh()
        tensors = operands(seqlen_k=128, dtype=BF16)
        with caplog.at_level(logging.INFO, "wan_attn"):
            out = wan_attn.sdpa(*tensors)
        assert isinstance(out, Tensor)
        line = caplog.records[0].getMessage()
        assert f"Using {module.TITLE} (USE_ATTENTION_BACKEND={name})" in line
        assert "lossy: 8-bit" in line

    def test_one_that_fails_is_left_with_its_reason(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        module = install(monkeypatch, "sage")
        monkeypatch.setattr(module, "why_not", lambda request: None)

        def unsupported(q: Any, k: Any, v: Any, **options: Any) -> Any:
            raise ValueError("Unsupported CUDA architecture: sm87")

        monkeypatch.setattr(module._load()[0], "sageattn", unsupported)
        monkeypatch.setattr(module, "_parameters", lambda: frozenset())
        monkeypatch.setenv("USE_ATTENTION_BACKEND", "sage")
        config.refresh()
        tensors = operands(seqlen_k=128, dtype=BF16)
        with caplog.at_level(logging.INFO, "wan_attn"):
            out = wan_attn.sdpa(*tensors)
        assert isinstance(out, Tensor)
        assert_close_to_oracle(out, *tensors)
        assert "failed at run time (ValueError: Unsupported CUDA" in caplog.text


def test_the_stand_ins_have_the_real_signatures() -> None:
    """Recorded from the sources that other_libraries.py names."""
    known = {
        "query key value attn_bias p scale op output_dtype": (
            libraries.make_xformers().memory_efficient_attention
        ),
        "q k v tensor_layout is_causal sm_scale return_lse kwargs": (
            libraries.make_sage2().sageattn
        ),
        "q k v tensor_layout is_causal sm_scale smooth_k kwargs": libraries.make_sage1().sageattn,
        "q k v scale attn_mask": libraries.make_comfy_kitchen().int8_attention,
    }
    for names, function in known.items():
        assert " ".join(inspect.signature(function).parameters) == names
