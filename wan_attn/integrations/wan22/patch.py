# SPDX-License-Identifier: Apache-2.0
"""patch.py - makes stock Wan2.2 use wan_attn: which names it binds where; patch(), unpatch().

Knows Wan2.2's module tree; knows no backend: every call goes to wan_attn.attention.
"""

from __future__ import annotations

import logging
import sys
import threading
from types import ModuleType

from wan_attn import config, log
from wan_attn.integrations import _rebind
from wan_attn.integrations._rebind import Binding
from wan_attn.integrations.wan22 import compile, tf32
from wan_attn.integrations.wan22.adapters import (
    Attention,
    make_flash_attention,
    make_flash_attn_func,
)
from wan_attn.integrations.wan22.places import PlacePatch
from wan_attn.integrations.wan22.report import PatchReport
from wan_attn.integrations.wan22.rope_patch import RopePatch
from wan_attn.request import gate, refuse
from wan_attn.selection import profile
from wan_attn.selfcheck import proof

DEFINER = "modules.attention"
"""Where Wan2.2 defines flash_attention, below its package."""

FLASH_ATTENTION = (
    "modules",
    "modules.attention",
    "modules.model",
    "modules.animate.clip",
    "modules.animate.model_animate",
    "modules.s2v.model_s2v",
    "modules.s2v.motioner",
    "distributed.ulysses",
)
"""The modules known to bind flash_attention; others that do are found by identity."""

FLASH_ATTN_FUNC = ("modules.animate.face_blocks", "modules.s2v.auxi_blocks")
"""The modules that take flash_attn_func from the flash_attn package itself, or None without it."""

FLASH_ATTN_PACKAGES = ("flash_attn", "flash_attn_interface", "flash_attn_3")

BLOCKS = (
    ("modules.model", "WanAttentionBlock"),
    ("modules.s2v.model_s2v", "WanS2VAttentionBlock"),
    ("modules.animate.model_animate", "WanAnimateAttentionBlock"),
)
"""The transformer blocks that WAN_COMPILE=1 compiles."""

_ABSENT = object()


class _Session:
    """One patch(): the replacements, what they replaced, and how to put it back.

    Methods that touch modules expect the caller to hold _LOCK.
    """

    def __init__(
        self, package: str, attention: Attention | None, settings: config.Settings
    ) -> None:
        self.package = package
        self.is_active = True
        self.hook = _rebind.ImportHook(package, self._loaded, FLASH_ATTN_PACKAGES)
        self._flash_attention = make_flash_attention(attention or _default_attention())
        self._flash_attn_func = make_flash_attn_func(attention)
        self._settings = settings
        self._originals: list[object] = []
        # (module, attribute) -> what unpatch puts back there
        self._records: dict[tuple[str, str], object] = {}
        self._flags: dict[str, ModuleType] = {}
        self._compilers: dict[str, compile.CompiledForward] = {}
        # An attention of the caller's own gets q and k as stock Wan2.2 makes them.
        has_rope = attention is None and settings.rope == "auto"
        self._rope = RopePatch(package) if has_rope else None
        self._why_no_rope = "WAN_ATTN_ROPE=off" if attention is None else "attention is given"
        self._places = PlacePatch(package) if attention is None else None
        self._tf32_refusal = tf32.why_not()
        self._tf32 = () if self._tf32_refusal else tf32.allow()

    def _module(self, name: str) -> ModuleType | None:
        return sys.modules.get(f"{self.package}.{name}")

    def _loaded(self, module: ModuleType) -> None:
        with _LOCK:
            if self.is_active:
                self.sync(module)

    def sync(self, module: ModuleType | None = None) -> None:
        """Bring ``module``, or everything that is loaded, into the patched state; idempotent."""
        if self._adopt():
            module = None
        for original in self._originals:
            for binding in _rebind.rebind(original, self._flash_attention, module):
                self._records[binding.module, binding.attribute] = original
        for name in FLASH_ATTN_FUNC:
            self._take_flash_attn_func(self._module(name))
        if self._rope is not None:
            self._rope.sync()
        if self._places is not None:
            self._places.sync()
        if self._settings.compile_model:
            self._compile_blocks()

    def _adopt(self) -> bool:
        """Learn which functions are Wan2.2's own; whether there is a new one.

        Its own is what its attention module defined, wherever it is held by now. There are two
        after a reload of that module.
        """
        definer = self._module(DEFINER)
        if definer is None:
            return False
        before = len(self._originals)
        for name in FLASH_ATTENTION:
            holder = self._module(name)
            value = vars(holder).get("flash_attention") if holder else None
            # Not __module__: functools.wraps copies that to other wrappers.
            is_defined_there = getattr(value, "__globals__", None) is vars(definer)
            if is_defined_there and not any(value is known for known in self._originals):
                self._originals.append(value)
        # attention(), Wan2.2's wrapper, takes flash_attention only if it believes in flash_attn;
        # its own fallback ignores lengths, scale and window.
        flags = ("FLASH_ATTN_2_AVAILABLE", "FLASH_ATTN_3_AVAILABLE")
        if [vars(definer).get(flag) for flag in flags] == [False, False]:
            setattr(definer, flags[0], True)
            self._flags[flags[0]] = definer
        return len(self._originals) > before

    def _take_flash_attn_func(self, module: ModuleType | None) -> None:
        if module is None or "flash_attn_func" not in vars(module):
            return
        value = vars(module)["flash_attn_func"]
        owner = str(getattr(value, "__module__", "")).partition(".")[0]
        if value is None or owner in FLASH_ATTN_PACKAGES:
            self._records[module.__name__, "flash_attn_func"] = value
            module.flash_attn_func = self._flash_attn_func  # type: ignore[attr-defined]

    def _compile_blocks(self) -> None:
        for name, attribute in BLOCKS:
            cls = vars(self._module(name) or ModuleType("")).get(attribute)
            title = f"{self.package}.{name}.{attribute}"
            compiler = self._compilers.get(title)
            if isinstance(cls, type) and (compiler is None or compiler.cls is not cls):
                self._compilers[title] = compile.CompiledForward(cls)
                self._compilers[title].install()

    def restore_names(self) -> None:
        """Put back every name that is still ours."""
        if self._rope is not None:
            self._rope.restore()
        if self._places is not None:
            self._places.restore()
        for (name, attribute), original in self._records.items():
            module = sys.modules.get(name)
            if module is not None and self._is_ours(vars(module).get(attribute)):
                setattr(module, attribute, original)
        # Names that took ours from a patched module have no record of their own.
        for ours, name in (
            (self._flash_attention, "flash_attention"),
            (self._flash_attn_func, "flash_attn_func"),
        ):
            if any(attribute == name for _, attribute in self._records):  # else nobody has ours
                _rebind.rebind(ours, self._original_of(name))

    def restore_settings(self) -> None:
        """Put back what is not a name: flags, the blocks' forward, TF32."""
        for flag, definer in self._flags.items():
            setattr(definer, flag, False)
        for compiler in self._compilers.values():
            compiler.remove()
        tf32.restore(self._tf32)

    def _original_of(self, attribute: str) -> object:
        values = [value for (_, name), value in self._records.items() if name == attribute]
        return values[-1] if values else None

    def _is_ours(self, value: object) -> bool:
        return value is self._flash_attention or value is self._flash_attn_func

    def report(self) -> PatchReport:
        """The state of things now."""
        bindings: list[Binding] = []
        pending: list[str] = []
        missing: list[str] = []
        foreign: list[Binding] = []
        known = [(f"{self.package}.{name}", "flash_attention") for name in FLASH_ATTENTION]
        known += [(f"{self.package}.{name}", "flash_attn_func") for name in FLASH_ATTN_FUNC]
        for name, attribute in dict.fromkeys([*known, *self._records]):
            module = sys.modules.get(name)
            value = vars(module).get(attribute, _ABSENT) if module else _ABSENT
            if value is _ABSENT:
                where = missing if module and not _rebind.is_initialising(module) else pending
                where.append(f"{name}.{attribute}")
            elif self._is_ours(value):
                original = self._records.get((name, attribute), self._original_of(attribute))
                bindings.append(Binding(name, attribute, _rebind.describe(original)))
            else:
                foreign.append(Binding(name, attribute, _rebind.describe(value)))
        return PatchReport(
            package=self.package,
            bindings=tuple(bindings),
            pending=tuple(pending),
            missing=tuple(missing),
            foreign=tuple(foreign),
            flags=tuple(f"{module.__name__}.{flag}" for flag, module in self._flags.items()),
            tf32=self._describe_tf32(),
            compile=self._describe_compile(),
            broken=tuple(self.hook.broken.items()),
            rope=self._rope.describe() if self._rope else (f"off ({self._why_no_rope})",),
        )

    def _describe_tf32(self) -> str:
        if self._tf32_refusal:
            return f"unchanged ({self._tf32_refusal})"
        names = [change.title for change in self._tf32]
        return f"allowed for {' and '.join(names)}" if names else "was already allowed"

    def _describe_compile(self) -> str:
        if not self._settings.compile_model:
            return "off (WAN_COMPILE is not set)"
        if not self._compilers:
            return "on, waiting for a model"
        return "; ".join(
            f"{title}: {f'switched off, {compiler.why_off}' if compiler.why_off else 'on'}"
            for title, compiler in self._compilers.items()
        )


def _default_attention() -> Attention:
    # Not at import: a stand-in needs none of what this pulls in.
    from wan_attn.attention import flash_attention

    return flash_attention


_LOCK = threading.RLock()
_session: _Session | None = None


def patch(*, package: str = "wan", attention: Attention | None = None) -> PatchReport:
    """Make Wan2.2 compute its attention through wan_attn.

    Works before and after ``import wan``, from any thread, and more than once: the second call only
    picks up what the first could not see. ``unpatch()`` undoes all of it. On a card where our CUDA
    kernels are not proven yet, it proves them, which takes seconds, once.

    Args:
        package: the name Wan2.2 is importable under; a vendored copy has another one.
        attention: what to call, with Wan2.2's signature; None: ``wan_attn.flash_attention``, and
            ``wan_attn.flash_attn_func`` where Wan2.2 takes that from flash_attn.

    Returns:
        What is patched now, what will be when it is imported, and what was left alone.

    Raises:
        ValueError: another package is patched already; or an environment variable is wrong.
        RuntimeError: an argument is no such thing.
        Whatever a module raises that does not let its names be replaced: nothing is patched then.
    """
    if not isinstance(package, str) or not all(p.isidentifier() for p in package.split(".")):
        refuse("package", "the name of a package, as in `import wan`", gate.kind_of(package))
    is_function = callable(attention) and isinstance(getattr(attention, "__name__", ""), str)
    if attention is not None and not is_function:
        rule = "a function with Wan2.2's signature, or None"
        refuse("attention", rule, gate.kind_of(attention))
    settings = config.current()
    session, is_new = _begin(package, attention, settings)
    try:
        session.hook.wait()
        with _LOCK:
            if session.is_active:
                session.sync()
            report = session.report()
    except BaseException:
        if is_new:
            unpatch()
        raise
    if attention is None:
        proof.before_work()
    for name in report.foreign:
        log.once(("foreign", name), logging.WARNING, f"{name} is {name.original}, left alone")
    return report


def _begin(
    package: str, attention: Attention | None, settings: config.Settings
) -> tuple[_Session, bool]:
    """The session, and whether it was made now, as there was none."""
    global _session
    with _LOCK:
        is_new = _session is None
        if _session is None:
            _session = _Session(package, attention, settings)
            log.enable(settings.log_level)
            if settings.profile is not None:
                profile.recorder(settings.profile)  # from here on, not from the first call
            _session.hook.install()
        session = _session
    if session.package != package:
        raise ValueError(
            f"wan_attn: package must be {session.package!r}, which is patched now, "
            f"got {package!r}; call wan_attn.unpatch() first"
        )
    return session, is_new


def unpatch() -> None:
    """Give every name back what it had before ``patch()``; without a patch, do nothing."""
    global _session
    with _LOCK:
        session, _session = _session, None
        if session is None:
            return
        session.is_active = False
        session.hook.remove()
        session.restore_names()
        session.restore_settings()
        log.disable()
    # A module that was being imported just now may have taken ours from a patched one.
    session.hook.wait()
    with _LOCK:
        session.restore_names()


def report() -> PatchReport | None:
    """What is patched now; None without a patch."""
    with _LOCK:
        return None if _session is None else _session.report()
