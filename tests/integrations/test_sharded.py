# SPDX-License-Identifier: Apache-2.0
"""test_sharded.py - DDP, FSDP and FSDP2 around models that wan_attn is switched on in, on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import wan_attn

pytest.importorskip("diffusers", reason="needs the packages of the extra `demo`")
pytest.importorskip("transformers", reason="needs the packages of the extra `demo`")

HERE = Path(__file__).resolve().parent
PATHS = (Path(wan_attn.__file__).parent.parent, HERE.parent / "support", HERE)
MODELS, WRAPPERS = {"diffusers": 4, "backend": 4, "transformers": 2}, ("DDP", "FSDP", "FSDP2")


@pytest.mark.parametrize(
    ("processes", "models"), [(1, ["transformers"]), (2, list(MODELS))], ids=["one", "two"]
)
def test_output_and_gradient_are_those_of_the_plain_model(
    processes: int, models: list[str], tmp_path: Path
) -> None:
    """Every process computes the same samples, so that the mean of their gradients is each one."""
    words = [sys.executable, "-W", "ignore", str(HERE / "sharded_worker.py"), ",".join(models)]
    running = [
        subprocess.Popen(
            [*words, str(rank), str(processes), str(tmp_path / "meet")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in running:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        lines = [line.split()[1:] for line in out.splitlines() if line.startswith("found ")]
        assert [tuple(line[:2]) for line in lines] == [(m, w) for m in models for w in WRAPPERS]
        for model, _, *differences, count, after in lines:
            assert all(float(x) <= 1e-4 for x in differences), lines
            assert int(count) == 2 * MODELS[model] and int(after) == 0, lines
