# SPDX-License-Identifier: Apache-2.0
"""modes.py - the public functions that ask for less than all of attention, for functions.py."""

from __future__ import annotations

from typing import Any

import torch

import wan_attn
from fuzz import values as v
from fuzz.functions import Function
from wan_attn import sparse

UNSET = "it is what the variables say, or as it was"


def _use(**arguments: Any) -> None:
    wan_attn.precision.use(**arguments).end()


def _sparse_use(**arguments: Any) -> None:
    sparse.use(**arguments).end()


def _at(**arguments: Any) -> None:
    with wan_attn.precision.at(**arguments):
        pass


def precision() -> list[Function]:
    """Where 8-bit scores are asked for. None asks for what holds without the argument."""
    numbers = ("step", "steps", "layer", "layers", "expert")
    here: dict[str, Any] = {**dict.fromkeys(numbers, 2), "kind": "self", "grid": (2, 3, 4)}
    asked = {"mode": "fast", "budget": 0.01, "guard": "off", "rules": [{"precision": "exact"}]}
    return [
        Function(
            "precision.use",
            _use,
            lambda: dict(asked),
            {"mode": v.WORD, "budget": v.PROBABILITY, "guard": v.WORD, "rules": v.NOTHING},
            {},
            {(name, "None"): UNSET for name in ("budget", "guard", "rules")},
        ),
        Function(
            "precision.at",
            _at,
            lambda: dict(here),
            {**dict.fromkeys(numbers, v.COUNT), "kind": v.WORD, "grid": v.NOTHING},
            {},
            {(name, "None"): UNSET for name in here},
        ),
    ]


def _lists() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    query, key, value = (torch.randn(2, 70, 2, 16, generator=generator) for _ in range(3))
    lists = sparse.block_lists(torch.ones(2, 2, 2, 2, dtype=torch.bool))
    more = {"scale": 0.3, "is_causal": False, "return_lse": False, "pools_others": True}
    lens = {"q_lens": torch.tensor([65, 70]), "k_lens": torch.tensor([70, 3])}
    return {"query": query, "key": key, "value": value, "lists": lists, **lens, **more}


def leaving_out() -> list[Function]:
    """Where blocks are left out."""
    asked: dict[str, Any] = {
        **{"mode": "sparse", "budget": 0.05, "tau": 1.0, "threshold": 0.05, "min_tokens": 9},
        **{"dense_steps": 0.2, "always": [(0, 9)], "profile": None},
    }
    operands = {"query": v.OPERAND, "key": v.OPERAND, "value": v.OPERAND}
    return [
        Function(
            "sparse.use",
            _sparse_use,
            lambda: dict(asked),
            {
                **{"mode": v.WORD, "budget": v.PROBABILITY, "min_tokens": v.COUNT},
                **{"threshold": v.PROBABILITY, "dense_steps": v.PROBABILITY},
                **{"tau": v.SCALE, "always": v.NOTHING, "profile": v.NOTHING},
            },
            {},
            {
                **{(name, "None"): UNSET for name in ("budget", "tau", "threshold", "profile")},
                ("dense_steps", "1"): "all steps",
            },
        ),
        Function(
            "sparse.sdpa",
            sparse.sdpa,
            _lists,
            {
                **{**operands, "q_lens": v.LENGTHS, "k_lens": v.LENGTHS, "scale": v.SCALE},
                **{"is_causal": v.FLAG, "return_lse": v.FLAG, "pools_others": v.FLAG},
                **{"window": v.WINDOW, "lists": v.NOTHING},
            },
            {
                "window": frozenset({"window", "window_left", "window_right"}),
                "query": frozenset({"block_counts", "block_indices"}),
            },
        ),
        Function(
            "sparse.block_lists",
            sparse.block_lists,
            lambda: {"mask": torch.ones(1, 2, 3, 4, dtype=torch.bool)},
            {"mask": v.NOTHING},
        ),
    ]
