# SPDX-License-Identifier: Apache-2.0
"""why.py - `wan-attn why`: the choice for one call and every refusal; no tensors, no GPU needed."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from wan_attn import console
from wan_attn.backends import REGISTRY
from wan_attn.cli import FINE, WRONG, refuse
from wan_attn.config import ConfigError, Settings, refresh
from wan_attn.console import heading, pairs, table, wrap
from wan_attn.log import dtype_name, dtype_of
from wan_attn.native import op
from wan_attn.request import Request
from wan_attn.selection.choose import compute_dtype, order, select, why_not
from wan_attn.workloads import WORKLOADS, Workload, parse_shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `why`."""
    parser.add_argument(
        "--shape",
        required=True,
        help="BxLxHxD (1x27280x24x128), BxLq:LkxHxD, MODEL:WxHxFRAMES (ti2v-5b:1280x704x121), or "
        f"a name: {', '.join(WORKLOADS)}",
    )
    parser.add_argument(
        "--dtype",
        default=torch.bfloat16,
        type=_dtype,
        metavar="DTYPE",
        help="of value: bf16, fp16, fp32",
    )
    parser.add_argument(
        "--qk-dtype",
        type=_dtype,
        metavar="DTYPE",
        help="of query and key, if another: Wan2.2 passes fp32",
    )
    parser.add_argument(
        "--lk",
        type=int,
        metavar="N",
        help="number of keys, if not that of queries",
    )
    parser.add_argument(
        "--kv-heads",
        type=int,
        metavar="N",
        help="heads of key and value, if fewer (GQA)",
    )
    parser.add_argument("--causal", dest="is_causal", action="store_true")
    parser.add_argument(
        "--window",
        type=_window,
        default=(-1, -1),
        metavar="L,R",
        help="keys left and right of the diagonal, -1 for all: --window=-1,0",
    )
    parser.add_argument(
        "--q-lens", action="store_true", help="the call comes with real query lengths"
    )
    parser.add_argument(
        "--k-lens", action="store_true", help="the call comes with real key lengths"
    )
    parser.add_argument(
        "--device", type=_device, help="cpu, cuda or cuda:N (default: cuda if there is one)"
    )
    parser.add_argument("--grad", action="store_true", help="a gradient is wanted")
    parser.add_argument("--lse", action="store_true", help="the log-sum-exp is wanted")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.epilog = "Exit code: 0 something takes the call; 1 nothing does; 2 bad arguments."


def main(args: argparse.Namespace) -> int:
    """Print the answer; 0, 1 or 2."""
    try:
        call = parse_shape(args.shape, args.lk, args.kv_heads)
        settings = refresh()
    except ConfigError as error:
        return refuse("why", error)
    except ValueError as error:
        return refuse("why", f"--{error}" if str(error).startswith("shape ") else error)
    answer = explain(make_request(args, call, settings), call, settings)
    console.emit(json.dumps(answer, indent=2) if args.json else render(answer))
    return FINE if answer["backend"] else WRONG


def make_request(args: argparse.Namespace, call: Workload, settings: Settings) -> Request:
    """The call that the arguments describe, after the dtype policy, as wan_attn.sdpa makes it."""
    device = args.device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(args.dtype, None, device, settings.force_fp16)
    qk_dtype = args.qk_dtype or args.dtype
    # Only float32 is read beside another dtype; the rest is converted.
    if qk_dtype != torch.float32:
        qk_dtype = dtype
    return Request.of(
        call,
        dtype,
        device,
        qk_dtype=qk_dtype,
        is_causal=args.is_causal,
        window=args.window,
        has_q_lens=args.q_lens,
        has_k_lens=args.k_lens,
        needs_grad=args.grad,
        return_lse=args.lse,
    )


def explain(request: Request, call: Workload, settings: Settings) -> dict[str, Any]:
    """The choice, and every backend's and kernel row's own answer, as plain values."""
    error, backend, kernel = None, None, None
    try:
        choice = select(request, settings)
        backend, kernel = choice.backend, choice.kernel_name
    except RuntimeError as problem:  # nothing takes it, or WAN_ATTN_STRICT=1 and the named does not
        error = str(problem)
    asked = order(request, settings)
    backends = [
        {
            "name": name,
            "title": REGISTRY[name].TITLE,
            "reason": why_not(name, request, settings, version=None, wrapper_failed=False),
            "asked": name in asked,
            "chosen": name == backend,
        }
        for name in [*asked, *(name for name in REGISTRY if name not in asked)]
    ]
    unused = ""
    if op.binding() == "torch":
        unused = f"the native library is not used: {op.binding_reason()}"
    kernels = [
        {
            "index": k.index,
            "name": k.name,
            "description": k.description,
            "reason": unused or console.without_name(op.why_not(request, k.index), k.name),
        }
        for k in op.kernels()
    ]
    return {
        "schema": 1,
        "call": _describe(request, call),
        "note": _absent(request.device),
        "settings": {"forced_by": settings.forced_by, "strict": settings.strict},
        "backend": backend,
        "kernel": kernel,
        "error": error,
        "backends": backends,
        "kernels": kernels,
        "no_kernels": "" if kernels else op.binding_reason(),
    }


def _describe(request: Request, call: Workload) -> dict[str, Any]:
    return {
        "shape": call.shape,
        "title": call.title,
        "query": [request.batch, request.seqlen_q, request.num_heads_q, request.head_dim],
        "key": [request.batch, request.seqlen_k, request.num_heads_k, request.head_dim],
        "dtype": dtype_name(request.dtype),
        "qk_dtype": dtype_name(request.query_dtype),
        "device": str(request.device),
        "is_causal": request.is_causal,
        "window": list(request.window),
        "has_q_lens": request.has_q_lens,
        "has_k_lens": request.has_k_lens,
        "needs_grad": request.needs_grad,
        "return_lse": request.return_lse,
        "flops": call.flops,
    }


def render(answer: dict[str, Any]) -> str:
    """The answer as text."""
    call = answer["call"]
    dtype = (
        call["dtype"]
        if call["qk_dtype"] == call["dtype"]
        else f"{call['dtype']} (query, key {call['qk_dtype']})"
    )
    rows = [
        (
            "call",
            f"{call['shape']}  {call['title']}" if call["title"] != "as given" else call["shape"],
        ),
        ("query", f"{call['query']} on {call['device']}, {dtype}"),
        ("key, value", str(call["key"])),
        ("with", ", ".join(_options(call)) or "no mask, no lengths"),
        ("work", f"{_flop(call['flops'])} without masks"),
        ("settings", answer["settings"]["forced_by"] or "auto"),
        ("choice", _choice(answer)),
    ]
    if answer["note"]:
        rows.append(("note", answer["note"]))
    text = pairs(rows)
    states = [
        (b["name"], _state(b["reason"], b["chosen"], b["asked"]), b["reason"] or b["title"])
        for b in answer["backends"]
    ]
    text += f"\n{heading('backends', 'in the order in which they are asked')}\n{table(states)}"
    rows3 = [
        (
            k["name"],
            _state(k["reason"], k["name"] == answer["kernel"]),
            k["reason"] or k["description"],
        )
        for k in answer["kernels"]
        if not (k["reason"] or "").startswith("runs on ")
    ]
    text += f"\n{heading('kernels of sdpa', 'best first')}\n"
    if not rows3:
        return text + wrap(f"none: {answer['no_kernels']}")
    others = len(answer["kernels"]) - len(rows3)
    return text + table(rows3) + (f"\n  and {others} for other devices" if others else "")


def _choice(answer: dict[str, Any]) -> str:
    if answer["backend"] is None:
        return f"none. {answer['error']}"
    kernel = f", kernel {answer['kernel']}" if answer["kernel"] else ""
    return f"{answer['backend']}{kernel}"


def _state(reason: str | None, chosen: bool, asked: bool = True) -> str:
    if chosen:
        return "chosen"
    if reason is not None:
        return "no"
    return "available" if asked else "not asked"


def _flop(number: int) -> str:
    return f"{number / 1e12:.3g} TFLOP" if number >= 1e11 else f"{number / 1e9:.3g} GFLOP"


def _absent(device: torch.device) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cpu" or (device.index or 0) < count:
        return ""
    return f"there is no {device} here: this is what would be chosen without knowing the card"


def _options(call: dict[str, Any]) -> list[str]:
    words = {
        "is_causal": "causal",
        "has_q_lens": "q_lens",
        "has_k_lens": "k_lens",
        "needs_grad": "gradient",
        "return_lse": "lse",
    }
    said = [word for key, word in words.items() if call[key]]
    if call["window"] != [-1, -1]:
        said.append(f"window {call['window'][0]},{call['window'][1]}")
    return said


def _window(text: str) -> tuple[int, int]:
    parts = text.split(",")
    try:
        left, right = (int(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be two integers L,R (-1: no bound), got {text!r}"
        ) from None
    if min(left, right) < -1:
        raise argparse.ArgumentTypeError(f"must not be below -1, got {text!r}")
    return left, right


def _dtype(text: str) -> torch.dtype:
    try:
        return dtype_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("dtype ")) from None


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return device
