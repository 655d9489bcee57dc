# SPDX-License-Identifier: Apache-2.0
"""test_tune_sm90.py - the tools for the first hour on a Hopper card, as far as they run without
one: the choice among instances with a stand-in for the timer, launches with a driver that only
records what it is asked for, the check with the emulator as its GPU."""

from __future__ import annotations

import ctypes
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import hopper_check, hopper_device, tune_sm90
from benchmarks.tune_sm90 import Call, candidates, choose, tune
from emu import compile as compilers
from emu.build import compiler
from emu.rows_sm90 import TileSm90, tile_for
from emu.run_sm90 import run_sm90

ROW = "sdpa_sm90_bf16_d128"
LONG = Call(ROW, False, 27280, 27280)
SPARE = next(t for t in tune_sm90.instances() if t.symbol == ROW and t.use == "SPARE")


def timer(factors: dict[str, float]) -> tune_sm90.Timer:
    """A card of 600 TFLOP/s with noise, on which some instances are slower or faster."""
    dice = random.Random(1)
    return lambda tile, call: (
        call.flop(tile.head_dim) / 600e12 * factors.get(tile.name, 1.0) * dice.uniform(1.0, 1.004)
    )


def test_the_fastest_instance_is_chosen() -> None:
    table = tune([LONG], timer({SPARE.name: 0.9}), "stand-in")
    [entry] = table["entries"]
    assert entry["tile"] == SPARE.name and 0.1 < entry["gain"] < 0.13
    assert 590 < entry["tflops"][entry["default"]] <= 600
    assert json.loads(json.dumps(table)) == table


def test_the_lists_own_order_decides_between_equals() -> None:
    [entry] = tune([LONG], timer({SPARE.name: 0.995}), "stand-in")["entries"]
    assert entry["tile"] == entry["default"] and entry["gain"] == 0.0


def test_every_candidate_answers_the_call() -> None:
    for call in tune_sm90.wan_calls("bf16") + tune_sm90.wan_calls("f16"):
        found = candidates(call)
        default = tile_for(call.row, is_masked=call.is_masked, seqlen_q=call.seqlen_q)
        assert found[0] == default and len(set(found)) == len(found)
        assert all(t.symbol == call.row and (call.is_masked or t.use != "MASKED") for t in found)


def test_rounds_take_turns() -> None:
    seen: list[str] = []

    def recording(tile: TileSm90, call: Call) -> float:
        seen.append(tile.name)
        return 1.0

    times = tune_sm90.measure(LONG, recording, rounds=3)
    names = [t.name for t in candidates(LONG)]
    assert seen == names + names[::-1] + names + names[::-1]
    assert all(len(x) == 3 for x in times.values())


def test_choose_takes_the_nearest_entry() -> None:
    calls = [LONG, Call(ROW, False, 27280, 512)]
    table = tune(calls, timer({SPARE.name: 0.9}), "stand-in")
    table["entries"][1]["tile"] = candidates(LONG)[0].name
    default = tile_for(ROW, is_masked=False, seqlen_q=32760)

    def chosen(seqlen_q: int, seqlen_k: int, is_masked: bool = False) -> TileSm90:
        return choose(table, ROW, is_masked=is_masked, seqlen_q=seqlen_q, seqlen_k=seqlen_k)

    assert chosen(32760, 32760) == SPARE
    assert chosen(32760, 400) == default
    assert chosen(1000, 1000) == tile_for(ROW, is_masked=False, seqlen_q=1000)  # nothing near
    assert chosen(27280, 27280, is_masked=True).use == "MASKED"
    assert choose(None, ROW, is_masked=False, seqlen_q=9, seqlen_k=9).cluster == 1
    table["entries"][0]["tile"] = "an instance of another list"
    assert chosen(27280, 27280) == default
    with pytest.raises(ValueError, match="version"):
        choose({"version": 0}, ROW, is_masked=False, seqlen_q=9, seqlen_k=9)


def test_without_a_hopper_card_it_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune_sm90"])
    assert tune_sm90.main() == 1
    assert "torch sees no CUDA device" in capsys.readouterr().out


class Recorder:
    """A driver that succeeds and remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append((name, *args))
            return 0

        return call


@pytest.mark.skipif(not (compilers.nvcc() or compilers.nvrtcs()), reason="no CUDA compiler")
def test_a_launch_follows_the_recipe() -> None:
    tile = tile_for(ROW, is_masked=False, seqlen_q=300)
    query, key = torch.zeros(2, 300, 4, 128).bfloat16(), torch.zeros(2, 70, 2, 128).bfloat16()
    driver = Recorder()
    device = hopper_device.Device(driver)
    args = device.arguments(tile, (query, key, key, query, None))
    device.launch(tile, args, 0)
    maps = [call for call in driver.calls if call[0] == "cuTensorMapEncodeTiled"]
    assert [list(call[7]) for call in maps] == [
        *([64, 128, 1, 1], [64, 88, 1, 1], [64, 88, 1, 1], [64, 64, 1, 1])
    ]
    assert list(maps[1][5]) == [128, 70, 2, 2] and list(maps[1][6]) == [512, 256, 70 * 512]
    assert all(call[1].value % 64 == 0 and call[2] == 9 for call in maps)
    launch = driver.calls[-1]
    assert launch[0] == "cuLaunchKernel"
    # 300 rows are three blocks and a surplus one.
    assert [x.value for x in launch[2:9]] == [4 * 4 * 2, 1, 1, 384, 1, 1, tile.smem_bytes]
    assert launch[10][0] == ctypes.addressof(args)
    [attribute] = [call for call in driver.calls if call[0] == "cuFuncSetAttribute"]
    assert attribute[2:] == (8, tile.smem_bytes)


def test_an_error_of_the_driver_is_named() -> None:
    class Refusing(Recorder):
        def cuTensorMapEncodeTiled(self, *args: Any) -> int:
            return 1

    device = hopper_device.Device(Refusing())
    tile = tile_for(ROW, is_masked=False, seqlen_q=300)
    x = torch.zeros(1, 8, 1, 128).bfloat16()
    with pytest.raises(hopper_device.DriverError, match="cuTensorMapEncodeTiled: unknown .1."):
        device.arguments(tile, (x, x, x, x, None))


class Emulated:
    """The emulator, as hopper_check sees a device; `factor` spoils what it returns."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def run(self, tile: TileSm90, *operands: torch.Tensor, **call: Any) -> Any:
        result = run_sm90(tile, *operands, **call)
        return result.out * self.factor, result.lse


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)")
def test_the_check_of_the_first_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = tile_for("sdpa_sm90_bf16_d64", is_masked=False, seqlen_q=300)
    some = [*hopper_check.cases_sm90.by_hand(tile)][::9]
    monkeypatch.setattr(hopper_check.cases_sm90, "by_hand", lambda tile: some)

    def found(device: Emulated) -> list[str]:
        return [
            *hopper_check.failures(tile, hopper_check.Runner(device, "cpu"), chances=2),
            *hopper_check.long_failures(tile, device, "cpu", shapes=((200, 300),)),
        ]

    assert found(Emulated()) == []
    wrong = found(Emulated(1.02))
    assert len(wrong) >= len(some) and "200x300: error" in wrong[-1]


def test_a_view_keeps_its_surroundings_when_it_is_moved() -> None:
    around = torch.arange(120.0).view(2, 5, 3, 4)
    view = around[1:, 1:4, :2, 1:]
    there = hopper_check.moved(view, "cpu")
    assert there is not None and torch.equal(there, view)
    assert there.stride() == view.stride() and there.data_ptr() != view.data_ptr()
    assert there.untyped_storage().nbytes() == around.untyped_storage().nbytes()
