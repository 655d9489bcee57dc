# SPDX-License-Identifier: Apache-2.0
"""report.py - what a patch did, as data and as text; looks at nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

from wan_attn.integrations._rebind import Binding


@dataclass(frozen=True, slots=True)
class PatchReport:
    """What is patched at this moment.

    ``str()`` is for people, ``dataclasses.asdict()`` for programs.
    """

    package: str
    bindings: tuple[Binding, ...]
    """Names that now run wan_attn."""
    pending: tuple[str, ...]
    """Names whose module is not imported yet; they follow when it is."""
    missing: tuple[str, ...]
    """Names that this version of Wan2.2 does not have."""
    foreign: tuple[Binding, ...]
    """Names that held neither Wan2.2's function nor ours: left alone."""
    flags: tuple[str, ...]
    """FLASH_ATTN_*_AVAILABLE flags switched on."""
    tf32: str
    compile: str
    broken: tuple[tuple[str, str], ...]
    """Installed packages that failed to load, and why; Wan2.2 took them as absent."""
    rope: tuple[str, ...] = ()
    """RMS norm and rotation: what each function of Wan2.2's is now."""

    def __str__(self) -> str:
        known = sum(map(len, (self.bindings, self.pending, self.missing, self.foreign)))
        lines = [f"wan_attn: {len(self.bindings)} of {known} names patched in `{self.package}`"]
        lines += [f"  patched     {binding}  (was {binding.original})" for binding in self.bindings]
        lines += [f"  pending     {name}  (module not imported yet)" for name in self.pending]
        lines += [f"  missing     {name}  (not in this Wan2.2)" for name in self.missing]
        lines += [f"  left alone  {binding}  (is {binding.original})" for binding in self.foreign]
        lines += [f"  flag        {flag} = True" for flag in self.flags]
        lines += [f"  broken      {name}: {reason}" for name, reason in self.broken]
        lines += [f"  norm, RoPE  {line}" for line in self.rope]
        lines += [f"  TF32        {self.tf32}", f"  compile     {self.compile}"]
        return "\n".join(lines)
