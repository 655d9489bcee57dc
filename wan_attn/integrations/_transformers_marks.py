# SPDX-License-Identifier: Apache-2.0
"""_transformers_marks - what a part of a model had before enable(), written on the model itself.

A table beside the model would miss its deep copies, what torch.load gives back, and a model that
was wrapped (peft, DDP, torch.compile) or unwrapped since. The mark is a plain attribute of every
module that holds the part's configuration; it is not part of the configuration, so that
save_pretrained() does not write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from wan_attn.integrations._transformers_choice import EAGER, OURS, SDPA

MARK = "_wan_attn_mark"


def _holders(model: torch.nn.Module, part: Any) -> Iterator[torch.nn.Module]:
    for module in model.modules():
        # vars: a wrapper forwards what it does not have, and the mark belongs on the model inside.
        if vars(module).get("config") is part.config:
            yield module


def _mark(model: torch.nn.Module, part: Any) -> tuple[str, str] | None:
    marks = (vars(module).get(MARK) for module in _holders(model, part))
    return next((mark for mark in marks if mark is not None), None)


def before(model: torch.nn.Module, part: Any, whole: Any) -> str:
    """What the part goes back to: what it had before enable(), or what somebody chose since.

    A part that names wan_attn without a mark was loaded so: it gets transformers' own default.
    """
    current: str = part.config._attn_implementation
    mark = _mark(model, part)
    if mark is not None and mark[1] == current:
        return mark[0]
    if current != OURS:
        return current
    return SDPA if getattr(whole, "_supports_sdpa", False) else EAGER


def write(model: torch.nn.Module, part: Any, had: str, has: str) -> None:
    """Note that `part` had one and now has the other."""
    for module in _holders(model, part):
        setattr(module, MARK, (had, has))


def erase(model: torch.nn.Module) -> None:
    """Take every mark off the model."""
    for module in model.modules():
        vars(module).pop(MARK, None)
