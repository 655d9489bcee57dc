# SPDX-License-Identifier: Apache-2.0
"""refusals.py - what each door says to each bad call, as JSON: for one process, with one binding.

    PYTHONPATH=tests:tests/support WAN_ATTN_BINDING=ctypes python tests/support/refusals.py

Doors: "op" is torch.ops.wan_attn.sdpa, "fake" the same with fake tensors, "sdpa" is wan_attn.sdpa,
"traced" that one with fake tensors.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import test_errors
import wan_attn
from wan_attn.request import Refusal


def by_sdpa(call: dict[str, Any]) -> Any:
    """The op's arguments to the public function, which has no `kernel`."""
    call = dict(call)
    if "kernel" in call:
        return None
    window = (call.pop("window_left", -1), call.pop("window_right", -1))
    return wan_attn.sdpa(window=window, **call)


def by_op(call: dict[str, Any]) -> Any:
    return torch.ops.wan_attn.sdpa(**call)


def faked(door: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def run(call: dict[str, Any]) -> Any:
        if any(isinstance(x, torch.Tensor) and x.layout != torch.strided for x in call.values()):
            return None  # fake tensors are dense
        with FakeTensorMode() as mode:
            fake = mode.from_tensor
            return door({n: fake(x) if isinstance(x, torch.Tensor) else x for n, x in call.items()})

    return run


DOORS = {"op": by_op, "sdpa": by_sdpa, "fake": faked(by_op), "traced": faked(by_sdpa)}
NO_TENSOR = ("query_none", "key_none", "value_none")


def calls() -> dict[str, Callable[[], dict[str, Any]]]:
    """name -> the arguments of a bad call."""
    bad = {name: make for name, (make, _) in test_errors.MALFORMED.items()}
    for name in NO_TENSOR:
        bad[name] = functools.partial(test_errors.good, **{name.removesuffix("_none"): None})
    return bad


def message(door: Callable[[dict[str, Any]], Any], call: dict[str, Any]) -> str | None:
    try:
        door(call)
    except Exception as error:  # noqa: BLE001 - any words are an answer
        kind = "RuntimeError" if isinstance(error, Refusal) else type(error).__name__
        return f"{kind}: {error}"
    return None


if __name__ == "__main__":
    found = {
        name: {door: message(function, make()) for door, function in DOORS.items()}
        for name, make in calls().items()
    }
    print(json.dumps({"binding": wan_attn.native.op.binding(), "said": found}))
