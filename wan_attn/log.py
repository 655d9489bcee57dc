# SPDX-License-Identifier: Apache-2.0
"""log.py - what logger `wan_attn` says, each thing once; knows no backend.

Nothing is shown until `enable()` (which `wan_attn.patch()` calls) or until the program sets up
logging itself.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Hashable
from dataclasses import replace

import torch

from wan_attn import config
from wan_attn.request import Request

LOGGER = logging.getLogger("wan_attn")
PREFIX = "[Attention]"

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}
# The names that users read and write, and the dtypes in the order in which they are shown.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_lock = threading.Lock()
_said: set[Hashable] = set()
_described: set[Hashable] = set()
# A workload whose shapes never repeat stops being described. Nothing else is ever kept back: what
# else was said is forgotten, rather than grow for ever, and may be said again.
_SAID_MAX = 4096


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic only for type checkers
    """Shows our lines on stderr, unless the program's root logger shows them already."""

    def emit(self, record: logging.LogRecord) -> None:
        if not (LOGGER.propagate and logging.getLogger().handlers):
            self.stream = sys.stderr  # today's, which tests and notebooks replace
            super().emit(record)


_handler = _StderrHandler()
_handler.setFormatter(logging.Formatter("%(message)s"))
_level_before: int | None = None
_owners: set[str] = set()
_settings: config.Settings | None = None  # those that were seen last


def enable(level: str = "info", owner: str = "patch") -> None:
    """Make the lines visible on stderr; `level` is a value of WAN_ATTN_LOG. Twice is once.

    `owner` says for whom: the lines stay visible until disable() was called for each one.
    """
    global _level_before
    with _lock:
        _owners.add(owner)
        if _handler not in LOGGER.handlers:
            _level_before = LOGGER.level
            LOGGER.addHandler(_handler)
        LOGGER.setLevel(_LEVELS[level])


def disable(owner: str = "patch") -> None:
    """Undo enable() of this owner."""
    global _level_before
    with _lock:
        _owners.discard(owner)
        if not _owners and _handler in LOGGER.handlers:
            LOGGER.removeHandler(_handler)
            LOGGER.setLevel(logging.NOTSET if _level_before is None else _level_before)
            _level_before = None


def once(key: Hashable, level: int, message: str) -> bool:
    """Log `message` unless something was logged under `key` before; says whether it did."""
    with _lock:
        if key in _said:
            return False
        if len(_said) >= _SAID_MAX:
            _said.clear()
        _said.add(key)
    LOGGER.log(level, "%s %s", PREFIX, message)
    return True


def traced(level: int, message: str) -> None:
    """once(), each message once, also where torch.compile traces: it says it while it does."""
    once(message, level, message)


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler.
traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget() -> None:
    """Say everything again; for tests and for a new run in the same process."""
    global _settings
    with _lock:
        _said.clear()
        _described.clear()
        _settings = None


def _obey(settings: config.Settings) -> None:
    """Shows as much as they ask for, describes calls again, and names what has to wait."""
    global _settings
    before, _settings = _settings, settings
    if _handler in LOGGER.handlers:
        LOGGER.setLevel(_LEVELS[settings.log_level])
    if before is None:
        for sentence in config.unknown():
            once(sentence, logging.WARNING, sentence)
        return
    with _lock:
        _said.clear()
        _described.clear()
    for variable in config.VARIABLES:
        is_changed = getattr(before, variable.field) != getattr(settings, variable.field)
        if is_changed and variable.waits_for:
            text = f"{variable.name} has changed, which takes effect with {variable.waits_for}"
            LOGGER.warning("%s %s", PREFIX, text)


config.memory(forget)
config.follow(_obey)


def dtype_name(dtype: torch.dtype) -> str:
    """fp16, bf16, fp32, as users write them."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def dtype_of(word: str) -> torch.dtype:
    """The dtype that a user names: bf16, bfloat16, fp16, float16, half, fp32, float32.

    Raises:
        ValueError: it is none of these.
    """
    long = {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    try:
        return DTYPES[long.get(word, word)]
    except KeyError:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {word!r}") from None


def describe(
    title: str, backend: str, reasons: str, request: Request, pairs: int | None
) -> tuple[str, ...]:
    """The three lines of one configuration, without the prefix.

    Args:
        title: what runs, as users know it: "PyTorch SDPA", "wan_attn SDPA (sdpa_ref)".
        backend: its name in USE_ATTENTION_BACKEND.
        reasons: why not the ones before it; "" if there were none.
        pairs: query-key pairs at the real lengths, summed over the batch; None where the lengths
            live on a device, which is not made to wait for a line of text.
    """
    trains = request.needs_grad or request.dropout_p > 0
    mode = "training" if trains else "inference"
    dropout = f"{request.dropout_p:g} (training)" if trains else "disabled (inference)"
    shape = f"[B={request.batch}, Lq={request.seqlen_q}, Lk={request.seqlen_k}]"
    padded = request.batch * request.seqlen_q * request.seqlen_k
    if pairs is None:
        actual, ratio = "? (lengths are on the device)", "?"
    else:
        actual, ratio = str(pairs), f"{pairs / padded if padded else 1.0:.2f}"
    bracket = f" ({reasons})" if reasons else ""
    return (
        f"Using {title}{bracket}, dropout={dropout}",
        f"Config: backend={backend}, dtype={dtype_name(request.dtype)}, mode={mode}, shape={shape},"
        f" dropout={request.dropout_p:g}",
        f"Computation: actual={actual}, batch={padded}, ratio={ratio}",
    )


def configuration(
    title: str,
    backend: str,
    reasons: str,
    request: Request,
    pairs: int | None,
    level: int = logging.INFO,
) -> None:
    """Log the three lines of describe(), once per configuration, of which only so many are told.

    A language model that decodes has one key more at every token: those are one configuration.
    Beyond the last one a warning, that another backend runs than the one that was asked for, is
    still given: once for each reason, without the shape.
    """
    is_decoding = request.seqlen_q == 1
    key = (title, backend, reasons, replace(request, seqlen_k=0) if is_decoding else request)
    lines = describe(title, backend, reasons, request, pairs)
    with _lock:
        if key in _described:
            return
        is_last = len(_described) == _SAID_MAX
        is_too_many = len(_described) > _SAID_MAX
        if not is_too_many:
            _described.add(key)
    if is_too_many:
        if level >= logging.WARNING:
            once(key[:3], level, lines[0])
        return
    if is_last:
        lines = (f"{lines[0]} (too many different calls: no more of them will be described)",)
    for line in lines:
        LOGGER.log(level, "%s %s", PREFIX, line)


def compile_enabled() -> None:
    """The line of WAN_COMPILE=1, once per process."""
    once("compile", logging.INFO, "torch.compile enabled for optimization")
