# SPDX-License-Identifier: Apache-2.0
"""test_wan22_compile.py - WAN_COMPILE=1: on, and off by itself where it does not pay or work."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stub_wan
import torch

from wan_attn import config
from wan_attn.integrations import wan22
from wan_attn.integrations.wan22 import compile
from wan_attn.integrations.wan22.report import PatchReport

ON = "[Attention] torch.compile enabled for optimization"
OFF = "[Attention] torch.compile switched off for"


@pytest.fixture
def wan_compile(
    stubs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[pytest.MonkeyPatch]:
    """WAN_COMPILE=1 and a stub of Wan2.2 to be imported; torch.compile without code generation."""
    stub_wan.write(stubs)
    monkeypatch.setenv("WAN_COMPILE", "1")
    config.refresh()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(real, backend="eager"))
    caplog.set_level(logging.INFO, "wan_attn")
    torch._dynamo.reset()
    yield monkeypatch
    wan22.unpatch()
    monkeypatch.undo()
    config.refresh()


def block_class() -> Any:
    importlib.import_module("wan")
    return sys.modules["wan.modules.model"].WanAttentionBlock


def patch() -> PatchReport:
    return wan22.patch(attention=lambda *args, **kwargs: None)


@pytest.mark.parametrize("order", ["patch first", "import first"])
def test_compiles_says_so_once_and_is_undone(
    wan_compile: Any, caplog: pytest.LogCaptureFixture, order: str
) -> None:
    if order == "import first":
        stock = block_class().forward
        patch()
    else:
        patch()
        stock = block_class().__dict__["forward"]
    cls = block_class()
    calls = []

    def counting(f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return f(*args, **kwargs)

        return call

    wan_compile.setattr(torch, "compile", counting)
    for block in [cls() for _ in range(3)]:
        assert block(torch.ones(4)).tolist() == [3.0] * 4
    assert len(calls) == 3
    assert caplog.messages.count(ON) == 1
    report = wan22.report()
    assert report is not None
    assert report.compile == "wan.modules.model.WanAttentionBlock: on"
    wan22.unpatch()
    if order == "import first":
        assert cls.forward is stock
    assert cls()(torch.ones(4)).tolist() == [3.0] * 4
    assert len(calls) == 3, "after unpatch() the plain forward runs"


def test_off_by_default(stubs: Path) -> None:
    stub_wan.write(stubs)
    stock = block_class().forward
    assert patch().compile == "off (WAN_COMPILE is not set)"
    assert block_class().forward is stock


def test_really_compiles_with_torch(wan_compile: Any, caplog: pytest.LogCaptureFixture) -> None:
    patch()
    blocks = [block_class()() for _ in range(12)]
    for n in (4, 4, 5, 6):
        for block in blocks:
            e = [torch.full((n,), 2.0), 0]
            assert block(torch.ones(n), e=e).tolist() == [5.0] * n
    assert ON in caplog.text and OFF not in caplog.text


def test_switched_off_when_shapes_keep_changing(
    wan_compile: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wan_compile.setattr(torch, "compile", lambda f: f)
    patch()
    block = block_class()()
    for n in range(1, 30):
        assert block(torch.ones(n)).tolist() == [3.0] * n
    lines = [line for line in caplog.messages if line.startswith(OFF)]
    assert len(lines) == 1 and "shapes keep changing" in lines[0]
    report = wan22.report()
    assert report is not None and "switched off, shapes keep changing" in report.compile


def test_shapes_inside_lists_count(wan_compile: Any, caplog: pytest.LogCaptureFixture) -> None:
    wan_compile.setattr(torch, "compile", lambda f: f)
    patch()
    block = block_class()()
    for n in range(1, 2 + compile.SHAPE_LIMIT):
        block(torch.ones(1), e=[torch.ones(n), 0])
    assert OFF in caplog.text


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"),
    reason="this torch retreats at its recompile limit without a sign",
)
def test_switched_off_at_torchs_recompile_limit(
    wan_compile: Any, caplog: pytest.LogCaptureFixture
) -> None:
    patch()
    blocks = [block_class()() for _ in range(20)]
    for number, block in enumerate(blocks):
        # A longer list each time: the tensors keep their shapes, yet every graph is a new one.
        assert block(torch.ones(2), e=[1] * (1 + number)).tolist() == [4.0, 4.0]
    lines = [line for line in caplog.messages if line.startswith(OFF)]
    assert len(lines) == 1 and "RecompileLimit" in lines[0]


@pytest.mark.parametrize(
    "error", [RuntimeError("no C++ compiler"), ImportError("triton"), FileNotFoundError("cl.exe")]
)
@pytest.mark.parametrize("when", ["at torch.compile", "at the first call"])
def test_switched_off_when_compiling_fails(
    wan_compile: Any, caplog: pytest.LogCaptureFixture, error: Exception, when: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    wan_compile.setattr(torch, "compile", fail if when == "at torch.compile" else lambda f: fail)
    patch()
    block = block_class()()
    for _ in range(3):
        assert block(torch.ones(2)).tolist() == [3.0, 3.0]
    lines = [line for line in caplog.messages if line.startswith(OFF)]
    assert len(lines) == 1 and str(error) in lines[0] and type(error).__name__ in lines[0]


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("2 GiB"), RuntimeError("CUDA error")]
)
def test_device_errors_are_raised(wan_compile: Any, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    wan_compile.setattr(torch, "compile", lambda f: fail)
    patch()
    with pytest.raises(type(error)):
        block_class()()(torch.ones(2))


def test_the_models_own_error_is_raised_as_it_is(wan_compile: Any) -> None:
    patch()
    with pytest.raises(RuntimeError, match="must match the size"):
        block_class()()(torch.ones(2), e=[torch.ones(3)])


def test_inside_somebody_elses_compile_the_plain_block_is_traced(
    wan_compile: Any, caplog: pytest.LogCaptureFixture
) -> None:
    patch()
    block = block_class()()
    compiled = torch.compile(lambda x: block(x) + 1, fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [4.0, 4.0]
    assert ON not in caplog.text
