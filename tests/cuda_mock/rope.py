# SPDX-License-Identifier: Apache-2.0
"""rope.py - rms_norm_rope through the C ABI on the mock GPU: the library's own launch, and each
launch runs the very kernel on the emulated GPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cuda_mock.gpu import STREAM, Gpu
from emu import build
from emu.args import RopeArgs
from emu.rows import rope_kernels
from emu.run import Tensor_, launch
from wan_attn.native import library as native
from wan_attn.native.bindings import describe
from wan_attn.native.rope_call import RopeCall


@dataclass
class _RopeCall:
    """One call's memory, and the launches that it made: (kernel, blocks, threads)."""

    arch: int
    inputs: dict[str, Tensor]
    out: Tensor
    launches: list[tuple[str, int, int]] = field(default_factory=list)

    def run_pass(self, image: str, args_at: int, blocks: int, threads: int, smem: int) -> None:
        kernel = rope_kernels()[image]
        assert threads % 32 == 0 and threads <= kernel.num_threads and smem == kernel.smem_bytes
        args = RopeArgs.from_buffer_copy(ctypes.string_at(args_at, ctypes.sizeof(RopeArgs)))
        assert args.num_threads == threads
        library = build.library(kernel, arch=75 if self.arch < 80 else 80)
        launch(library, args, blocks, self._memory())
        self.launches.append((image, blocks, threads))

    def _memory(self) -> list[Tensor_]:
        tensors = {"out": self.out, **self.inputs}
        stores: dict[int, Tensor_] = {}
        for name, x in tensors.items():
            store = x.untyped_storage()
            kind = 2 if name == "x" and store.data_ptr() in stores else int(name == "out")
            if store.nbytes():
                known = Tensor_(name.encode(), store.data_ptr(), store.nbytes(), kind)
                stores[store.data_ptr()] = known
        return list(stores.values())


class RopeGpu(Gpu):
    """A mock machine that rms_norm_rope is called on."""

    def rope(
        self,
        *operands: Any,
        grid_on_device: bool = False,
        device: int = 0,
        out: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """wan_attn_rms_norm_rope, with the op's arguments. out: where to write, x itself for
        instance."""
        call = RopeCall(*operands, **options)
        x, grid_sizes = call.x, call.grid_sizes
        if out is None:
            out = torch.full(x.shape, float("nan"), dtype=call.dtype or x.dtype)
        params = native.RopeParams(
            struct_size=ctypes.sizeof(native.RopeParams),
            kernel=call.kernel,
            x=self._on_device(x, device),
            out=self._on_device(out, device),
            seqlen_offset=call.seqlen_offset,
            eps=0.0 if call.eps is None else call.eps,
            has_norm=call.eps is not None,
            is_per_head=call.per_head,
            rounds_norm=call.round_norm,
            stream=STREAM,
        )
        inputs = {"x": x}
        for name, given in (("weight", call.weight), ("table", call.table)):
            if given is not None:
                setattr(params, name, self._on_device(given, device))
                inputs[name] = given
        if grid_sizes is not None:
            on_device = self._on_device(grid_sizes, device)
            params.grid_sizes = on_device if grid_on_device else describe(grid_sizes)
            if grid_on_device:
                inputs["grid_sizes"] = grid_sizes
        card = self.cards[device]
        made = _RopeCall(10 * card.major + card.minor, inputs, out)
        self.call = made  # type: ignore[assignment]
        self.problem = None
        error = native.Error()
        status = self.lib.wan_attn_rms_norm_rope(params, None, error)
        if self.problem is not None:
            raise self.problem
        self._check(status, error)
        self.launches = made.launches
        return out
