# SPDX-License-Identifier: Apache-2.0
"""bench_rope.py - the options of `wan-attn bench rope`: parses and checks; wan_attn/bench/rope.py
measures."""

from __future__ import annotations

import argparse

import torch

from wan_attn.bench import rope
from wan_attn.bench.model import ARCHS, CPU_FRAMES, Arch, Video
from wan_attn.cli import bench_options
from wan_attn.cli.bench_options import BadOption

CPU_LENGTHS = (CPU_FRAMES, 21)  # 2 and 6 latent frames: what a CPU does in a minute


def add(parser: argparse.ArgumentParser) -> None:
    """Options of the action beside the common ones."""
    parser.add_argument("--model", choices=ARCHS, default="ti2v-5b", help="default: ti2v-5b")
    parser.add_argument("--size", metavar="WxH", help="several with commas; default: the model's")
    parser.add_argument(
        "--frames",
        metavar="N",
        help=f"several with commas; default: the model's, on a CPU {CPU_LENGTHS[0]},"
        f"{CPU_LENGTHS[1]} unless --full",
    )
    parser.add_argument(
        "--routes",
        metavar="NAMES",
        help="only these, and stock Wan2.2's; `compiled` (torch.compile) runs only where named; an "
        "unknown name lists all",
    )


def options(args: argparse.Namespace) -> rope.Options:
    """Checked.

    Raises:
        BadOption: names the option, the rule and what was given.
    """
    device = bench_options.device(args)
    arch = ARCHS[args.model]
    wanted = bench_options.words([args.routes]) if args.routes is not None else None
    try:
        rope.chosen([""] if wanted == [] else wanted)
    except ValueError as error:
        raise BadOption(str(error)) from error
    return rope.Options(
        device=device,
        arch=arch,
        videos=_videos(args, arch, device),
        dtypes=bench_options.dtypes(args, "bf16"),
        wanted=wanted,
        seconds=args.seconds,
        rounds=args.rounds,
        cpu_time=args.cpu_time,
    )


def _videos(args: argparse.Namespace, arch: Arch, device: torch.device) -> tuple[Video, ...]:
    sizes = [arch.size]
    if args.size is not None:
        sizes = [bench_options.size(word) for word in bench_options.words([args.size])]
    is_small = device.type != "cuda" and not args.full
    lengths = list(CPU_LENGTHS) if is_small else [arch.frames]
    if args.frames is not None:
        lengths = bench_options.integers("--frames", args.frames, 1)
    return bench_options.videos(sizes, lengths, arch.call)
