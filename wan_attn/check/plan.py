# SPDX-License-Identifier: Apache-2.0
"""plan.py - what there is to check on a device, the most telling first: a run that is stopped early
then knows the most."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from wan_attn.check import calls, programs, real, sanitizer, speed
from wan_attn.check.calls import Detail
from wan_attn.check.target import Target
from wan_attn.log import dtype_name

STEPS: dict[str, Callable[..., Detail]] = {
    "small": calls.check_small,
    "rope": calls.check_rope,
    "matmul": speed.measure_matmul,
    "speed": speed.measure_speed,
    "lengths": calls.check_lengths,
    "wan": real.check_wan,
    "masks": calls.check_masks,
    "graph": programs.check_graph,
    "stream": programs.check_stream,
    "offsets": real.check_offsets,
    "sanitizer": sanitizer.run_sanitizer,
}
ON_GPU_ONLY = ("graph", "stream", "sanitizer")


@dataclass(frozen=True)
class Item:
    """One thing to do.

    Attributes:
        step: of STEPS.
        kernel: sdpa_sm80_d128/bf16; "": all of them.
        argument: what the step wants to know beside it.
        limit_s: seconds without a word after which it hangs.
    """

    step: str
    kernel: str = ""
    argument: str = ""
    limit_s: float = 45.0

    @property
    def title(self) -> str:
        return " ".join(word for word in (self.step, self.kernel, self.argument) if word)


def make(target: Target, steps: Collection[str] = ()) -> list[Item]:
    """Everything, or these steps."""
    names = [kernel.name for kernel in target.kernels()]
    shapes = [call.name for call in target.sizes.shapes]
    items = each("small", names, 60.0)
    items += [Item("rope", argument=kernel.name) for kernel in target.rope_kernels()]
    items += [Item("matmul", limit_s=120.0), *speeds(target, shapes[:1])]
    items += each("lengths", names) + real_calls(target, shapes[:1])
    items += each("masks", names) + each("graph", names) + each("stream", names)
    items += speeds(target, shapes[1:]) + real_calls(target, shapes[1:])
    items += each("offsets", names, 60.0)
    items += [Item("sanitizer", argument=tool, limit_s=150.0) for tool in sanitizer.TOOLS]
    return [
        replace(item, limit_s=item.limit_s * target.patience)
        for item in items
        if (not steps or item.step in steps)
        and (target.has_streams or item.step not in ON_GPU_ONLY)
    ]


def each(step: str, names: list[str], limit_s: float = 45.0, argument: str = "") -> list[Item]:
    """The step for every kernel."""
    return [Item(step, name, argument, limit_s) for name in names]


def real_calls(target: Target, shapes: list[str]) -> list[Item]:
    """Each shape for every kernel that takes it; those of one dtype together share its result."""
    items = []
    for call in map(target.sizes.find, shapes):
        for kernel in sorted(target.kernels(), key=lambda kernel: dtype_name(kernel.dtype)):
            if target.why_not(kernel, call, has_k_lens=True, return_lse=True) is None:
                items.append(Item("wan", kernel.name, call.name))
    return items


def speeds(target: Target, shapes: list[str]) -> list[Item]:
    """Speed in every dtype of the first shape, and of what is quick; of the rest in one."""
    first = target.sizes.shapes[0]
    items = []
    for name in shapes:
        is_long = target.sizes.find(name).flops > first.flops
        dtypes = target.sizes.dtypes[:1] if is_long else target.sizes.dtypes
        items += [Item("speed", "", f"{name}/{dtype_name(dtype)}", 120.0) for dtype in dtypes]
    return items
