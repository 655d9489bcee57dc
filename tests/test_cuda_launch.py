# SPDX-License-Identifier: Apache-2.0
"""test_cuda_launch.py - whole calls on a CUDA device: C ABI, loader, every pass, on the mock driver
and the emulated GPU (tests/cuda_mock), against the oracle.

What this proves is the host side: geometry, arguments, workspace, which passes a call needs, in
which order, on which stream and device. The kernels have tests of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_mock.gpu import CARDS, STREAM, Card, Gpu
from emu.build import compiler
from tolerances import assert_close_to_oracle
from wan_attn.backends._errors import is_device_error
from wan_attn.native import kernels, library, op
from wan_attn.request import Request

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler (clang++ or g++)"),
    pytest.mark.skipif(library.load() is None, reason="no native library"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[Gpu]:
    machine = Gpu(tmp_path, CARDS[80])
    yield machine
    assert machine.driver.mock_depth() == 0, "a context was left on the stack"


def normal(
    seqlen_q: int = 70,
    seqlen_k: int = 133,
    heads_q: int = 2,
    heads_k: int = 1,
    head_dim: int = 64,
    batch: int = 2,
    dtype: torch.dtype = BF16,
    q_dtype: torch.dtype | None = None,
    k_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(batch, seqlen_q, heads_q, head_dim)
    key, value = torch.randn(2, batch, seqlen_k, heads_k, head_dim)
    return query.to(q_dtype or dtype), key.to(k_dtype or dtype), value.to(dtype)


def check(gpu: Gpu, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> list[str]:
    """Runs the call, holds it against the oracle, returns the kernels that were launched."""
    gpu.log()
    out, lse = gpu.sdpa(query, key, value, **call)
    for name in ("lens_on_device", "kernel", "device", "out", "lse"):
        call.pop(name, None)
    rounded = out.to(value.dtype)
    if (
        query.dtype != value.dtype
    ):  # what the kernels multiply; their sums are judged as 16-bit ones
        query = query.to(value.dtype)
    assert_close_to_oracle(rounded, query, key.to(value.dtype), value, lse=lse, **call)
    return [line.split()[1] for line in gpu.log() if line.startswith("launch")]


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("arch", CARDS)
def test_each_card_runs_its_row(arch: int, dtype: torch.dtype, tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, CARDS[arch])
    name = "f16" if dtype == F16 else "bf16"
    for head_dim in (64, 80, 128):
        isa = {75: "sm75", 90: "sm80" if head_dim == 80 else "sm90"}.get(arch, "sm80")
        if CARDS[arch].name.endswith(("4090", "5090")) and head_dim == 128 and dtype == BF16:
            isa += "_pv16"
        launched = check(gpu, *normal(head_dim=head_dim, dtype=dtype), is_causal=True)
        assert launched[-1] == f"sdpa_{isa}_{name}_d{head_dim}"
    assert {arch for _, arch in gpu.asked} == {arch}


def test_hopper_gets_the_tile_and_the_copies_that_it_needs(tmp_path: Path) -> None:
    """Which tile of a row a call gets, and what has to be copied before TMA can read it."""
    gpu = Gpu(tmp_path, CARDS[90])
    row = "sdpa_sm90_bf16_d128"
    call: dict[str, Any] = {"head_dim": 128, "batch": 2}
    assert check(gpu, *normal(200, 300, **call)) == [row]
    assert check(gpu, *normal(100, 300, **call)) == [row]
    assert check(gpu, *normal(200, 300, **call), is_causal=True) == [row]
    lens = torch.tensor([177, 300])
    assert check(gpu, *normal(200, 300, **call), k_lens=lens) == ["wan_attn_put_lengths", row]
    launched = check(gpu, *normal(200, 300, **call, q_dtype=F32, k_dtype=F32))
    assert launched == ["wan_attn_convert"] * 2 + [row]
    query, key, value = normal(200, 300, **call)
    one_for_all = key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1)
    assert check(gpu, query, *one_for_all) == ["wan_attn_convert"] * 2 + [row]
    fused = torch.randn(2, 150, 6, 128).to(BF16)
    assert check(gpu, *fused.split(2, dim=2)) == [row]
    images = {name for name, _ in gpu.asked if name.startswith("sdpa")}
    assert images == {
        f"{row}_n176_w2_s2_c2", f"{row}_n176_w2_s2_c1", f"{row}_n128_w2_s2_c1"
    }  # fmt: skip
    # Shared out over keys, and without keys, by the row that can:
    launched = check(gpu, *normal(5, 4200, 1, 1, 64, batch=1))
    assert launched == ["sdpa_sm80_bf16_d64", "wan_attn_merge"]
    assert check(gpu, *normal(head_dim=80, batch=1)) == ["sdpa_sm80_bf16_d80"]
    out, lse = gpu.sdpa(*normal(70, 0))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_hopper_with_one_row_or_one_key(tmp_path: Path) -> None:
    """The stride of a dimension of size 1 is never used, but the driver looks at it."""
    gpu = Gpu(tmp_path, CARDS[90])
    assert check(gpu, *normal(1, 1, head_dim=128)) == ["sdpa_sm90_bf16_d128"]


def test_hopper_without_tensor_maps(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, CARDS[90])
    gpu.fail("cuTensorMapEncodeTiled", 1)
    with pytest.raises(RuntimeError, match="^2: .*sdpa_sm90_bf16_d64 .* when describing tensors"):
        gpu.sdpa(*normal())
    assert gpu.driver.mock_depth() == 0


def test_head_dim_256(gpu: Gpu) -> None:
    check(gpu, *normal(head_dim=256, batch=1))


def test_a_head_dim_without_a_row(gpu: Gpu) -> None:
    said = "those for cuda take head_dim 64, 128, 256, 80, got 96"
    with pytest.raises(RuntimeError, match=said):
        gpu.sdpa(*normal(head_dim=96, batch=1))


def test_a_plain_call_is_one_launch(gpu: Gpu) -> None:
    assert check(gpu, *normal()) == ["sdpa_sm80_bf16_d64"]
    check(gpu, *normal(), scale=-0.3)
    check(gpu, *normal(), scale=0.0)
    check(gpu, *normal(), window=(40, 9))


def test_float32_query_is_read_as_it_is(gpu: Gpu) -> None:
    assert check(gpu, *normal(q_dtype=F32)) == ["sdpa_sm80_bf16_d64"]


def test_float32_key_is_converted(gpu: Gpu) -> None:
    launched = check(gpu, *normal(q_dtype=F32, k_dtype=F32))
    assert launched == ["wan_attn_convert", "sdpa_sm80_bf16_d64"]


def test_views_are_read_as_they_are_if_they_are_aligned(gpu: Gpu) -> None:
    fused = torch.randn(2, 90, 3 * 2, 64).to(F16)
    query, key, value = fused.split(2, dim=2)
    assert check(gpu, query, key, value) == ["sdpa_sm80_f16_d64"]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert check(gpu, *heads_first) == ["sdpa_sm80_f16_d64"]
    one_row = [x[:, 3:4] for x in (query, key, value)]
    assert check(gpu, *one_row) == ["sdpa_sm80_f16_d64"]


def test_views_that_are_not_aligned_are_copied(gpu: Gpu) -> None:
    query, key, value = (
        torch.randn(2, 70, 2, 64 + 5).to(BF16)[..., begin : begin + 64] for begin in (1, 2, 4)
    )
    launched = check(gpu, query, key, value)
    assert launched == ["wan_attn_convert"] * 3 + ["sdpa_sm80_bf16_d64"]


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("on_device", (False, True), ids=("host", "device"))
def test_lengths_reach_the_kernel_from_either_device(
    gpu: Gpu, on_device: bool, dtype: torch.dtype
) -> None:
    query, key, value = normal(batch=3)
    q_lens = torch.tensor([70, 11, 0], dtype=dtype)
    k_lens = torch.tensor([9, 133, 64], dtype=dtype)
    for x, lens in ((query, q_lens), (key, k_lens), (value, k_lens)):
        for b, n in enumerate(lens.tolist()):
            x[b, n:] = float("nan")
    call = {"q_lens": q_lens, "k_lens": k_lens, "lens_on_device": on_device, "is_causal": True}
    put = 0 if on_device else 2
    assert check(gpu, query, key, value, **call) == ["wan_attn_put_lengths"] * put + [
        "sdpa_sm80_bf16_d64"
    ]


def test_lengths_that_say_nothing_cost_nothing(gpu: Gpu) -> None:
    """Stock Wan2.2 on one GPU: seq_lens on the CPU, all of them the padded length."""
    lens = torch.tensor([133, 133])
    assert check(gpu, *normal(), k_lens=lens) == ["sdpa_sm80_bf16_d64"]


def test_more_lengths_than_one_launch_carries(gpu: Gpu) -> None:
    lens = torch.arange(300) % 9
    launched = check(gpu, *normal(3, 8, 1, 1, 64, batch=300), k_lens=lens)
    assert launched == ["wan_attn_put_lengths"] * 2 + ["sdpa_sm80_bf16_d64"]


def test_few_rows_share_their_keys_out(gpu: Gpu) -> None:
    call: dict[str, Any] = {"is_causal": True, "k_lens": torch.tensor([8300])}
    launched = check(gpu, *normal(5, 8500, 1, 1, 64, batch=1), **call)
    assert launched == ["wan_attn_put_lengths", "sdpa_sm80_bf16_d64", "wan_attn_merge"]
    assert "wan_attn_merge" not in check(gpu, *normal(5, 4096, 1, 1, 64, batch=1))


def test_splitting_does_not_depend_on_batch_or_card(tmp_path: Path) -> None:
    query, key, value = normal(3, 4500, 1, 1, 64, batch=2)
    results = []
    for cards in (CARDS[80], CARDS[80].__class__(8, 0, "A100 with fewer SMs", sms=2)):
        gpu = Gpu(tmp_path, cards)
        results.append(gpu.sdpa(query, key, value)[0])
        results.append(
            torch.cat([gpu.sdpa(*(x[b : b + 1] for x in (query, key, value)))[0] for b in (0, 1)])
        )
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_keys_at_all(gpu: Gpu) -> None:
    out, lse = gpu.sdpa(*normal(70, 0))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_two_devices(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, CARDS[80], CARDS[89])
    operands = normal(head_dim=128)
    for device, row in ((1, "sdpa_sm80_pv16_bf16_d128"), (0, "sdpa_sm80_bf16_d128")):
        gpu.log()
        gpu.sdpa(*operands, device=device)
        launches = [line for line in gpu.log() if line.startswith("launch")]
        assert all(f" on {device}, stream {STREAM:#x}" in line for line in launches)
        assert row in launches[-1]
    assert gpu.driver.mock_depth() == 0


def test_a_kernel_is_loaded_once_and_outside_a_capture(gpu: Gpu) -> None:
    gpu.sdpa(*normal())
    log = gpu.log()  # 2: relaxed
    assert "load, capture mode 2" in log and "to device 0, capture mode 2" in log
    gpu.sdpa(*normal())
    assert not [line for line in gpu.log() if line.startswith(("load", "to", "retain", "cuInit"))]
    assert gpu.asked == [("sdpa_sm80_bf16_d64", 80)]
    mode = ctypes.c_int(0)
    gpu.driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert mode.value == 0, "the thread's own mode was not put back"


def test_a_forced_row(gpu: Gpu) -> None:
    rows = {row.name: row.index for row in op.kernels()}
    with pytest.raises(RuntimeError, match="half rate"):
        gpu.sdpa(*normal(head_dim=128), kernel=rows["sdpa_sm80_pv16_d128"])
    with pytest.raises(RuntimeError, match="needs compute capability 7.5, cuda:0 has 8.0"):
        gpu.sdpa(*normal(dtype=F16), kernel=rows["sdpa_sm75_d64"])
    check(gpu, *normal(head_dim=128), kernel=rows["sdpa_sm80_d128"])


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (Card(7, 0, "Tesla V100"), "needs compute capability 8.0 or newer, cuda:0 has 7.0"),
        (Card(6, 1, "GeForce GTX 1080"), "cuda:0 has 6.1"),
    ],
)
def test_older_cards_are_refused(card: Card, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=reason):
        Gpu(tmp_path, card).sdpa(*normal())


def test_a_newer_card_runs_what_the_newest_known_does(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, Card(13, 0, "NVIDIA card of 2028"))
    gpu.driver.mock_on_launch(type(gpu._keep[0])(0))  # its class is not in the list of the tests
    gpu.sdpa(*normal())
    assert gpu.asked == [("sdpa_sm80_bf16_d64", 130)]


FAILURES = [
    ("cuLaunchKernel", 700, "3: CUDA driver error CUDA_ERROR_ILLEGAL_ADDRESS .* launching sdpa"),
    ("cuLaunchKernel", 2, "3: CUDA driver error CUDA_ERROR_OUT_OF_MEMORY .out of memory. when lau"),
    ("cuLaunchKernel", 701, "2: the machine code of sdpa_sm80_bf16_d64 .* resources .* launching"),
    ("cuLibraryLoadData", 2, "3: CUDA driver error CUDA_ERROR_OUT_OF_MEMORY .* when loading sdpa"),
    ("cuLibraryLoadData", 209, "2: the machine code of sdpa_sm80_bf16_d64 is not for this device"),
    ("cuLibraryLoadData", 218, "2: the machine code of sdpa_sm80_bf16_d64 is not for this device"),
    ("cuLibraryLoadData", 801, "2: the machine code of sdpa_sm80_bf16_d64 is not for this device"),
    ("cuLibraryGetKernel", 500, "2: the machine code of sdpa_sm80_bf16_d64 is not for"),
    ("cuLibraryGetKernel", 700, "3: CUDA driver error .* when loading sdpa_sm80_bf16_d64"),
    ("cuKernelGetFunction", 2, "3: CUDA driver error CUDA_ERROR_OUT_OF_MEMORY .* when loading"),
    ("cuKernelGetFunction", 209, "2: the machine code of sdpa_sm80_bf16_d64 is not for this dev"),
    ("cuThreadExchangeStreamCaptureMode", 709, "3: CUDA driver error .* is destroyed. when load"),
    ("cuDevicePrimaryCtxRetain", 2, "3: CUDA driver error CUDA_ERROR_OUT_OF_MEMORY .* entering"),
    ("cuCtxPushCurrent_v2", 201, "3: CUDA driver error .* when entering the primary context"),
    ("cuCtxGetCurrent", 3, "3: CUDA driver error .* when asked for the thread's context"),
    ("cuInit", 100, "2: .*the driver does not start: CUDA_ERROR_NO_DEVICE"),
    ("cuDeviceGetAttribute", 101, "2: .*the driver does not tell what cuda:0 is: CUDA_ERROR_INV"),
    ("cuDeviceGetCount", 702, "3: .*CUDA driver error CUDA_ERROR_LAUNCH_TIMEOUT .* asked what cud"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "error", "message"), FAILURES)
def test_failures_of_the_driver(gpu: Gpu, function: str, error: int, message: str) -> None:
    gpu.fail(function, error)
    with pytest.raises(RuntimeError, match=message) as caught:
        gpu.sdpa(*normal())
    assert is_device_error(caught.value) == message.startswith("3"), "the rest may fall through"
    log = gpu.log()
    assert sum(line.startswith("load") for line in log) == (
        sum(line.startswith("unload") for line in log) + (function == "cuLaunchKernel")
    )
    gpu.fail("", 0)
    if function != "cuInit":  # of NO_DEVICE no driver gets well
        check(gpu, *normal())


def ask_for_a_row(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> str:
    """What Python's choice of a backend hears about this machine: a row's name, or why none."""
    monkeypatch.setattr(library, "lib", lambda: gpu.lib)
    call = Request(1, 8, 8, 1, 1, 64, BF16, BF16, BF16, torch.device("cuda:0"))
    kernel, reasons = kernels.select(call)
    return reasons if kernel is None else kernel.name


LOST = (700, 702, 709, 719)


@pytest.mark.parametrize("error", (2, *LOST))
def test_a_driver_that_does_not_start_leaves_the_call_to_another_backend(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Whatever the error: cuInit knows no context, so that nothing of the caller's is lost."""
    gpu.fail("cuInit", error)
    reasons = ask_for_a_row(gpu, monkeypatch)
    assert "the driver does not start: CUDA_ERROR_" in reasons
    assert not is_device_error(RuntimeError(reasons))
    gpu.fail("", 0)
    assert any(ask_for_a_row(gpu, monkeypatch) == "sdpa_sm80_d64" for _ in range(3))


@pytest.mark.parametrize("function", ("cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute"))
def test_a_lost_device_is_no_reason_for_another_backend(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    for error in LOST:
        gpu.fail(function, error)
        with pytest.raises(RuntimeError, match="CUDA driver error .* when asked what cuda:0 is"):
            ask_for_a_row(gpu, monkeypatch)
    gpu.fail(function, 999)
    assert "the driver does not tell what cuda:0 is" in ask_for_a_row(gpu, monkeypatch)


@pytest.mark.parametrize("error", (2, 304, 802, 999))
def test_a_driver_that_does_not_start_is_tried_again_ever_less(gpu: Gpu, error: int) -> None:
    gpu.fail("cuInit", error)
    asked = []
    for number in range(40):
        with pytest.raises(
            RuntimeError, match="^2: .*no usable NVIDIA driver: the driver does not"
        ):
            gpu.sdpa(*normal())
        asked += [number] * gpu.log().count(f"cuInit fails with {error}")
    assert asked == [0, 2, 6, 14, 30]
    gpu.fail("", 0)
    while "cuInit" not in (log := gpu.log()):
        with contextlib.suppress(RuntimeError):
            gpu.sdpa(*normal())
        asked.append(0)
        assert len(asked) < 40
    check(gpu, *normal())
    assert log.count("cuInit") == 1


@pytest.mark.parametrize("error", (3, 100, 803))
def test_a_driver_that_never_starts_is_asked_once(gpu: Gpu, error: int) -> None:
    gpu.fail("cuInit", error)
    for _ in range(20):
        with pytest.raises(RuntimeError, match="the driver does not start: CUDA_ERROR_"):
            gpu.sdpa(*normal())
    assert gpu.log() == [f"cuInit fails with {error}"]


@pytest.mark.parametrize("function", ("cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName"))
def test_a_device_that_does_not_answer_is_asked_once_a_call(gpu: Gpu, function: str) -> None:
    gpu.fail(function, 999)
    with pytest.raises(
        RuntimeError, match="^2: no kernel takes this call: the driver does not tell"
    ):
        gpu.sdpa(*normal())
    assert gpu.log() == ["cuInit", f"{function} fails with 999"]
    gpu.fail("", 0)
    check(gpu, *normal())


def test_a_green_context_stays(gpu: Gpu) -> None:
    """What torch's GreenContext has made current: its part of the GPU, and its streams' order."""
    operands = normal()
    with gpu.green():
        gpu.sdpa(*operands)
        assert gpu.driver.mock_depth() == 1
    log = gpu.log()
    launches = [line for line in log if line.startswith("launch")]
    assert launches and all(" on green 0, stream" in line for line in launches)
    assert "retain 0" not in log, "the primary context was entered"
    assert [line for line in log if line.startswith("load")]
    gpu.sdpa(*operands)  # without one, in the primary context, and the kernel is the same
    log = gpu.log()
    assert any(" on 0, stream" in line for line in log if line.startswith("launch"))
    assert not [line for line in log if line.startswith("load")]


def test_a_context_of_another_device_is_left_for_a_while(tmp_path: Path) -> None:
    gpu = Gpu(tmp_path, CARDS[80], CARDS[89])
    with gpu.green(1):
        gpu.sdpa(*normal(), device=0)
        assert gpu.driver.mock_depth() == 1
        gpu.sdpa(*normal(), device=1)
    launches = [line for line in gpu.log() if line.startswith("launch")]
    assert [line.partition(" on ")[2].partition(",")[0] for line in launches] == ["0", "green 1"]


def test_shared_memory_is_asked_for_in_full(gpu: Gpu) -> None:
    """A wish: a driver that does not know it is used all the same."""
    check_smem = {64: "of 100%", 128: "of 100%"}
    for head_dim, words in check_smem.items():
        gpu.sdpa(*normal(head_dim=head_dim))
        assert gpu.log()[-1].endswith(words)
    gpu.sdpa(*normal(5, 4200, 1, 1, 64, batch=1))
    assert gpu.log()[-1].endswith("smem 0 of 0%"), "a pass without shared memory has no wish"


def test_a_wish_that_is_refused(gpu: Gpu) -> None:
    gpu.fail("cuKernelSetAttribute", 801)
    check(gpu, *normal())  # 24 KiB, so that the wish is the only attribute


def test_no_machine_code(tmp_path: Path) -> None:
    def find_image(kernel, arch, image, size, message, message_size):  # type: ignore[no-untyped-def]
        words = b"no compiler; install one\0"
        ctypes.memmove(message, words, len(words))
        return 1

    gpu = Gpu(tmp_path, CARDS[80], find_image=find_image)
    with pytest.raises(RuntimeError, match="^2: no machine code for sdpa_.*: no compiler; install"):
        gpu.sdpa(*normal())


def test_a_reason_that_fills_its_place_has_an_end(tmp_path: Path) -> None:
    """The library ends the text itself: it would read on behind its own buffer."""

    def find_image(kernel, arch, image, size, message, message_size):  # type: ignore[no-untyped-def]
        ctypes.memset(message, ord("x"), message_size)
        return 1

    gpu = Gpu(tmp_path, CARDS[80], find_image=find_image)
    with pytest.raises(RuntimeError, match="^2: no machine code for sdpa_.*: x+$") as caught:
        gpu.sdpa(*normal())
    assert str(caught.value).count("x") < 1000


def test_no_driver(gpu: Gpu, tmp_path: Path) -> None:
    empty = Gpu(tmp_path)
    with pytest.raises(RuntimeError, match="the driver has 0 devices, there is no cuda:0"):
        empty.sdpa(*normal())
    other = Gpu(tmp_path, CARDS[80])
    assert other.configure(str(tmp_path / "nowhere.so")) is None
    with pytest.raises(RuntimeError, match="^2: .*no usable NVIDIA driver: .*nowhere"):
        other.sdpa(*normal())
    assert "before the driver is opened" in (other.configure("another.so") or "")


def test_threads_share_one_driver(gpu: Gpu) -> None:
    """Eight threads make the first call at once."""
    gpu.driver.mock_on_launch(type(gpu._keep[0])(0))
    problems: list[Exception] = []

    def call() -> None:
        try:
            for head_dim in (64, 80, 128, 256):
                gpu.sdpa(*normal(head_dim=head_dim))
        except Exception as error:  # noqa: BLE001 - shown by the main thread
            problems.append(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert gpu.log().count("cuInit") == 1
