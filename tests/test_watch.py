# SPDX-License-Identifier: Apache-2.0
"""test_watch.py - calls under wan_attn.precision: which row runs, and what follows from a fault.

What an injected fault leaves must have the bits of the exact call: there is no bound to choose.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import calls
import wan_attn
from calls import BF16, F16, F32, operands
from wan_attn import config, precision
from wan_attn.native import bindings, op
from wan_attn.observe import place
from wan_attn.observe.pace import Pace
from wan_attn.precision import guard, state
from wan_attn.precision.state import Use

pytestmark = pytest.mark.usefixtures("native")

QK8 = {"precision": 1}


@pytest.fixture(autouse=True)
def _as_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    config.forget()
    yield
    monkeypatch.undo()
    config.forget()


def sdpa(*x: Tensor, **options: Any) -> Any:
    return wan_attn.sdpa(*x, **options)


def some(seqlen: int = 96, heads: int = 4, dtype: torch.dtype = F32) -> list[Tensor]:
    return list(operands(seqlen_q=seqlen, seqlen_k=seqlen, heads_q=heads, head_dim=64, dtype=dtype))


def lossy(*x: Tensor, **options: Any) -> Tensor:
    out: Tensor = torch.ops.wan_attn.sdpa(*x, precision=1, **options)[0]
    return out


def exact(*x: Tensor, **options: Any) -> Tensor:
    out: Tensor = torch.ops.wan_attn.sdpa(*x, **options)[0]
    return out


def inner(layer: int = 3, step: int = 4) -> Any:
    return precision.at(step=step, steps=10, layer=layer, layers=8, expert=0)


def one(used: Use, **known: Any) -> dict[str, Any]:
    """The one layer of the report that has all this."""
    (found,) = [x for x in used.report().layers if known.items() <= x.items()]
    return found


# --- which row runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_each_mode(dtype: torch.dtype) -> None:
    x = some(dtype=dtype)
    want, off = exact(*x), lossy(*x)
    assert not torch.equal(want, off)
    assert torch.equal(sdpa(*x), want) and state.uses.active is None
    for mode, inside, outside in (
        ("exact", want, want),
        ("balanced", off, want),
        ("fast", off, off),
        ("auto", off, want),
    ):
        with precision.use(mode):
            assert torch.equal(sdpa(*x), outside), mode
            with inner():
                assert torch.equal(sdpa(*x), inside), mode
            with inner(layer=0):
                assert torch.equal(sdpa(*x), outside), mode
    assert torch.equal(sdpa(*x), want) and state.uses.active is None


@pytest.mark.parametrize("mode", ["exact", "balanced", "fast", "auto"])
def test_the_environment_asks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = some()
    monkeypatch.setenv("WAN_ATTN_PRECISION", mode)
    config.refresh()
    want = exact(*x) if mode == "exact" else lossy(*x)
    with inner():
        assert torch.equal(sdpa(*x), want)
        with precision.use("exact"):
            assert torch.equal(sdpa(*x), exact(*x))
        assert torch.equal(sdpa(*x), want)
    monkeypatch.setenv("WAN_ATTN_PRECISION", "exact")
    config.refresh()
    assert torch.equal(sdpa(*x), exact(*x))


def test_rules_of_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    x, file = some(), tmp_path / "rules.json"
    file.write_text('{"rules": [{"precision": "qk8", "layers": [3]}]}')
    monkeypatch.setenv("WAN_ATTN_SCHEDULE", str(file))
    config.refresh()
    for layer, want in ((3, lossy(*x)), (4, exact(*x))):
        with inner(layer), caplog.at_level(logging.INFO, "wan_attn"):
            assert torch.equal(sdpa(*x), want)
    assert "where rules of your own allow them (WAN_ATTN_SCHEDULE)" in caplog.text
    file.write_text("[1]")
    monkeypatch.setenv("WAN_ATTN_SCHEDULE", f"{file.parent}/../{file.parent.name}/rules.json")
    config.refresh()
    for _ in range(2):  # not only the first call
        with pytest.raises(config.ConfigError, match="WAN_ATTN_SCHEDULE must have only precision"):
            sdpa(*x)
    with pytest.raises(RuntimeError, match="WAN_ATTN_SCHEDULE must have only precision"):
        precision.use("fast")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mode": "best"}, "mode must be one of exact, balanced, fast, auto, got 'best'"),
        ({"mode": None}, "mode must be one of"),
        ({"budget": 1.0}, "budget must be between 0 and 1, got 1.0"),
        ({"budget": "2 %"}, "budget must be a number"),
        ({"guard": True}, "guard must be None, auto, off or all, got True"),
        ({"rules": [{"precision": "qk8", "steps": "x"}]}, "rules must have steps like"),
        ({"rules": "/no/such"}, "rules must be a JSON file, got '/no/such'"),
    ],
)
def test_use_refuses(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeError, match="^wan_attn: ") as caught:
        precision.use(**asked)
    assert said in str(caught.value) and state.uses.active is None


def test_uses_end_in_any_order() -> None:
    outer, within = precision.use("fast"), precision.use("balanced")
    assert state.uses.active is within.watch
    outer.end()
    assert state.uses.active is within.watch
    within.end()
    within.end()
    assert state.uses.active is None


def test_some_heads() -> None:
    """The lossy heads have the lossy call's bits, the others the exact one's; lse too."""
    x = some(heads=6)
    for query in (x[0], x[0].to(BF16).float()):
        x[0] = query
        rules = [{"precision": "exact", "heads": "0, 3-4"}]
        with precision.use("fast", rules=rules):
            out, lse = sdpa(*x, return_lse=True)
        pairs = (
            torch.ops.wan_attn.sdpa(*x, return_lse=True),
            torch.ops.wan_attn.sdpa(*x, return_lse=True, precision=1),
        )
        for head in range(6):
            want, want_lse = pairs[head in (1, 2, 5)]
            assert torch.equal(out[:, :, head], want[:, :, head])
            assert torch.equal(lse[:, head], want_lse[:, head])


def test_grouped_queries_are_lossy_whole_or_not_at_all() -> None:
    x = operands(seqlen_q=64, seqlen_k=64, heads_q=4, heads_k=2, head_dim=64)
    with precision.use("fast"):
        assert torch.equal(sdpa(*x), lossy(*x))
    with precision.use("fast", rules=[{"precision": "exact", "heads": "0"}]):
        assert torch.equal(sdpa(*x), exact(*x))


def test_all_that_a_call_may_be(caplog: pytest.LogCaptureFixture) -> None:
    """Masks, lengths, another dtype of the result, mixed dtypes."""
    x = operands(batch=2, seqlen_q=40, seqlen_k=40, head_dim=64, dtype=(F32, F32, BF16))
    lens = torch.tensor([40, 7])
    with precision.use("fast"):
        got = sdpa(*x, k_lens=lens, is_causal=True, window=(9, -1), scale=0.2)
        want = lossy(*x, k_lens=lens, is_causal=True, window_left=9, scale=0.2)
        assert torch.equal(got, want)
        got = sdpa(*x, out_dtype=BF16)
        assert torch.equal(got, lossy(*x, out_like_value=True)) and got.dtype == BF16
        assert wan_attn.flash_attention(*x).dtype == F32


def test_a_call_that_wants_a_gradient_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    x = some()
    leaf = x[0].clone().requires_grad_()
    plain = sdpa(leaf, *x[1:]).detach()
    with precision.use("fast"), caplog.at_level(logging.INFO, "wan_attn"):
        out = sdpa(leaf, *x[1:])
        out.sum().backward()
        sdpa(leaf, *x[1:])
    assert torch.equal(out.detach(), plain) and leaf.grad is not None
    said = [r.message for r in caplog.records if "8-bit" in r.message]
    assert [line.partition(": ")[2] for line in said] == ["a gradient is wanted; it is exact"]


def test_under_torch_func_and_compile() -> None:
    x = some(32)
    batch = [torch.stack((t, t + 0.1)) for t in x]
    with precision.use("fast"):
        mapped = torch.func.vmap(lambda q, k, v: sdpa(q, k, v))(*batch)
        compiled = torch.compile(lambda q, k, v: sdpa(q, k, v), backend="eager")(*x)
    assert torch.equal(compiled, lossy(*x))
    for i in range(2):
        torch.testing.assert_close(mapped[i], exact(*(t[i] for t in batch)))


def test_what_no_lossy_row_takes_is_exact_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    x = operands(seqlen_q=20, seqlen_k=20, head_dim=300)
    with precision.use("fast"), caplog.at_level(logging.INFO, "wan_attn"):
        for _ in range(2):
            assert torch.equal(sdpa(*x), sdpa(*x))
    (line,) = [r.message for r in caplog.records if "8-bit scores for a call" in r.message]
    assert "head_dim 300" in line


def test_a_lossy_row_that_fails_is_exact_with_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = some()

    def failing(*args: Any, **options: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(bindings, "ctypes_sdpa", failing)
    with precision.use("fast"), caplog.at_level(logging.INFO, "wan_attn"):
        for _ in range(3):
            assert torch.equal(sdpa(*x), exact(*x))
    assert sum("planted" in r.message for r in caplog.records) == 1


def test_each_start_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    x = some()
    with caplog.at_level(logging.INFO, "wan_attn"):
        for mode in ("fast", "balanced"):
            with precision.use(mode), inner():
                sdpa(*x)
                sdpa(*x)
    said = [r.message for r in caplog.records if "not exact" in r.message]
    row = next(k for k in op.kernels() if k.is_lossy and calls.can_run(k)).name
    assert said == [
        f"[Attention] Using wan_attn SDPA ({row}), which is not exact: 8-bit scores, where `{mode}`"
        f" allows them (wan_attn.precision.use('{mode}'))"
        for mode in ("fast", "balanced")
    ]
    assert all(r.levelno == logging.WARNING for r in caplog.records if "not exact" in r.message)


def test_balanced_says_what_no_host_tells(caplog: pytest.LogCaptureFixture) -> None:
    with precision.use("balanced"), caplog.at_level(logging.INFO, "wan_attn"):
        for _ in range(2):
            sdpa(*some())
        sdpa(*operands(seqlen_q=9, seqlen_k=64, head_dim=64))  # text: exact by rule
    (line,) = [r.message for r in caplog.records if "no host tells" in r.message]
    assert "the layer and step and number of steps of a call; it is exact" in line


# --- faults --------------------------------------------------------------------------------------


def put(which: int, value: float) -> Callable[[list[Tensor]], None]:
    def inject(x: list[Tensor]) -> None:
        x[which][0, 5, 2, 7] = value

    return inject


def f16_limit(x: list[Tensor]) -> None:
    x[2].copy_(torch.where(x[2] > 0, 65504.0, -65504.0))


def zero(x: list[Tensor]) -> None:
    for tensor in x:
        tensor.zero_()


FAULTS: dict[str, Callable[[list[Tensor]], None]] = {
    **{f"NaN in {n}": put(i, math.nan) for i, n in enumerate("qkv")},
    **{f"+inf in {n}": put(i, math.inf) for i, n in enumerate("qkv")},
    **{f"-inf in {n}": put(i, -math.inf) for i, n in enumerate("qkv")},
}
HARMLESS: dict[str, Callable[[list[Tensor]], object]] = {
    "constant channel of v": lambda x: x[2][:, :, :, 9].fill_(3.0),
    "constant v": lambda x: x[2].fill_(-2.0),
    "constant channel of k": lambda x: x[1][:, :, :, 9].fill_(300.0),
    "rows of zeros in q": lambda x: x[0][:, 3:6].zero_(),
    "rows of zeros in k": lambda x: x[1][:, 3:6].zero_(),
    "everything 0": zero,
    "v at float16's limit": f16_limit,
}


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_the_layer_is_exact(
    fault: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    good, x = some(dtype=dtype), some(dtype=dtype)
    FAULTS[fault](x)
    with precision.use("balanced") as used, caplog.at_level(logging.INFO, "wan_attn"):
        with inner(layer=3):
            assert torch.equal(sdpa(*good), lossy(*good))
            got = sdpa(*x)
            again = sdpa(*good)
        with inner(layer=4):
            other = sdpa(*good)
    torch.testing.assert_close(got, exact(*x), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again, exact(*good)), "the layer must stay exact"
    assert torch.equal(other, lossy(*good)), "other layers must not"
    layer = one(used, layer=3)
    assert (layer["lossy_calls"], layer["exact_calls"]) == (1, 2)
    (event,) = layer["events"]
    assert event.startswith("layer 3 (self), step 4: ") and "NaN or infinite" in event
    assert "computed again exactly. It is exact for the rest of this run" in event
    assert sum(event in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_no_fault_is_left_alone(case: str, dtype: torch.dtype) -> None:
    """And the result is as near as any of this row."""
    x = some(dtype=dtype)
    HARMLESS[case](x)
    with precision.use("auto") as used, inner():
        for _ in range(8):
            got = sdpa(*x)
    want = exact(*x).double()
    assert (got.double() - want).norm() <= 0.03 * want.norm()
    layer = one(used, layer=3)
    assert layer["events"] == [] and layer["lossy_calls"] == 8


def test_160_000_keys() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 8, 1, 64, generator=generator)
    k, v = (torch.randn(1, 160_001, 1, 64, generator=generator) for _ in range(2))
    k[..., 5] += 40.0
    v[..., 9] = 7.0
    with precision.use("fast") as used:
        got = sdpa(q, k, v)
    want = exact(q, k, v)
    assert (got - want).norm() <= 0.02 * want.norm()
    assert one(used, kind="text")["lossy_calls"] == 1 and not one(used)["events"]
    v[0, 160_000, 0, 3] = math.nan  # the last of all
    with precision.use("fast") as used:
        got = sdpa(q, k, v)
    torch.testing.assert_close(got, exact(q, k, v), rtol=0, atol=0, equal_nan=True)
    assert one(used)["lossy_calls"] == 0


def test_guard_off_lets_it_pass_and_a_new_run_forgets(caplog: pytest.LogCaptureFixture) -> None:
    x, good = some(), some()
    x[2][0, 5, 2, 7] = math.nan
    with precision.use("fast", guard="off") as used:
        torch.testing.assert_close(sdpa(*x), lossy(*x), rtol=0, atol=0, equal_nan=True)
        assert one(used)["lossy_calls"] == 1
    with precision.use("fast") as used:
        place.begin([2.0, 1.0])
        sdpa(*x)
        assert torch.equal(sdpa(*good), exact(*good))
        place.begin([2.0, 1.0])
        assert torch.equal(sdpa(*good), lossy(*good))


def test_guard_all_watches_exact_calls(caplog: pytest.LogCaptureFixture) -> None:
    x = some()
    with precision.use("exact", guard="all"), caplog.at_level(logging.INFO, "wan_attn"):
        assert torch.equal(sdpa(*x), exact(*x))
        assert not [r for r in caplog.records if "NaN" in r.message]
        x[0][0, 1] = math.inf
        with inner():
            for _ in range(2):
                got = sdpa(*x)
    torch.testing.assert_close(got, exact(*x), rtol=0, atol=0, equal_nan=True)
    (line,) = [r.message for r in caplog.records if "NaN" in r.message]
    assert line.startswith("[Attention] layer 3 (self), step 4, exact: 256 NaN or infinite")


def test_guard_all_says_whose_calls_it_does_not_watch(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_ATTN_GUARD", "all")
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "torch")
    config.refresh()
    with caplog.at_level(logging.INFO, "wan_attn"):
        for _ in range(2):
            sdpa(*some())
    (line,) = [r.message for r in caplog.records if "not watched" in r.message]
    assert "calls on torch are not watched" in line


def test_a_row_that_fills_no_guard_still_runs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the CUDA rows of today."""
    x = some()

    def without(*args: Any, **options: Any) -> Any:
        raise RuntimeError("wan_attn: no kernel takes this call: it does not fill a guard")

    monkeypatch.setattr(bindings, "ctypes_sdpa", without)
    with precision.use("exact", guard="all"), caplog.at_level(logging.INFO, "wan_attn"):
        for _ in range(2):
            assert torch.equal(sdpa(*x), exact(*x))
    (line,) = [r.message for r in caplog.records if "not watched" in r.message]
    assert "does not fill a guard" in line
    assert not [r for r in caplog.records if "failed at run time" in r.message]


def test_the_words_of_a_guard() -> None:
    none = guard.Words.of([0, 0, 0, 0])
    assert none.hit() is None
    words = guard.Words.of([0x477FE000, 1, 2, -1])
    assert words == guard.Words(65504.0, 1, 2, 2**32 - 1)
    assert words.hit() == (
        "4294967295 NaN or infinite numbers in its result, 2 in v, 1 numbers of v too large for"
        " float16; largest |v|: 6.55e+04"
    )
    assert "largest |v|: NaN" in (guard.Words(math.nan, 0, 1, 0).hit() or "")


def test_a_request_without_an_lse_has_none() -> None:
    x = some()
    with precision.use("fast", rules=[{"precision": "exact", "heads": "0"}]):
        assert isinstance(sdpa(*x), Tensor)


# --- whether it is faster ------------------------------------------------------------------------


def test_the_least_of_three_calls() -> None:
    pace = Pace()
    assert [pace.is_turn_of_exact() for _ in range(7)] == [False, True] * 3 + [False]
    for seconds in (3.0, 1.0):
        pace.add(seconds, is_lossy=True)
        pace.add(seconds + 1, is_lossy=False)
    assert pace.least() is None
    pace.add(2.0, is_lossy=True)
    pace.add(9.0, is_lossy=False)
    assert pace.least() == (2.0, 1.0)
    pace.add(0.1, is_lossy=True)  # what was decided stands
    assert pace.least() == (2.0, 1.0)
    assert not Pace(_exact=[1.0] * 3).is_turn_of_exact()


@pytest.mark.parametrize("tune", ["auto", "off"])
@pytest.mark.parametrize("lossy_seconds", [0.9, 1.0, 1.1])
def test_slower_than_exact(
    lossy_seconds: float,
    tune: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WAN_ATTN_TUNE", tune)
    config.refresh()
    add = Pace.add
    taken = {True: lossy_seconds, False: 1.0}
    monkeypatch.setattr(Pace, "add", lambda pace, _, is_lossy: add(pace, taken[is_lossy], is_lossy))
    x = some()
    ran = []
    with caplog.at_level(logging.INFO, "wan_attn"), precision.use("fast"):
        for _ in range(8):
            ran.append("lossy" if torch.equal(sdpa(*x), lossy(*x)) else "exact")
    assert all(torch.equal(sdpa(*x), exact(*x)) for _ in range(2))
    said = [line for line in caplog.messages if "8-bit scores for a call" in line]
    brings = [line for line in caplog.messages if "] 8-bit scores: " in line]
    if tune == "off":
        assert ran == ["lossy"] * 8 and not said and not brings
    elif lossy_seconds < 1.0:
        assert ran == ["lossy", "exact"] * 3 + ["lossy"] * 2 and not said
        (line,) = brings
        assert "_qk8) takes 900 ms, exactly 1e+03 ms on " in line
    else:
        assert not brings
        assert ran == ["lossy", "exact"] * 3 + ["exact"] * 2
        (line,) = said
        assert "_qk8)" in line and "exactly 1e+03 ms on " in line
