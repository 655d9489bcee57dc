# SPDX-License-Identifier: Apache-2.0
"""test_gate.py - bad values are refused by the caller's name for them, and do no harm.

The whole matrix, every function by every value, is tests/fuzz/malformed.py.
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import wan_attn
from wan_attn.backends import _flash_attention
from wan_attn.integrations.wan22.patch import report
from wan_attn.request import Refusal, gate
from wan_attn.signatures import _mask_plan

HUGE = 2**70


def operands() -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(3)
    return [torch.randn(2, 5, 2, 16, generator=generator, device="cpu") for _ in range(3)]


LENGTHS: list[Any] = [
    *([1.7, 2.9], [True, False], ["1", "2"], [None, 1], [HUGE, 1], [[1], [2]], "12", b"12", {1, 2}),
    *({0: 1, 1: 2}, (n for n in (1, 2)), np.array([1.5, 2.5]), 2, torch.tensor([1, 2]).to_sparse()),
]
SCALES: list[Any] = [
    *(math.nan, True, "0.5", [0.5], 1j, 10**400, np.float64("nan"), torch.tensor([0.5])),
    torch.tensor([0.5]).to_sparse(),
]
FLAGS: list[Any] = [None, "no", 2, [], 0.5, object(), torch.tensor([True, False])]
WINDOWS: list[Any] = [(1,), (1.5, 2), (1, True), (HUGE, 0), {1, 2}, None]
VALUES = {
    **{"q_lens": LENGTHS, "k_lens": LENGTHS, "scale": SCALES, "is_causal": FLAGS},
    **{"return_lse": FLAGS, "window": WINDOWS},
}
FLASH = {
    **{"q_lens": LENGTHS, "k_lens": LENGTHS, "softmax_scale": SCALES, "causal": FLAGS},
    **{"window_size": WINDOWS, "deterministic": FLAGS, "version": [True, "3", 2.5]},
    "dropout_p": [7, math.nan, "0.1", None, True, torch.tensor([0.1, 0.2])],
    "q_scale": ["2", math.nan, True, torch.ones(7)],
}
FUNCTIONS: dict[str, tuple[Any, dict[str, list[Any]]]] = {
    "sdpa": (wan_attn.sdpa, VALUES),
    "wrapper": (
        wan_attn.windows_flash_attention_wrapper,
        {**VALUES, "threshold": [1.5, "8"], "max_elements": [HUGE, 0], "method": [None, ["rows"]]},
    ),
    "flash_attention": (wan_attn.flash_attention, FLASH),
}
TENSORS: dict[str, Any] = {
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[0]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"),
    "integers": lambda x: x.long(),
    "list": lambda x: x.tolist(),
}


def refused(name: str) -> Any:
    return pytest.raises(RuntimeError, match=rf"^wan_attn: {name} must .+, got ")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str) -> None:
    """With and without a gradient; the same bits afterwards."""
    function, table = FUNCTIONS[name]
    before = function(*operands())
    whole = torch.tensor([5, 5], device="cpu")  # a plan for lengths that a sparse one could take
    function(*operands(), q_lens=whole)
    function(*operands(), k_lens=whole)
    for argument, values in table.items():
        for value in values:
            for wants_grad in (False, True):
                with torch.set_grad_enabled(wants_grad), refused(argument):
                    function(*operands(), **{argument: value})
    assert torch.equal(before, function(*operands()))


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("index", range(3))
@pytest.mark.filterwarnings("ignore")
def test_tensors_and_the_calls_after_them(kind: str, index: int) -> None:
    """A refusal is no backend's failure: good calls of that kind stay where they were."""
    for function, names in (
        (wan_attn.sdpa, ("query", "key", "value")),
        (wan_attn.flash_attention, ("q", "k", "v")),
        (wan_attn.flash_attn_func, ("q", "k", "v")),
    ):
        good: Any = operands()
        before: Any = function(*good)
        bad: list[Any] = operands()
        bad[index] = TENSORS[kind](bad[index])
        # Of two that do not fit each other, either may be named.
        with refused("(?:key|k)" if kind == "meta" and index == 0 else names[index]):
            function(*bad)
        after: Any = function(*good)
        assert torch.equal(before, after)


@pytest.mark.parametrize("limit", [4.9, "8", HUGE, -1, True, torch.tensor(8.5)])
def test_max_seqlen_and_softcap(limit: Any) -> None:
    qkv = torch.randn(10, 3, 2, 16, device="cpu")
    begins = torch.tensor([0, 4, 10], device="cpu")
    with refused("max_seqlen"):
        wan_attn.flash_attn_varlen_qkvpacked_func(qkv, begins, limit)
    with refused("softcap"):
        wan_attn.flash_attn_varlen_qkvpacked_func(qkv, begins, 8, softcap=math.nan)


def test_numbers_of_other_kinds_are_taken() -> None:
    expected: Any = wan_attn.sdpa(*operands(), k_lens=[3, 4], scale=0.5, is_causal=True)
    for given in (np.array([3, 4]), (np.int64(3), 4), [torch.tensor(3), torch.tensor(4)]):
        options: Any = {"k_lens": given, "scale": np.float32(0.5), "is_causal": 1}
        found: Any = wan_attn.sdpa(*operands(), **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("wants_grad", [False, True])
def test_another_default_device(wants_grad: bool) -> None:
    q, k, v = operands()
    q.requires_grad_(wants_grad)
    options: Any = {"k_lens": [3, 4], "dtype": torch.float32}
    expected = wan_attn.flash_attention(q, k, v, **options)
    with torch.device("meta"):
        found = wan_attn.flash_attention(q, k, v, **options)
    assert torch.equal(found, expected)


def test_another_default_device_beside_masks_and_packed_tokens() -> None:
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device="cpu").tril()
    mask[1, :, :, 3:] = False
    tokens = operands()[0]
    with torch.device("meta"):
        plan = _mask_plan.make_plan(mask, 2, 5, 5)
        packed = _flash_attention.pack("q_lens", tokens, None)
    assert plan.parts and not plan.reason
    assert packed.cu_seqlens.tolist() == [0, 5, 10]


def test_patch_refuses_before_it_hooks_in() -> None:
    bad: Any
    for bad in (None, 3, ["wan"], "no name"):
        with refused("package"):
            wan_attn.patch(package=bad)
    bad = 3
    with refused("attention"):
        wan_attn.patch(attention=bad)
    assert report() is None


def test_a_refusal_survives_pickling_and_renaming() -> None:
    with pytest.raises(Refusal) as raised:
        gate.refuse("key", "on query's device cpu", "meta")
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value)
    renamed = str(again.under({"key": "k", "query": "q"}))
    assert renamed == "wan_attn: k must be on q's device cpu, got meta"
