# SPDX-License-Identifier: Apache-2.0
"""selftest_paths.py - what the self-test covers: kernel rows, backends, and the public function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from wan_attn.backends import LOSSY, REGISTRY
from wan_attn.backends._common import accelerators
from wan_attn.doctor.selftest import Answer, Path
from wan_attn.native import op
from wan_attn.request import Call, Request
from wan_attn.selfcheck import reference
from wan_attn.workloads import Workload


def request(
    case: reference.Case, dtype: torch.dtype, device: str, return_lse: bool = False
) -> Request:
    """The case as the selection sees it."""
    is_causal, window = reference.MASKS[case.mask]
    heads = (reference.HEADS_Q, reference.HEADS_K)
    sizes = (reference.BATCH, case.seqlen_q, case.seqlen_k, *heads, case.head_dim)
    return Request.of(
        Workload("selftest", str(case), *sizes),
        dtype,
        device,
        is_causal=is_causal,
        window=window,
        has_q_lens=case.q_lens is not None,
        has_k_lens=True,
        return_lse=return_lse,
    )


def devices() -> list[str]:
    """The CPU, what is neither CPU nor CUDA, and one CUDA GPU of each kind."""
    found = ["cpu", *accelerators()]
    seen: set[tuple[str, tuple[int, int]]] = set()
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        kind = (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
        if kind not in seen:
            seen.add(kind)
            found.append(f"cuda:{i}")
    return found


def _backend_path(name: str, device: str) -> Path:
    backend = REGISTRY[name]

    def run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Answer:
        # The lse is judged too wherever the backend can return it.
        call = Call(**options, return_lse=True)
        if backend.why_not(Request.from_tensors(query, key, value, call)) is not None:
            call = call._replace(return_lse=False)
        return backend.run(query, key, value, call)

    return Path(
        "backend",
        name,
        device,
        lambda case, dtype: backend.why_not(request(case, dtype, device)),
        run,
        is_ours=name == "sdpa",
    )


def _kernel_path(row: int, name: str, device: str) -> Path:
    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        q_lens: Tensor | None,
        k_lens: Tensor | None,
        is_causal: bool,
        window: tuple[int, int],
    ) -> Answer:
        out, lse = torch.ops.wan_attn.sdpa(
            query,
            key,
            value,
            q_lens,
            k_lens,
            is_causal=is_causal,
            window_left=window[0],
            window_right=window[1],
            return_lse=True,
            kernel=row,
        )
        return out, lse

    return Path(
        "kernel",
        name,
        device,
        lambda case, dtype: op.why_not(request(case, dtype, device, return_lse=True), row),
        run,
        is_ours=True,
    )


def _function_path(device: str) -> Path:
    """What a patched Wan2.2 calls: query and key in float32 from RoPE, value in half precision."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        q_lens: Tensor | None,
        k_lens: Tensor | None,
        is_causal: bool,
        window: tuple[int, int],
    ) -> Answer:
        from wan_attn import precision
        from wan_attn.attention import flash_attention

        with precision.use("exact", guard="off", rules=[]):  # whatever the variables ask for
            out = flash_attention(
                query.float(),
                key.float(),
                value,
                q_lens=q_lens,
                k_lens=k_lens,
                causal=is_causal,
                window_size=window,
                dtype=value.dtype,
            )
        return out, None

    def why_not(case: reference.Case, dtype: torch.dtype) -> str | None:
        return "computes in half precision" if dtype is torch.float32 else None

    return Path("function", "flash_attention", device, why_not, run)


def paths() -> Iterator[Path]:
    """Every path of this machine, CPU first: kernel rows, backends, then the public function."""
    # Without a binding to the native library no row can be reached, whether it loads or not.
    rows = () if op.binding() == "torch" else op.kernels()
    for device in devices():
        kind = torch.device(device).type
        for row in rows:
            if row.device == kind and not row.is_lossy:  # those are wrong by any exact measure
                yield _kernel_path(row.index, row.name, device)
        for name in (n for n in REGISTRY if n not in LOSSY):
            yield _backend_path(name, device)
        yield _function_path(device)
