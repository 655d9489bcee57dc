# SPDX-License-Identifier: Apache-2.0
"""check.py - the worker of a check on the mock GPU: the real program (check/worker.py), the real
library and its launches, and a card whose kernels are right, wrong or deadly as the test says.

    python check.py PATHS ARCH FAULTS WORDS...

PATHS and FAULTS as in prove.py. FAULTS null: every kernel runs on the emulated GPU, at lengths that
take it seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv.pop(1))

import torch
from torch import Tensor

from cuda_mock.backward import BackwardGpu
from cuda_mock.gpu import CARDS
from cuda_mock.prove import MockCard
from wan_attn.bench import facts, peers
from wan_attn.check import worker
from wan_attn.check.target import HALF, Sizes, Target, every_block
from wan_attn.native import cuda_driver, library, op
from wan_attn.request import Request
from wan_attn.request.blocks import DENSE
from wan_attn.selfcheck.proof_calls import Answer
from wan_attn.workloads import parse_shape

SIZES = Sizes(
    tuple(map(parse_shape, ("1x300x2x64", "1x77x2x80"))),
    HALF,
    products=(),
    lengths=tuple(range(1, 301, 30)),
    far=1 << 16,
    seconds=0.05,
)
EMULATED = replace(SIZES, shapes=(parse_shape("1x65x1x64"),), lengths=(1, 17, 66), far=1 << 13)
CLOCKS = {"sm_mhz": 1410.0, "power_w": 290.0}


class MockTarget(Target):
    """The mock GPU as a check sees it. Operands lie in ordinary memory."""

    card: MockCard

    def __init__(self, gpu: BackwardGpu, faults: dict[str, str] | None) -> None:
        card = MockCard(0, gpu, faults)
        super().__init__(card, card.where, EMULATED if faults is None else SIZES)
        # Emulation takes its time; a kernel that hangs should not cost minutes.
        self.patience = 4.0 if faults is None else 0.5

    def able(self) -> list[op.KernelInfo]:
        return self.card.rows()

    def run(
        self,
        row: op.KernelInfo,
        operands: tuple[Tensor, Tensor, Tensor],
        q_lens: Tensor | None = None,
        k_lens: Tensor | None = None,
        **options: Any,
    ) -> Answer:
        blocks = every_block(*operands[:2]) if row.is_for_lists else DENSE
        return self.card.attend(row, operands, q_lens, k_lens, blocks=blocks, **options)

    def candidates(self) -> list[peers.Peer]:
        def no_plan(*_: Tensor) -> Tensor:
            raise RuntimeError("cuDNN Frontend error: no valid execution plans built")

        found = [self._peer(row) for row in self.rows()]
        found += [peer for peer in super().candidates() if peer.name in ("torch", "torch-flash")]
        return [*found, peers.Peer("torch-cudnn", "without a plan", no_plan, lambda request: None)]

    def _peer(self, row: op.KernelInfo) -> peers.Peer:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.run(row, (query, key, value))[0]

        def why_not(request: Request) -> str | None:
            return op.why_not(replace(request, device=self.where), row.index)

        return peers.Peer(row.name, row.description, run, why_not, is_ours=True)

    def environment(self) -> dict[str, Any]:
        return super().environment() | {"device": self.card.gpu.cards[0].name}

    def state(self) -> facts.State:
        return facts.State(CLOCKS)


def main(argv: Sequence[str]) -> int:
    arch, faults, *words = argv
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        gpu = BackwardGpu(Path(folder), CARDS[int(arch)])
        library.load = library.lib = lambda: gpu.lib
        cuda_driver._path = None  # this library has its driver, and every row counts as proven
        return worker.main(words, lambda device: MockTarget(gpu, json.loads(faults)))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
