# SPDX-License-Identifier: Apache-2.0
"""prove.py - `wan-attn prove`: tries the CUDA kernels on this machine's cards in child processes,
and keeps what it finds; every other program uses only what has passed."""

from __future__ import annotations

import argparse

import torch

from wan_attn import config, console, log
from wan_attn.cli import FINE, WRONG, refuse
from wan_attn.doctor import proofs
from wan_attn.doctor.facts import cuda_devices
from wan_attn.native import op
from wan_attn.selfcheck import proof
from wan_attn.selfcheck.verdicts import PASSED, Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `prove`."""
    parser.add_argument(
        "--device", type=int, metavar="N", help="only cuda:N (default: all cards of this machine)"
    )
    parser.add_argument(
        "--again", action="store_true", help="try kernels that have passed once more, too"
    )
    parser.epilog = (
        "Without --again it tries what has no verdict and what has failed. Exit code: 0 every"
        " kernel that the card can run has passed; 1 one has not; 2 there is nothing to try."
    )


def main(args: argparse.Namespace) -> int:
    """Print each card's table; 0, 1 or 2."""
    try:
        settings = config.current()
    except config.ConfigError as error:
        return refuse("prove", error)
    why = why_nothing(args.device)
    if why is not None:
        return refuse("prove", why)
    log.enable(settings.log_level, owner="prove")
    count = torch.cuda.device_count()
    is_fine = True
    for index in range(count) if args.device is None else (args.device,):
        found = proof.again(index, everything=args.again)
        is_fine &= isinstance(found, Verdict) and found.names(PASSED) == list(found.rows)
        console.emit(proofs.render(proofs.facts(index)))
    return FINE if is_fine else WRONG


def why_nothing(index: int | None) -> str | None:
    """Why there is nothing to try here; None: there is something."""
    if op.binding() == "torch":
        return f"the native library is not used: {op.binding_reason()}"
    if torch.version.hip is not None:
        return "this torch is made for AMD GPUs, and our CUDA kernels are not"
    if not torch.cuda.is_available():
        return f"no CUDA device here: {cuda_devices()[1]}"
    count = torch.cuda.device_count()
    if index is not None and not 0 <= index < count:
        return f"--device must be below {count}, the number of CUDA devices, got {index}"
    return None
