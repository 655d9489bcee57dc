# SPDX-License-Identifier: Apache-2.0
"""test_sparse.py - calls under wan_attn.sparse: which leave blocks out, how tau follows the budget,
and what is dense and why."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_calls import TOKENS, inside, near, one, sdpa, use
from tolerances import off
from wan_attn import config, precision, sparse
from wan_attn.backends import native
from wan_attn.observe import later
from wan_attn.observe.place import Place
from wan_attn.request import PLAIN, Request
from wan_attn.selection import watched
from wan_attn.sparse import kernel, record, state, steer, verdict
from wan_attn.sparse.routing import DENSE, Routing

pytestmark = pytest.mark.usefixtures("native", "as_in_a_new_process")


# --- what is left out ----------------------------------------------------------------------------


def test_a_call_keeps_the_budget_and_leaves_blocks_out() -> None:
    x = near()
    exact = sdpa(*x)
    with use(budget=0.05) as used, inside():
        out, lse = sdpa(*x, return_lse=True)
    layer = one(used, layer=3)
    assert layer["lossy_calls"] == 1 and layer["events"] == []
    assert 0 < off(out, exact) < 0.05 and 0 < layer["largest_error"] < 0.05
    assert 0.05 < layer["density"] < 0.7 and len(layer["densities"]) == 4
    assert off(lse, sdpa(*x, return_lse=True)[1]) < 0.05
    assert torch.equal(sdpa(*x), exact) and state.uses.active is None


def test_a_smaller_budget_costs_more_blocks() -> None:
    x, found = near(), []
    for budget in (0.1, 0.02, 0.005):
        with use(budget=budget, tau=3.0) as used, inside():
            out = sdpa(*x)
        assert off(out, sdpa(*x)) < budget
        layer = one(used, layer=3)
        found.append((layer["density"] or 1.0, max(t or -2.0 for t in layer["taus"])))
    assert found[0][0] < found[1][0] <= found[2][0] and found[0][1] > found[1][1]


def test_the_order_of_tokens_makes_fewer_blocks_matter() -> None:
    wide = (4, 8, 64)
    x, densities = near(math.prod(wide), heads=1, reach=2.0, grid=wide), []
    for grid in (wide, None):
        with use(budget=0.03) as used, inside(grid=grid):
            sdpa(*x)
        densities.append(one(used, layer=3)["density"] or 1.0)
    assert densities[0] < 0.8 * densities[1]


def test_tokens_that_are_always_in() -> None:
    """Tokens behind the grid see all, and all see them: their rows are dense."""
    x = near(TOKENS + 40)
    exact = sdpa(*x)
    with use(budget=0.1, always=[(0, 24)]) as used, inside():
        out = sdpa(*x)
    assert one(used, layer=3)["lossy_calls"] == 1
    always = [*range(24), *range(TOKENS, TOKENS + 40)]  # one block
    assert off(out[:, always], exact[:, always]) < 1e-5 < off(out, exact) < 0.1


def test_near_exact() -> None:
    x = near(sharp=14.0)
    exact = sdpa(*x)
    with use("near_exact") as used, inside():
        out = sdpa(*x)
    layer = one(used, layer=3)
    assert layer["lossy_calls"] == 1 and layer["threshold"] == 0.05
    assert 0 < off(out, exact) < 0.02 and 0 < layer["lost_mass"] < 1
    assert "no row lost more than" in used.report().as_text()


def test_near_exact_follows_the_budget_too() -> None:
    x = near(sharp=14.0)
    exact = sdpa_dense(x)
    with use("near_exact", budget=1e-6) as used, inside():
        for count in range(1, 4):
            assert torch.equal(sdpa(*x), exact), "computed again"
            assert len(one(used, layer=3)["events"]) == count
            assert one(used, layer=3)["threshold"] == 0.05 / 2**count
    assert "Less is left out from now on" in one(used, layer=3)["events"][0]


def sdpa_dense(x: Any) -> Tensor:
    with sparse.use("off"):
        out: Tensor = sdpa(*x)
    return out


def test_lengths_padding_and_two_samples() -> None:
    x = [torch.cat((t, t.flip(1))) for t in near()]
    padded = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 32), value=math.nan) for t in x]
    lens = torch.tensor([TOKENS, TOKENS])
    with use(budget=0.05) as used, inside():
        out = sdpa(*padded, k_lens=lens)[:, :TOKENS]
    assert one(used, layer=3)["lossy_calls"] == 1
    assert 1e-5 < off(out, sdpa(*x)) < 0.05


def test_fewer_heads_of_keys() -> None:
    q, k, v = near()
    k, v = k[:, :, :2], v[:, :, :2]
    with use(budget=0.2) as used, inside():
        out = sdpa(q, k, v)
    layer = one(used, layer=3)
    assert layer["lossy_calls"] == 1 and len(layer["taus"]) == 1
    assert 1e-5 < off(out, sdpa(q, k, v)) < 0.2


# --- what is dense -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "is_dense"),
    [
        ({}, False),
        ({"step": 1}, True),  # the first 20 %
        ({"step": 2}, False),
        ({"step": 0, "steps": 3}, True),
        ({"step": 1, "steps": 3}, False),
        ({"layer": 0}, True),
        ({"layer": 1}, False),
        ({"kind": "text"}, True),
    ],
)
def test_the_schedule(where: dict[str, Any], is_dense: bool) -> None:
    x = near()
    with use(budget=0.3), inside(**where):
        out = sdpa(*x)
    assert torch.equal(out, sdpa(*x)) == is_dense


def test_what_no_host_tells(caplog: pytest.LogCaptureFixture) -> None:
    x = near()
    exact = sdpa(*x)
    with use(budget=0.3), caplog.at_level(logging.INFO, "wan_attn"):
        assert torch.equal(sdpa(*x), exact)
        with sparse.at(layer=3, layers=9, step=4):
            assert torch.equal(sdpa(*x), exact)
    said = [r.message for r in caplog.records if "no host tells" in r.message]
    assert len(said) == 2 and "tells the layer and step and number of steps" in said[0]
    assert "tells the number of steps of a call; it is dense" in said[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"is_causal": True}, "a causal mask or a window"),
        ({"window": (9, 9)}, "a causal mask or a window"),
        ({"q_lens": torch.tensor([TOKENS])}, "real query lengths"),
    ],
)
def test_calls_that_are_dense_say_why_once(
    options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = near()
    with use(budget=0.3), inside(), caplog.at_level(logging.INFO, "wan_attn"):
        for _ in range(2):
            found = sdpa(*x, **options)
    assert torch.equal(found, sdpa(*x, **options))
    lines = [r.message for r in caplog.records if "nothing is left out" in r.message]
    assert len(lines) == 1 and said in lines[0] and lines[0].endswith("it is dense")


def test_gradients_few_tokens_and_missing_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = near()
    leaf = x[0].clone().requires_grad_()
    with inside(), caplog.at_level(logging.INFO, "wan_attn"):
        with use(budget=0.3):
            sdpa(leaf, *x[1:]).sum().backward()
        with sparse.use("sparse"):
            assert torch.equal(sdpa(*x), sdpa_dense(x))
        monkeypatch.setattr(kernel, "why_not", lambda request: "planted: no kernel")
        with use(budget=0.3):
            assert torch.equal(sdpa(*x), sdpa_dense(x))
    assert leaf.grad is not None
    for said in (
        "of a call: forward only, and a gradient is wanted",
        f"it has {TOKENS} tokens, fewer than 12000",
        "planted: no kernel",
    ):
        assert sum(said in r.message for r in caplog.records) == 1, said


def test_a_kernel_that_fails_leaves_the_dense_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    x = near()
    monkeypatch.setattr(kernel, "by_lists", fail)
    with use(budget=0.3) as used, inside(), caplog.at_level(logging.INFO, "wan_attn"):
        for _ in range(2):
            assert torch.equal(sdpa(*x), sdpa_dense(x))
    assert one(used, layer=3)["lossy_calls"] == 0
    assert "failed at run time (planted)" in caplog.text


@pytest.mark.parametrize("mode", ("sparse", "near_exact"))
def test_where_it_is_slower_it_is_dense(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Dense calls are counted where the schedule has them; six of each sort decide."""
    monkeypatch.setenv("WAN_ATTN_TUNE", "auto")
    config.refresh()
    name = "by_lists" if mode == "sparse" else "by_threshold"
    x, stock = near(), getattr(kernel, name)

    def slow(*args: Any, **options: Any) -> Any:
        for _ in range(40):
            made = stock(*args, **options)
        return made

    monkeypatch.setattr(kernel, name, slow)
    with (
        use(mode, budget=0.3) as used,
        caplog.at_level(logging.INFO, "wan_attn"),
    ):
        for step in range(32):
            with inside(step=step, steps=32):
                sdpa(*x)
    assert one(used, layer=3)["lossy_calls"] <= 8
    assert sum("with blocks left out, and" in r.message for r in caplog.records) == 1


def test_what_ran_is_named() -> None:
    """As the profile has it."""
    q, k, v = near()
    by = (native.run, "sdpa", Request.from_tensors(q, k, v))
    with precision.use("fast"), use(budget=0.3):
        with inside():
            assert "blocks left out)" in watched.run(*by, (q, k, v), PLAIN)[2]
        with inside(layer=0):
            assert "qk8)" in watched.run(*by, (q, k, v), PLAIN)[2]
    with use(budget=0.3), inside(layer=0):
        assert watched.run(*by, (q, k, v), PLAIN)[2] == ""


def test_heads_in_8_bits_and_blocks_left_out_together() -> None:
    x = near()
    with precision.use("fast") as bits, use(budget=0.3) as used:
        with inside():
            out = sdpa(*x)
        with inside(layer=0):
            other = sdpa(*x)
    lossy = torch.ops.wan_attn.sdpa(*x, precision=1)[0]
    assert one(used, layer=3)["lossy_calls"] == 1 and torch.equal(other, lossy)
    assert not torch.equal(out, lossy)
    assert [layer["layer"] for layer in bits.report().layers] == [0]


# --- the budget while a run goes on --------------------------------------------------------------


def test_an_error_above_the_budget_is_computed_again() -> None:
    """A tau that a profile brings is far too large: the result is the dense one, and less is left
    out from then on, in the heads that it concerns."""
    x = near()
    x[0][:, :, 0] *= 0.3  # a head that sees nearly all
    exact = sdpa(*x)
    with use(budget=0.05, tau=6.0) as used, inside():
        sdpa(*x)
        made = used.report().found
    assert made["layers"][0]["taus"][3] is not None
    made["layers"][0]["taus"][0] = 6.0
    with use(budget=0.05, tau=6.0, profile=made) as used, inside():
        first, second = sdpa(*x), sdpa(*x)
    layer = one(used, layer=3)
    assert torch.equal(first[:, :, 0], exact[:, :, 0]), "computed again"
    assert not torch.equal(first[:, :, 3], exact[:, :, 3])
    assert "layer 3 (self), head 0, step 4: an error of" in layer["events"][0]
    assert off(first, exact) < 0.05 and off(second, exact) < 0.05
    assert "is above the budget of 5 %; computed again densely" in layer["events"][0]
    assert layer["measured"][0]["error"] > 0.05 and not layer["measured"][0]["stands"]
    assert layer["largest_error"] is None or layer["largest_error"] < 0.05


def test_heads_that_cannot_keep_it_are_dense() -> None:
    x = near()
    with use(budget=1e-7) as used, inside():
        assert torch.equal(sdpa(*x), sdpa_dense(x))
    layer = one(used, layer=3)
    assert layer["lossy_calls"] == 0 and layer["taus"] == [None] * 4
    assert "would save too little. Dense for the rest of this run" in layer["events"][0]


def note(squares: list[float], run: int = 0) -> record.Note:
    return record.Note(Place("self", 5, 9, 3, 9, 0, run), later.Later(torch.tensor(squares)))


def test_verdicts() -> None:
    layer = record.Layer(0, 3, "self", groups=((0, 2), (2, 4)), taus=[1.0, 0.5])
    budget, most = 0.05, 1.5
    assert verdict.read(layer, note([0.01**2, 0.06**2]), budget, most, False) == [1]
    assert layer.taus == [] and layer.tries == {1: 1}
    assert "layer 3 (self), heads 2-3, step 5: an error of 6 %" in layer.events[0]
    for count in (2, 3):
        layer.taus = [1.0, 0.0]
        assert verdict.read(layer, note([0.01**2, math.nan]), budget, most, True) == [1]
        assert layer.tries == {1: count}
    assert 1 in layer.why_dense and None not in layer.why_dense
    assert layer.events[-1].endswith("Dense for the rest of this run")
    layer.taus, layer.running = [1.0, DENSE], {}
    layer.measured_since = 0
    for _ in range(verdict.ENOUGH):
        assert layer.taus
        assert verdict.read(layer, note([0.001**2, 9.0]), budget, most, False) == []
    assert layer.taus == [], "errors far below the budget: a larger tau is looked for"
    layer.taus = [1.0, DENSE]
    verdict.read(layer, note([9.0, 9.0], run=7), budget, most, True)
    assert layer.taus, "of another run"
    layer.begin(1)
    assert layer.taus and not layer.why_dense and layer.allowance.rows(64)


def test_what_a_gpu_tells_late_of_a_threshold() -> None:
    """Of calls that ran before it went down nothing follows but what they have lost."""
    layer = record.Layer(0, 3, "self", groups=((0, 4),), threshold=0.05)
    lost = [later.Later(torch.tensor([0.0, 0, 0, 0, x]).view(torch.int32)) for x in (0.25, 0.5)]
    layer.pending += [note([0.06**2])._replace(threshold=0.05, guard=words) for words in lost]
    layer.pending.append(note([0.01**2])._replace(threshold=0.025))
    verdict.read_pending(layer, 0.05, 1.5)
    assert layer.pending == [] and layer.threshold == 0.025 and layer.lost_mass == 0.5
    assert len(layer.measured) == 3 and len(layer.events) == 1
    assert "its result was in use already. Less is left out" in layer.events[0]
    layer.pending += [note([0.06**2])._replace(threshold=0.025 / 2**n) for n in range(5)]
    verdict.read_pending(layer, 0.05, 1.5)
    assert None in layer.why_dense and layer.events[-1].endswith("Dense for the rest of this run")


@pytest.mark.parametrize("budget", [0.3, 0.05, 0.01])
def test_a_search_finds_the_largest_tau_within_the_budget(budget: float) -> None:
    x = near()
    groups = ((0, 2), (2, 4))
    routing = Routing(x[0], x[1], [TOKENS])
    search = steer.Search(native.run, kernel.by_lists, routing, x, PLAIN, groups)
    taus = search.taus(budget, 2.0)
    goal = steer.WITHIN * budget
    for group, tau in enumerate(taus):
        if tau != DENSE:
            assert search._judge([tau] * 2)[group][0] <= goal
        if tau not in (DENSE, 2.0):
            assert search._judge([tau + 0.3] * 2)[group][0] > 0.7 * goal


@pytest.mark.parametrize(
    ("budget", "density", "wanted"),
    [
        (0.05, 0.4, 0.22),  # where 0.03 * 2^tau reaches 0.7 of it
        (1.0, 0.4, 2.0),
        (0.02, 0.4, DENSE),  # below the least tau
        (0.05, 0.75, DENSE),  # too little would be left out
    ],
)
def test_a_search_halves(
    budget: float, density: float, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = steer.Search.__new__(steer.Search)
    search._groups = ((0, 1), (1, 2))
    monkeypatch.setattr(
        search, "_judge", lambda taus: [(0.03 * 2**t, density) for t in taus], raising=False
    )
    for tau in search.taus(budget, 2.0):
        assert tau == wanted or wanted - 3 / 2**steer.HALVINGS <= tau <= wanted
