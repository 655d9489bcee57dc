# SPDX-License-Identifier: Apache-2.0
"""rope.py - torch.ops.wan_attn.rms_norm_rope: its schema, fake, derivative and bindings.

The contract is in csrc/wan_attn.h. Our kernels compute it on the CPU and on NVIDIA's GPUs;
elsewhere, and for gradients, torch's operators do (rope_in_torch.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wan_attn.native import bindings, cuda_driver, library, rope_in_torch, rope_on_cuda, shim
from wan_attn.native.kernels import rope_kernels
from wan_attn.native.rope_call import OPERANDS, RopeCall
from wan_attn.request import gate, refuse
from wan_attn.request.transforms import without_tangent

SCHEMA = (
    "rms_norm_rope(Tensor x, Tensor? weight=None, Tensor? table=None, Tensor? grid_sizes=None, *,"
    " float? eps=None, bool per_head=False, bool round_norm=True, int seqlen_offset=0,"
    " ScalarType? dtype=None, int kernel=-1) -> Tensor"
)
NAME = "wan_attn::rms_norm_rope"


def kernels() -> tuple[str, ...]:
    """The names of the rope kernels, best first; empty without the native library."""
    return tuple(row.name for row in rope_kernels())


def why_not_call(
    given: Mapping[str, Any], row: int = -1, device: torch.device | None = None
) -> str | None:
    """Why no kernel (or not this row) takes a call of these arguments; None: one does.

    Args:
        device: where the tensors are said to be; None: where they are.
    """
    call = RopeCall(**given)._replace(kernel=row)
    params = _params(call)
    for name in OPERANDS:
        if device is not None and getattr(call, name) is not None:
            described = getattr(params, name)
            described.device_type = bindings.DEVICES[device.type]
            described.device_index = device.index or 0
    found, error = ctypes.c_int32(-1), library.Error()
    with cuda_driver.question():
        status = library.lib().wan_attn_rope_select(params, found, error)
    return None if status == library.OK else error.text()


def why_not(device: torch.device, row: int = -1, dtype: torch.dtype = torch.float32) -> str | None:
    """Why this row (-1: every row) takes not even a plain call with an x of this dtype on the
    device, as before a GPU's kernels are proven there; None: it does."""
    if library.load() is None:
        return "no native library"
    if device.type not in bindings.DEVICES:
        return f"no kernel for {device.type}"
    probe = torch.zeros(1, 1, 1, 8, dtype=dtype, device="cpu")
    return why_not_call({"x": probe, "eps": 1e-6}, row, device)


def chosen(device: torch.device) -> str | None:
    """The name of the row that takes calls on the device; None: none does."""
    return next((n for i, n in enumerate(kernels()) if why_not(device, i) is None), None)


def _params(call: RopeCall) -> library.RopeParams:
    x = call.x
    if not isinstance(x, Tensor):  # None gets past the dispatcher
        refuse("x", "a tensor", gate.kind_of(x))
    if not -(1 << 31) <= call.kernel < 1 << 31:  # would wrap, perhaps into a row that exists
        refuse("kernel", "-1 (the best) or a row", call.kernel)
    params = library.RopeParams(
        struct_size=ctypes.sizeof(library.RopeParams),
        kernel=call.kernel,
        seqlen_offset=call.seqlen_offset,
        eps=0.0 if call.eps is None else call.eps,
        has_norm=call.eps is not None,
        is_per_head=call.per_head,
        rounds_norm=call.round_norm,
        cpu_features=bindings.allowed_cpu_features(),
    )
    if x.device.type == "cpu":
        params.num_threads, params.parallel = torch.get_num_threads(), shim.parallel_for()
    elif x.is_cuda:
        params.stream = torch.cuda.current_stream(x.device).cuda_stream
    for name in OPERANDS:
        if (tensor := getattr(call, name)) is not None:
            setattr(params, name, bindings.describe(tensor))
    return params


def by_ctypes(*operands: Any, **options: Any) -> Tensor:
    """The op without the shim; the same steps as csrc/torch/shim.c."""
    call = RopeCall(*operands, **options)
    params = _params(call)
    error = library.Error()
    lib = library.lib()
    row = ctypes.c_int32(-1)
    if lib.wan_attn_rope_select(params, row, error) != library.OK:
        raise RuntimeError(f"wan_attn: {error.text()}")
    if call.dtype is not None:
        _check_dtype(call.dtype)
    out = call.x.new_empty(call.x.shape, dtype=call.dtype)
    params.out = bindings.describe(out)
    if lib.wan_attn_rms_norm_rope(params, row, error) != library.OK:
        raise RuntimeError(f"wan_attn: {error.text()}")
    return out


def _check(call: RopeCall) -> None:
    """The rules of csrc/core/rope_check.c that shapes and dtypes tell, in the same words."""
    x, weight, table, grid_sizes = call[:4]
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if x.dim() != 4:
        refuse("x", "[batch, seqlen, heads, head_dim]", list(x.shape))
    for name, tensor, dtypes in (
        ("x", x, floats),
        ("weight", weight, floats),
        ("table", table, (torch.float32, torch.float64)),
        ("grid_sizes", grid_sizes, (torch.int32, torch.int64)),
    ):
        if tensor is not None and tensor.dtype not in dtypes:
            words = [str(d).removeprefix("torch.") for d in dtypes]
            rule = f"{', '.join(words[:-1])} or {words[-1]}"
            refuse(name, rule, str(tensor.dtype).removeprefix("torch."))
    if call.dtype is not None:
        _check_dtype(call.dtype)
    _check_norm(call)
    _check_table(call)
    for name, tensor in (("weight", weight), ("table", table)):
        if tensor is not None and tensor.device != x.device:
            refuse(name, f"on x's device {x.device}", tensor.device)
    if grid_sizes is not None and grid_sizes.device not in (x.device, torch.device("cpu")):
        refuse("grid_sizes", f"on the CPU or on x's device {x.device}", grid_sizes.device)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        refuse("dtype", "float32, float16 or bfloat16", str(dtype).removeprefix("torch."))


def _check_norm(call: RopeCall) -> None:
    x, weight = call.x, call.weight
    if weight is None:
        return
    if call.eps is None:
        refuse("weight", "None where eps is None, which means no norm", list(weight.shape))
    size = x.shape[3] * (1 if call.per_head else x.shape[2])
    if weight.dim() != 1 or weight.shape[0] != size:
        rule = f"[{'head_dim' if call.per_head else 'heads * head_dim'}] = [{size}]"
        refuse("weight", rule, list(weight.shape))


def _check_table(call: RopeCall) -> None:
    x, _, table, grid_sizes = call[:4]
    if table is None:
        if grid_sizes is not None:
            refuse("table", "a tensor where grid_sizes is one", None)
        return
    head_dim = x.shape[3]
    if head_dim % 2:
        gate.refuse_having("x", "an even head_dim to be rotated", head_dim)
    if call.seqlen_offset < 0:
        refuse("seqlen_offset", "at least 0 and below 2^62", call.seqlen_offset)
    if grid_sizes is None:
        if call.seqlen_offset:
            refuse("seqlen_offset", "0 without grid_sizes", call.seqlen_offset)
        if table.shape != x.shape:
            refuse("table", f"shaped like x = {list(x.shape)}", list(table.shape))
        return
    if table.dim() != 2 or table.shape[1] != head_dim:
        refuse("table", f"[positions, head_dim] = [.., {head_dim}]", list(table.shape))
    if grid_sizes.dim() != 2 or grid_sizes.shape[0] != x.shape[0] or grid_sizes.shape[1] != 3:
        refuse("grid_sizes", f"[batch, 3] = [{x.shape[0]}, 3]", list(grid_sizes.shape))


def _by_torch(*operands: Any, **options: Any) -> Tensor:
    call = RopeCall(*operands, **options)
    for name in OPERANDS:
        if (tensor := getattr(call, name)) is not None or name == "x":
            gate.dense(name, tensor)
    _check(call)
    return rope_in_torch.compute(call)


def _fake(*operands: Any, **options: Any) -> Tensor:
    call = RopeCall(*operands, **options)
    _check(call)
    return call.x.new_empty(call.x.shape, dtype=call.dtype)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    # Torch keeps no tensor of inference mode, as a table or sizes made once may be.
    ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in inputs))
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Torch's own derivative of the op in its operators, which are computed again."""
    # Torch leaves out trailing arguments that have their default.
    operands = list(ctx.saved_tensors)
    with torch.enable_grad():
        for i, needed in enumerate(ctx.needs_input_grad):
            if needed:
                operands[i] = operands[i].detach().requires_grad_()
        out = rope_in_torch.compute(RopeCall(*operands, **ctx.options))
        wanted = [t for t in operands if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad_out))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in operands)


class _Guard:
    """Stands for the library where torch puts the kernel of the op's derivative: a tangent of
    forward-mode AD would be dropped there without a word."""

    def __init__(self, to: torch.library.Library) -> None:
        self._library = to

    def impl(self, op: Any, kernel: Any, key: str, **options: Any) -> None:
        """As a library's."""

        def guarded(keyset: Any, *operands: Any, **keywords: Any) -> Any:
            without_tangent(**dict(zip(OPERANDS[:3], operands, strict=False)))
            return kernel(keyset, *operands, **keywords)

        self._library.impl(op, guarded, key, **options)


def define(to: torch.library.Library) -> None:
    """The op with all that does not depend on a binding."""
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    # What the shim has for CUDA tensors; who calls it: rope_on_cuda.py.
    to.define(SCHEMA.replace("rms_norm_rope(", "rms_norm_rope_kernel(", 1), tags=tags)
    to.define(SCHEMA, tags=tags)
    torch.library.register_fake(NAME, _fake, lib=to)
    to.impl("rms_norm_rope", _by_torch, "CompositeExplicitAutograd")
    guard: Any = _Guard(to)
    torch.library.register_autograd(NAME, _backward, setup_context=_setup_context, lib=guard)


def register(to: torch.library.Library, binding: str) -> None:
    """Its kernels, unless torch computes; the shim has registered its own for the CPU."""
    if binding == "torch":
        return
    if binding == "ctypes":
        to.impl("rms_norm_rope", by_ctypes, "CPU")
    kernel = by_ctypes if binding == "ctypes" else torch.ops.wan_attn.rms_norm_rope_kernel.default
    to.impl("rms_norm_rope", rope_on_cuda.implementation(kernel, _by_torch), "CUDA")
