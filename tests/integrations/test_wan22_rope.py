# SPDX-License-Identifier: Apache-2.0
"""test_wan22_rope.py - the patch of Wan2.2's norm and rotation, without Wan2.2."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import rope_oracle
from wan_attn import config
from wan_attn.integrations import wan22
from wan_attn.integrations.wan22 import fused, rope, rope_patch
from wan_attn.integrations.wan22.source import fingerprint

PACKAGE = "ropes_of_wan"
MODEL = """
import torch

class WanRMSNorm(torch.nn.Module):
    def forward(self, x):
        return self._norm(x)

    def _norm(self, x):
        return x

def rope_apply(x, grid_sizes, freqs):
    return x

class WanSelfAttention(torch.nn.Module):
    def forward(self, x):
        return x
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with modules.model; everything else of Wan2.2 is missing."""
    folder = tmp_path / PACKAGE / "modules"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield PACKAGE
    wan22.unpatch()
    for name in [n for n in sys.modules if n.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def model() -> ModuleType:
    return __import__(f"{PACKAGE}.modules.model", fromlist=["model"])


def know(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the functions of MODEL were Wan2.2's."""
    module: Any = model()
    norm = module.WanRMSNorm
    known = fingerprint(norm.forward, norm._norm)
    monkeypatch.setitem(rope_patch.NORMS, "modules.model.WanRMSNorm", known)
    name = "modules.model.rope_apply"
    changed = (fingerprint(module.rope_apply), rope.make_rope_apply)
    monkeypatch.setitem(rope_patch.FUNCTIONS, name, changed)


def test_comments_and_layout_do_not_make_another_function(tmp_path: Path) -> None:
    texts = (
        "def f(x, y=1):\n    return x + y\n",
        'def f(x,  y = 1):\n    """Says so."""\n    # a comment\n\n    return (x +\n      y)\n',
        "def f(x, y=1):\n    return (x +  # why\n            y)\n",
        "def f(x, y=2):\n    return x + y\n",
        "def f(x, y=1):\n    if x:\n        x = y\n    return x + y\n",
        "def f(x, y=1):\n    if x:\n        x = y\n        return x + y\n",
    )
    found = []
    for number, text in enumerate(texts):
        file = tmp_path / f"f{number}.py"
        file.write_text(text)
        names: dict[str, Any] = {}
        exec(compile(text, str(file), "exec"), names)
        found.append(fingerprint(names["f"]))
    assert None not in found
    assert found[1] == found[2] != found[0]  # the parentheses are tokens
    assert len(set(found)) == 5
    assert fingerprint(len) is None


def test_what_is_not_known_is_left_alone(package: str) -> None:
    before = model().rope_apply, vars(model().WanRMSNorm)["forward"]
    report = wan22.patch(package=package)
    assert (model().rope_apply, vars(model().WanRMSNorm)["forward"]) == before
    lines = "\n".join(report.rope)
    assert f"{PACKAGE}.modules.model.rope_apply: left alone, not as in Wan2.2" in lines
    assert f"{PACKAGE}.modules.model.WanRMSNorm: left alone, not as in Wan2.2" in lines
    assert f"{PACKAGE}.distributed.sequence_parallel.rope_apply: not imported yet" in lines
    assert "norm, RoPE" in str(report)


def test_what_is_known_is_replaced_everywhere_and_put_back(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch)
    module = model()
    before = module.rope_apply, vars(module.WanRMSNorm)["forward"]
    user = ModuleType("user_of_ropes")
    user.rope_apply = module.rope_apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "user_of_ropes", user)
    for _ in range(2):
        report = wan22.patch(package=package)
        assert f"{PACKAGE}.modules.model.rope_apply: wan_attn" in report.rope
        assert module.rope_apply is user.rope_apply is not before[0]
        assert vars(module.WanRMSNorm)["forward"] is not before[1]
    wan22.unpatch()
    assert (module.rope_apply, vars(module.WanRMSNorm)["forward"]) == before
    assert user.rope_apply is before[0]


@pytest.mark.parametrize("why", ("off", "attention"))
def test_it_can_be_left_out(package: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch)
    before = model().rope_apply
    options: dict[str, Any] = {"attention": len} if why == "attention" else {}
    try:
        if why == "off":
            monkeypatch.setenv("WAN_ATTN_ROPE", "off")
            config.refresh()
        report = wan22.patch(package=package, **options)
        assert model().rope_apply is before
        assert report.rope == (
            f"off ({'WAN_ATTN_ROPE=off' if options == {} else 'attention is given'})",
        )
    finally:
        monkeypatch.undo()
        config.refresh()


def stock_freqs(head_dim: int) -> Tensor:
    return torch.view_as_complex(rope_oracle.table(16, head_dim).unflatten(-1, (-1, 2)))


def test_a_call_that_is_not_ours_goes_to_the_original(binding: str) -> None:
    calls = []

    def original(x: Tensor, grid_sizes: Any, freqs: Any) -> Tensor:
        calls.append(x)
        return x.float()

    apply = rope.make_rope_apply(original)
    x, grid, freqs = torch.randn(1, 8, 2, 12), torch.tensor([[2, 2, 2]]), stock_freqs(12)
    apply(x, grid, freqs)
    assert len(calls) == (binding == "torch")
    calls.clear()
    others: list[tuple[Any, ...]] = [
        (x.requires_grad_(), grid, freqs),
        (x.detach().double(), grid, freqs),
        (x.detach(), [[2, 2, 2]], freqs),
        (x.detach(), grid, freqs.to(torch.complex64)),
        (x.detach(), torch.tensor([[3, 2, 2]]), freqs),
        (x.detach().to("meta"), grid, freqs),
        (x.detach().transpose(2, 3).contiguous().transpose(2, 3), grid, freqs),
    ]
    for arguments in others:
        apply(*arguments)
    assert len(calls) == len(others)


def test_a_norm_with_hooks_is_not_fused() -> None:
    class Norm(torch.nn.Module):
        weight, eps = torch.ones(4), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x

    norms: fused.Norms = {Norm: Norm.forward}
    norm = Norm()
    assert fused._norm_of(norm, norms) is not None
    handle = norm.register_forward_hook(lambda *_: None)
    assert fused._norm_of(norm, norms) is None
    handle.remove()
    assert fused._norm_of(norm, {}) is None
    assert fused._norm_of(torch.nn.Identity(), {}) == (None, None)


def token_freqs(batch: int, seqlen: int, heads: int, pairs: int) -> Tensor:
    """As Wan2.2's rope_precompute stores them: those of all heads, alike."""
    angles = torch.rand(batch, seqlen, 1, pairs, dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles).repeat(1, 1, heads, 1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every tensor whose heads have been compared."""
    found: list[Tensor] = []
    equal = torch.equal

    def counted(one: Tensor, other: Tensor) -> bool:
        found.append(one)
        return equal(one, other)

    monkeypatch.setattr(rope, "_last_asked", (lambda: None, 0, False))
    monkeypatch.setattr(torch, "equal", counted)
    yield found
    monkeypatch.undo()


def bytes_per_element(freqs: Tensor, x: Tensor) -> float:
    """Of the table that the kernel reads, for each element of x."""
    table = rope.token_table_of(freqs, x)
    assert table is not None and table.shape == x.shape
    sizes = (n for n, step in zip(table.shape, table.stride(), strict=True) if step)
    return math.prod(sizes) * table.element_size() / x.numel()


def test_heads_that_turn_alike_are_read_as_one(asked: list[Tensor]) -> None:
    x, freqs = torch.randn(2, 7, 4, 12), token_freqs(2, 7, 4, 6)
    for _ in range(3):
        assert bytes_per_element(freqs, x) == 8 / 4
    assert len(asked) == 1, "every layer asks about the same tensor"
    freqs[1, 3, 2, 5] *= 1j  # now one head has an angle of its own
    assert bytes_per_element(freqs, x) == 8
    assert bytes_per_element(freqs[:, :, :1], x) == 8 / 4
    freqs[0, 0] = torch.nan
    assert bytes_per_element(freqs, x) == 8
    with torch.inference_mode():
        assert bytes_per_element(token_freqs(2, 7, 4, 6), x) == 8, "it would not tell of a change"
    del freqs
    asked.clear()
    gc.collect()
    assert rope._last_asked[0]() is None, "nothing is kept alive"


def test_a_graph_does_not_ask_what_is_in_a_tensor(asked: list[Tensor]) -> None:
    x, freqs = torch.randn(1, 5, 4, 12), token_freqs(1, 5, 4, 6)

    def table(freqs: Tensor) -> Tensor:
        found = rope.token_table_of(freqs, x)
        assert found is not None
        return found.clone()

    compiled = torch.compile(table, fullgraph=True, backend="eager")
    assert compiled(freqs).shape == x.shape and not asked
    assert table(freqs).shape == x.shape and len(asked) == 1


PARALLEL = """
import torch

def distributed_attention(q, k, v, seq_lens, window_size):
    asked.append((q, k))
    return v

def turn(x, grid_sizes, freqs):
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * freqs
    return torch.view_as_real(turned).flatten(-2).float()

def sp_attn_forward(self, x, seq_lens, grid_sizes, freqs, dtype=torch.bfloat16):
    b, s, n, d = *x.shape[:2], self.num_heads, self.head_dim
    q = turn(self.norm_q(self.q(x)).view(b, s, n, d), grid_sizes, freqs)
    k = turn(self.norm_k(self.k(x)).view(b, s, n, d), grid_sizes, freqs)
    v = self.v(x).view(b, s, n, d)
    x = distributed_attention(q.to(dtype), k.to(dtype), v.to(dtype), seq_lens, self.window_size)
    return self.o(x.flatten(2).float())
"""


def test_a_part_of_s2v_has_the_angles_of_its_tokens(native: str) -> None:
    """sp_attn_forward_s2v: q and k leave one pass in the dtype of attention, with stock's bits."""
    names: dict[str, Any] = {"asked": []}
    exec(compile(PARALLEL, "parallel", "exec"), names)
    attention: Any = torch.nn.Module()
    for name in "qkvo":
        setattr(attention, name, torch.nn.Linear(48, 48))
    attention.norm_q = attention.norm_k = torch.nn.Identity()
    attention.num_heads, attention.head_dim, attention.window_size = 4, 12, (-1, -1)
    x, freqs = torch.randn(1, 6, 48), token_freqs(1, 6, 4, 6)
    forward = fused.make_parallel_forward(names["sp_attn_forward"], {}, "turn", True)
    turn, names["turn"] = names["turn"], None  # which ours does not need
    with torch.no_grad():
        attention.o.to(torch.bfloat16)
        forward(attention, x, None, None, freqs)
        names["turn"] = turn
        attention.o.float()
        names["sp_attn_forward"](attention, x, None, None, freqs)
    ours, stocks = names["asked"]
    for one, other in zip(ours, stocks, strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other)
