# SPDX-License-Identifier: Apache-2.0
"""test_comfyui_real.py - ComfyUI's own source from COMFYUI_DIR, its files unedited, on the CPU.

Its Wan transformers, tiny and with random weights: all models, one model by the node, and back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import wan_attn

HERE = Path(__file__).resolve().parent
COMFYUI_DIR = os.environ.get("COMFYUI_DIR")
MISSING = [
    name
    for name in ("einops", "psutil", "safetensors", "transformers")
    if importlib.util.find_spec(name) is None
]

pytestmark = [
    pytest.mark.skipif(not COMFYUI_DIR, reason="COMFYUI_DIR is not set: no ComfyUI to test"),
    pytest.mark.skipif(bool(MISSING), reason=f"ComfyUI needs {', '.join(MISSING)}"),
]

# Beside twice ComfyUI's own pytorch function against its default one.
FLOOR = 1e-6


@pytest.fixture(scope="module")
def saw() -> dict[str, Any]:
    paths = (Path(wan_attn.__file__).parents[1], HERE.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment.pop("WAN_ATTN_COMFYUI", None)
    run = subprocess.run(
        [sys.executable, str(HERE / "comfyui_worker.py"), str(COMFYUI_DIR)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    read: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return read


@pytest.mark.parametrize("kind", ("t2v", "i2v"))
def test_all_models(saw: dict[str, Any], kind: str) -> None:
    assert saw["global"][kind] <= 2 * saw["yardstick"][kind] + FLOOR
    assert saw["without"][kind] > 1e-2, "attention must matter in this model"


def test_restored_bit_for_bit(saw: dict[str, Any]) -> None:
    assert saw["restored"] is True
    # Two layers of self- and cross-attention; image-to-video attends to the image, too.
    assert saw["calls"] == [2 * 2 + 2 * 3, 0, 2 * 2]


def test_one_model_by_the_node(saw: dict[str, Any]) -> None:
    assert saw["node"] <= 2 * saw["yardstick"]["t2v"] + FLOOR
    assert {"wan_attn", "pytorch", "sub_quad", "split"} <= set(saw["backends"])
    if saw["default"] == "attention_sub_quad":
        assert saw["sub_quad"] == 0.0, "ComfyUI's own function, chosen by the node"


def test_a_mask_and_the_words_at_start(saw: dict[str, Any]) -> None:
    assert saw["mask"] == 0.0
    assert "Using wan_attn attention\n" in saw["said"]


def test_a_run_in_8_bits(saw: dict[str, Any]) -> None:
    """Its Wan model tells step and layer."""
    own = [layer for layer in saw["in 8 bits"] if layer["kind"] == "self"]
    assert [layer["layer"] for layer in own] == [0, 1, 2, 3]
    assert [layer["lossy_calls"] for layer in own] == [0, 6, 6, 0]
    assert all(layer["lossy_calls"] + layer["exact_calls"] == 10 for layer in own)
    assert all(0 < layer["largest_error"] <= 0.02 for layer in own[1:3])
    assert saw["its call is torch's"]
