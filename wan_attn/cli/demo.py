# SPDX-License-Identifier: Apache-2.0
"""demo.py - `wan-attn demo`: a short video with and without wan_attn, compared."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import torch

from wan_attn import config
from wan_attn.cli import FINE, WRONG, refuse
from wan_attn.demo import wan22
from wan_attn.demo.options import DTYPES, DemoError, Options, resolve, writable_folder

FPS, FPS_RANDOM = 16, 8  # Wan's; slower where the forms mean nothing and the video is short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `demo`."""
    add = parser.add_argument
    add("--output", default="demo-out", metavar="DIR", help="where the files go (demo-out)")
    add("--model", metavar="DIR", help="weights in diffusers' format; without: small random ones")
    add(
        "--ckpt-dir", metavar="DIR", help="Wan-AI's original weights: runs generate.py of WAN22_DIR"
    )
    add("--task", choices=wan22.TASKS, help="with --ckpt-dir, if the folder's name does not tell")
    add("--prompt", help="what the video shows (random weights: just changes it)")
    add("--frames", type=int, metavar="N", help="4n + 1 (25)")
    add("--height", type=int, metavar="N", help="a multiple of 16, some models 32 (224)")
    add("--width", type=int, metavar="N", help="a multiple of 16, some models 32 (400)")
    add("--steps", type=int, metavar="N", help="denoising steps (6)")
    add("--seed", type=int, default=0, metavar="N", help="of noise and random weights (0)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bfloat16 on a GPU")
    add("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1 ...")
    add("--quick", action="store_true", help="the smallest run that shows anything, in seconds")


def main(args: argparse.Namespace) -> int:
    """Run the demo."""
    try:
        if args.ckpt_dir is not None:
            return _stock_wan22(args)
        if args.task is not None:
            raise DemoError("--task goes with --ckpt-dir: pass both or neither")
        return _diffusers(_options(args))
    except (DemoError, config.ConfigError) as error:
        return refuse("demo", error)
    except torch.cuda.OutOfMemoryError:
        return refuse(
            "demo",
            "the GPU's memory is too small for this: take fewer --frames, or a smaller --height "
            "and --width",
            WRONG,
        )


def _options(args: argparse.Namespace) -> Options:
    return resolve(
        model=args.model,
        output=args.output,
        prompt=args.prompt,
        seed=args.seed,
        dtype=args.dtype,
        device=args.device,
        is_quick=args.quick,
        frames=args.frames,
        height=args.height,
        width=args.width,
        steps=args.steps,
    )


def _diffusers(options: Options) -> int:
    # These import diffusers' and Pillow's worlds: only after the options are known to be good.
    from wan_attn.demo import compare, pipeline, render, report, runs, text
    from wan_attn.demo.probe import Recorder, probe

    config.current()  # a bad variable: now, not in the middle
    start = time.perf_counter()
    print(text.opening(options), flush=True)
    subject = pipeline.make(options)

    stock = runs.stock(subject, options, "1/3 stock")
    _say("1/3 stock", stock.median_step_seconds, "diffusers' own attention")
    recorder = Recorder()
    ours, layers, records = runs.through_wan_attn(subject, options, "2/3 wan_attn", recorder)
    _say("2/3 wan_attn", ours.median_step_seconds, recorder.titles)
    rounding = runs.other_rounding(subject, options, "3/3 rounding")
    print(
        "  3/3 rounding    stock again with another order of sums: what rounding alone changes",
        flush=True,
    )

    picture = options.output / "compare.png"
    amplification = render.write_sheet(
        stock.frames, ours.frames, ("stock", recorder.titles), picture
    )
    found = report.Findings(
        options=options,
        stock=stock,
        ours=ours,
        layers=layers,
        recorder=recorder,
        probe=probe(recorder),
        comparisons=compare.compare(stock, ours, rounding, recorder.dtype),
        log=tuple(record.getMessage() for record in records),
        warnings=tuple(r.getMessage() for r in records if r.levelno >= logging.WARNING),
        video=render.write_video(ours.frames, options.output, FPS if options.model else FPS_RANDOM),
        picture=picture,
        amplification=amplification,
        seconds=time.perf_counter() - start,
    )
    _write_json(options.output, report.as_dict(found))
    (options.output / "report.md").write_text(text.markdown(found), encoding="utf-8")
    print(text.closing(found))
    return FINE if found.is_same else WRONG


def _say(label: str, seconds: float, note: str) -> None:
    from wan_attn.demo.text import duration

    print(f"  {label:<14} {duration(seconds):>8} a step   {note}", flush=True)


def _write_json(folder: Path, content: dict[str, object]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")


def _stock_wan22(args: argparse.Namespace) -> int:
    if args.model is not None:
        raise DemoError("--model and --ckpt-dir are two formats of weights: pass one of them")
    for option, is_set in (
        ("--dtype", args.dtype != "auto"),
        ("--device", args.device != "auto"),
        ("--quick", args.quick),
    ):
        if is_set:
            raise DemoError(f"{option} means nothing to Wan2.2's generate.py: leave it out")
    asked = wan22.Asked(
        weights=Path(args.ckpt_dir),
        task=args.task,
        output=Path(args.output),
        prompt=args.prompt,
        seed=args.seed,
        frames=args.frames,
        height=args.height,
        width=args.width,
        steps=args.steps,
    )
    words = wan22.command(asked, config.current().wan22_dir)
    writable_folder(asked.output)
    start = time.perf_counter()
    exit_code = wan22.run(words)
    content = wan22.report(words, exit_code, time.perf_counter() - start)
    _write_json(asked.output, content)
    print(f"\nResult: {content['result']} after {content['seconds']} s; files in {asked.output}")
    return exit_code
