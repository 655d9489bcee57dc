# SPDX-License-Identifier: Apache-2.0
"""backward.py - the op sdpa_backward: gradients of attention by our kernels.

The contract is wan_attn_backward's in csrc/wan_attn.h. Both bindings call it through ctypes: beside
what it computes, some 30 us are little. Who calls it: autograd.py.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.native import bindings, cuda_driver, library
from wan_attn.native.kernels import backward_kernels, call_params
from wan_attn.request import Request, gate, refuse

SCHEMA = (
    "sdpa_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value,"
    " Tensor out, Tensor lse, Tensor? q_lens=None, Tensor? k_lens=None, *, float? scale=None,"
    " bool is_causal=False, int window_left=-1, int window_right=-1, int kernel=-1)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)
NAME = "wan_attn::sdpa_backward"
PORTABLE = "sdpa_backward_ref"
"""The row that computes anywhere, but not fast."""
ONCE = "differentiated once: gradients of gradients are computed by torch alone"

_here = threading.local()


def last_kernel() -> str | None:
    """The row that this thread's last call ran on; None: there was none."""
    row = int(vars(_here).get("kernel", -1))
    return None if row < 0 else backward_kernels()[row].name


def _ask(request: Request, row: int) -> tuple[int, str]:
    """A status, and the row's name or why none takes the call."""
    error, found = library.Error(), ctypes.c_int32(-1)
    params = _params(call_params(request), row)
    with cuda_driver.question():
        status = library.lib().wan_attn_backward_select(params, found, None, error)
    return status, backward_kernels()[found.value].name if status == library.OK else error.text()


def select(request: Request) -> tuple[str | None, str]:
    """The row that computes gradients of such a call and "", or None and every row's reason.

    Raises:
        RuntimeError: the device is in trouble: another backend would fail there, or hide it.
    """
    if library.load() is None:
        return None, library.load_error() or ""
    status, words = _ask(request, -1)
    if status == library.DEVICE_ERROR:
        raise RuntimeError(f"wan_attn: {words}")
    return (words, "") if status == library.OK else (None, words)


def why_not(request: Request, row: int = -1) -> str | None:
    """Why no kernel (or not this row) computes gradients of such a call; None: one does."""
    if library.load() is None:
        return library.load_error()
    status, words = _ask(request, row)
    return None if status == library.OK else words


def chosen(request: Request) -> str | None:
    """The name of the row that computes gradients of such a call; None: none does."""
    return select(request)[0]


def takes(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a kernel computes gradients of attention of these, on whatever device they are.

    Args:
        dtype: what a value that is not 16-bit is converted to before it is computed in.
    """
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return False
    dtypes = computed_in(query, key, value, dtype)
    (batch, seqlen_q, heads_q, head_dim), (seqlen_k, heads_k) = query.shape, key.shape[1:3]
    sizes = (batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim)
    # A compiler's sizes have no value yet, and must not be given one.
    b, m, n, h, h_k, d = (size if type(size) is int else _ANY_SIZE for size in sizes)
    request = Request(b, m, n, h, h_k, d, dtypes[2], *dtypes[:2], query.device, needs_grad=True)
    if request in _taken:
        return True
    # No is no answer for ever: a card's proof may come yet.
    if chosen(request) is None:
        return False
    if len(_taken) >= _TAKEN_MAX:
        _taken.clear()
    _taken.add(request)
    return True


def computed_in(
    query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """What they are converted to before kernels see them; dtype: as Call has it.

    As in forward, float32 stays beside a half value.
    """
    if dtype is None:
        return query.dtype, key.dtype, value.dtype
    half = value.dtype if value.dtype in (torch.float16, torch.bfloat16) else dtype
    query_dtype, key_dtype = (x.dtype if x.dtype == torch.float32 else half for x in (query, key))
    return query_dtype, key_dtype, half


_ANY_SIZE = 64  # every row takes it, as head_dim as well
_taken: set[Request] = set()
_TAKEN_MAX = 1024
config.memory(_taken.clear)


def workspace_bytes(request: Request, row: str = "") -> int | None:
    """The memory beside operands and results that a row needs; None: it does not take the call.

    Args:
        row: of the table, by name; "": the best one.
    """
    if library.load() is None:
        return None
    forward, size = call_params(request), ctypes.c_size_t(0)
    forward.num_threads = torch.get_num_threads()
    index = next((kernel.index for kernel in backward_kernels() if kernel.name == row), -1)
    params = _params(forward, index)
    with cuda_driver.question():
        status = library.lib().wan_attn_backward_select(params, None, size, None)
    return int(size.value) if status == library.OK else None


def _params(forward: library.Params, kernel: int = -1) -> library.BackwardParams:
    return library.BackwardParams(
        struct_size=ctypes.sizeof(library.BackwardParams),
        kernel=kernel,
        forward=ctypes.pointer(forward),
    )


def _readable(x: Tensor) -> Tensor:
    """What torch hands over as a gradient may be one number, seen everywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def by_ctypes(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    kernel: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's implementation."""
    for name, tensor in (("grad_out", grad_out), ("out", out), ("lse", lse)):
        if not isinstance(tensor, Tensor):  # None gets past the dispatcher
            refuse(name, "a tensor", gate.kind_of(tensor))
    if not -(1 << 31) <= kernel < 1 << 31:  # would wrap, perhaps into a row that exists
        refuse("kernel", "-1 (the best) or a row", kernel)
    forward = bindings.describe_call(query, key, value, q_lens, k_lens, -1, library.EXACT)
    forward.softmax_scale = 0.0 if scale is None else scale
    forward.has_softmax_scale, forward.is_causal = scale is not None, is_causal
    forward.window_size_left, forward.window_size_right = window_left, window_right
    forward.out, forward.lse = bindings.describe(out), bindings.describe(lse)
    params, error = _params(forward, kernel), library.Error()
    grad_out = _readable(grad_out) if grad_out.dim() == 4 else grad_out
    params.dout = bindings.describe(grad_out)
    if grad_lse is not None:
        params.dlse = bindings.describe(grad_lse)
    lib, size, row = library.lib(), ctypes.c_size_t(0), ctypes.c_int32(-1)
    _check(lib.wan_attn_backward_select(params, None, size, error), error)
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    params.dq, params.dk, params.dv = (bindings.describe(x) for x in (dq, dk, dv))
    if size.value:
        workspace = query.new_empty(size.value, dtype=torch.uint8)
        forward.workspace, forward.workspace_size = workspace.data_ptr(), size.value
    _check(lib.wan_attn_backward(params, row, error), error)
    _here.kernel = row.value
    return dq, dk, dv


def _check(status: int, error: library.Error) -> None:
    if status != library.OK:
        # What C could not pass on: Ctrl-C while a kernel was compiled or proven.
        cuda_driver.raise_interruption()
        raise RuntimeError(f"wan_attn: {error.text()}")


def _without_library(*operands: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError(f"wan_attn: sdpa_backward needs the native library: {library.load_error()}")


def _elsewhere(grad_out: Tensor, *operands: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    refuse("grad_out", gate.DENSE, f"{grad_out.layout} on {grad_out.device}")


def _fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.new_empty(x.shape) for x in (query, key, value))
    return query, key, value


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    pass


def _refuse_more(ctx: Any, *grads: Any) -> None:
    refuse("sdpa", ONCE, "a gradient of its gradient (USE_ATTENTION_BACKEND=torch has those)")


def define(to: torch.library.Library) -> None:
    """The op with all that does not depend on the library."""
    to.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    torch.library.register_fake(NAME, _fake, lib=to)
    to.impl("sdpa_backward", _elsewhere, "CompositeExplicitAutograd")
    torch.library.register_autograd(NAME, _refuse_more, setup_context=_setup_context, lib=to)


def register(to: torch.library.Library, binding: str) -> None:
    """Its kernels."""
    for key in ("CPU", "CUDA"):
        to.impl("sdpa_backward", _without_library if binding == "torch" else by_ctypes, key)
