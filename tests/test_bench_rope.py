# SPDX-License-Identifier: Apache-2.0
"""test_bench_rope.py - `bench rope`: its routes compute the same, and stock's is stock's."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rope_oracle
from wan_attn.__main__ import main
from wan_attn.bench import model, plots, rope, rope_routes, step
from wan_attn.bench.model import Video
from wan_attn.integrations import _rope
from wan_attn.native import rope as native_rope
from wan_attn.native.kernels import rope_kernels

CPU = torch.device("cpu")
GRID = (3, 4, 5)


def given(dtype: torch.dtype = torch.float32) -> rope_routes.Operands:
    return rope_routes.operands(GRID, 3, 40, dtype, CPU)


def test_each_route_computes_norm_and_rotation(native: str) -> None:
    one = given()
    exact = rope_oracle.exact(one.x, one.weight, [GRID], eps=rope_routes.EPS)
    assert torch.allclose(rope_routes.exact(one), exact, rtol=0, atol=1e-13)
    every = [r for r in rope_routes.routes() if r.name != rope_routes.COMPILED and r.runs_on(CPU)]
    right = set()
    for route in every:
        try:
            out = route.make(one)()
        except RuntimeError as error:
            assert "needs" in str(error), route.name
            continue
        if float((out.double() - exact).abs().max()) < 3e-6:
            right.add(route.name)
    assert rope_routes.COPY not in right
    assert {"wan22", "diffusers", "torch", "rms_norm_rope_ref"} <= right


def test_stock_is_stock() -> None:
    folder = os.environ.get("WAN22_DIR")
    if not folder:
        pytest.skip("WAN22_DIR is not set: no checkout of Wan2.2")
    for dtype in (torch.float32, torch.bfloat16):
        one = given(dtype)
        module: Any = model.import_wan22(Path(folder))
        try:
            norm = module.WanRMSNorm(one.weight.numel(), eps=rope_routes.EPS)
            norm.weight.data = one.weight
            turns = torch.view_as_complex(one.table.unflatten(-1, (-1, 2)).contiguous())
            x = norm(one.x.flatten(2)).view(one.x.shape)
            theirs = module.rope_apply(x, one.grid_sizes, turns).to(dtype)
        finally:
            for name in [n for n in sys.modules if n.startswith(model.ALIAS)]:
                del sys.modules[name]
        stock = rope_routes.routes()[0]
        assert stock.name == rope_routes.STOCK
        assert torch.equal(stock.make(one)(), theirs)


def test_a_small_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, native: str) -> None:
    words = ["bench", "rope", "--device", "cpu", "--rounds", "2", "--size", "64x64"]
    assert main([*words, "--frames", "1,5", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    found = json.loads((tmp_path / "rope.json").read_text())
    assert {row["video"] for row in found["rows"]} == {"64x64x1", "64x64x5"}
    rows = {row["route"]: row for row in found["rows"] if row["video"] == "64x64x5"}
    assert rows[rope_routes.STOCK]["speedup"] == 1.0
    assert rows[rope_routes.COPY]["of_copy"] == 1.0 and rows["copy"]["max_error"] is None
    assert rows[rope_routes.STOCK]["shape"] == "1x8x24x128"
    best = native_rope.chosen(CPU)
    assert best is not None and rows[best]["max_error"] <= rows["wan22"]["max_error"] * 1.01
    assert rows[best]["ours"] and not rows["torch"]["ours"]
    if rows[best]["extra_mib"] is not None:
        assert rows[best]["extra_mib"] <= 0.1 * rows["wan22"]["extra_mib"]
    refused = {s["what"]: s["reason"] for s in found["skipped"]}
    assert all(why.startswith("needs ") for why in refused.values()), refused
    of_cpu = {row.name for row in rope_kernels() if row.device == "cpu"}
    assert set(refused) | set(rows) >= of_cpu
    assert "x wan22" in said.out and rope_routes.COMPILED not in rows


def test_only_what_is_asked(native: str) -> None:
    assert [r.name for r in rope.chosen(["diffusers"])] == [rope_routes.STOCK, "diffusers"]
    assert rope_routes.COMPILED in {r.name for r in rope.chosen([rope_routes.COMPILED])}


def test_the_picture(tmp_path: Path, native: str) -> None:
    pytest.importorskip("matplotlib")
    options = rope.Options(
        CPU, model.ARCHS["ti2v-5b"], (Video(64, 64, 1),), (torch.bfloat16,), rounds=2
    )
    report = rope.run(options)
    (path,) = plots.draw(report, tmp_path / "rope")
    assert "stock Wan2.2" in path.read_text()


def test_a_step_with_and_without(native: str) -> None:
    """Both routes of `bench step` make the same video; one of them by the fused pass."""
    pytest.importorskip("diffusers")
    arch, is_reduced = step.default_arch("ti2v-5b", CPU, full=False)
    video = Video(64, 64, 1)
    options = step.Options(CPU, arch, 1, (video,), (torch.float32,), is_reduced=is_reduced)
    stack: Any = step.make_stack(options, torch.float32)
    stack.show(video, 1, (1.0,))
    calls: list[str] = []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append("rope")
        return real(*args, **kwargs)

    real = _rope.rms_norm_rope
    outs = []
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rope, "rms_norm_rope", count)
        for route in (r for r in step.routes(CPU) if r.name in ("sdpa", step.ROPE)):
            calls.clear()
            stack.use(route.attend, rope=route.rope)
            outs.append(stack.model(*stack.inputs, return_dict=False)[0])
            assert bool(calls) == (route.name == step.ROPE)
    assert torch.allclose(outs[0], outs[1], rtol=1e-3, atol=1e-3)
