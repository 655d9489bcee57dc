# SPDX-License-Identifier: Apache-2.0
"""runs.py - one denoising run, timed: stock, through wan_attn, or stock with other rounding."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from wan_attn import log
from wan_attn.backends._torch_kernels import SDPA
from wan_attn.demo.options import Options
from wan_attn.demo.pipeline import Subject
from wan_attn.demo.probe import Recorder
from wan_attn.integrations import diffusers as wan_diffusers

SCORES_MAX = 1 << 26  # scores that OtherRounding holds at once: 256 MiB in float32


@dataclass(frozen=True, slots=True)
class Run:
    """What one run returns: times, latents after the first and the last step, frames in 0..1."""

    step_seconds: tuple[float, ...]
    first: Tensor
    last: Tensor
    frames: NDArray[np.float32]  # [frames, height, width, 3]

    @property
    def median_step_seconds(self) -> float:
        """The median without the first step, which also warms up."""
        return statistics.median(self.step_seconds[1:] or self.step_seconds)


def stock(subject: Subject, options: Options, label: str) -> Run:
    """Runs diffusers as it is."""
    return _denoise(subject, options, label)


def through_wan_attn(
    subject: Subject, options: Options, label: str, recorder: Recorder
) -> tuple[Run, int, list[logging.LogRecord]]:
    """Runs with wan_attn's attention; also returns how many layers used it, and the log."""
    layers = 0
    with _logged() as records:
        try:
            for transformer in subject.transformers:
                layers += wan_diffusers.replace_processors(transformer, recorder)
            run = _denoise(subject, options, label)
        finally:
            for transformer in subject.transformers:
                wan_diffusers.restore_processors(transformer)
    return run, layers, records


def other_rounding(subject: Subject, options: Options, label: str) -> Run:
    """Runs diffusers on torch's unfused SDPA: the same mathematics, in another order."""
    with _OtherRounding():
        return _denoise(subject, options, label)


class _ListHandler(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextlib.contextmanager
def _logged() -> Iterator[list[logging.LogRecord]]:
    """What logger `wan_attn` says: which backend really ran, and whether one failed."""
    records: list[logging.LogRecord] = []
    handler = _ListHandler(records)
    level, propagates = log.LOGGER.level, log.LOGGER.propagate
    log.forget()
    log.LOGGER.addHandler(handler)
    log.LOGGER.setLevel(logging.INFO)
    log.LOGGER.propagate = False
    try:
        yield records
    finally:
        log.LOGGER.propagate = propagates
        log.LOGGER.setLevel(level)
        log.LOGGER.removeHandler(handler)


class _OtherRounding(TorchFunctionMode):
    """Takes every scaled_dot_product_attention to torch's math kernel, some rows at a time."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not SDPA:
            return func(*args, **kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            if len(args) != 3 or kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
                return func(*args, **kwargs)
            query, key, value = args
            batch, heads, _, _ = query.shape
            rows = max(1, SCORES_MAX // (batch * heads * key.shape[2]))
            return torch.cat(
                [func(q, key, value, **kwargs) for q in query.split(rows, dim=2)], dim=2
            )


class _Watch:
    """Notes when steps end, and the latents after the first and the last of them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.times: list[float] = []
        self.latents: list[Tensor] = []

    def now(self) -> float:
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)
        return time.perf_counter()

    def before_model(self, *_: Any) -> None:
        if not self.times:
            self.times.append(self.now())

    def after_step(self, _pipe: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.times.append(self.now())
        if step in (0, self.options.size.steps - 1):
            self.latents.append(tensors["latents"].detach().float().cpu())
        return {}


@contextlib.contextmanager
def _hooked(subject: Subject, watch: _Watch) -> Iterator[None]:
    handle = subject.transformers[0].register_forward_pre_hook(watch.before_model)
    try:
        yield
    finally:
        handle.remove()


def _denoise(subject: Subject, options: Options, label: str) -> Run:
    watch = _Watch(options)
    # No bar where stderr is not a terminal; a width, because some terminals do not tell theirs.
    subject.pipe.set_progress_bar_config(desc=f"  {label}", leave=False, disable=None, ncols=80)
    with _hooked(subject, watch):
        frames = subject.pipe(
            prompt=options.prompt,
            num_frames=options.size.frames,
            height=options.size.height,
            width=options.size.width,
            num_inference_steps=options.size.steps,
            latents=subject.latents,
            generator=torch.Generator().manual_seed(options.seed),
            callback_on_step_end=watch.after_step,
            output_type="np",
        ).frames[0]
    ends = watch.times
    return Run(
        step_seconds=tuple(after - before for before, after in zip(ends, ends[1:], strict=False)),
        first=watch.latents[0],
        last=watch.latents[-1],
        frames=np.asarray(frames, dtype=np.float32),
    )
