# SPDX-License-Identifier: Apache-2.0
"""profile.py - WAN_ATTN_PROFILE=FILE: how long each attention call of a real run took, and where;
norm and rotation of q and k beside it, where our kernels do them.

Off, it costs one comparison a call. On, it marks each call with two events of the device (a clock
on the CPU), waits for nothing, and reads the marks when they have long passed and at exit. A call
is told by the line of the program that made it and, where that belongs to a module of a model, by
the module's name: blocks.7.self_attn.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from wan_attn import config
from wan_attn.request import Request
from wan_attn.store import processes
from wan_attn.tuning import clocks

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_HOME = os.path.expanduser("~").rstrip(os.sep) + os.sep
DRAIN_EVERY = 512  # calls between two looks at marks that have passed


OnExit = Callable[["Recorder", float], None]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a call came from.

    Attributes:
        line: file:line function of the first frame that is not ours.
        model: class of the model with a number, "" where no module made the call.
        layer: name of the module within it.
    """

    line: str
    model: str
    layer: str


ATTENTION, ROPE = "attention", "norm and RoPE"
"""What a mark is of."""


@dataclass(slots=True)
class Mark:
    """One call: when it began and ended, in events or in seconds."""

    site: Site
    kind: str
    title: str
    device: torch.device
    begin: Any
    end: Any
    host: float  # seconds since the recorder began
    begin_ms: float = -1.0
    ms: float = -1.0
    part: str = ATTENTION


class Recorder:
    """Marks of one process, and what they say at exit.

    Args:
        path: the JSON file.
        api: torch.cuda, or a stand-in.
        on_exit: gets the recorder, all its times read, and the seconds since it began: it writes
            the file and the summary.
    """

    def __init__(self, path: str, api: Any = torch.cuda, on_exit: OnExit | None = None) -> None:
        self.path, self.api, self.on_exit = path, api, on_exit
        self.marks: list[Mark] = []
        self.began = time.perf_counter()
        self.date = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
        self.rank: int | None = None
        self.not_timed = 0
        self._lock = threading.Lock()
        # By id; weak, because a program may drop a model to make room for another.
        self._names: dict[int, tuple[weakref.ref[Any], str, str]] = {}
        self._models: list[tuple[weakref.ref[Any], str]] = []
        self._first: dict[torch.device, Any] = {}  # events of two devices cannot be compared
        self._unread = 0

    @property
    def device(self) -> torch.device:
        """Whose times these are."""
        return next(iter(self._first), torch.device("cpu"))

    def start(self, device: torch.device) -> Any:
        """Before a call; None where it cannot be timed: a CUDA graph is being captured."""
        begun = clocks.mark(device, self.api)
        if begun is None:
            self.not_timed += 1
        elif device.type == "cuda":
            self._first.setdefault(device, begun)
        return begun

    def stop(self, begun: Any, request: Request, title: str) -> None:
        """After an attention call; `title` is what ran."""
        lengths = f"{request.seqlen_q}"
        if request.seqlen_k != request.seqlen_q:
            lengths += f":{request.seqlen_k}"
        shape = f"{request.batch}x{lengths}x{request.num_heads_q}x{request.head_dim}"
        self._stop(begun, request.device, shape, request.dtype, title, ATTENTION)

    def stop_rope(self, begun: Any, x: torch.Tensor, title: str) -> None:
        """After norm and rotation of x [batch, seqlen, heads, head_dim]."""
        self._stop(begun, x.device, "x".join(map(str, x.shape)), x.dtype, title, ROPE)

    def _stop(
        self,
        begun: Any,
        device: torch.device,
        shape: str,
        dtype: torch.dtype,
        title: str,
        part: str,
    ) -> None:
        if begun is None:
            return
        host = time.perf_counter() - self.began
        end = clocks.mark(device, self.api)
        if end is None:  # its capture has begun meanwhile
            return
        site = self._site(sys._getframe(2))
        kind = f"{shape} {str(dtype).removeprefix('torch.')}"
        mark = Mark(site, kind, title, device, begun, end, host, part=part)
        with self._lock:
            self.marks.append(mark)
            if self.rank is None:
                self.rank = processes.rank()
            is_time = len(self.marks) % DRAIN_EVERY == 0
        if is_time:
            self.drain(wait=False)

    def _site(self, frame: FrameType | None) -> Site:
        """The first frame outside this package, and the names of the modules around it."""
        while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        inner = frame
        # A module whose forward is ours is called by torch; the program's line is the one before.
        while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        if inner is None or frame is None or frame.f_code.co_filename.startswith("<frozen"):
            return Site("wan_attn itself", "", "")  # python -m wan_attn demo
        code = frame.f_code
        file = code.co_filename
        if file.startswith(_HOME):  # people share these files
            file = "~" + file[len(_HOME) - 1 :]
        file = "/".join(file.replace("\\", "/").split("/")[-3:])
        function = getattr(code, "co_qualname", code.co_name)  # Python 3.11 and newer
        line = f"{file}:{frame.f_lineno} {function}"
        module, outer = _modules(inner)
        if module is None:
            return Site(line, "", "")
        known = self._names.get(id(module))
        if known is None or known[0]() is not module:
            known = (weakref.ref(module), *self._name(module, outer))
            self._names[id(module)] = known
        return Site(line, known[1], known[2])

    def _name(self, module: Any, outer: list[Any]) -> tuple[str, str]:
        """(model, layer): the outermost module on the stack that has this one inside."""
        for root in reversed(outer):
            for name, inner in root.named_modules():
                if inner is module and name:
                    return self._model_title(root), str(name)
        return type(module).__name__, ""

    def _model_title(self, root: Any) -> str:
        """Its class; the second one of a class is Class#2."""
        for known, title in self._models:
            if known() is root:
                return title
        name = type(root).__name__
        same = sum(title.partition("#")[0] == name for _, title in self._models)
        self._models.append((weakref.ref(root), name + (f"#{same + 1}" if same else "")))
        return self._models[-1][1]

    def drain(self, wait: bool) -> None:
        """Turn marks into milliseconds: all after `wait`, else those that have passed."""
        with self._lock:
            marks = self.marks[self._unread :]
        if wait:
            for device in self._first:
                self.api.synchronize(device)
        for mark in marks:
            if isinstance(mark.end, float):
                mark.begin_ms = (mark.begin - self.began) * 1e3
                mark.ms = (mark.end - mark.begin) * 1e3
            elif wait or mark.end.query():
                mark.begin_ms = float(self._first[mark.device].elapsed_time(mark.begin))
                mark.ms = float(mark.begin.elapsed_time(mark.end))
                mark.begin = mark.end = None  # a long run makes many
            else:
                break
            self._unread += 1

    def finish(self) -> None:
        """Read what is left, and hand all to on_exit; at exit, or where recording ends before."""
        global _recorder
        atexit.unregister(self.finish)
        if _recorder is self:
            _recorder = None
        self.drain(wait=True)
        if self.on_exit is not None:
            self.on_exit(self, time.perf_counter() - self.began)


def _modules(frame: FrameType) -> tuple[Any, list[Any]]:
    """(the innermost torch module that is running, it and those around it from inside out)."""
    found: list[Any] = []
    for each in itertools.islice(_frames(frame), 200):
        names = each.f_code.co_varnames
        if names[:1] == ("self",) and each.f_code.co_argcount:
            owner = each.f_locals.get("self")
            if isinstance(owner, torch.nn.Module) and (not found or owner is not found[-1]):
                found.append(owner)
    return (found[0], found) if found else (None, [])


def _frames(frame: FrameType | None) -> Any:
    while frame is not None:
        yield frame
        frame = frame.f_back


_recorder: Recorder | None = None
_start_lock = threading.Lock()
_report: OnExit | None = None


def report_with(on_exit: OnExit) -> None:
    """What each recorder of this process hands its times to; it lies above us, in bench/."""
    global _report
    _report = on_exit


def recorder(path: str) -> Recorder:
    """The one of this process, begun now if there was none."""
    global _recorder
    with _start_lock:
        if _recorder is None:
            _recorder = Recorder(path, on_exit=_report)
            atexit.register(_recorder.finish)
        return _recorder


def _obey(settings: config.Settings) -> None:
    """Ends the recording to a file that WAN_ATTN_PROFILE no longer names."""
    if _recorder is not None and _recorder.path != settings.profile:
        _recorder.finish()


config.follow(_obey)
