# SPDX-License-Identifier: Apache-2.0
"""patching.py - a stand-in attention, patch() with it, and a look at all that should be patched."""

from __future__ import annotations

import sys
from typing import Any

import stub_wan

from wan_attn.integrations import wan22
from wan_attn.integrations.wan22.report import PatchReport


def ours(*args: Any, **kwargs: Any) -> Any:
    """Stands in for wan_attn.flash_attention; hands back what it was called with."""
    return "ours", args, kwargs


def patch(**kwargs: Any) -> PatchReport:
    return wan22.patch(attention=ours, **kwargs)


def held(package: str = "wan") -> dict[str, Any]:
    """Every one of the 8 + 2 names and what it holds."""
    names = {f"{name}.flash_attention": "flash_attention" for name in stub_wan.FLASH_ATTENTION}
    names |= {f"{n}.flash_attn_func": "flash_attn_func" for n in stub_wan.FLASH_ATTN_FUNC_HOLDERS}
    return {
        name: vars(sys.modules[f"{package}.{name.rpartition('.')[0]}"])[attribute]
        for name, attribute in names.items()
    }


def assert_all_ours(package: str = "wan") -> None:
    for name, value in held(package).items():
        assert callable(value) and value(1, 2, 3)[0] == "ours", f"{name} is {value}"


def assert_all_stock() -> None:
    for name, value in held().items():
        if name.endswith("flash_attn_func"):
            assert value is None, name
        else:
            assert value.__module__ == "wan.modules.attention", name
            assert value(1, 2, 3) == "stock", name
    assert len({id(value) for value in held().values()}) == 2
