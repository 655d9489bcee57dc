# SPDX-License-Identifier: Apache-2.0
"""test_select.py - Request + Settings -> Choice, as a table; no tensor, no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import standins
from calls import BF16, F16, F32
from wan_attn.backends import LOSSY, REGISTRY, _torch_kernels, chunked, native
from wan_attn.config import Settings
from wan_attn.request import Call, Request
from wan_attn.selection.choose import CARDS, Card, compute_dtype, order, select

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
CALL = Request(
    batch=1, seqlen_q=512, seqlen_k=512, num_heads_q=24, num_heads_k=24, head_dim=128, dtype=BF16,
    query_dtype=F32, key_dtype=F32, device=CUDA,
)  # fmt: skip


def but(**changes: Any) -> Request:
    return dataclasses.replace(CALL, **changes)


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    standins.reset()
    yield
    standins.reset()


class Machine:
    """A machine as selection sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def has(self, *, arch: Any, installed: str, ours: bool, flash: bool = True) -> None:
        """arch: compute capability; installed: "fa2 fa3"; ours: a kernel row takes every call."""
        real = native.why_not

        def why_not(request: Request) -> str | None:
            if request.dropout_p > 0 or (request.needs_grad and request.device != CPU):
                return real(request)
            return None if ours else "no row for this card"

        self._patch.setattr(native, "why_not", why_not)
        self._patch.setattr(native, "kernel_name", lambda request: "sdpa_row")
        self._patch.setattr(_torch_kernels, "has_flash", lambda: flash)
        for name, module, make in (
            ("fa2", "flash_attn", standins.make_fa2),
            ("fa3", "flash_attn_interface", standins.make_fa3),
        ):
            there = name in installed.split()
            standins.install(self._patch, make() if there else None, module)
        standins.install(self._patch, None, "flash_attn_3")
        standins.install(self._patch, None, "xformers")
        standins.pretend_card(self._patch, arch)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


ALL = "fa2 fa3"
H100, A100, T4 = (9, 0), (8, 0), (7, 5)
LONG = {"seqlen_q": 75600, "seqlen_k": 75600}


@pytest.mark.parametrize(
    ("has", "call", "env", "want", "refused"),
    [
        # auto: FA3 > FA2 > ours > PyTorch
        ({"arch": H100, "installed": ALL, "ours": True}, {}, {}, "fa3", ""),
        ({"arch": H100, "installed": "fa2", "ours": True}, {}, {}, "fa2", "fa3"),
        ({"arch": A100, "installed": ALL, "ours": True}, {}, {}, "fa2", "fa3"),
        ({"arch": A100, "installed": "", "ours": True}, {}, {}, "sdpa", "fa3 fa2"),
        ({"arch": A100, "installed": "", "ours": False}, {}, {}, "torch", "fa3 fa2 sdpa"),
        ({"arch": T4, "installed": ALL, "ours": False}, {}, {}, "torch", "fa3 fa2 sdpa"),
        # off CUDA FlashAttention is not even asked
        ({"arch": None, "installed": ALL, "ours": True}, {"device": CPU}, {}, "sdpa", ""),
        ({"arch": None, "installed": ALL, "ours": False}, {"device": CPU}, {}, "torch", "sdpa"),
        # what a call asks for
        ({"arch": H100, "installed": ALL, "ours": True}, {"dropout_p": 0.1}, {}, "fa2", "fa3"),
        ({"arch": H100, "installed": ALL, "ours": True}, {"dtype": F32}, {}, "torch", "fa3 fa2"),
        ({"arch": H100, "installed": ALL, "ours": True}, {"needs_grad": True}, {}, "fa3", ""),
        (
            {"arch": H100, "installed": ALL, "ours": True},
            {"needs_grad": True, "return_lse": True},
            {},
            "torch",
            "fa3 fa2",
        ),
        (
            {"arch": None, "installed": "", "ours": True},
            {"needs_grad": True, "device": CPU},
            {},
            "sdpa",
            "",
        ),
        # DISABLE_FLASH_ATTN
        (
            {"arch": H100, "installed": ALL, "ours": True},
            {},
            {"DISABLE_FLASH_ATTN": "1"},
            "torch",
            "fa3 fa2",
        ),
        # a named backend is first, and what is behind it follows
        ({"arch": H100, "installed": ALL, "ours": True}, {}, {"USE_SDPA": "1"}, "sdpa", ""),
        (
            {"arch": H100, "installed": ALL, "ours": True},
            {},
            {"USE_ATTENTION_BACKEND": "fa2"},
            "fa2",
            "",
        ),
        (
            {"arch": H100, "installed": "fa3", "ours": True},
            {},
            {"USE_ATTENTION_BACKEND": "fa2"},
            "sdpa",
            "fa2",
        ),
        (
            {"arch": H100, "installed": ALL, "ours": False},
            {},
            {"USE_ATTENTION_BACKEND": "sdpa"},
            "torch",
            "sdpa",
        ),
        (
            {"arch": H100, "installed": ALL, "ours": True},
            {},
            {"USE_ATTENTION_BACKEND": "torch"},
            "torch",
            "",
        ),
        (
            {"arch": H100, "installed": ALL, "ours": True},
            {},
            {"USE_ATTENTION_BACKEND": "chunked"},
            "chunked",
            "",
        ),
        (
            {"arch": H100, "installed": ALL, "ours": True},
            {"dropout_p": 0.1},
            {"USE_ATTENTION_BACKEND": "chunked"},
            "torch",
            "chunked",
        ),
        (
            {"arch": None, "installed": ALL, "ours": True},
            {"device": CPU},
            {"USE_ATTENTION_BACKEND": "fa3"},
            "sdpa",
            "fa3 fa2",
        ),
        # PyTorch would store every score: the wrapper instead
        ({"arch": T4, "installed": "", "ours": False}, LONG, {}, "chunked", "fa3 fa2 sdpa torch"),
        (
            {"arch": T4, "installed": "", "ours": False},
            LONG,
            {"USE_ATTENTION_BACKEND": "torch"},
            "chunked",
            "torch",
        ),
        (
            {"arch": T4, "installed": "", "ours": False},
            LONG,
            {"WAN_ATTN_CHUNK_THRESHOLD": str(75600**2)},
            "torch",
            "fa3 fa2 sdpa",
        ),
        (
            {"arch": T4, "installed": "", "ours": False},
            {**LONG, "dropout_p": 0.1},
            {},
            "torch",
            "fa3 fa2 sdpa",
        ),
        ({"arch": A100, "installed": "", "ours": False}, LONG, {}, "torch", "fa3 fa2 sdpa"),
    ],
)
def test_choice(
    machine: Machine,
    has: dict[str, Any],
    call: dict[str, Any],
    env: dict[str, str],
    want: str,
    refused: str,
) -> None:
    machine.has(**has)
    choice = select(but(**call), Settings.from_env(env))
    assert choice.backend == want
    assert [name for name, _ in choice.refusals] == refused.split()
    assert all(reason for _, reason in choice.refusals)
    assert choice.kernel_name == ("sdpa_row" if want == "sdpa" else None)
    assert choice.is_fallback == (
        bool(refused) and bool({"USE_ATTENTION_BACKEND", "USE_SDPA"} & set(env))
    )


@pytest.mark.parametrize(
    ("version", "want", "refused"), [(None, "fa3", ""), (3, "fa3", ""), (2, "fa2", "fa3")]
)
def test_version(machine: Machine, version: int | None, want: str, refused: str) -> None:
    machine.has(arch=H100, installed=ALL, ours=True)
    choice = select(CALL, Settings(), version=version)
    assert (choice.backend, " ".join(n for n, _ in choice.refusals)) == (want, refused)


def test_version_2_without_flash_attention_2_does_not_run_3(machine: Machine) -> None:
    machine.has(arch=H100, installed="fa3", ours=True)
    assert select(CALL, Settings(), version=2).backend == "torch"


@pytest.mark.parametrize("name", ["fa2", "fa3", "sdpa"])
def test_strict_raises_where_the_named_backend_refuses(machine: Machine, name: str) -> None:
    machine.has(arch=T4, installed="", ours=False)
    with pytest.raises(RuntimeError, match=f"USE_ATTENTION_BACKEND={name} cannot take this call: "):
        select(CALL, Settings(backend=name, strict=True))


def test_strict_auto_may_pass_over(machine: Machine) -> None:
    machine.has(arch=T4, installed="", ours=False)
    assert select(CALL, Settings(strict=True)).backend == "torch"


def test_what_failed_is_passed_over_with_its_reason(machine: Machine) -> None:
    machine.has(arch=H100, installed=ALL, ours=True)
    failed = (("fa3", "failed at run time (X)"), ("fa2", "failed at run time (Y)"))
    choice = select(CALL, Settings(), failed=failed)
    assert choice.backend == "torch" and choice.refusals == failed


def test_nothing_left_lists_every_reason(machine: Machine) -> None:
    machine.has(arch=H100, installed="", ours=False)
    failed = tuple((name, f"{name} is broken") for name in REGISTRY)
    with pytest.raises(RuntimeError) as caught:
        select(CALL, Settings(), failed=failed)
    assert str(caught.value).startswith("wan_attn: no backend takes this call: fa3: fa3 is broken;")
    asked = {"fa3", "fa2", "sdpa", "torch", "chunked"}  # the others are not installed, or lossy
    assert all((f"{name} is broken" in str(caught.value)) == (name in asked) for name in REGISTRY)


def test_pytorch_is_the_last_resort_where_the_wrapper_failed(machine: Machine) -> None:
    machine.has(arch=T4, installed="", ours=False)
    failed = ((chunked.NAME, "failed at run time (X)"),)
    assert select(but(**LONG), Settings(), failed=failed).backend == "torch"


def test_the_registry_is_in_the_order_of_preference() -> None:
    exact = ("fa3", "fa2", "sdpa", "xformers", "torch", "chunked")
    assert tuple(REGISTRY) == (*exact, "sage", "comfy_kitchen")
    for name, backend in REGISTRY.items():
        assert backend.NAME == name and backend.TITLE


@pytest.mark.parametrize(
    ("value", "asked", "arch", "force", "want"),
    [
        (BF16, BF16, (8, 9), False, BF16),  # half stays
        (F16, BF16, (9, 0), False, F16),
        (F16, F32, (9, 0), False, F16),
        (F32, BF16, (6, 1), False, F16),
        (F32, BF16, (7, 5), False, F16),
        (F32, BF16, (8, 6), False, F16),  # RTX 30
        (F32, BF16, (8, 9), False, F16),  # RTX 40
        (F32, BF16, (8, 0), False, BF16),  # A100
        (F32, BF16, (9, 0), False, BF16),  # H100
        (F32, BF16, (10, 0), False, BF16),
        (F32, BF16, (12, 0), False, BF16),
        (F32, BF16, None, False, BF16),  # a CPU
        (F32, F16, (9, 0), False, F16),  # said, so done
        (F32, F32, (8, 9), False, F32),
        (F32, None, (8, 9), False, F32),  # wan_attn.sdpa computes in value's dtype
        (BF16, BF16, (9, 0), True, F16),  # WAN_FORCE_FP16 wins
        (F32, F32, (9, 0), True, F16),
        (F32, None, None, True, F16),
    ],
)
def test_dtype_policy(
    value: Any, asked: Any, arch: Any, force: bool, want: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.pretend_card(monkeypatch, arch)
    device = CPU if arch is None else CUDA
    assert compute_dtype(value, asked, device, force) == want


# The request


def test_a_request_is_plain_hashable_and_frozen() -> None:
    assert hash(CALL) == hash(dataclasses.replace(CALL)) and dataclasses.replace(CALL) == CALL
    with pytest.raises(dataclasses.FrozenInstanceError):
        CALL.batch = 2  # type: ignore[misc]


def test_a_request_from_tensors() -> None:
    q = torch.zeros(2, 5, 4, 8)
    k = torch.zeros(2, 7, 2, 8)
    got = Request.from_tensors(
        q, k, k.bfloat16(),
        Call(k_lens=torch.tensor([1, 2]), is_causal=True, window=(3, -1), dropout_p=0.5,
             return_lse=True),
    )  # fmt: skip
    assert got == Request(
        batch=2, seqlen_q=5, seqlen_k=7, num_heads_q=4, num_heads_k=2, head_dim=8, dtype=BF16,
        query_dtype=F32, key_dtype=F32, device=CPU, is_causal=True, window=(3, -1),
        has_k_lens=True, dropout_p=0.5, return_lse=True,
    )  # fmt: skip
    assert Request.from_tensors(q.requires_grad_(), k, k).needs_grad
    with torch.no_grad():
        assert not Request.from_tensors(q, k, k).needs_grad


Q = torch.zeros(2, 5, 4, 8)
K = torch.zeros(2, 7, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "query must be a tensor, got None"),
        ({"key": [1]}, "key must be a tensor, got a list"),
        ({"q_lens": [1, 2]}, "q_lens must be a tensor, got a list"),
        ({"query": Q[0]}, "query must be .*, got"),
        ({"query": Q.long()}, "query must be float"),
        ({"value": K[:, :6]}, "value must be"),
        ({"key": K[:1], "value": K[:1]}, "key must"),
        ({"query": Q[:, :, :3]}, "query must have a multiple of key's heads"),
        ({"query": Q[..., :7]}, "key must"),
        ({"key": K.half()}, "key must have value's dtype float32, got float16"),
        ({"k_lens": torch.tensor([1])}, r"k_lens must be \[batch\]"),
        ({"k_lens": torch.tensor([1.0, 2.0])}, "k_lens must be int32 or int64"),
        ({"k_lens": torch.zeros(2, dtype=torch.int32, device="meta")}, "k_lens must be on the CPU"),
        ({"window": (1,)}, r"window must be a pair \(left, right\)"),
        ({"window": (0, -2)}, "window_right must be -1"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": float("nan")}, r"dropout_p must be in \[0, 1\), got nan"),
    ],
)
def test_a_request_that_breaks_the_contract(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"query": Q, "key": K, "value": K, **change}
    with pytest.raises(RuntimeError, match=f"^wan_attn: {message}"):
        query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
        Request.from_tensors(query, key, value, Call(**arguments))


@pytest.mark.parametrize(
    ("arch", "first"), [((8, 9), "sdpa"), ((12, 0), "sdpa"), ((9, 0), "torch"), ((10, 3), "torch")]
)
def test_torchs_kernels_go_before_mma_sync_where_that_is_slow(
    machine: Machine, arch: tuple[int, int], first: str
) -> None:
    machine.has(arch=arch, installed="", ours=True)
    assert select(CALL, Settings()).backend == first
    assert select(CALL, Settings(use_sdpa=True)).backend == "sdpa"
    assert CARDS.get(arch, Card("")).is_torch_first == (first == "torch")
    left_out = {"xformers", *LOSSY}  # not installed, or only by name
    assert sorted(order(CALL, Settings())) == sorted(set(REGISTRY) - left_out)
