# SPDX-License-Identifier: Apache-2.0
"""_operands.py - what a host hands to torch's SDPA, as SDPA would take it; and host arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wan_attn.request import DTYPES, gate, refuse


def under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands in autocast's dtype where it is on: SDPA is among the functions that it converts
    for, and what stands in SDPA's place must compute in the same dtype. float64 stays, as there."""
    kind = query.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # which meta has not
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)

    def convert(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype)

    return convert(query), convert(key), convert(value)


def why_not_dtypes(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why wan_attn leaves these dtypes to the host's own function; None: it takes them."""
    names = [str(x.dtype).removeprefix("torch.") for x in (query, key, value)]
    if len(set(names)) > 1:
        return f"its query, key and value are {', '.join(names)}"
    return None if query.dtype in DTYPES else f"it is {names[0]}"


def broadcasts(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a mask of this shape can be read as one of the whole. Of our own: torch's function
    turns an exception of a signal handler into one of its own."""
    sizes = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(n in (1, size) for n, size in sizes)


def check_module(argument: str, value: Any, rule: str) -> None:
    """Refuse what is no torch.nn.Module, before anything is looked up in it."""
    if not isinstance(value, torch.nn.Module):
        refuse(argument, rule, gate.kind_of(value))
