# SPDX-License-Identifier: Apache-2.0
"""why.py - `wan-attn why`: the choice for one call and every refusal; no tensors, no GPU needed."""

from __future__ import annotations

import argparse
import json
import re

import torch

from wan_attn import console
from wan_attn.cli import FINE, WRONG, refuse
from wan_attn.config import ConfigError, Settings, refresh
from wan_attn.doctor.explain import explain, render
from wan_attn.log import dtype_of
from wan_attn.request import Request
from wan_attn.selection.choose import compute_dtype
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
    parser.set_defaults(refuse=parser.error)
    parser.epilog = "Exit code: 0 something takes the call; 1 nothing does; 2 bad arguments."


def main(args: argparse.Namespace) -> int:
    """Print the answer; 0, 1 or 2."""
    try:
        call = parse_shape(args.shape, args.lk, args.kv_heads)
        settings = refresh()
    except ConfigError as error:
        return refuse("why", error)
    except ValueError as error:  # said as argparse says what it finds itself
        args.refuse(re.sub("^shape ", "argument --shape: ", str(error)))
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
