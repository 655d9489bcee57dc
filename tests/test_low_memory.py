# SPDX-License-Identifier: Apache-2.0
"""test_low_memory.py - no operand is held longer than it is needed, and none is copied for nothing.

Peaks are bytes that torch's profiler has seen, against sums made by hand; who is dead when a
backend runs is asked of weak references.
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from calls import BF16, F16, F32, check, operands, row_id, rows
from cuda_mock.gpu import CARDS, Gpu
from emu.build import compiler
from test_cuda_launch import check as check_on_gpu
from test_cuda_launch import normal
from tolerances import assert_close_to_oracle
from wan_attn import config, flash_attention, sdpa
from wan_attn.backends import REGISTRY, reads_float32
from wan_attn.bench.accuracy import peak_bytes
from wan_attn.integrations import comfyui, wan2gp
from wan_attn.integrations.wan22.adapters import make_flash_attention
from wan_attn.native import kernels, library
from wan_attn.request import Request

# Before 3.11 a caller's frame keeps what it hands to a function until that returns.
moves = pytest.mark.skipif(sys.version_info < (3, 11), reason="callers hold arguments before 3.11")

IN_SUITE = "PYTEST_XDIST_WORKER" in os.environ

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest) -> None:
    if IN_SUITE and request.function is not test_in_a_process_of_its_own:
        pytest.skip("runs in test_in_a_process_of_its_own")


def test_in_a_process_of_its_own() -> None:
    """Where torch.compile has met an error, callers hold operands from then on."""
    if not IN_SUITE:
        pytest.skip("this is such a process")
    env = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    peaks = Path(__file__).with_name("test_doctor_memory.py")
    others = f"{peaks}::test_the_peak_is_what_is_allocated"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, others]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets variables of ours."""

    def set_them(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        config.refresh()

    yield set_them
    monkeypatch.undo()
    config.refresh()


def rotated(x: Tensor) -> Tensor:
    """As Wan2.2's rope_apply: a new float32 tensor, which the caller gives away."""
    return x.float()


class Given:
    """Operands that are made for one call, and which of them are alive while a backend runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []
        self.ran: list[tuple[Any, ...]] = []
        module: Any = REGISTRY[backend]
        run = module.run

        def spied(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
            self.alive = [i for i, made in enumerate(self.made) if made() is not None]
            self.ran.append((query.dtype, key.dtype, value.dtype))
            return run(query, key, value, *rest)

        monkeypatch.setattr(module, "run", spied)

    def __call__(self, x: Tensor, dtype: torch.dtype = F32) -> Tensor:
        made = x.to(dtype, copy=True)
        self.made.append(weakref.ref(made))
        return made


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cast(Tensor, sdpa(q, k, v))


# Peaks: 1 x 2048 x 8 x 64 elements are 2^20: 4 MiB in float32, 2 MiB in bfloat16.


@moves
@pytest.mark.parametrize(
    ("backend", "out_dtype", "mib"),
    [
        # q and k in float32 and the one that is converted first: 4 + 4 + 2. Beside q, k and the
        # result in bfloat16 the kernel has some 2 MiB of its own, and the result becomes float32
        # when q and k are gone.
        ("torch", None, 10.0),
        ("torch", BF16, 10.0),
        ("chunked", None, 10.0),
        # q, k and the result: 4 + 4 + 4, or + 2 in v's dtype; the workspace comes on top.
        ("sdpa", None, 12.0),
        ("sdpa", BF16, 10.0),
    ],
)
def test_the_peak_of_wan22s_call(
    backend: str, out_dtype: Any, mib: float, force: Any, native: str
) -> None:
    force(USE_ATTENTION_BACKEND=backend)
    q, k, v = operands(1, 2048, 2048, heads_q=8, dtype=BF16)
    request = Request(1, 2048, 2048, 8, 8, 64, BF16, F32, F32, CPU)

    def call() -> Tensor:
        lens = torch.tensor([2048])
        return flash_attention(q=rotated(q), k=rotated(k), v=v, k_lens=lens, out_dtype=out_dtype)

    out = call()  # what is allocated once does not count
    assert out.dtype == (out_dtype or F32)
    peak, _ = peak_bytes(call, CPU)
    if peak is None:
        pytest.skip("this torch's profiler does not report allocations")
    workspace = workspace_of(request) if backend == "sdpa" else 0
    assert mib * MIB <= peak - workspace < mib * MIB + 4096


def workspace_of(request: Request) -> int:
    found = kernels.workspace_bytes(request)
    assert found is not None
    return found


@moves
def test_the_result_is_converted_when_the_operands_are_gone(force: Any) -> None:
    """q in float32 and bfloat16 beside k and v: 4 + 2 + 2 + 2, and less than that for PyTorch. The
    result in both dtypes is 2 + 4 on its own, and would be 12 beside what it came from."""
    force(USE_ATTENTION_BACKEND="torch")
    q, k, v = operands(1, 2048, 2048, heads_q=8, dtype=BF16)

    def call() -> Tensor:
        return flash_attention(rotated(q), k.clone(), v.clone())

    call()
    peak, _ = peak_bytes(call, CPU)
    if peak is None:
        pytest.skip("this torch's profiler does not report allocations")
    assert 10 * MIB <= peak < 10 * MIB + 4096


# Who is alive while the backend runs.


@moves
@pytest.mark.parametrize("backend", ["torch", "chunked"])
@pytest.mark.parametrize("patched", [False, True], ids=["ours", "patched Wan2.2"])
def test_what_is_converted_is_let_go_of(
    backend: str, patched: bool, force: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Given(monkeypatch, backend)
    force(USE_ATTENTION_BACKEND=backend)
    q, k, v = operands(dtype=BF16)
    function = make_flash_attention(flash_attention) if patched else flash_attention
    for _ in range(2):  # with a plan and without
        out = function(q=given(q), k=given(k), v=v)
        assert given.alive == [] and given.ran.pop() == (BF16, BF16, BF16)
        assert out.dtype == F32
    assert_close_to_oracle(out.to(BF16), q, k, v)
    out = cast(Tensor, sdpa(given(q), given(k), v))
    assert given.alive == [] and out.dtype == F32


def test_a_caller_that_keeps_its_operands_finds_them_as_they_were(force: Any) -> None:
    q, k, v = operands(dtype=(F32, F32, BF16))
    before = [x.clone() for x in (q, k, v)]
    for backend in ("torch", "sdpa", "chunked"):
        force(USE_ATTENTION_BACKEND=backend)
        flash_attention(q, k, v)
        assert all(map(torch.equal, (q, k, v), before))


@moves
@pytest.mark.parametrize("k_batch", [2, 1])
def test_wan2gps_list(k_batch: int, force: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its list holds the only references; its modes convert to v's dtype, as this does."""
    given = Given(monkeypatch, "torch")
    force(USE_ATTENTION_BACKEND="torch")
    pay_attention = wan2gp.make_pay_attention(lambda qkv_list: None)
    q, k, v = operands(batch=2, dtype=BF16)
    held = [given(q), given(k[:k_batch]), v[:k_batch]]
    out = pay_attention(held, recycle_q=True)
    assert held == [] and given.alive == [] and out.dtype == F32
    k, v = (x[:k_batch].expand_as(k) for x in (k, v))
    assert_close_to_oracle(out.to(BF16), q, k, v)


class Container:
    """ComfyUI's AttentionTensorContainer."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def take(self) -> Tensor:
        tensor, self.tensor = self.tensor, None
        assert tensor is not None
        return tensor


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_comfyuis_containers(
    skip_reshape: bool, force: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Python 3.10 as well: only the containers hold the tensors."""
    given = Given(monkeypatch, "torch")
    force(USE_ATTENTION_BACKEND="torch", WAN_FORCE_FP16="1")
    q, k, v = operands(dtype=BF16)

    def laid_out(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if skip_reshape else x.flatten(2)

    boxes = [Container(given(laid_out(x), BF16)) for x in (q, k, v)]
    override: Any = comfyui.make_override(None, cast(Any, None))
    out = override.container_function(*boxes, heads=2, skip_reshape=skip_reshape)
    assert given.alive == [] and given.ran == [(F16, F16, F16)]
    assert [box.tensor for box in boxes] == [None] * 3
    assert torch.equal(out, expected(q, k, v).flatten(2)) and out.dtype == BF16


def test_comfyuis_containers_and_what_wan_attn_leaves() -> None:
    """The fallback gets the tensors and every option by its name."""
    got: list[Any] = []

    def fallback(*args: Any, **kwargs: Any) -> Tensor:
        got.extend((args, kwargs))
        return torch.empty(())

    q, k, v = (x.flatten(2) for x in operands())
    mask = torch.ones(17, 33)
    override: Any = comfyui.make_override(None, fallback)
    override.container_function(*map(Container, (q, k, v)), 2, mask, scale=0.5)
    (*tensors, heads), options = got
    assert all(map(torch.equal, tensors, (q, k, v))) and heads == 2
    assert options == {"mask": mask, "scale": 0.5}


def test_an_override_behind_ours_gets_what_comfyui_unpacks() -> None:
    """It wants the function that ComfyUI would have called, which comes with tensors alone."""
    override = comfyui.make_override(lambda function, *args, **kwargs: function, cast(Any, None))
    assert not hasattr(override, "container_function")


# What a kernel reads where it lies.


@pytest.mark.parametrize("row", rows(), ids=row_id)
def test_cpu_rows_read_float32_in_place(
    row: Any, force: Any, monkeypatch: pytest.MonkeyPatch, native: str
) -> None:
    """The op gets the caller's own memory, in any mix of dtypes; nothing is converted before."""
    force(USE_ATTENTION_BACKEND="sdpa")
    seen: list[tuple[int, torch.dtype]] = []
    module: Any = REGISTRY["sdpa"]
    op = module._op

    def spied(*args: Any, **options: Any) -> Any:
        seen.extend((x.data_ptr(), x.dtype) for x in args[:3])
        return op(*args, **(options | {"kernel": row.index}))

    monkeypatch.setattr(module, "_op", spied)
    half = next(dtype for dtype in (BF16, F16, F32) if dtype in row.dtypes)
    for dtypes in ((F32, F32, half), (F32, half, half), (half, F32, half)):
        q, k, v = operands(dtype=dtypes, seqlen_q=40)
        seen.clear()
        out = flash_attention(q, k, v, dtype=half)
        assert seen == [(x.data_ptr(), x.dtype) for x in (q, k, v)]
        assert_close_to_oracle(out, q, k, v)


@pytest.mark.parametrize("row", rows(), ids=row_id)
@pytest.mark.parametrize("seqlen_q", [3, 70])
def test_a_row_writes_values_dtype_where_asked(row: Any, seqlen_q: int) -> None:
    """The same numbers, rounded once: by the kernel instead of afterwards."""
    for half in (BF16, F16):
        if row is not None and half not in row.dtypes:
            continue
        q, k, v = operands(2, seqlen_q, 33, dtype=(F32, F32, half))
        wide, _ = check(row, q, k, v)
        options = {} if row is None else {"kernel": row.index}
        out, _ = torch.ops.wan_attn.sdpa(q, k, v, out_like_value=True, **options)
        assert out.dtype == half and torch.equal(out, wide.to(half))


def test_out_dtype_everywhere(force: Any) -> None:
    q, k, v = operands(dtype=(F32, F32, BF16))
    for backend in ("torch", "sdpa", "chunked"):
        force(USE_ATTENTION_BACKEND=backend)
        for dtype in (F32, F16, BF16):
            for out in (
                flash_attention(q, k, v, out_dtype=dtype),
                flash_attention(q, k, v, q_scale=torch.ones(()), out_dtype=dtype),
                cast(Tensor, sdpa(q, k, v, out_dtype=dtype)),
            ):
                assert out.dtype == dtype
                assert_close_to_oracle(out.float(), q, k, v)


def test_out_dtype_in_a_graph() -> None:
    q, k, v = operands(dtype=(F32, F32, BF16))
    compiled: Any = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v, out_dtype=BF16)
    assert torch.equal(out, flash_attention(q, k, v, out_dtype=BF16)) and out.dtype == BF16


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, "float32", 16])
def test_an_out_dtype_that_is_none(dtype: Any) -> None:
    for function in (sdpa, flash_attention):
        with pytest.raises(RuntimeError, match="wan_attn: out_dtype must be None, torch.float16, "):
            cast(Any, function)(*operands(), out_dtype=dtype)


def test_the_dtype_of_the_result_where_q_scale_changes_qs() -> None:
    q, k, v = operands(dtype=BF16)
    assert flash_attention(q, k, v, q_scale=torch.ones(64)).dtype == BF16


needs_mock = pytest.mark.skipif(
    compiler() is None or library.load() is None, reason="no C++ compiler, or no native library"
)


@needs_mock
@pytest.mark.parametrize(
    ("arch", "seqlen_q", "head_dim", "reads"),
    [
        (75, 512, 128, (True, False)),
        (80, 512, 128, (True, False)),
        (89, 512, 64, (True, False)),
        (90, 512, 128, (False, False)),
        (90, 512, 80, (True, False)),  # the row of sm_80
        (90, 100, 128, (False, False)),
        (80, 0, 128, (True, False)),
    ],
)
def test_what_cuda_rows_copy_is_converted_by_who_can_let_go(
    arch: int,
    seqlen_q: int,
    head_dim: int,
    reads: tuple[bool, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They have room for K in their workspaces, those of sm_90 for Q as well."""
    gpu = Gpu(tmp_path, CARDS[arch])
    monkeypatch.setattr(library, "load", lambda: gpu.lib)
    monkeypatch.setattr(library, "lib", lambda: gpu.lib)
    half = F16 if arch == 75 else BF16
    request = Request(2, seqlen_q, 640, 6, 3, head_dim, half, F32, F32, CUDA)
    assert reads_float32("sdpa", request) == reads
    for backend in ("fa2", "fa3", "xformers", "torch", "sage", "comfy_kitchen"):
        assert reads_float32(backend, request) == (False, False)


@needs_mock
@pytest.mark.parametrize("arch", (75, 80, 90))
@pytest.mark.parametrize("seqlen_k", (133, 4200), ids=("whole", "split"))
def test_cuda_rows_write_values_dtype_where_asked(arch: int, seqlen_k: int, tmp_path: Path) -> None:
    gpu, half = Gpu(tmp_path, CARDS[arch]), F16 if arch == 75 else BF16
    query, key, value = normal(9, seqlen_k, 1, 1, 64, dtype=half, q_dtype=F32, k_dtype=F32)
    wide = torch.zeros_like(query)
    narrow = wide.to(half)
    for out in (wide, narrow):
        check_on_gpu(gpu, query, key, value, out=out)
    assert torch.equal(narrow, wide.to(half))


# A backend that fails.


@moves
def test_the_next_backend_gets_what_the_failed_one_would_have_read(
    force: Any, monkeypatch: pytest.MonkeyPatch, native: str
) -> None:
    """The originals are gone by then; the result still has their dtype."""
    force(USE_ATTENTION_BACKEND="chunked")
    chunked: Any = REGISTRY["chunked"]

    def fails(*args: Any) -> Any:
        raise TypeError("not today")

    given = Given(monkeypatch, "torch")
    monkeypatch.setattr(chunked, "run", fails)
    q, k, v = operands(dtype=BF16)
    out = flash_attention(given(q), given(k), v)
    assert given.alive == [] and given.ran == [(BF16, BF16, BF16)] and out.dtype == F32
    assert_close_to_oracle(out.to(BF16), q, k, v)
