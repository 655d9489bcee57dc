# SPDX-License-Identifier: Apache-2.0
"""rope_patch.py - which functions of Wan2.2 rms_norm_rope stands in for; puts them in and back.

Only those that are, word for word, what Wan2.2 42bf4cf has: another version's may mean something
else. A name that holds a function that is not Wan2.2's own is left alone.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType
from typing import Any

from wan_attn.integrations import _rebind
from wan_attn.integrations.wan22 import fused, rope
from wan_attn.integrations.wan22.source import fingerprint

FUNCTIONS = {
    "modules.model.rope_apply": ("9df392e85c42e55a", rope.make_rope_apply),
    "modules.s2v.model_s2v.rope_apply": ("7da0c34c1ec73405", rope.make_token_rope_apply),
    "modules.s2v.model_s2v.rope_apply_usp": ("83ebed7a1b9076f7", rope.make_token_rope_apply),
    "distributed.sequence_parallel.rope_apply": (
        "7dca93fce376c449",
        rope.make_parallel_rope_apply,
    ),
}
"""name -> (fingerprint, what makes ours of it)."""

NORMS = {
    "modules.model.WanRMSNorm": "e630a1d3f6ca985d",
    "modules.s2v.motioner.RMSNorm": "e630a1d3f6ca985d",
}
"""class -> fingerprint of its forward and _norm."""

ATTENTIONS = {
    "modules.model.WanSelfAttention": ("1472c1d96b37872e", fused.by_grid),
    "modules.animate.model_animate.WanAnimateSelfAttention": ("1472c1d96b37872e", fused.by_grid),
    "modules.s2v.model_s2v.WanS2VSelfAttention": ("1472c1d96b37872e", fused.by_token),
}
"""class -> (fingerprint of its forward, where its angles come from)."""

PARALLEL: dict[str, tuple[str, str, bool]] = {
    "distributed.sequence_parallel.sp_attn_forward": ("473d76bc06c5ae7b", "rope_apply", False),
    "modules.s2v.model_s2v.sp_attn_forward_s2v": ("0fa3960c1a62167d", "rope_apply_usp", True),
}
"""name -> (fingerprint, the function that rotates there, whether each token has its angles)."""

# Grids in buckets, each with an origin of its own and positions that repeat: a gather that the op
# does not have. Wan2.2 configures S2V 14B without its motioner (enable_motioner = False), so that
# there nothing calls this function in a step.
STAYS = {
    "modules.s2v.motioner.rope_apply": "its grids come in buckets, and S2V 14B has no motioner",
}
"""What stays Wan2.2's, and why."""

_OTHER = "not as in Wan2.2 42bf4cf"


class RopePatch:
    """What stands where; the session's lock is held around every method."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._norms: fused.Norms = {}
        # name -> (owner, attribute, what was there, ours)
        self._records: dict[str, tuple[Any, str, rope.Function, rope.Function]] = {}
        self._refused: dict[str, object] = {}

    def sync(self) -> None:
        """Bring all that is loaded into the patched state; idempotent."""
        for name, known in NORMS.items():
            self._take_method(name, known, rope.make_norm_forward, "_norm")
        self._norms.update(
            {self._records[n][0]: self._records[n][3] for n in NORMS if n in self._records}
        )
        for name, (known, make) in FUNCTIONS.items():
            self._take_function(name, known, make)
        for name, (known, angles) in ATTENTIONS.items():
            make = functools.partial(fused.make_attention_forward, norms=self._norms, angles=angles)
            self._take_method(name, known, make)
        for name, (known, rotation, has_token_angles) in PARALLEL.items():
            make = functools.partial(
                fused.make_parallel_forward,
                norms=self._norms,
                rotation=rotation,
                has_token_angles=has_token_angles,
            )
            self._take_function(name, known, make)

    def restore(self) -> None:
        """Put back what is still ours."""
        for owner, attribute, original, ours in self._records.values():
            if isinstance(owner, ModuleType):
                _rebind.rebind(ours, original)
            elif vars(owner).get(attribute) is ours:
                setattr(owner, attribute, original)

    def describe(self) -> tuple[str, ...]:
        """A line for each name: what it is now."""
        lines = []
        for name in (*FUNCTIONS, *NORMS, *ATTENTIONS, *PARALLEL, *STAYS):
            title = f"{self._package}.{name}"
            if name in self._records:
                lines.append(f"{title}: wan_attn")
            elif name in self._refused:
                lines.append(f"{title}: left alone, {_OTHER}")
            elif name in STAYS:
                lines.append(f"{title}: stock, {STAYS[name]}")
            elif self._module(name)[0] is None:
                lines.append(f"{title}: not imported yet")
            else:
                lines.append(f"{title}: not in this Wan2.2")
        return tuple(lines)

    def _module(self, name: str) -> tuple[ModuleType | None, str]:
        module, _, attribute = f"{self._package}.{name}".rpartition(".")
        loaded = sys.modules.get(module)
        is_ready = loaded is not None and not _rebind.is_initialising(loaded)
        return (loaded if is_ready else None), attribute

    def _is_new(self, name: str, value: object) -> bool:
        """Whether it is neither ours nor refused before."""
        record = self._records.get(name)
        is_ours = record is not None and value is record[3]
        return callable(value) and not is_ours and value is not self._refused.get(name)

    def _take_function(self, name: str, known: str, make: Any) -> None:
        module, attribute = self._module(name)
        value: Any = vars(module).get(attribute) if module else None
        if not self._is_new(name, value):
            return
        # Not __module__: functools.wraps copies that to other wrappers.
        is_own = getattr(inspect.unwrap(value), "__globals__", None) is vars(module)
        if not is_own or fingerprint(value) != known:
            self._refused[name] = value
            return
        ours = make(value)
        self._records[name] = (module, attribute, value, ours)
        _rebind.rebind(value, ours)

    def _take_method(self, name: str, known: str, make: Any, *others: str) -> None:
        module, attribute = self._module(name)
        cls: Any = vars(module).get(attribute) if module else None
        value: Any = vars(cls).get("forward") if isinstance(cls, type) else None
        if not self._is_new(name, value):
            return
        if fingerprint(value, *(getattr(cls, other) for other in others)) != known:
            self._refused[name] = value
            return
        ours = make(value)
        self._records[name] = (cls, "forward", value, ours)
        cls.forward = ours
