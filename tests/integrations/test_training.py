# SPDX-License-Identifier: Apache-2.0
"""test_training.py - LoRA of a tiny Wan transformer (diffusers) and of a tiny Qwen with padding
(transformers), on our kernels' gradients and on torch's: the same losses; resumed, the same bits.

The adapters are written out here: a pair of small matrices beside a frozen linear layer, as peft
makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_attn import log
from wan_attn.integrations import diffusers as wan_diffusers
from wan_attn.integrations import transformers as wan_transformers
from wan_attn.native import backward

pytest.importorskip("diffusers", reason="needs the packages of the extra `demo`")
pytest.importorskip("transformers", reason="needs the packages of the extra `demo`")


import diffusers_models  # noqa: E402 - imports diffusers
import transformers_models  # noqa: E402 - imports transformers

STEPS = 50


class Adapter(nn.Module):
    """A frozen linear layer, and what is learnt beside it."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) + x @ self.down.T @ self.up.T
        return result


def with_adapters(model: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
    """Puts adapters in front of and behind attention; the parameters that are learnt."""
    torch.manual_seed(1)
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Adapter(module))
    learnt = [x for x in model.parameters() if x.requires_grad]
    assert learnt
    return learnt


class Training:
    """A model, what is learnt, and its optimizer; step(n) gives the loss of step n."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], loss: Callable[[int], Tensor]):
        self.learnt, self.loss = with_adapters(model, names), loss
        self.optimizer = torch.optim.AdamW(self.learnt, lr=5e-3)

    def run(self, first: int, last: int) -> list[float]:
        losses = []
        for n in range(first, last):
            loss = self.loss(n)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def save(self, file: Path) -> None:
        torch.save({"learnt": self.learnt, "optimizer": self.optimizer.state_dict()}, file)

    def load(self, file: Path) -> None:
        saved = torch.load(file, weights_only=False)
        with torch.no_grad():
            for x, y in zip(self.learnt, saved["learnt"], strict=True):
                x.copy_(y)
        self.optimizer.load_state_dict(saved["optimizer"])


def wan(is_ours: bool) -> Training:
    torch.manual_seed(0)
    model, inputs = diffusers_models._text()
    if is_ours:
        wan_diffusers.enable(model)
    target = torch.randn(inputs["hidden_states"].shape)

    def loss(n: int) -> Tensor:
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(n))
        given = inputs | {"hidden_states": 0.5 * target + 0.5 * noise}
        return F.mse_loss(model(**given, return_dict=False)[0], noise - target)

    return Training(model, ("to_q", "to_k", "to_v"), loss)


def qwen(is_ours: bool) -> Training:
    torch.manual_seed(0)
    name = "wan_attn" if is_ours else "sdpa"
    model = transformers_models.make_language_model("qwen2", name).train()
    ids = torch.randint(3, 20, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, 33:] = mask[2, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)

    def loss(n: int) -> Tensor:
        result: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return result

    return Training(model, ("q_proj", "k_proj", "v_proj", "o_proj"), loss)


@pytest.fixture
def registered() -> Iterator[None]:
    wan_transformers.register()
    yield
    wan_transformers.unregister()
    log.disable("diffusers")


@pytest.mark.usefixtures("registered", "native")
@pytest.mark.parametrize("make", (wan, qwen), ids=lambda f: f.__name__)
def test_lora_learns_what_it_learns_with_torch_and_resumes_with_the_same_bits(
    make: Callable[[bool], Training], tmp_path: Path
) -> None:
    torchs = make(False).run(0, STEPS)
    vars(backward._here).clear()
    ours: Any = make(True)
    losses = ours.run(0, STEPS // 2)
    assert backward.last_kernel() is not None, "the gradients are not ours"
    ours.save(tmp_path / "half")
    losses += ours.run(STEPS // 2, STEPS)
    assert losses[-1] < 0.97 * losses[0], "nothing is learnt"
    torch.testing.assert_close(losses, torchs, rtol=1e-5, atol=0.0)
    resumed = make(True)
    resumed.load(tmp_path / "half")
    assert resumed.run(STEPS // 2, STEPS) == losses[STEPS // 2 :]
