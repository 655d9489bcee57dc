# SPDX-License-Identifier: Apache-2.0
"""user.py - a user's process on a machine with a mock card, for tests of the proof: what it would
run, and children that find what the test says."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wan_attn
from cuda_mock import prove
from cuda_mock.backward import BackwardGpu
from cuda_mock.gpu import CARDS, IMAGE
from tolerances import assert_close_to_oracle
from wan_attn import config
from wan_attn.backends import native
from wan_attn.cuda import images
from wan_attn.native import cuda_driver, kernels, library
from wan_attn.request import Request
from wan_attn.selection import run
from wan_attn.selfcheck import child, proof, verdicts
from wan_attn.selfcheck.verdicts import FAILED, PASSED, Verdict

BF16, F16 = torch.bfloat16, torch.float16
PROGRAM = Path(prove.__file__)
CUDA = torch.device("cuda", 0)
ROWS = [f"sdpa_sm80_d{d}/{dtype}" for d in (64, 80, 128, 256) for dtype in ("fp16", "bf16")]
LISTED_ROWS = [f"sdpa_sm80_listed_d{d}/{dtype}" for d in (64, 128) for dtype in ("fp16", "bf16")]
QK8_ROWS = [
    f"sdpa_sm80_{kind}_d{d}/{dtype}"
    for kind in ("qk8", "qk8_listed")
    for d in (64, 128)
    for dtype in ("fp16", "bf16")
]
BACKWARD_ROWS = [
    f"sdpa_backward_sm80_d{d}/{dtype}" for d in (64, 80, 128) for dtype in ("fp16", "bf16")
]
ROPE_ROWS = [
    f"rms_norm_rope_{row}/{dtype}"
    for row in ("sm75", "any_sm75")
    for dtype in ("fp32", "fp16", "bf16")
]


class Machine:
    """A user's process on a machine with this card, and what its proofs will find."""

    def __init__(self, gpu: BackwardGpu, monkeypatch: pytest.MonkeyPatch, arch: int = 80) -> None:
        self.gpu, self.arch = gpu, arch
        self.faults: dict[str, str] = {}
        self.children: list[list[str]] = []
        self.limits = proof.Limits(row=120, start=240, whole=900)
        monkeypatch.setattr(proof, "make_command", self._command)
        monkeypatch.setattr(proof, "LIMITS", self.limits)

    def _command(self, words: list[str]) -> list[str]:
        self.children.append(words)
        path = json.dumps(sys.path)
        return [sys.executable, str(PROGRAM), path, str(self.arch), json.dumps(self.faults), *words]

    def restart(self) -> None:
        """The user starts another process."""
        self.children.clear()
        config.forget()

    def select(self, head_dim: int = 64, dtype: torch.dtype = BF16) -> str:
        """The row that a call would get, or why none."""
        call = Request(1, 8, 8, 1, 1, head_dim, dtype, dtype, dtype, CUDA)
        kernel, reasons = kernels.select(call)
        return reasons if kernel is None else kernel.name

    def keep(self, **rows: str) -> Verdict:
        """There is a verdict on disk: passed, but for these (sdpa_sm80_d64__bf16="failed")."""
        key = verdicts.key_of(0)
        assert isinstance(key, verdicts.Key)
        verdict = Verdict(key)
        verdict.put(ROWS, PASSED)
        for name, state in rows.items():
            verdict.put([name.replace("__", "/")], state, "wrong" if state == FAILED else "")
        verdicts.write(verdict)
        return verdict


@pytest.fixture(name="machine")
def machine_fixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_settings: None
) -> Iterator[Machine]:
    gpu = BackwardGpu(tmp_path, CARDS[80])
    monkeypatch.setattr(library, "load", lambda: gpu.lib)
    monkeypatch.setattr(library, "lib", lambda: gpu.lib)
    monkeypatch.setattr(cuda_driver, "_path", gpu.driver._name)
    monkeypatch.setattr(cuda_driver, "_images", {})
    monkeypatch.setattr(images, "image", lambda kernel, arch: IMAGE + kernel.encode())
    monkeypatch.setenv("WAN_ATTN_CACHE_DIR", str(tmp_path / "cache"))
    config.forget()
    yield Machine(gpu, monkeypatch)
    monkeypatch.undo()
    config.forget()


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture(name="spoken")
def spoken_fixture(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="wan_attn"):
        yield caplog


def user_calls(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, head_dim: int, dtype: torch.dtype
) -> bool:
    """A call through the whole selection, right whoever computes it; whether ours did. Tensors lie
    in ordinary memory and are said to be on the card."""
    card, ran = prove.MockCard(0, machine.gpu), []
    real = Request.from_tensors

    def from_tensors(*operands: Any) -> Request:
        return replace(real(*operands), device=CUDA)

    def op(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Any:
        assert set(options) >= {"is_causal"}
        ran.append(True)
        return card.gpu.sdpa(query, key, value)

    query, key, value = torch.randn(3, 1, 70, 2, head_dim).to(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(Request, "from_tensors", staticmethod(from_tensors))
        patch.setattr(native, "_op", op)
        run._plans.clear()
        out = wan_attn.sdpa(query, key, value)
        run._plans.clear()
    assert isinstance(out, Tensor)
    assert_close_to_oracle(out, query, key, value)
    return bool(ran)


FAKE = """
import json, os, sys, time
path, names, code = sys.argv[1:4]
def say(**words): print({mark!r} + json.dumps(words), flush=True)
def put(**rows):
    old = dict.fromkeys(json.loads(names))
    if os.path.exists(path):
        old = json.load(open(path))["rows"]
    new = {{name: rows.get(name.split("/")[0].split("_")[-1], old[name]) for name in old}}
    def row(x):
        return x if isinstance(x, dict) else dict(state=x or "untried", said="", seconds=0, at=1)
    text = json.dumps(dict(schema=1, key=json.loads(sys.argv[4]), skipped=[],
                           rows={{name: row(x) for name, x in new.items()}}))
    open(path + ".new", "w").write(text)
    os.replace(path + ".new", path)
exec(code)
"""
FAKE = FAKE.format(mark=child.MARK)
ALL = "put(d64='passed', d80='passed', d128='passed', d256='passed'); say(end=True)"


@pytest.fixture(name="quick")
def quick_fixture(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Children that do what `code` says, without torch: they are there at once."""

    def as_if(code: str, **limits: float) -> Machine:
        key = verdicts.key_of(0)
        assert isinstance(key, verdicts.Key)

        def command(words: list[str]) -> list[str]:
            machine.children.append(words)
            about = json.dumps(asdict(key))
            path = str(verdicts.path_of(key))
            return [sys.executable, "-c", FAKE, path, json.dumps(ROWS), code, about]

        monkeypatch.setattr(proof, "make_command", command)
        monkeypatch.setattr(proof, "LIMITS", replace(machine.limits, **limits))
        return machine

    return as_if
