# SPDX-License-Identifier: Apache-2.0
"""prove.py - the child process of a proof on the mock GPU: the real program (proof_child.main), the
real library and its launches, and a card whose kernels are right, wrong or deadly as the test says.

    python prove.py PATHS ARCH FAULTS INDEX DIGEST

PATHS is sys.path as JSON, FAULTS is {"sdpa_sm80_bf16_d64": "illegal address"}, for example. A row
that is not named is computed in float32 by a CPU kernel; the emulator would take minutes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv.pop(1))

import torch
from torch import Tensor

from cuda_mock.backward import BackwardGpu
from cuda_mock.gpu import CARDS, LAUNCH
from wan_attn.native import bindings, cuda_driver, library
from wan_attn.native.kernels import KernelInfo
from wan_attn.request import Blocks
from wan_attn.request.blocks import DENSE
from wan_attn.selfcheck import backward_calls, proof_child
from wan_attn.selfcheck.proof_calls import CALLS, Answer, Operands
from wan_attn.selfcheck.reference import MASKS, Case

# What the driver answers from the launch on, for good: so does a real one, once a context is lost.
DRIVER_ERRORS = {"illegal address": 700, "launch timeout": 702, "context lost": 709}
OUT_OF_MEMORY = 2
ON_DEVICE = {(call.seqlen_q, call.seqlen_k) for call in CALLS if call.lens_on_device}
GRADIENTS_ON_DEVICE = {
    (call.seqlen_q, call.seqlen_k) for call in backward_calls.CALLS if call.lens_on_device
}


class MockCard(proof_child.TableCard):
    """The mock GPU as a proof sees it. Operands lie in ordinary memory."""

    def __init__(self, index: int, gpu: BackwardGpu, faults: dict[str, str] | None = None) -> None:
        super().__init__(index)
        self.gpu, self.faults = gpu, faults
        self.skipped = ["CUDA graphs: the mock GPU has none"]
        self.asked: set[str] = set()
        self._now: dict[str, Any] = {}
        self._error = self._calls = 0
        if faults is not None:
            self._keep = LAUNCH(self._launch)
            gpu.driver.mock_on_launch(self._keep)

    def rows(self) -> list[KernelInfo]:
        absent = [name for name, fault in (self.faults or {}).items() if fault == "absent"]
        return [row for row in super().rows() if row.name not in absent]

    def backward_rows(self) -> list[KernelInfo]:
        absent = [name for name, fault in (self.faults or {}).items() if fault == "absent"]
        return [row for row in super().backward_rows() if row.name not in absent]

    def rope_rows(self) -> list[KernelInfo]:
        absent = [name for name, fault in (self.faults or {}).items() if fault == "absent"]
        return [row for row in super().rope_rows() if row.name not in absent]

    def device(self) -> torch.device:
        return torch.device("cpu")

    def captured(self, attend: Callable[[], Answer]) -> None:
        return None

    def run(
        self,
        row: KernelInfo,
        operands: Operands,
        q_lens: Tensor | None,
        k_lens: Tensor,
        case: Case,
        guard: Tensor | None = None,
        blocks: Blocks = DENSE,
    ) -> Answer:
        is_causal, window = MASKS[case.mask]
        on_device = (case.seqlen_q, case.seqlen_k) in ON_DEVICE
        more: dict[str, Any] = {"is_causal": is_causal, "window": window, "guard": guard}
        return self.attend(row, operands, q_lens, k_lens, on_device, blocks=blocks, **more)

    def attend(
        self,
        row: KernelInfo,
        operands: Operands,
        q_lens: Tensor | None = None,
        k_lens: Tensor | None = None,
        lens_on_device: bool = False,
        is_causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        scale: float | None = None,
        guard: Tensor | None = None,
        blocks: Blocks = DENSE,
    ) -> Answer:
        """Any call, through the library and the mock driver."""
        call = {"is_causal": is_causal, "scale": scale}
        self._calls += 1
        self._now = {"operands": operands, "lens": (q_lens, k_lens), "window": window, **call}
        self._now |= {"guard": guard, "blocks": blocks}
        return self.gpu.sdpa(
            *operands,
            q_lens=q_lens,
            k_lens=k_lens,
            lens_on_device=lens_on_device,
            is_causal=is_causal,
            window=window,
            scale=scale,
            kernel=row.index,
            guard=guard,
            **blocks._asdict(),
        )

    def gradients(
        self, row: KernelInfo, inputs: backward_calls.Inputs, case: Case
    ) -> backward_calls.Gradients:
        is_causal, window = MASKS[case.mask]
        self._calls += 1
        self._now = {"gradients": inputs, "is_causal": is_causal, "window": window}
        dq, dk, dv = self.gpu.backward(
            *(inputs.grad_out, inputs.grad_lse, inputs.query, inputs.key, inputs.value),
            *(inputs.out, inputs.lse),
            q_lens=inputs.q_lens,
            k_lens=inputs.k_lens,
            lens_on_device=(case.seqlen_q, case.seqlen_k) in GRADIENTS_ON_DEVICE,
            is_causal=is_causal,
            window=window,
            kernel=row.index,
        )
        return dq, dk, dv

    def rope(self, row: KernelInfo, given: Mapping[str, Any]) -> Tensor:
        self._now = {"rope": given}
        on_device = given.get("seqlen_offset", 0) > 0  # as in rope_calls.CALLS
        return self.gpu.rope(**given, kernel=row.index, grid_on_device=on_device)

    def _launch(self, image: bytes, args: int, numbers: object, stream: int | None) -> int:
        name = image.decode()
        fault = self.faults.get(name, "") if self.faults else ""
        if name.startswith("rms_norm_rope_") and not self._error:
            assert self.gpu.call is not None
            out = torch.ops.wan_attn.rms_norm_rope(**self._now["rope"])
            self.gpu.call.out.copy_(out)  # type: ignore[attr-defined]
            if fault == "wrong numbers":
                self.gpu.call.out[1, 7, 0, 5] *= 1.25  # type: ignore[attr-defined]
        if name == "wan_attn_watch" and fault != "wrong numbers":
            self._watch()
        if name.startswith("sdpa_") and not self._error:
            of_gradients = ("dq",) if "_dq_" in name else ("dk", "dv")
            if "backward" in name:
                self._compute_gradients(of_gradients)
            else:
                self._compute(fault)
            if fault == "hang":
                time.sleep(600)
            if fault == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if fault == "out of memory":
                return OUT_OF_MEMORY
            self._error = DRIVER_ERRORS.get(fault, 0)
            assert self.gpu.call is not None
            outputs = self.gpu.call.outputs
            if fault == "wrong numbers":
                if "backward" in name:
                    grad = outputs[of_gradients[0]]
                    grad[1, 17, -1, 5] += grad.abs().max()  # beyond any bound, however small it is
                else:
                    _spoil(outputs["out"])
            if fault == "other bits" and "backward" in name:
                bits = outputs[of_gradients[0]]
                bits = bits.view(torch.int16 if bits.element_size() == 2 else torch.int32)
                bits[0, 0, 0, 0] ^= self._calls % 2
            elif fault == "other bits":
                outputs["lse"][0, 0, 0] *= 1 + 1e-6 * (self._calls % 2)
        return self._error

    def _watch(self) -> None:
        """What the pass adds to the guard."""
        assert self.gpu.call is not None
        guard: Tensor = self._now["guard"]
        value, k_lens = self._now["operands"][2].float(), self._now["lens"][1]
        real = torch.cat([value[b, : int(n)].flatten() for b, n in enumerate(k_lens)])
        largest = guard[:1].view(torch.float32)
        largest.copy_(torch.maximum(largest, real.abs().max()))
        guard[2] += (~torch.isfinite(real)).sum()
        guard[3] += (~torch.isfinite(self.gpu.call.outputs["out"])).sum()

    def _compute(self, fault: str = "") -> None:
        assert self._now and self.gpu.call is not None
        blocks: Blocks = self._now["blocks"]
        if fault == "skips too much" and blocks.skip_threshold:
            blocks = blocks._replace(skip_threshold=0.9)
        window_left, window_right = self._now["window"]
        words = torch.zeros(5, dtype=torch.int32)
        out, lse = bindings.ctypes_sdpa(
            *(x.float() for x in self._now["operands"]),
            *self._now["lens"],
            scale=self._now["scale"],
            is_causal=self._now["is_causal"],
            window_left=window_left,
            window_right=window_right,
            return_lse=True,
            guard=words,
            **blocks._asdict(),
        )
        if fault == "tells too little":
            words.view(torch.float32)[4] *= 0.99
        guard = self._now["guard"]
        if guard is not None and len(guard) == len(words):
            guard[4] = torch.maximum(guard[4], words[4])  # not negative: ordered as integers
        self.gpu.call.outputs["out"].copy_(out)
        self.gpu.call.outputs["lse"].copy_(lse)

    def _compute_gradients(self, names: tuple[str, ...]) -> None:
        assert self.gpu.call is not None
        inputs: backward_calls.Inputs = self._now["gradients"]
        window_left, window_right = self._now["window"]
        *operands, q_lens, k_lens = inputs.tensors
        found = torch.ops.wan_attn.sdpa_backward(
            *(x if x is None else x.float() for x in operands),
            *(q_lens, k_lens),
            is_causal=self._now["is_causal"],
            window_left=window_left,
            window_right=window_right,
        )
        for name, grad in zip(("dq", "dk", "dv"), found, strict=True):
            if name in names:
                self.gpu.call.outputs[name].copy_(grad)


def _spoil(out: Tensor) -> None:
    """One element, a quarter too large; nothing in a call with fewer rows."""
    if out.shape[0] > 1 and out.shape[1] > 17:
        out[1, 17, 1 % out.shape[2], 5] *= 1.25


def main(argv: Sequence[str]) -> int:
    arch, faults, *words = argv
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        gpu = BackwardGpu(Path(folder), CARDS[int(arch)])
        library.load = library.lib = lambda: gpu.lib
        cuda_driver._path = None  # this library has its driver, and every row counts as proven
        return proof_child.main(words, lambda index: MockCard(index, gpu, json.loads(faults)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
