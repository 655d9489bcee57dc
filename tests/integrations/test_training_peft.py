# SPDX-License-Identifier: Apache-2.0
"""test_training_peft.py - test_training.py's models with adapters by peft itself, where it is
installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("diffusers", reason="needs the packages of the extra `demo`")
pytest.importorskip("transformers", reason="needs the packages of the extra `demo`")

import test_training  # noqa: E402 - imports diffusers and transformers
from test_training import STEPS, registered  # noqa: E402, F401 - a fixture

from wan_attn.native import backward  # noqa: E402


def with_peft(model: Any, names: tuple[str, ...]) -> list[Any]:
    """In place of test_training.with_adapters()."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(names), lora_dropout=0.0)
    peft.inject_adapter_in_model(config, model)
    learnt = [x for x in model.parameters() if x.requires_grad]
    assert learnt and all("lora_" in n for n, x in model.named_parameters() if x.requires_grad)
    return learnt


@pytest.mark.usefixtures("registered", "native")
@pytest.mark.parametrize("make", (test_training.wan, test_training.qwen), ids=lambda f: f.__name__)
def test_pefts_lora_learns_what_it_learns_with_torch_and_resumes_with_the_same_bits(
    make: Callable[[bool], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    monkeypatch.setattr(test_training, "with_adapters", with_peft)
    torchs = make(False).run(0, STEPS)
    vars(backward._here).clear()
    ours = make(True)
    losses = ours.run(0, STEPS // 2)
    assert backward.last_kernel() is not None, "the gradients are not ours"
    ours.save(tmp_path / "half")
    losses += ours.run(STEPS // 2, STEPS)
    assert losses[-1] < 0.97 * losses[0], "nothing is learnt"
    off = max(abs(a / b - 1.0) for a, b in zip(losses, torchs, strict=True))
    record_property("summary", f"losses {losses[0]:.3f} to {losses[-1]:.3f}, off by {off:.1e}")
    torch.testing.assert_close(losses, torchs, rtol=1e-5, atol=0.0)
    resumed = make(True)
    resumed.load(tmp_path / "half")
    assert resumed.run(STEPS // 2, STEPS) == losses[STEPS // 2 :]
