# SPDX-License-Identifier: Apache-2.0
"""flash_attn_suite.py - FlashAttention's own tests against wan_attn's functions, on the CPU.

    python tests/integrations/flash_attn_suite.py CHECKOUT [--every N] [-- PYTEST ARGUMENTS]

CHECKOUT is a checkout of Dao-AILab/flash-attention (BSD-3), which whoever runs this brings along:
its tests/test_flash_attn.py is run as it is. Needs einops. In this process alone

- `flash_attn` is a package of our six functions (its own bert_padding.py, which is plain PyTorch,
  is loaded from the checkout; what needs its CUDA extension is absent),
- device="cuda" means the CPU, and the card that tests ask about is an A100 with 80 GiB,
- calls go through torch.ops.wan_attn.attention, as they do under torch.compile: our kernels compute
  the forward pass, and wan_attn/native/autograd.py computes the backward pass, which these tests
  look at, too. (A plain call that wants a gradient goes to PyTorch, which would be tested instead.)

What is left out, by parameter: dropout, ALiBi, softcap and paged caches, which wan_attn refuses by
name; deterministic=True, which changes nothing in a forward pass; sequences of more than 512 tokens
(for time). And by test: kvcache and splitkv (another function), race conditions and overflow in the
backward kernels, the argument slots of the CUDA extension. Of what is left every 61st is run, or
every Nth: a test takes a second, because the references that it compares with do.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

TESTS = (
    "test_flash_attn_qkvpacked",
    "test_flash_attn_varlen_qkvpacked",
    "test_flash_attn_output",
    "test_flash_attn_varlen_output",
    "test_flash_attn_causal",
    "test_flash_attn_varlen_causal",
)
# What a parameter may be; one that is not named may be anything.
ALLOWED: dict[str, set[Any]] = {
    "dropout_p": {0.0},
    "alibi": {False},
    "softcap": {0.0},
    "deterministic": {False},
    "paged_kv_block_size": {None},
}
LONGEST = 512
EVERY = 61  # a prime: steps through the values of all parameters


class OnTheCpu(TorchFunctionMode):
    """device="cuda" means the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return function(*args, **kwargs)


def install(checkout: Path) -> None:
    """Make `flash_attn` and the card that its tests see; for this process."""
    import wan_attn
    from wan_attn.selection import traced

    traced._PLAIN = ()  # type: ignore[assignment]  # no tensor is plain: all go through the op
    package = types.ModuleType("flash_attn")
    package.__path__ = [str(checkout / "flash_attn")]
    for name in wan_attn.__all__:
        if name.startswith("flash_attn_"):
            setattr(package, name, getattr(wan_attn, name))
    package.flash_attn_with_kvcache = None  # type: ignore[attr-defined]  # imported, never called
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._get_block_size_n = None  # type: ignore[attr-defined]  # likewise
    interface.USE_TRITON_ROCM = False  # type: ignore[attr-defined]
    layers = types.ModuleType("flash_attn.layers")
    rotary = types.ModuleType("flash_attn.layers.rotary")
    rotary.apply_rotary_emb = None  # type: ignore[attr-defined]
    for module in (package, interface, layers, rotary):
        sys.modules[module.__name__] = module
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    card = types.SimpleNamespace(total_memory=80 << 30)
    torch.cuda.get_device_properties = lambda device=None: card  # type: ignore[assignment,return-value]


class Selection:
    """The tests and parameters that make sense here; counts what there was."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.offered = self.meaningful = 0

    def allows(self, name: str, value: Any) -> bool:
        if name.startswith("seqlen"):
            return bool(value <= LONGEST)
        return name not in ALLOWED or value in ALLOWED[name]

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.meaningful = len(items)
        items[:] = items[:: self.every]

    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: Any) -> Any:
        return [] if name.startswith("test_") and name not in TESTS else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Thin out the marks before pytest multiplies them: all of them would be 10⁵ tests."""
        total, marks = 1, metafunc.definition.own_markers
        for index, mark in enumerate(marks):
            if mark.name != "parametrize":
                continue
            names, values = mark.args
            total *= len(values)
            names = [name.strip() for name in names.split(",")]
            rows = [value if len(names) > 1 else (value,) for value in values]
            kept = [
                value
                for value, row in zip(values, rows, strict=True)
                if all(map(self.allows, names, row))
            ]
            marks[index] = pytest.mark.parametrize(mark.args[0], kept).mark
        self.offered += total

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        with OnTheCpu():
            return (yield)

    def pytest_report_collectionfinish(self, items: Any) -> str:
        return (
            f"{len(items)} of {self.meaningful} meaningful parametrisations of {len(TESTS)} tests;"
            f" with dropout, ALiBi, softcap, paged caches and long sequences {self.offered}"
        )


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--every", type=int, default=EVERY, metavar="N")
    args = parser.parse_args(words[:split])
    file = args.checkout / "tests" / "test_flash_attn.py"
    if not file.is_file():
        parser.error(f"CHECKOUT must hold tests/test_flash_attn.py, got {args.checkout}")
    install(args.checkout)
    options = ["--no-header", "-p", "no:cacheprovider", "-c", os.devnull]
    options += ["--rootdir", str(args.checkout), *words[split + 1 :]]
    return int(pytest.main([str(file), *options], [Selection(args.every)]))


if __name__ == "__main__":
    raise SystemExit(main())
