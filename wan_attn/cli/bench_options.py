# SPDX-License-Identifier: Apache-2.0
"""bench_options.py - options that bench's actions share, and words to values, with the rule in
the message where a word is none."""

from __future__ import annotations

import argparse
import re

import torch

from wan_attn.bench.model import Video
from wan_attn.log import DTYPES
from wan_attn.workloads import Model

SECONDS = 60.0


class BadOption(Exception):
    """An option holds something it must not; the message names it, the rule and what was given."""


def common(parser: argparse.ArgumentParser, *, is_action: bool) -> None:
    """Adds the options of every measuring action; before the action's name they set defaults."""

    def default(value: object) -> object:
        return argparse.SUPPRESS if is_action else value

    parser.add_argument(
        "--device",
        default=default(None),
        help="cpu, cuda or cuda:N (default: cuda if there is one)",
    )
    parser.add_argument(
        "--dtype", default=default(None), metavar="DTYPES", help="bf16, fp16, fp32, with commas"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=default(SECONDS),
        help=f"about how long to time calls, in all (default: {SECONDS:g})",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=default(None),
        metavar="N",
        help="how often each is timed; --seconds is then ignored",
    )
    parser.add_argument(
        "--threads", type=int, default=default(None), metavar="N", help="of the CPU"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        default=default(False),
        help="on a CPU that others use: the process's CPU time instead of the wall clock (with "
        "OMP_WAIT_POLICY=passive)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        default=default(False),
        help="real dimensions on a CPU too, where they are reduced otherwise",
    )
    parser.add_argument(
        "--out", default=default(None), metavar="FOLDER", help="write CSV, JSON, Markdown, pictures"
    )
    parser.add_argument(
        "--picture", choices=("svg", "png"), default=default("svg"), help="default: svg"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        default=default(False),
        help="print one JSON object instead of text",
    )


def words(texts: list[str]) -> list[str]:
    """Splits texts at commas."""
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]


def device(args: argparse.Namespace) -> torch.device:
    """Returns the device to measure; also checks and applies the other common numbers."""
    if not args.seconds > 0:
        raise BadOption(f"--seconds must be above 0, got {args.seconds:g}")
    if args.rounds is not None and args.rounds < 2:
        raise BadOption(f"--rounds must be at least 2, or there is no spread, got {args.rounds}")
    if args.threads is not None:
        if args.threads < 1:
            raise BadOption(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    found = named_device(args.device)
    if found.type == "cpu":
        return found
    if args.cpu_time:
        raise BadOption(f"--cpu-time must come with the CPU, got the device {str(found)!r}")
    torch.cuda.set_device(found)
    return found


def named_device(name: str | None) -> torch.device:
    """Returns the device of --device; cuda:N always with its number. None: cuda if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BadOption(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    found = torch.device(name)
    if found.type == "cpu":
        return found
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= count:
        raise BadOption(f"--device must exist, got {name!r} and torch sees {count} CUDA devices")
    return torch.device("cuda", found.index or 0)


def dtype(option: str, word: str) -> torch.dtype:
    """Returns one of DTYPES."""
    if word not in DTYPES:
        raise BadOption(f"{option} must be one of {', '.join(DTYPES)}; got {word!r}")
    return DTYPES[word]


def dtypes(args: argparse.Namespace, default: str) -> tuple[torch.dtype, ...]:
    """Returns the dtypes of --dtype."""
    found = tuple(dtype("--dtype", word) for word in words([args.dtype or default]))
    if not found:
        raise BadOption(f"--dtype must be one of {', '.join(DTYPES)}; got {args.dtype!r}")
    return found


def integer(option: str, word: str, least: int, most: int | None = None) -> int:
    """Returns a number within bounds."""
    rule = f"an integer of at least {least}" + (f" and at most {most}" if most else "")
    if not (word.isascii() and word.isdigit()):
        raise BadOption(f"{option} must be {rule}, got {word!r}")
    number = int(word)
    if number < least or (most is not None and number > most):
        raise BadOption(f"{option} must be {rule}, got {number}")
    return number


def integers(option: str, text: str, least: int) -> list[int]:
    """Returns some numbers, separated by commas."""
    found = [integer(option, word, least) for word in words([text])]
    if not found:
        raise BadOption(f"{option} must name at least one number, got {text!r}")
    return found


def size(word: str) -> tuple[int, int]:
    """Parses WxH, or W*H as Wan2.2 writes it."""
    match = re.fullmatch(r"(\d+)[x*](\d+)", word, re.ASCII)
    if match is None:
        raise BadOption(f"--size must be WxH (896x512), got {word!r}")
    return int(match[1]), int(match[2])


def videos(sizes: list[tuple[int, int]], lengths: list[int], model: Model) -> tuple[Video, ...]:
    """Returns each size with each number of frames; refuses what the model has no tokens for."""
    found = tuple(Video(w, h, f) for w, h in sizes for f in lengths)
    for video in found:
        try:
            model.tokens(video.width, video.height, video.frames)
        except ValueError as error:
            option = "--frames" if str(error).startswith("frames") else "--size"
            raise BadOption(f"{option}: {error}") from error
    return found


def shares(text: str, batch: int) -> tuple[float, ...]:
    """Parses one share in (0, 1] for all samples, or one for each."""
    try:
        found = tuple(float(word) for word in words([text]))
    except ValueError:
        found = ()
    if len(found) not in (1, batch) or not all(0 < share <= 1 for share in found):
        raise BadOption(
            f"--fill must be one number above 0 and at most 1, or one for each of {batch} samples, "
            f"got {text!r}"
        )
    return found
