# SPDX-License-Identifier: Apache-2.0
"""test_wan22_real.py - stock Wan2.2 from WAN22_DIR, its files unedited, on the CPU.

Each test reads what wan22_worker.py saw in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wan22_harness
import wan22_models

import wan_attn

HERE = Path(__file__).resolve().parent
PYTHONPATH = os.pathsep.join(
    str(path) for path in (Path(wan_attn.__file__).parent.parent, HERE.parent / "support", HERE)
)
WAN22_DIR = os.environ.get("WAN22_DIR")

pytestmark = [
    pytest.mark.skipif(not WAN22_DIR, reason="WAN22_DIR is not set: no checkout of Wan2.2 to test"),
    pytest.mark.skipif(
        bool(wan22_harness.missing()), reason=f"Wan2.2 needs {', '.join(wan22_harness.missing())}"
    ),
]

BF16_ROWS = ("sdpa_avx512_bf16", "sdpa_amx")
# Beside twice torch's error: what remains where torch happens to be exact.
FLOOR_OF_LARGEST = 1e-6
# An output that depends on attention changes far more than by rounding when attention is gone.
MATTERS = 20


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "wan22_worker.py"), *arguments],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], result: Path) -> dict[str, Any]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-5000:]
    read: dict[str, Any] = json.loads(result.read_text())
    return read


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What the worker saw in a task; each task runs once."""
    folder = tmp_path_factory.mktemp("wan22")
    done: dict[str, dict[str, Any] | AssertionError] = {}

    def get(task: str) -> dict[str, Any]:
        if task not in done:
            result = folder / f"{task}.json"
            try:
                done[task] = finish(start(task, str(result)), result)
            except AssertionError as error:
                done[task] = error  # the next test that asks need not wait for the same
        seen = done[task]
        if isinstance(seen, AssertionError):
            raise seen
        return seen

    return get


def assert_all_ours_then_stock(seen: dict[str, Any]) -> None:
    assert len(seen["patched"]) == 10
    for name, module in seen["patched"].items():
        assert module.startswith("wan_attn."), f"{name} is {module}'s"
    for name, module in seen["unpatched"].items():
        stock = "wan.modules.attention" if name.endswith("flash_attention") else "None"
        assert module == stock or module.startswith("flash_attn"), f"{name} is {module}'s"


def test_bindings_patch_first(saw: Callable[..., Any]) -> None:
    seen = saw("patch_first")
    assert seen["pending"] == 10
    assert_all_ours_then_stock(seen)
    assert seen["report"].startswith("wan_attn: 10 of 10 names patched")


def test_bindings_import_first(saw: Callable[..., Any]) -> None:
    seen = saw("import_first")
    assert_all_ours_then_stock(seen)
    assert len(seen["restored"]) == 10


def test_nothing_pretends_to_be_flash_attn(saw: Callable[..., Any]) -> None:
    """utils/prompt_extend.py asks for flash_attn, and would then ask transformers for it."""
    seen = saw("patch_first")
    if not seen["fake flash_attn"]:
        assert seen["FLASH_VER"] is None


def assert_close(seen: dict[str, Any]) -> None:
    floor = FLOOR_OF_LARGEST * seen["largest"]
    for kind in ("max", "rms"):
        ours, torchs, none = (seen[title][kind] for title in ("ours", "torch", "nothing"))
        assert none > MATTERS * torchs, "the output must depend on attention"
        assert ours <= 2 * torchs + floor, f"{kind}: {ours:.2e}, torch's own {torchs:.2e}"


@pytest.mark.parametrize("piece", [*wan22_models.PIECES, "in float32"])
def test_models_are_as_exact_as_torch_times_two(saw: Callable[..., Any], piece: str) -> None:
    assert_close(saw("patch_first")["pieces"][piece])


@pytest.mark.parametrize(
    ("piece", "calls"),
    [
        ("wan_model_as_shipped", 4),
        ("clip", 2),
        ("clip_pool", 1),
        ("s2v", 6),
        ("s2v_motioner", 7),
        ("animate", 16),
    ],
)
def test_the_models_called_attention_as_expected(
    saw: Callable[..., Any], piece: str, calls: int
) -> None:
    """So that a piece cannot pass by calling nothing."""
    seen = saw("patch_first")["pieces"][piece]["calls"]
    assert len(seen) == calls, seen
    if piece == "wan_model_as_shipped":
        assert seen[0] == (
            "[2, 80, 2, 128] [2, 80, 2, 128] torch.float32 torch.float32 torch.bfloat16 [72, 30]"
        )


def two_ranks(task: str, folder: Path) -> list[dict[str, Any]]:
    """What each of two processes saw in a task."""
    results = [folder / f"{rank}.json" for rank in range(2)]
    meeting = str(folder / "rendezvous")
    ranks = [start(task, str(result), str(n), meeting) for n, result in enumerate(results)]
    return [finish(process, result) for process, result in zip(ranks, results, strict=True)]


def test_sequence_parallel_in_two_processes(tmp_path: Path) -> None:
    for rank in two_ranks("ulysses", tmp_path):
        pieces = rank["pieces"]
        seen = pieces["ulysses"]
        assert_close(seen)
        assert_close(pieces["s2v_ulysses"])
        assert seen["calls"][0].startswith("[2, 80, 1, 128] [2, 80, 1, 128]"), "one head per rank"
        assert seen["calls"][0].endswith("[72, 30]")


def test_norm_and_rotation_are_ours_and_go_back(saw: Callable[..., Any]) -> None:
    seen = saw("rope")
    assert len(seen["report"]) == 12
    assert sum(line.endswith(": wan_attn") for line in seen["report"]) == 11, seen["report"]
    for name, count in seen["ops"].items():
        assert count > 0, f"{name} called nothing of ours"
        # Wan2.2 computes attention of float32 tensors in bfloat16. A row with products of bfloat16
        # rounds q and k to that, so that their last bit is one of 8; others read them as they are.
        is_rounded = name != "wan_model_float32" or seen["rows"][name] in BF16_ROWS
        bound = 2.0**-7 if is_rounded else 1e-4
        assert seen["changed"][name]["max"] <= bound * seen["largest"][name], name
    assert seen["same afterwards"] == list(seen["ops"])


def test_a_stock_block_is_one_graph(saw: Callable[..., Any]) -> None:
    assert saw("rope")["compiled"]["max"] == 0.0


def test_compiled_blocks(saw: Callable[..., Any]) -> None:
    seen = saw("import_first")["compiled"]
    for block in ("model.WanAttentionBlock", "s2v.model_s2v.WanS2VAttentionBlock"):
        assert f"wan.modules.{block}: on" in seen["before"]
        assert f"wan.modules.{block}: on" in seen["after"], seen["lines"]
    assert seen["lines"].count("[Attention] torch.compile enabled for optimization") == 1
    assert seen["error"]["max"] < 0.02 * seen["largest"]


def test_stock_generate_runs_unchanged(tmp_path: Path) -> None:
    """generate.py up to its own --help: everything imported, everything patched."""
    assert WAN22_DIR
    program = (
        "import atexit, sys, wan22_harness\n"
        "wan22_harness.prepare()\n"
        "from wan_attn.integrations import wan22\n"
        "atexit.register(lambda: print(wan22.report()))\n"
        "from wan_attn.__main__ import main\n"
        "sys.exit(main(['run', sys.argv[1], '--help']))\n"
    )
    script = str(Path(WAN22_DIR) / "generate.py")
    done = subprocess.run(
        [sys.executable, "-c", program, script],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("usage: generate.py") and "--ckpt_dir" in done.stdout
    assert "wan_attn: 10 of 10 names patched in `wan`" in done.stdout


def test_copies_and_trainers(tmp_path: Path) -> None:
    """Copies, Wan2.2's own FSDP, DDP and both kinds of checkpointing, around the patched model."""
    result = tmp_path / "wrapped.json"
    found = finish(start("wrapped", str(result), "0", str(tmp_path / "meet")), result)
    assert found.keys() == {
        *("deepcopy", "torch.save", "FSDP", "DDP", "checkpoint False", "checkpoint True"),
    }
    # Reentrant checkpointing runs forward without a gradient, which is our kernels' business, and
    # PyTorch's for the gradient: their outputs differ by bfloat16's rounding.
    bounds = dict.fromkeys(found, 1e-5) | {"checkpoint True": 2.0**-7}
    assert {title: x for title, x in found.items() if not x <= bounds[title]} == {}


def assert_a_denoise_in_8_bits(seen: dict[str, Any]) -> None:
    """Steps, layers and both experts are told; the error of each layer is known and in the
    budget."""
    for mode, layers in seen["modes"].items():
        assert 0 < seen["off"][mode] < 0.05, mode
        own = [layer for layer in layers if layer["kind"] == "self"]
        assert [(x["expert"], x["layer"]) for x in own] == [
            (e, n) for e in (0, 1) for n in range(4)
        ]
        for layer in own:
            assert layer["events"] == []
            assert layer["lossy_calls"] + layer["exact_calls"] == 10
            # 3 of the 5 steps of each expert, twice.
            assert layer["lossy_calls"] == (6 if layer["layer"] in (1, 2) else 0)
            if layer["lossy_calls"]:
                assert 0 < layer["largest_error"] <= 0.02
        # 10 calls of self-attention and of attention to the text in each layer, those to the text
        # in bfloat16; 2 x 2 layers have 6 in 8 bits.
        dense = seen["dense"][mode]
        assert [sum(one["lossy"] is kind for one in dense) for kind in (True, False)] == [24, 136]
        for one in dense:
            assert 0 < max(one["heads"]) <= (0.02 if one["lossy"] else 2.0**-8), one
    assert seen["exact again"] and seen["restored"]


def test_a_denoise_in_8_bits(saw: Callable[..., Any]) -> None:
    """Every fault is caught, and what it leaves has the exact run's bits."""
    seen = saw("precision")
    assert_a_denoise_in_8_bits(seen)
    assert seen["faults"]["same"] and seen["faults"]["planted"] == 4
    assert len(seen["faults"]["events"]) == 4


def test_a_denoise_in_8_bits_on_two_ranks(tmp_path: Path) -> None:
    """A fault on one rank is that rank's alone: each has heads of its own, and nobody waits."""
    ranks = two_ranks("ulysses_precision", tmp_path)
    for rank, seen in enumerate(ranks):
        assert_a_denoise_in_8_bits(seen)
        faults = seen["faults"]
        assert 0 < faults["off"] < 0.05
        assert faults["planted"] == len(faults["events"]) == (4 if rank == 0 else 0)
        assert faults["lossy"] == (0 if rank == 0 else 24)
