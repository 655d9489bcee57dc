# SPDX-License-Identifier: Apache-2.0
"""test_bench_sparse.py - `bench sparse`: its errors are those of an oracle, its heads are of the
kinds that they are called by, and its options are checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import blocks_oracle
from blocks_oracle import Lists
from tolerances import off
from wan_attn.__main__ import main
from wan_attn.bench import sparse, sparse_heads
from wan_attn.sparse.routing import DENSE

GRID = (2, 8, 20)  # 5 blocks of 64 tokens


@pytest.fixture
def head() -> sparse.Head:
    options = sparse.Options(torch.device("cpu"), GRID, (torch.float32,), heads=2, kinds=("mixed",))
    (made,) = sparse.synthetic(options, torch.float32)
    return made


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("in_order", [sparse.RASTER, sparse.MORTON])
def test_errors_are_those_of_the_oracle(head: sparse.Head, in_order: str) -> None:
    judge = sparse.Judge(head, in_order)
    density, rule, error = judge.errors(0.5)
    lists = Lists(judge.routing.mask([0.5, 0.5]).numpy())
    q, k, v = judge.exact
    dense = in_torch(judge.exact)
    found, _ = blocks_oracle.attention(q.numpy(), k.numpy(), v.numpy(), lists, pools_others=True)
    assert judge._rows == [0, 1, 2, 3, 4], "all blocks: the errors are those of whole calls"
    assert rule == pytest.approx(off(torch.from_numpy(found), dense), rel=1e-9)
    assert error == pytest.approx(rule, rel=1e-3) and 0 < density < 1
    all_of_it, nothing, _ = judge.errors(DENSE)
    assert all_of_it == 1.0 and nothing < 1e-12
    whole = sparse.whole_call(head, in_order, 0.5)()
    assert off(whole, in_torch(head.exact)) == pytest.approx(rule, rel=1e-3)


def in_torch(operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in operands)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def test_heads_see_as_many_keys_as_they_are_said_to() -> None:
    found = [
        sparse_heads.effective_keys(*sparse_heads.make(kind, (4, 16, 16))[:2])
        for kind in sparse_heads.KINDS
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 200 and 2 < found[2] < 40 and found[3] < 4


@pytest.mark.usefixtures("native")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "sparse", "--grid", "2x8x20", "--kinds", "mixed", "--taus", "1"]
    arguments += ["--budgets", "0.1", "--rounds", "2", "--dtype", "fp32", "--device", "cpu"]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["order"], row["asked"]) for row in rows] == [
        (order, asked) for order in ("raster", "morton") for asked in ("tau 1", "budget 10 %")
    ]
    assert rows[2]["p50_ms"] > 0 and rows[0]["p50_ms"] is None
    for row in rows[1::2]:
        assert row["tau"] is None or row["error"] < 0.15


@pytest.mark.usefixtures("native")
def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["bench", "sparse", "--grid", "2x8x20", "--taus", "1,0", "--rounds", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "relative error, %" in (tmp_path / "sparse-errors.svg").read_text()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--grid", "2x8", "--grid must be FRAMESxROWSxCOLUMNS, got '2x8'"),
        ("--grid", "0x8x8", "--grid must be FRAMESxROWSxCOLUMNS"),
        ("--kinds", "odd", "--kinds must name some of diffuse, mixed, local, sharp; got 'odd'"),
        ("--taus", "1,x", "--taus must be numbers from -10 to 10, got 'x'"),
        ("--budgets", "2", "--budgets must be numbers from 1e-06 to 1, got '2'"),
        ("--heads", "0", "--heads"),
    ],
)
def test_options_are_checked(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "sparse", option, value]) == 2
    assert said in capsys.readouterr().err
