# SPDX-License-Identifier: Apache-2.0
"""bench.py - `wan-attn bench`: measure kernels and denoising steps, compare two measurements.

Parses and checks; wan_attn/bench measures. Without a further word: a short run of both, with files
to share.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from wan_attn import config, console
from wan_attn.bench import (
    backward,
    compare,
    kernels,
    peers,
    plots,
    progress,
    report,
    rope,
    sparse,
    step,
    suite,
)
from wan_attn.bench.model import ARCHS, CPU_FRAMES, Arch, ModelError, Video
from wan_attn.cli import FINE, WRONG, bench_options, bench_rope, bench_sparse, refuse
from wan_attn.cli.bench_options import BadOption
from wan_attn.selfcheck import proof
from wan_attn.workloads import WORKLOADS, parse_shape

DEFAULT_FOLDER = "wan-attn-bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench` and of its actions."""
    bench_options.common(parser, is_action=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    for name, (add, _, summary) in ACTIONS.items():
        sub = actions.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            allow_abbrev=False,
        )
        add(sub)
        if name != "compare":
            bench_options.common(sub, is_action=True)
    parser.epilog = (
        "Exit code: 0 measured, or no regression; 1 nothing could be measured, or `compare` found "
        "a regression; 2 bad arguments."
    )


def main(args: argparse.Namespace) -> int:
    """Run the action; 0, 1 or 2."""
    action = ACTIONS[args.action][1] if args.action else _short
    try:
        config.refresh()
        if args.action != "compare":
            proof.before_work()
        return action(args)
    except (BadOption, ModelError, compare.CompareError, config.ConfigError) as error:
        return refuse("bench", error)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        return refuse("bench", f"the device failed: {text}", WRONG)


# --- kernels ----------------------------------------------------------------------------------


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        metavar="SHAPE",
        help="BxLxHxD (1x27280x24x128), BxLq:LkxHxD, MODEL:WxHxFRAMES, or a name: "
        f"{', '.join(WORKLOADS)}; several with commas. On a CPU named ones are scaled down, "
        "unless --full",
    )
    parser.add_argument(
        "--kernels", metavar="NAMES", help="only these, and torch; an unknown name lists all"
    )
    parser.add_argument(
        "--qk-dtype", metavar="DTYPE", help="of query and key, if another: Wan2.2 passes fp32"
    )


# --- backward ---------------------------------------------------------------------------------

BACKWARD_SHAPES = ("1x4096x4x128", "1x8192x4x64")


def _add_backward(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        metavar="SHAPE",
        help=f"as of `bench kernels`; default: {', '.join(BACKWARD_SHAPES)}",
    )


def _backward(args: argparse.Namespace) -> int:
    args.shape = args.shape or list(BACKWARD_SHAPES)
    found = _kernels_options(args)
    options = backward.Options(
        found.shapes, found.dtypes, found.seconds, found.rounds, found.cpu_time, found.device
    )
    return _finish(args, backward.run(options))


# --- kernels' options -------------------------------------------------------------------------


def _kernels_options(args: argparse.Namespace) -> kernels.Options:
    device = bench_options.device(args)
    dtypes = bench_options.dtypes(args, "bf16" if device.type == "cuda" else "bf16,fp32")
    shapes = []
    for text in bench_options.words(getattr(args, "shape", None) or []):
        try:
            call = parse_shape(text)
        except ValueError as error:
            raise BadOption(
                f"--{error}" if str(error).startswith("shape ") else str(error)
            ) from error
        if 0 in (call.seqlen_q, call.seqlen_k):
            raise BadOption(f"--shape must have lengths of at least 1, got {text!r}")
        is_named = call.title != "as given"
        if is_named and device.type != "cuda" and not args.full:
            call = kernels.scaled(call)
        shapes.append(call)
    if not shapes:
        shapes = list(kernels.default_shapes(device))
        if args.full and device.type != "cuda":
            shapes = [WORKLOADS[name] for name in kernels.CPU_SHAPES]
    qk = getattr(args, "qk_dtype", None)
    wanted = getattr(args, "kernels", None)
    options = kernels.Options(
        device=device,
        shapes=tuple(shapes),
        dtypes=dtypes,
        qk_dtype=bench_options.dtype("--qk-dtype", qk) if qk else None,
        wanted=bench_options.words([wanted]) if wanted is not None else None,
        seconds=args.seconds,
        rounds=args.rounds,
        cpu_time=args.cpu_time,
    )
    if options.qk_dtype not in (None, torch.float32) and options.dtypes != (options.qk_dtype,):
        raise BadOption(f"--qk-dtype must be fp32 or that of --dtype, got {qk!r}")
    try:
        peers.choose(peers.all_peers(device), options.wanted)
    except ValueError as error:
        raise BadOption(str(error)) from error
    return options


def _kernels(args: argparse.Namespace) -> int:
    return _finish(args, kernels.run(_kernels_options(args)))


# --- step -------------------------------------------------------------------------------------


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=ARCHS, default="ti2v-5b", help="default: ti2v-5b")
    parser.add_argument(
        "--size",
        metavar="WxH",
        help="several with commas; default: 896x512,1152x640,1344x768, on a GPU also the model's",
    )
    parser.add_argument("--frames", metavar="N", help="several with commas; default: the model's")
    parser.add_argument(
        "--layers", default="2", metavar="N", help="blocks that are run, or `all`; default: 2"
    )
    parser.add_argument("--backends", metavar="NAMES", help="only these, with commas")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument(
        "--fill",
        default="1",
        metavar="SHARES",
        help="how much of each sample is real: 1,0.5 with --batch 2",
    )
    parser.add_argument(
        "--source",
        choices=("diffusers", "wan22"),
        help="whose transformer; default: wan22 where WAN22_DIR is set, else diffusers",
    )


def _step_options(args: argparse.Namespace) -> step.Options:
    device = bench_options.device(args)
    name = getattr(args, "model", "ti2v-5b")
    arch, is_reduced = step.default_arch(name, device, args.full)
    layers_text = getattr(args, "layers", "2")
    layers = (
        arch.call.layers
        if layers_text == "all"
        else bench_options.integer("--layers", layers_text, 1, arch.call.layers)
    )
    known = [route.name for route in step.routes(device)]
    backends = getattr(args, "backends", None)
    wanted = bench_options.words([backends]) if backends is not None else None
    for word in wanted or ():
        if word not in known:
            raise BadOption(f"--backends must name some of {', '.join(known)}; got {word!r}")
    if wanted == []:
        raise BadOption(f"--backends must name some of {', '.join(known)}; got nothing")
    batch = getattr(args, "batch", 1)
    if batch < 1:
        raise BadOption(f"--batch must be at least 1, got {batch}")
    return step.Options(
        device=device,
        arch=arch,
        layers=layers,
        videos=_videos(args, arch, device),
        dtypes=bench_options.dtypes(args, "bf16"),
        wanted=wanted,
        batch=batch,
        fill=bench_options.shares(getattr(args, "fill", "1"), batch),
        wan22=_checkout(getattr(args, "source", None)),
        seconds=args.seconds,
        rounds=args.rounds,
        is_reduced=is_reduced,
        cpu_time=args.cpu_time,
    )


def _videos(args: argparse.Namespace, arch: Arch, device: torch.device) -> tuple[Video, ...]:
    size, frames = getattr(args, "size", None), getattr(args, "frames", None)
    is_small = device.type != "cuda" and not args.full
    sizes = list(step.PUBLISHED) if is_small else [*step.PUBLISHED, arch.size]
    if size is not None:
        sizes = [bench_options.size(word) for word in bench_options.words([size])]
    lengths = [CPU_FRAMES if is_small else arch.frames]
    if frames is not None:
        lengths = bench_options.integers("--frames", frames, 1)
    return bench_options.videos(sizes, lengths, arch.call)


def _checkout(source: str | None) -> Path | None:
    folder = config.current().wan22_dir
    if source == "diffusers" or (source is None and folder is None):
        return None
    if folder is None:
        raise BadOption("--source wan22 needs WAN22_DIR, the folder of a checkout of Wan2.2")
    return Path(folder)


def _step(args: argparse.Namespace) -> int:
    return _finish(args, step.run(_step_options(args)))


def _rope(args: argparse.Namespace) -> int:
    return _finish(args, rope.run(bench_rope.options(args)))


def _sparse(args: argparse.Namespace) -> int:
    return _finish(args, sparse.run(bench_sparse.options(args)))


# --- suite and compare ------------------------------------------------------------------------


def _add_suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--test-frames", metavar="N", help="lengths of video, with commas: 25,49,81"
    )
    parser.add_argument("--settings", metavar="NAME", help=f"one of {', '.join(suite.SETTINGS)}")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.csv")
    parser.add_argument(
        "--blocks", type=int, default=suite.BLOCKS, metavar="N", help="times that all is made anew"
    )
    parser.add_argument("--backends", metavar="NAMES", help="only these, with commas")


def _suite(args: argparse.Namespace) -> int:
    device = bench_options.device(args)
    if args.output.suffix != ".csv":
        raise BadOption(f"--output must end in .csv, got {str(args.output)!r}")
    if args.blocks < 1:
        raise BadOption(f"--blocks must be at least 1, got {args.blocks}")
    frames = suite.default_frames(device)
    if args.test_frames is not None:
        frames = tuple(bench_options.integers("--test-frames", args.test_frames, 1))
    name = args.settings or suite.default_setting(device)
    try:
        options = suite.step_options(name, frames, device)
    except ValueError as error:
        text = str(error)
        raise BadOption(text if text.startswith("--") else f"--test-frames: {text}") from error
    if args.backends is not None:
        known = [route.name for route in step.routes(device)]
        wanted = bench_options.words([args.backends])
        for word in wanted or [""]:
            if word not in known:
                raise BadOption(f"--backends must name some of {', '.join(known)}; got {word!r}")
        options = replace(options, wanted=wanted)
    options = replace(options, rounds=args.rounds, wan22=_checkout(None), cpu_time=args.cpu_time)
    args.out = None  # --output is where it goes
    result = suite.run(name, options, args.blocks)
    return _finish(args, result, stem=args.output.with_suffix(""))


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", type=Path, metavar="BASELINE.csv")
    parser.add_argument("new", type=Path, metavar="NEW.csv")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _compare(args: argparse.Namespace) -> int:
    result = compare.compare(args.baseline, args.new)
    _show(args, [result])
    return WRONG if compare.has_regression(result.rows) else FINE


# --- without an action ------------------------------------------------------------------------


def _short(args: argparse.Namespace) -> int:
    """Measures kernels and a step, each in half of the time; writes files for an issue."""
    args.seconds /= 2
    first = _kernels_options(args)
    second = _step_options(args)
    bar = progress.make(
        len(first.dtypes) * (1 + len(first.shapes)) + len(second.dtypes) * len(second.videos)
    )
    results = [kernels.run(first, bar)]
    problem = ""
    try:
        results.append(step.run(second, bar))
    except ModelError as error:  # the kernels are worth showing without it
        problem = f"no step was measured: {error}"
        results[0].note([problem])
    _show(args, results)
    folder = Path(args.out or DEFAULT_FOLDER)
    for result in results:
        _save(args, result, folder / result.kind)
    print(f"\nTo share: paste {folder / 'kernels.md'} into an issue.", file=sys.stderr)
    return FINE if any(result.rows for result in results) else WRONG


def _finish(args: argparse.Namespace, result: report.Report, stem: Path | None = None) -> int:
    _show(args, [result])
    if stem is None and args.out:
        stem = Path(args.out) / result.kind
    if stem is not None:
        _save(args, result, stem)
    return FINE if result.rows else WRONG


def _show(args: argparse.Namespace, results: list[report.Report]) -> None:
    if args.json:
        found = [report.as_dict(result) for result in results]
        console.emit(json.dumps(found[0] if len(found) == 1 else found, indent=1))
        return
    for result in results:
        console.emit(report.as_text(result))


def _save(args: argparse.Namespace, result: report.Report, stem: Path) -> None:
    """Writes files and pictures. A picture that cannot be drawn is said once, and is no failure."""
    try:
        paths = report.write(result, stem)
    except OSError as error:
        raise BadOption(f"{stem.parent} cannot be written to: {error}") from error
    try:
        paths += plots.draw(result, stem, f".{args.picture}")
    except plots.NoPicture as reason:
        print(reason, file=sys.stderr)
    print("written: " + " ".join(str(path) for path in paths), file=sys.stderr)


Adder = Callable[[argparse.ArgumentParser], None]
ACTIONS: dict[str, tuple[Adder, Callable[[argparse.Namespace], int], str]] = {
    "kernels": (_add_kernels, _kernels, "our kernels beside every other that is installed"),
    "backward": (_add_backward, _backward, "gradients by our kernels, and by torch's"),
    "step": (_add_step, _step, "one denoising step of a stack of Wan blocks, per backend"),
    "rope": (bench_rope.add, _rope, "RMS norm and RoPE of one query, on every route"),
    "sparse": (bench_sparse.add, _sparse, "blocks of keys left out: density, error and time"),
    "suite": (_add_suite, _suite, "steps over several lengths of video, as a file for `compare`"),
    "compare": (_add_compare, _compare, "two files of `suite`: slower, faster, or the same"),
}
