# SPDX-License-Identifier: Apache-2.0
"""flash_attn_suite.py - FlashAttention's own tests against wan_attn's functions, on the CPU.

    python tests/integrations/flash_attn_suite.py CHECKOUT [--every N] [--tests backward]
        [--through-op] [-- PYTEST ARGUMENTS]

CHECKOUT is a checkout of Dao-AILab/flash-attention (BSD-3), which whoever runs this brings along:
its tests/test_flash_attn.py is run as it is. Needs einops. In this process alone

- `flash_attn` is a package of our six functions (its own bert_padding.py, which is plain PyTorch,
  is loaded from the checkout; what needs its CUDA extension is absent),
- device="cuda" means the CPU, and the card that tests ask about is an A100 with 80 GiB,
- USE_ATTENTION_BACKEND=sdpa: our kernels compute forward and backward passes, and at the end it is
  said in how many tests the latter ran. --through-op sends calls through
  torch.ops.wan_attn.attention, as torch.compile does.

What is left out, by parameter: dropout, ALiBi, softcap and paged caches, which wan_attn refuses by
name; sequences of more than 512 tokens, and of more than 128 where a test repeats its call 250
times (for time). And by test: kvcache and splitkv (another function), the argument slots of the
CUDA extension. Of what is left every 61st is run, or every Nth: a test takes a second, because the
references that it compares with do.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

# Each compares results, and gradients, with references.
BOTH = (
    "test_flash_attn_qkvpacked",
    "test_flash_attn_varlen_qkvpacked",
    "test_flash_attn_output",
    "test_flash_attn_varlen_output",
    "test_flash_attn_causal",
    "test_flash_attn_varlen_causal",
)
BACKWARD = (
    "test_flash_attn_bwd_overflow",
    "test_flash_attn_bwd_transpose",
    "test_flash_attn_bwd_varlen_overflow",
    "test_flash_attn_deterministic",
    "test_flash_attn_varlen_deterministic",
    "test_flash_attn_race_condition",
)
TESTS = {"all": (*BOTH, *BACKWARD), "both": BOTH, "backward": BACKWARD}
# What a parameter may be; one that is not named may be anything.
ALLOWED: dict[str, set[Any]] = {
    "dropout_p": {0.0},
    "alibi": {False},
    "softcap": {0.0},
    "paged_kv_block_size": {None},
}
LONGEST = 512
LONGEST_OF = {"test_flash_attn_race_condition": 128}
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


def install(checkout: Path, through_op: bool) -> None:
    """Make `flash_attn` and the card that its tests see; for this process."""
    os.environ["USE_ATTENTION_BACKEND"] = "sdpa"
    import wan_attn
    from wan_attn.selection import traced

    if through_op:
        traced._PLAIN = ()  # type: ignore[assignment]  # no tensor is plain
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

    def __init__(self, every: int, tests: tuple[str, ...]) -> None:
        self.every, self.tests = every, tests
        self.offered = self.meaningful = self.with_our_gradients = 0

    def allows(self, test: str, name: str, value: Any) -> bool:
        if name.startswith("seqlen"):
            return bool(value <= LONGEST_OF.get(test, LONGEST))
        return name not in ALLOWED or value in ALLOWED[name]

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.meaningful = len(items)
        items[:] = items[:: self.every]

    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: Any) -> Any:
        return [] if name.startswith("test_") and name not in self.tests else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Thin out the marks before pytest multiplies them: all of them would be 10⁵ tests."""
        total, marks = 1, metafunc.definition.own_markers
        test = metafunc.function.__name__
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
                if all(map(partial(self.allows, test), names, row))
            ]
            marks[index] = pytest.mark.parametrize(mark.args[0], kept).mark
        self.offered += total

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        from wan_attn.native import backward

        vars(backward._here).clear()
        with OnTheCpu():
            result = yield
        self.with_our_gradients += backward.last_kernel() is not None
        return result

    def pytest_report_collectionfinish(self, items: Any) -> str:
        return (
            f"{len(items)} of {self.meaningful} meaningful parametrisations of {len(self.tests)}"
            f" tests; with dropout, ALiBi, softcap, paged caches and long sequences {self.offered}"
        )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.line(f"gradients by our kernels in {self.with_our_gradients} tests")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--every", type=int, default=EVERY, metavar="N")
    parser.add_argument("--tests", choices=TESTS, default="all")
    parser.add_argument("--through-op", action="store_true")
    args = parser.parse_args(words[:split])
    file = args.checkout / "tests" / "test_flash_attn.py"
    if not file.is_file():
        parser.error(f"CHECKOUT must hold tests/test_flash_attn.py, got {args.checkout}")
    install(args.checkout, args.through_op)
    options = ["--no-header", "-p", "no:cacheprovider", "-c", os.devnull]
    options += ["--rootdir", str(args.checkout), *words[split + 1 :]]
    return int(pytest.main([str(file), *options], [Selection(args.every, TESTS[args.tests])]))


if __name__ == "__main__":
    raise SystemExit(main())
