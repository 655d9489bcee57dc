# SPDX-License-Identifier: Apache-2.0
"""_rebind - the one monkeypatch: replace a function by identity, now and in modules yet to come.

Knows modules, attributes and Python's import system; knows nothing about attention or Wan.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from wan_attn.transient import is_interruption, is_transient

# What a package with a broken binary raises on import: a missing DLL, an undefined symbol, an
# operator registered twice, a name its torch no longer has.
BROKEN_INSTALL = (ImportError, OSError, RuntimeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Binding:
    """One module attribute that was replaced."""

    module: str
    attribute: str
    original: str
    """What it was, in words: ``wan.modules.attention.flash_attention`` or ``None``."""

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


def describe(value: object) -> str:
    """Name a function by where it was defined; anything else by its repr."""
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(value)


def _modules() -> Iterable[tuple[str, ModuleType]]:
    # dict.copy is one step for the interpreter, iterating over the live dict is not: other
    # threads may be importing.
    for name, module in sys.modules.copy().items():
        if isinstance(module, ModuleType):
            yield name, module


def rebind(
    original: object,
    replacement: object,
    within: ModuleType | None = None,
    names: Iterable[str] | None = None,
) -> tuple[Binding, ...]:
    """Point every module attribute that *is* ``original`` at ``replacement``.

    By identity: neither the attribute's name nor its module matters. So aliases and the
    user's own ``from ... import`` follow; another function that was put there does not. All or
    none: a module that refuses leaves every other one as it was.

    Args:
        within: look into this module only; None: into all that are loaded.
        names: replace only attributes with these names; None: with any name.
    """
    places = _modules() if within is None else [(within.__name__, within)]
    done: list[tuple[str, ModuleType, str]] = []
    try:
        for name, module in places:
            for attribute, value in vars(module).copy().items():
                if value is original and (names is None or attribute in names):
                    setattr(module, attribute, replacement)
                    done.append((name, module, attribute))
    except BaseException:
        for _, module, attribute in done:
            setattr(module, attribute, original)
        raise
    return tuple(Binding(name, attribute, describe(original)) for name, _, attribute in done)


def is_initialising(module: ModuleType) -> bool:
    """Whether some thread is still executing this module's body."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class ImportHook(importlib.abc.MetaPathFinder):
    """Calls ``on_load(module)`` after each module of ``package`` was executed.

    While such a module executes, a package named in ``fragile`` that is installed but fails to load
    raises ModuleNotFoundError instead of its own error: code that is prepared for the package to be
    absent then copes with a broken one. Nothing is put into sys.modules in its place.
    """

    def __init__(
        self,
        package: str,
        on_load: Callable[[ModuleType], None],
        fragile: Iterable[str] = (),
    ) -> None:
        self.package = package
        self.fragile = frozenset(fragile)
        self.broken: dict[str, str] = {}
        self._on_load = on_load
        self._thread = threading.local()

    def owns(self, name: str) -> bool:
        """Whether ``name`` is the package or one of its submodules."""
        return name == self.package or name.startswith(self.package + ".")

    def install(self) -> None:
        """Stand first in line for every module found from now on."""
        sys.meta_path.insert(0, self)

    def wait(self) -> None:
        """Wait until no other thread is executing a module of the package.

        A module that was found before the hook stood may be taking the original right now; its
        import lock is the only signal that it has finished. Call without holding a lock that
        ``on_load`` takes.
        """
        for name, module in sys.modules.copy().items():
            if self.owns(name) and isinstance(module, ModuleType) and is_initialising(module):
                # If that import fails, this one repeats it; its error is the first importer's.
                try:
                    importlib.import_module(name)
                except Exception as error:  # noqa: BLE001 - see above
                    if is_interruption(error):
                        raise

    def remove(self) -> None:
        """Leave the import system as it was."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the module as if this hook were not there, then put a loader around its loader."""
        owned = self.owns(fullname)
        if not owned and (fullname not in self.fragile or not self._depth):
            return None
        searching: str | None = getattr(self._thread, "searching", None)
        if searching == fullname:
            return None  # another hook that asks every finder but itself is asking back
        self._thread.searching = fullname
        try:
            spec = self._find_elsewhere(fullname, path, target)
        finally:
            self._thread.searching = searching
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(self, spec.loader, owned)
        return spec

    def _find_elsewhere(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None,
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path.copy():
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec: importlib.machinery.ModuleSpec | None = find(fullname, path, target)
            if spec is not None:
                return spec
        return None

    @property
    def _depth(self) -> int:
        return int(getattr(self._thread, "depth", 0))

    def execute(self, loader: Any, module: ModuleType) -> None:
        """Run an owned module's body, then report it."""
        self._thread.depth = self._depth + 1
        try:
            loader.exec_module(module)
        finally:
            self._thread.depth -= 1
        self._on_load(module)

    def execute_fragile(self, loader: Any, module: ModuleType) -> None:
        """Run a fragile module's body; broken reads as absent."""
        try:
            loader.exec_module(module)
        except ModuleNotFoundError:
            raise
        except BROKEN_INSTALL as error:
            if is_transient(error):
                raise  # the module is sound, and may be imported later
            reason = f"{type(error).__name__}: {error}"
            self.broken[module.__name__] = reason
            raise ModuleNotFoundError(
                f"{module.__name__} is installed but cannot be loaded ({reason})",
                name=module.__name__,
            ) from error


class _Loader(importlib.abc.Loader):
    """Stands in for the real loader until the module executes, then hands its place back.

    Tools that look at ``module.__loader__`` afterwards (inspect, tracebacks, torch.compile) see the
    real one.
    """

    def __init__(self, hook: ImportHook, loader: Any, owned: bool) -> None:
        self._hook = hook
        self._loader = loader
        self._owned = owned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        if self._owned:
            self._hook.execute(self._loader, module)
        else:
            self._hook.execute_fragile(self._loader, module)
