# SPDX-License-Identifier: Apache-2.0
"""test_attention.py - the public functions: Wan2.2's signature, dtypes, failures, threads, ops."""

from __future__ import annotations

import ast
import inspect
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import standins
import wan_attn
from calls import BF16, F16, F32, operands, poisoned
from tolerances import assert_close_to_oracle
from wan_attn import config, scaled_dot_product_attention
from wan_attn.attention import flash_attention, sdpa
from wan_attn.backends import REGISTRY, native
from wan_attn.integrations.wan22.adapters import make_flash_attention
from wan_attn.native import op
from wan_attn.request import Call, Request
from wan_attn.selection import run as execute

SIGNATURE = (
    "q, k, v, q_lens=None, k_lens=None, dropout_p=0.0, softmax_scale=None, q_scale=None,"
    " causal=False, window_size=(-1, -1), deterministic=False, dtype=torch.bfloat16, version=None"
)


@pytest.fixture(autouse=True)
def _reset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in config.VARIABLES:
        if variable.field not in ("binding", "cpu_isa", "wan22_dir"):  # the run's own
            monkeypatch.delenv(variable.name, raising=False)
    standins.reset()
    yield
    standins.reset()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """(backend, arguments) of each backend that runs."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def spy(name: str, run: Any) -> Any:
        def spied(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Any:
            seen.append((name, {"query": query, "key": key, "value": value, **call._asdict()}))
            return run(query, key, value, call)

        return spied

    for name, backend in REGISTRY.items():
        monkeypatch.setattr(backend, "run", spy(name, backend.run))
    return seen


# Wan2.2's function


def written(parameters: list[str], defaults: list[str]) -> str:
    bare = parameters[: len(parameters) - len(defaults)]
    rest = parameters[len(bare) :]
    return ", ".join([*bare, *(f"{p}={d}" for p, d in zip(rest, defaults, strict=True))])


def test_the_signature() -> None:
    parameters = inspect.signature(flash_attention).parameters.values()
    defaults = [str(p.default) for p in parameters if p.default is not p.empty]
    assert written([p.name for p in parameters], defaults) == f"{SIGNATURE}, out_dtype=None"
    assert {p.kind.name for p in parameters} == {"POSITIONAL_OR_KEYWORD"}


def test_the_signature_is_stock_wan22s() -> None:
    folder = os.environ.get("WAN22_DIR")
    if not folder:
        pytest.skip("WAN22_DIR is not set: no stock Wan2.2 to compare with")
    tree = ast.parse((Path(folder) / "wan" / "modules" / "attention.py").read_text("utf-8"))
    (stock,) = [
        node.args
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attention"
    ]
    defaults = [ast.unparse(default) for default in stock.defaults]
    assert written([a.arg for a in stock.args], defaults) == SIGNATURE


@pytest.mark.parametrize(
    ("dtypes", "asked", "force", "computed"),
    [
        ((F32, F32, BF16), BF16, False, (F32, F32, BF16)),  # stock's self-attention
        ((BF16, BF16, BF16), BF16, False, (BF16, BF16, BF16)),
        ((F16, F16, F16), BF16, False, (F16, F16, F16)),
        ((F32, F32, F32), BF16, False, (F32, F32, BF16)),
        ((F32, F32, F32), F16, False, (F32, F32, F16)),
        ((F32, F32, F32), F32, False, (F32, F32, F32)),
        ((F32, F32, F16), BF16, False, (F32, F32, F16)),  # stock rounds q to bf16 on the way
        ((BF16, F32, F16), BF16, False, (F16, F32, F16)),
        ((F16, F16, F32), BF16, False, (BF16, BF16, BF16)),
        ((BF16, BF16, BF16), BF16, True, (F16, F16, F16)),
        ((F32, F32, F32), F32, True, (F32, F32, F16)),
        ((torch.float64,) * 3, BF16, False, (BF16, BF16, BF16)),
    ],
)
def test_computes_in_one_dtype_and_answers_in_the_dtype_of_query(
    dtypes: Any, asked: Any, force: bool, computed: Any, ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:
        monkeypatch.setenv("WAN_FORCE_FP16", "1")
    q, k, v = (x.to(dtype) for x, dtype in zip(operands(), dtypes, strict=True))
    out = flash_attention(q, k, v, dtype=asked)
    assert out.dtype == dtypes[0] and out.shape == q.shape
    ((_, call),) = ran
    assert tuple(call[name].dtype for name in ("query", "key", "value")) == computed
    given = [x.to(dtype) for x, dtype in zip((q, k, v), computed, strict=True)]
    assert_close_to_oracle(out.to(computed[0]), *given)


@pytest.mark.parametrize("name", ["sdpa", "torch", "chunked"])
def test_every_dtype_on_every_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", name)
    for dtypes in ((F32, F32, BF16), (BF16, BF16, BF16), (F32, F32, F16), (F16, F32, F16)):
        q, k, v = operands(batch=2, dtype=dtypes)
        lens = torch.tensor([33, 7])
        out = flash_attention(q, poisoned(k, [33, 7]), poisoned(v, [33, 7]), k_lens=lens)
        assert_close_to_oracle(out, q, k, v, k_lens=lens)


def test_force_fp16_holds_for_sdpa_too(ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_FORCE_FP16", "1")
    q, k, v = operands(dtype=BF16)
    out = sdpa(q, k, v)
    assert isinstance(out, Tensor) and out.dtype == BF16 and ran[0][1]["value"].dtype == F16


def test_q_lens_shorter_than_q_and_lengths_as_numbers() -> None:
    q, k, v = operands(batch=2, dtype=BF16)
    q_lens, k_lens = [3, 17], [33, 6]
    q, k, v = poisoned(q, q_lens), poisoned(k, k_lens), poisoned(v, k_lens)
    want = {"q_lens": torch.tensor(q_lens), "k_lens": torch.tensor(k_lens)}
    for lens in (want, {"q_lens": q_lens, "k_lens": tuple(k_lens)}):
        out = flash_attention(q, k, v, **lens)
        assert_close_to_oracle(out, q, k, v, **want)


def test_scales_given_twice_multiply() -> None:
    q, k, v = operands(dtype=F32)
    for given, scale in (
        ({"softmax_scale": 0.3}, 0.3),
        ({"q_scale": 0.5}, 0.5 * 64**-0.5),
        ({"q_scale": 0.5, "softmax_scale": 0.3}, 0.15),
        ({"q_scale": torch.tensor(0.5)}, 0.5 * 64**-0.5),
        ({"q_scale": torch.tensor(0.5), "softmax_scale": 0.3}, 0.15),
    ):
        out = flash_attention(q, k, v, dtype=F32, **given)
        assert_close_to_oracle(out, q, k, v, scale=scale)


def test_a_number_as_q_scale_is_not_rounded_to_half(ran: Any) -> None:
    q, k, v = operands(dtype=BF16)
    flash_attention(q, k, v, q_scale=1.001)
    assert ran[0][1]["scale"] == 1.001 * 64**-0.5 and ran[0][1]["query"] is q


def test_q_scale_per_head() -> None:
    q, k, v = operands(heads_q=4, dtype=BF16)
    q_scale = torch.tensor([0.5, 1.0, 2.0, -1.0]).view(1, 1, 4, 1)
    out = flash_attention(q, k, v, q_scale=q_scale)
    assert out.dtype == BF16
    for head in range(4):
        one = [x[:, :, head : head + 1] for x in (q, k, v)]
        assert_close_to_oracle(
            out[:, :, head : head + 1], *one, scale=q_scale[0, 0, head].item() * 64**-0.5
        )


def test_window_and_causal() -> None:
    q, k, v = operands(dtype=BF16)
    out = flash_attention(q, k, v, causal=True, window_size=(5, -1))
    assert_close_to_oracle(out, q, k, v, is_causal=True, window=(5, -1))


def test_views_as_clip_makes_them() -> None:
    """A stride of 0 over the batch, head_dim 80, and a last stride that is not 1."""
    q, k, v = operands(batch=2, head_dim=80, dtype=BF16)
    q = q[:1].expand(2, -1, -1, -1)
    sideways = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    out = flash_attention(q, sideways, v, version=2)
    assert_close_to_oracle(out, q, k, v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "dtype must be torch.float16, torch.bfloat16 or torch.float32"),
        ({"version": 4}, "version must be None, 2 or 3, got 4"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\), got 1.5"),
        (
            {"window_size": (1, 2, 3)},
            r"window_size must be a pair \(left, right\), got \(1, 2, 3\)",
        ),
        ({"window_size": None}, r"window_size must be a pair \(left, right\), got None"),
        (
            {"window_size": (1.5, 2)},
            r"window_size must be a pair of integers .*, got \(1.5, 2\)",
        ),
        (
            {"window_size": (1, True)},
            r"window_size must be a pair of integers .*, got \(1, True\)",
        ),
        ({"softmax_scale": math.nan}, "softmax_scale must be finite, got nan"),
        ({"q_scale": math.inf}, "q_scale must be finite, got inf"),
        ({"k_lens": torch.tensor([34])}, "k_lens must be between 0 and the padded length 33"),
        ({"k_lens": torch.tensor([1, 1])}, r"k_lens must be \[batch\]"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    q, k, v = operands(dtype=BF16)
    flash_attention(q, k, v)  # a plan that is already there must not let them through
    with pytest.raises(RuntimeError, match=f"^wan_attn: {message}"):
        flash_attention(q.requires_grad_(), k, v, **options)
    flash_attention(q.detach(), k, v)


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"^wan_attn: q must be a tensor, got a list$"):
        flash_attention(*[cast(Any, [1.0])] * 3)


def test_integers_are_not_silently_converted() -> None:
    q, k, v = operands(dtype=BF16)
    with pytest.raises(RuntimeError, match="k must be of a floating-point dtype, got torch.int64"):
        flash_attention(q, k.long(), v)


# Dropout and gradients


def test_dropout_only_while_grad_is_enabled(ran: Any) -> None:
    q, k, v = operands(seqlen_k=200, dtype=F32)
    with torch.no_grad():
        out = flash_attention(q, k, v, dropout_p=0.5, dtype=F32)
    assert ran[-1][1]["dropout_p"] == 0.0
    assert_close_to_oracle(out, q, k, v)
    dropped = flash_attention(q, k, v, dropout_p=0.5, dtype=F32)
    assert ran[-1][0] == "torch" and ran[-1][1]["dropout_p"] == 0.5
    assert not torch.allclose(dropped, out, atol=1e-2)


def test_a_gradient_goes_to_a_backend_that_has_one(ran: Any) -> None:
    q, k, v = operands(dtype=F32)
    flash_attention(q, k, v.requires_grad_(), dtype=F32).sum().backward()
    has_rows = op.binding() != "torch" and set(op.cpu_features()) & {"avx2", "avx512"}
    assert [name for name, _ in ran] == ["sdpa" if has_rows else "torch"]
    assert v.grad is not None and v.grad.sum() == pytest.approx(q.numel(), rel=1e-3)
    with torch.no_grad():
        flash_attention(q, k, v, dtype=F32)
    assert ran[-1][0] == ("sdpa" if native.why_not(_request(q, k, v)) is None else "torch")


def _request(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return Request.from_tensors(q, k, v, needs_grad=False)


# Failures


class Broken:
    """Makes a backend raise, and counts how often it is tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
        self.calls = 0

        def run(*args: Any, **options: Any) -> Any:
            self.calls += 1
            raise error

        # Whether or not there is a native library here.
        monkeypatch.setattr(native, "why_not", lambda request: None)
        monkeypatch.setattr(REGISTRY[name], "run", run)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("kernel\n  exploded"),
        TypeError("unexpected keyword argument"),
        AttributeError("gone"),
        OSError("symbol not found"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    ],
)
def test_a_backend_that_fails_is_left_and_that_is_said_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="wan_attn")
    broken = Broken(monkeypatch, "sdpa", error)
    q, k, v = operands(dtype=BF16)
    for _ in range(3):
        assert_close_to_oracle(flash_attention(q, k, v), q, k, v)
    assert broken.calls == 1
    said = [record.getMessage() for record in caplog.records]
    text = " ".join(str(error).split())
    reason = f"failed at run time ({type(error).__name__}: {text})"
    assert said[0] == (f"[Attention] wan_attn SDPA {reason}; trying PyTorch SDPA")
    assert said[1].startswith(f"[Attention] Using PyTorch SDPA (wan_attn SDPA: {reason}), dropout=")
    assert len(said) == 4
    sdpa(q[:, :5], k, v)  # another kind of call: tried again, not said again
    assert broken.calls == 2 and caplog.text.count("; trying ") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
)
def test_device_errors_are_raised(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(monkeypatch, "sdpa", error)
    q, k, v = operands(dtype=BF16)
    for count in (1, 2):
        with pytest.raises(type(error)) as caught:
            flash_attention(q, k, v)
        assert caught.value is error and broken.calls == count


def test_strict_raises_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("exploded")
    Broken(monkeypatch, "sdpa", error)
    monkeypatch.setenv("WAN_ATTN_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"wan_attn SDPA failed at run time .*exploded") as got:
        flash_attention(*operands(dtype=BF16))
    assert got.value.__cause__ is error


def test_where_everything_fails_the_last_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sdpa", "chunked"):
        Broken(monkeypatch, name, RuntimeError(f"{name} exploded"))
    last = RuntimeError("torch exploded")
    Broken(monkeypatch, "torch", last)
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "chunked")
    with pytest.raises(RuntimeError) as got:
        flash_attention(*operands(dtype=BF16))
    assert got.value is last
    assert "chunked exploded" in str(got.value.__cause__)  # and the others, with their reasons


def test_strict_raises_where_the_named_backend_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "fa2")
    monkeypatch.setenv("WAN_ATTN_STRICT", "1")
    with pytest.raises(
        RuntimeError, match="USE_ATTENTION_BACKEND=fa2 cannot take this call: needs"
    ):
        flash_attention(*operands(dtype=BF16))


def test_a_wrong_variable_is_an_error_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "flash")
    with pytest.raises(ValueError, match="must be one of auto, sdpa, fa3, fa2, xformers, torch"):
        flash_attention(*operands(dtype=BF16))


def test_settings_that_change_reach_the_next_call(
    ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = operands(dtype=BF16)
    for name in ("torch", "chunked", "sdpa", "torch"):
        monkeypatch.setenv("USE_ATTENTION_BACKEND", name)
        config.refresh()
        ran.clear()
        flash_attention(*tensors)
        if name != "sdpa" or native.why_not(_request(*tensors)) is None:
            assert ran[0][0] == name


def test_version_3_that_is_not_there_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("USE_ATTENTION_BACKEND", "fa3")
    for _ in range(2):
        flash_attention(*operands(dtype=BF16), version=3)
    lines = [r.getMessage() for r in caplog.records if "version=3" in r.getMessage()]
    assert lines == [
        "[Attention] version=3 was asked for, but Flash Attention 3: needs a CUDA device, the call"
        " is on cpu"
    ]


# Caches and threads


def test_a_plan_is_made_once_for_a_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    real = execute._make_plan

    def spy(*args: Any) -> Any:
        nonlocal made
        made += 1
        return real(*args)

    monkeypatch.setattr(execute, "_make_plan", spy)
    q, k, v = operands(batch=2, dtype=BF16)
    for lens in ([33, 1], [5, 6], [0, 33]):  # lengths are values, not a kind
        flash_attention(q, k, v, k_lens=torch.tensor(lens))
    assert made == 1
    changes: list[dict[str, Any]] = [{"causal": True}, {"window_size": (3, 3)}, {"k_lens": None}]
    for change in (*changes, {"version": 2}):
        flash_attention(q, k, v, **{"k_lens": torch.tensor([3, 3]), **change})
    assert made == 5
    flash_attention(q[:, :5], k, v)
    flash_attention(q.half(), k.half(), v.half())
    assert made == 7


PATCHED = make_flash_attention(flash_attention)
FRAMES_MAX = 15  # Python functions of the package that a steady call may enter; 21 before 0.2
FRAMES_OF: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "sdpa": lambda q, k, v: sdpa(q, k, v),
    "sdpa with lengths": lambda q, k, v: sdpa(q, k, v, k_lens=torch.tensor([33])),
    "flash_attention": lambda q, k, v: flash_attention(q, k, v, k_lens=torch.tensor([33])),
    "scaled_dot_product_attention": lambda q, k, v: scaled_dot_product_attention(
        v.transpose(1, 2), v.transpose(1, 2), v.transpose(1, 2)
    ),
    "patched Wan2.2": lambda q, k, v: PATCHED(q=q, k=k, v=v, k_lens=torch.tensor([33])),
}


def frames(call: Callable[[], object]) -> list[str]:
    """The functions of the package that are entered, in this order."""
    root, entered = str(Path(wan_attn.__file__).parent), []

    def enter(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            entered.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


@pytest.mark.parametrize("name", FRAMES_OF)
def test_a_steady_call_is_short(name: str, native: str, record_property: Any) -> None:
    """On the CPU by our kernels. The first call of a kind may do more."""
    q, k, v = operands(dtype=(F32, F32, BF16))
    FRAMES_OF[name](q, k, v)
    entered = frames(lambda: FRAMES_OF[name](q, k, v))
    assert "native._call" in entered or native == "ctypes"
    ours = [f for f in entered if not f.startswith(("bindings.", "shim."))]
    record_property("summary", f"Python frames of {name}: {len(ours)} of {FRAMES_MAX}")
    assert len(ours) <= FRAMES_MAX, "\n".join(ours)


def test_plans_do_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "_PLANS_MAX", 4)
    for length in range(1, 12):
        q, k, v = operands(seqlen_q=length, dtype=BF16)
        assert_close_to_oracle(flash_attention(q, k, v), q, k, v)
        assert len(execute._plans) <= 4


def test_threads_share_the_plans_without_mixing_results() -> None:
    cases = []
    for number in range(8):
        q, k, v = operands(batch=2, seqlen_q=3 + number, dtype=BF16 if number % 2 else F32)
        lens = torch.tensor([33, number])
        cases.append(((q, k, v), lens, flash_attention(q, k, v, k_lens=lens)))
    standins.reset()
    wrong: list[object] = []

    def work(first: int) -> None:
        try:
            for turn in range(24):
                (q, k, v), lens, want = cases[(first + turn) % len(cases)]
                if not torch.equal(flash_attention(q, k, v, k_lens=lens), want):
                    wrong.append((first, turn))
        except Exception as error:  # noqa: BLE001 - a thread's failure must reach the test
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
