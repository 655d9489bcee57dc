# SPDX-License-Identifier: Apache-2.0
"""backward.py - gradients of attention through the C ABI on the mock GPU: the library's own choice,
plan and launches, and each launch runs the very kernel on the emulated GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cuda_mock.gpu import Card, give_workspace, options_of
from cuda_mock.rope import RopeGpu
from emu import build
from emu.args import PackArgs, PutLengthsArgs
from emu.args_backward import BackwardArgs, BackwardRowsArgs, BackwardScaleArgs
from emu.rows import Helper, TileBackward, gpus, helpers, tiles_backward
from emu.run import Tensor_, launch
from wan_attn.native import library as native
from wan_attn.native.bindings import describe

Written = list[tuple[int, int]]  # address, bytes


class _Call:
    """One call's memory, and the launches that it made: (kernel, blocks)."""

    def __init__(
        self, card: Card, inputs: dict[str, Tensor], outputs: dict[str, Tensor], workspace: Tensor
    ) -> None:
        self.arch = 10 * card.major + card.minor
        self.inputs, self.outputs, self.workspace = inputs, outputs, workspace
        self.launches: list[tuple[str, int]] = []

    def run_pass(self, image: str, args_at: int, blocks: int, threads: int, smem: int) -> None:
        kernel = self._kernel(image)
        assert threads == kernel.num_threads
        assert smem == (0 if isinstance(kernel, Helper) else kernel.smem_bytes)
        args, written, outputs = _decode(kernel, args_at)
        library = build.library(kernel, arch=75 if self.arch < 80 else 80)
        assert launch(library, args, blocks, [*self._memory(written, outputs)]) == 0
        self.launches.append((image, blocks))

    def _kernel(self, image: str) -> TileBackward | Helper:
        if image in helpers():
            return helpers()[image]
        mine = gpus()[self.arch]
        return next(t for t in tiles_backward() if t.symbol == image and t.gpu_class == mine)

    def _memory(self, written: Written, outputs: tuple[str, ...]) -> Iterator[Tensor_]:
        """What this pass may touch: it reads inputs and the workspace, it writes these outputs and
        these parts of the workspace."""
        tensors = self.inputs | {name: self.outputs[name] for name in outputs}
        for name, x in tensors.items():
            store = x.untyped_storage()
            if store.nbytes():
                kind = int(name in outputs)
                yield Tensor_(name.encode(), store.data_ptr(), store.nbytes(), kind)
        begin, end = self.workspace.data_ptr(), self.workspace.data_ptr() + len(self.workspace)
        for at, size in sorted(written):
            assert begin <= at and at + size <= end, "a pass writes beyond the workspace"
            if at > begin:
                yield Tensor_(b"workspace", begin, at - begin, 0)
            if size:
                yield Tensor_(b"written", at, size, 1)
            begin = at + size
        if end > begin:
            yield Tensor_(b"workspace", begin, end - begin, 0)


def _decode(
    kernel: TileBackward | Helper, at: int
) -> tuple[ctypes.Structure, Written, tuple[str, ...]]:
    """The arguments of a launch, what it writes into the workspace, and which outputs."""

    def args_of(kind: type[ctypes.Structure]) -> Any:
        return kind.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(kind)))

    if isinstance(kernel, TileBackward):
        return args_of(BackwardArgs), [], ("dk", "dv") if kernel.of_keys else ("dq",)
    args = args_of(
        {
            "put_lengths": PutLengthsArgs,
            "backward_rows": BackwardRowsArgs,
            "backward_scale": BackwardScaleArgs,
        }.get(kernel.body, PackArgs)
    )
    if kernel.body == "put_lengths":
        return args, [(args.to, 4 * args.count)], ()
    if kernel.body == "backward_rows":
        rows = args.batch * args.num_heads_q * args.seqlen_q
        written = [(args.rows, 16 * rows)]
        return args, written + ([(args.sizes, 4 * rows)] if args.sizes else []), ()
    if kernel.body == "backward_scale":
        heads = args.batch * args.num_heads_q
        written = [(args.scales, 16 * heads // args.heads_per_key_head)]
        return args, written + ([(args.dout_scale, 4 * heads)] if args.dout_scale else []), ()
    heads = args.batch * args.heads
    if kernel.pack_step == 1:
        return args, [(args.largest, 4 * heads * args.num_parts)], ()
    assert kernel.pack_step == 3
    return args, [(args.to, 2 * heads * args.seqlen * args.head_dim)], ()


class BackwardGpu(RopeGpu):
    """A mock machine that gradients are asked of, too.

    Attributes:
        passes: of the last one, (kernel, blocks) each; workspace_bytes: what it was given.
    """

    passes: list[tuple[str, int]] = []  # noqa: RUF012 - replaced, never changed
    workspace_bytes = 0

    def backward_params(
        self,
        forward: native.Params,
        operands: dict[str, Tensor],
        kernel: int = -1,
        device: int = 0,
    ) -> native.BackwardParams:
        """The call, of tensors by their names in wan_attn.h."""
        for name in ("q", "k", "v", "out", "lse"):
            setattr(forward, name, self._on_device(operands[name], device))
        others = {n: operands[n] for n in ("dout", "dlse", "dq", "dk", "dv") if n in operands}
        return native.BackwardParams(
            struct_size=ctypes.sizeof(native.BackwardParams),
            kernel=kernel,
            forward=ctypes.pointer(forward),
            **{name: self._on_device(x, device) for name, x in others.items()},
        )

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        q_lens: Tensor | None = None,
        k_lens: Tensor | None = None,
        lens_on_device: bool = False,
        scale: float | None = None,
        is_causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        kernel: int = -1,
        device: int = 0,
        grads: tuple[Tensor, ...] | None = None,
        spare_workspace: int = 0,
    ) -> tuple[Tensor, ...]:
        """wan_attn_backward_select and wan_attn_backward. grads: where to write, dense if not
        given; spare_workspace: bytes that the workspace is too large by."""
        likes = (query, key, value)
        grads = grads or tuple(torch.full(x.shape, float("nan"), dtype=x.dtype) for x in likes)
        operands = dict(zip(("q", "k", "v", "out", "lse", "dout"), (*likes, out, lse, grad_out)))  # noqa: B905
        if grad_lse is not None:
            operands["dlse"] = grad_lse
        results = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        forward = native.Params(kernel=-1, **options_of(scale, is_causal, window))
        inputs = dict(operands)
        for name, lens in (("seqused_q", q_lens), ("seqused_k", k_lens)):
            if lens is not None:
                on_device = self._on_device(lens, device) if lens_on_device else describe(lens)
                setattr(forward, name, on_device)
                if lens_on_device:
                    inputs[name] = lens
        params = self.backward_params(forward, operands | results, kernel, device)
        size, row, error = ctypes.c_size_t(0), ctypes.c_int32(-1), native.Error()
        self._check(self.lib.wan_attn_backward_select(params, row, size, error), error)
        workspace = give_workspace(forward, max(0, size.value + spare_workspace))
        made = _Call(self.cards[device], inputs, results, workspace)
        self.call = made  # type: ignore[assignment]
        self.problem, self.passes = None, []
        ran = ctypes.c_int32(-1)
        status = self.lib.wan_attn_backward(params, ran, error)
        if self.problem is not None:
            raise self.problem
        self._check(status, error)
        assert ran.value == row.value
        self.passes, self.workspace_bytes = made.launches, size.value
        return grads
