# SPDX-License-Identifier: Apache-2.0
"""test_transient.py - what a signal handler raises during a call, and want of memory, reach their
owner and are not held against a backend, a package or a compiler."""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import wan_attn
from calls import F32, operands
from wan_attn import config
from wan_attn.backends import REGISTRY, _flash_attention, _torch_kernels, native
from wan_attn.cuda import images, nvrtc, store
from wan_attn.integrations import _rebind
from wan_attn.integrations.wan22.compile import CompiledForward
from wan_attn.native import cuda_driver, library, shim
from wan_attn.selection import run
from wan_attn.signatures import _masked, _operands
from wan_attn.transient import is_interruption, is_out_of_memory, is_transient

ERRORS = (TimeoutError, OSError, RuntimeError, ValueError, AssertionError, KeyError)
SIGNAL = signal.SIGINT  # every system has it


class Object:
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __call__(self, number: int, frame: Any) -> None:
        raise self.error("time is up")

    def once(self, number: int, frame: Any) -> None:
        """As those that put back what was there before."""
        signal.signal(SIGNAL, signal.SIG_IGN)
        raise self.error("time is up")

    def loose(self, *args: Any) -> None:
        signal.signal(SIGNAL, signal.SIG_IGN)
        raise self.error("time is up")

    def more(self, text: str, number: int, frame: Any) -> None:
        raise self.error(text)


def handlers(error: type[Exception]) -> dict[str, Callable[..., Any]]:
    one = Object(error)
    partial = functools.partial(one.more, "time is up")
    return {"object": one, "once": one.once, "loose": one.loose, "partial": partial}


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    before = signal.getsignal(SIGNAL)
    config.forget()
    yield
    signal.signal(SIGNAL, before)
    config.forget()


@pytest.mark.parametrize("kind", ["object", "once", "loose", "partial"])
@pytest.mark.parametrize("error", ERRORS)
def test_it_arrives_and_the_backend_stays(
    error: type[Exception], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = REGISTRY["sdpa"].run, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(SIGNAL)
        return plain(*args)

    monkeypatch.setattr(native, "why_not", lambda request: None)
    monkeypatch.setattr(REGISTRY["sdpa"], "run", interrupted)
    signal.signal(SIGNAL, handlers(error)[kind])
    q, k, v = operands(dtype=F32)
    with pytest.raises(error, match="time is up"):
        wan_attn.sdpa(q, k, v)
    wan_attn.sdpa(q, k, v)
    assert len(calls) == 2


def test_a_kernel_of_torchs_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> Tensor:
        signal.raise_signal(SIGNAL)
        return torch.zeros(())

    signal.signal(SIGNAL, Object(RuntimeError))
    order = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    monkeypatch.setattr(_torch_kernels, "order_for", lambda device: order)
    monkeypatch.setattr(_torch_kernels, "SDPA", interrupted)
    q, k, v = (x.transpose(1, 2) for x in operands(dtype=F32, heads_q=1, heads_k=1))
    with pytest.raises(RuntimeError, match="time is up"):
        _torch_kernels.attend(q, k, v, None, False, 1.0, 0.0)
    assert not _torch_kernels._refused


def test_while_operands_and_masks_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's own RuntimeError is an answer: this tensor has no strides. No mask's is."""

    class Operand:
        def stride(self, dim: int) -> int:
            signal.raise_signal(SIGNAL)
            return 1

    signal.signal(SIGNAL, Object(RuntimeError))
    with pytest.raises(RuntimeError, match="time is up"):
        run._readable(*[Operand()] * 3)  # type: ignore[arg-type]
    monkeypatch.setattr(_operands, "broadcasts", lambda *_: signal.raise_signal(SIGNAL))
    q, k, v = (x.transpose(1, 2) for x in operands(dtype=F32, heads_q=1, heads_k=1))
    with pytest.raises(RuntimeError, match="time is up"):
        _masked.attend(q, k, v, torch.ones(1, dtype=torch.bool), None, "mask")


def test_while_flash_attention_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(SIGNAL, Object(TimeoutError))
    monkeypatch.setattr(importlib, "import_module", lambda name: signal.raise_signal(SIGNAL))
    with pytest.raises(TimeoutError):
        _flash_attention.load("flash_attn")


def test_while_a_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(SIGNAL, Object(TimeoutError))

    def interrupted(*_: Any) -> bytes:
        signal.raise_signal(SIGNAL)
        return b""

    monkeypatch.setattr(images, "image", interrupted)
    text = (ctypes.c_char * 100)()
    find: Any = cuda_driver._find_image
    assert find(b"row", 80, None, None, text, 100) == 1
    with pytest.raises(TimeoutError, match="time is up"):
        cuda_driver.raise_interruption()


def test_what_a_backend_raises_is_none() -> None:
    try:
        raise RuntimeError("kernel exploded")
    except RuntimeError as error:
        assert not is_interruption(error)
    assert is_interruption(KeyboardInterrupt())


NO_MEMORY = {
    "python": MemoryError(),
    "torch": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "driver": RuntimeError("cuModuleLoadData failed: out of memory"),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    "C++": RuntimeError("std::bad_alloc"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    "NVRTC": nvrtc.NvrtcError("nvrtcCompileProgram failed: NVRTC_ERROR_OUT_OF_MEMORY"),
    "dynamo": RuntimeError("backend='inductor' raised:\nMemoryError: "),
    "fork": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "loader": OSError("x.so: failed to map segment from shared object: Cannot allocate memory"),
    "import": ImportError("x.so: cannot map zero-fill pages: Cannot allocate memory"),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_want_of_memory_is_known(kind: str) -> None:
    assert is_out_of_memory(NO_MEMORY[kind]) and is_transient(NO_MEMORY[kind])


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),  # a value's text
        OSError(errno.ENOENT, "no such file"),
        ImportError("x.so: cannot allocate memory in static TLS block"),
        RuntimeError("No available kernel. Aborting execution."),
    ],
)
def test_what_stays_so_is_not_want_of_memory(error: Exception) -> None:
    assert not is_transient(error)


def raiser(error: BaseException) -> Callable[..., Any]:
    """A function that raises `error`, or makes the signal's handler raise."""

    def function(*_: Any, **__: Any) -> Any:
        if isinstance(error, KeyboardInterrupt):
            signal.raise_signal(SIGNAL)
        raise error

    return function


# KeyboardInterrupt stands for the handler, whose TimeoutError is an OSError by nature.
TRANSIENT = [KeyboardInterrupt(), NO_MEMORY["fork"]]


@pytest.fixture(params=TRANSIENT, ids=["interruption", "no memory"])
def transient(request: pytest.FixtureRequest) -> Callable[..., Any]:
    signal.signal(SIGNAL, Object(TimeoutError))
    return raiser(request.param)


def raises_it() -> Any:
    return pytest.raises(OSError, match="time is up|Cannot allocate memory")


@pytest.mark.parametrize("error", [MemoryError(), NO_MEMORY["torch"], NO_MEMORY["C++"]])
def test_no_memory_while_flash_attention_is_imported(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have been «installed but broken» until the process ends."""
    monkeypatch.setattr(importlib, "import_module", raiser(error))
    with pytest.raises(type(error)):
        _flash_attention.load("flash_attn")


def test_a_package_that_a_host_tries_to_import(transient: Callable[..., Any]) -> None:
    """Wan2.2 would have taken it for absent, and kept that."""
    hook = _rebind.ImportHook("owned", lambda module: None, ("fragile",))
    with raises_it():
        hook.execute_fragile(type("Loader", (), {"exec_module": transient}), ModuleType("fragile"))
    assert not hook.broken


def test_our_own_libraries(transient: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "opened", transient)
    with raises_it():
        library._open.__wrapped__()
    if shim.why_not() is None:
        monkeypatch.setattr(ctypes, "CDLL", transient)
        with raises_it():
            shim.load()
    monkeypatch.setattr(ctypes, "CDLL", transient)
    with raises_it():
        nvrtc._open(nvrtc.Found(Path("libnvrtc.so.12"), None, (12, 8)))


def test_the_cache_of_kernels(
    transient: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It would have been damaged, not trusted, empty, or not kept."""
    monkeypatch.setattr(store, "contents", transient)
    with raises_it():
        images._read(tmp_path, "sdpa")
    monkeypatch.setattr(store, "make_private", transient)
    monkeypatch.setattr(images, "cache_folder", lambda: tmp_path)
    with raises_it():
        images._keep(images._jobs(["wan_attn_merge"], 80)[0], (12, 8), b"")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "lstat", transient)
        for ask in (images._may_look, store.problem, store.is_there):
            with raises_it():
                ask(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", transient)
        with raises_it():
            store.names(tmp_path)


def test_a_compiler_without_memory_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = images._jobs(["wan_attn_merge"], 80)
    images.forget()
    monkeypatch.setattr(nvrtc, "found", lambda: ("here",))
    monkeypatch.setattr(nvrtc, "load", raiser(NO_MEMORY["NVRTC"]))
    with pytest.raises(images.ImageError, match="OUT_OF_MEMORY") as caught:
        images._make(job)
    assert job not in images._failed and is_out_of_memory(caught.value)
    monkeypatch.setattr(nvrtc, "load", raiser(nvrtc.NvrtcError("no such option")))
    with pytest.raises(images.ImageError):
        images._make(job)
    assert job in images._failed, "an error of the source is final"
    images._failed.clear()


@pytest.mark.parametrize("where", ["compiler", "tracer"])
def test_while_torch_compiles_a_block(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is not switched off, and the owner gets what it raised, not torch's wrapper."""

    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    signal.signal(SIGNAL, Object(TimeoutError))
    interrupts = [True]

    def interrupt() -> None:
        if interrupts:
            interrupts.pop()
            signal.raise_signal(SIGNAL)

    def backend(graph: Any, _: Any) -> Any:
        if where == "compiler":
            interrupt()
        return graph

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend=backend))
    if where == "tracer":
        from torch._dynamo.symbolic_convert import InstructionTranslator as Tracer

        run = Tracer.run

        def interrupted_run(self: Any) -> Any:
            interrupt()
            return run(self)

        monkeypatch.setattr(Tracer, "run", interrupted_run)
    torch._dynamo.reset()
    forward = CompiledForward(Block)
    forward.install()
    with pytest.raises(TimeoutError, match="time is up"):
        Block()(torch.ones(2))
    assert forward.why_off is None
    assert Block()(torch.ones(2)).tolist() == [2.0, 2.0] and forward.why_off is None
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["python", "torch", "dynamo", "fork"])
def test_no_memory_while_torch_compiles_a_block(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    monkeypatch.setattr(torch, "compile", lambda f: raiser(NO_MEMORY[kind]))
    forward = CompiledForward(Block)
    with pytest.raises(type(NO_MEMORY[kind])):
        forward._call(Block(), (torch.ones(2),), {})
    assert forward.why_off is None


IMPORTS_TWICE = """
import signal, sys

def handler(number, frame):
    raise TimeoutError("time is up")

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "wan_attn.merge":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, handler)
sys.meta_path.insert(0, Finder())
try:
    import wan_attn
except TimeoutError:
    import wan_attn, torch
    x = torch.ones(1, 2, 1, 8)
    print(wan_attn.sdpa(x, x, x).sum().item())
"""


def test_importing_wan_attn_may_be_tried_again() -> None:
    """The package would have said for good that it cannot be used here."""
    done = subprocess.run([sys.executable, "-c", IMPORTS_TWICE], capture_output=True, text=True)
    assert done.stdout.strip() == "16.0", done.stderr
