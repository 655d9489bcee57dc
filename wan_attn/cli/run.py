# SPDX-License-Identifier: Apache-2.0
"""run.py - `python -m wan_attn run SCRIPT args…`: an unchanged script, with Wan2.2 patched.

The script sees what `python SCRIPT args…` would show it: sys.argv, sys.path[0], a fresh __main__,
and its own exit code and traceback. Processes that it spawns through multiprocessing are patched
too; programs that it starts through subprocess are not.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import multiprocessing.spawn
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from wan_attn import config
from wan_attn.integrations import wan22

BACKEND_VARIABLE = "USE_ATTENTION_BACKEND"
PROFILE_VARIABLE = "WAN_ATTN_PROFILE"

CANNOT_START = 2
"""The exit code if there is nothing to run; Python's own is the same."""


class CannotRun(Exception):
    """SCRIPT cannot be run; the message says why."""


@dataclass(frozen=True, slots=True)
class Program:
    """The program that becomes __main__."""

    code: CodeType
    argv0: str
    file: str
    loader: Any
    spec: importlib.machinery.ModuleSpec | None
    """None for a plain script, as under Python: multiprocessing tells the two apart by it."""
    package: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Our options, then SCRIPT; everything after SCRIPT belongs to it."""
    (backends,) = (v.values for v in config.VARIABLES if v.name == BACKEND_VARIABLE)
    parser.add_argument(
        "--backend",
        choices=backends,
        help=f"sets {BACKEND_VARIABLE} for the script and the processes it starts",
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help=f"sets {PROFILE_VARIABLE}: time every attention call, by call site and layer",
    )
    parser.add_argument(
        "-m",
        dest="as_module",
        action="store_true",
        help="SCRIPT is the name of a module, as in python -m",
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, such as generate.py")
    parser.add_argument(
        "script_args",
        metavar="ARGUMENT",
        nargs=argparse.REMAINDER,
        help="everything after SCRIPT is passed to it unchanged",
    )


def main(args: argparse.Namespace) -> int:
    """Patch, then become the script; returns its exit code or lets its SystemExit pass."""
    try:
        if args.backend:
            config.put(BACKEND_VARIABLE, args.backend)
        if args.profile:
            # The script may change its folder; processes that it starts read the variable, too.
            config.put(PROFILE_VARIABLE, os.path.abspath(args.profile))
        wan22.patch()
    except config.ConfigError as error:
        print(f"wan_attn run: {error}", file=sys.stderr)
        return CANNOT_START
    _patch_spawned_processes()
    try:
        _set_path0(os.getcwd() if args.as_module else _directory_of(args.script))
        program = _find_module(args.script) if args.as_module else _find_script(args.script)
        sys.argv[:] = [program.argv0, *args.script_args]
        exec(program.code, _become_main(program))
    except SystemExit:
        raise
    except CannotRun as error:
        print(f"wan_attn run: {error}", file=sys.stderr)
        return CANNOT_START
    except BaseException as error:  # noqa: BLE001 - this is where Python's own last resort would be
        _print_traceback(error)
        if isinstance(error, KeyboardInterrupt):
            # Python ends by the signal itself, after its exit handlers; it has been reported.
            sys.excepthook = lambda *_: None
            raise
        return 1
    return 0


def _set_path0(directory: str) -> None:
    """Replace the entry that Python made for us by the one it would make for the script."""
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = directory


def _directory_of(script: str) -> str:
    real = os.path.realpath(script)
    return real if os.path.isdir(real) else os.path.dirname(real)


def _find_script(script: str) -> Program:
    """A Python file, or a folder or zip archive with a __main__.py in it."""
    file = os.path.abspath(script)
    importer = pkgutil.get_importer(file) if os.path.exists(file) else None
    spec = importer.find_spec("__main__") if importer is not None else None
    if spec is not None and spec.loader is not None:
        _set_path0(file)
        return _from_spec(spec, script, package="")
    try:
        with open(file, "rb") as stream:
            source = stream.read()
    except OSError as error:
        raise CannotRun(
            f"can't open file {file!r}: [Errno {error.errno}] {error.strerror}"
        ) from error
    return Program(
        code=compile(source, file, "exec", dont_inherit=True),
        argv0=script,
        file=file,
        loader=importlib.machinery.SourceFileLoader("__main__", file),
        spec=None,
        package=None,
    )


def _find_module(name: str) -> Program:
    """A module by its name, or the __main__ of a package."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        raise CannotRun(f"no module named {name}: {error}") from error
    if spec is None or spec.loader is None or spec.origin is None:
        raise CannotRun(f"no module named {name}")
    return _from_spec(spec, spec.origin, package=spec.parent)


def _from_spec(spec: importlib.machinery.ModuleSpec, argv0: str, *, package: str | None) -> Program:
    loader: Any = spec.loader
    code = loader.get_code(spec.name)
    if code is None:
        raise CannotRun(f"{spec.name} has no Python code")
    return Program(code, argv0, code.co_filename, loader, spec, package)


def _become_main(program: Program) -> dict[str, Any]:
    """A fresh __main__ in the place of ours; it stays there, as exit handlers may still need it."""
    module = ModuleType("__main__")
    vars(module).update(
        __file__=program.file,
        __loader__=program.loader,
        __spec__=program.spec,
        __package__=program.package,
        __cached__=None,
        __builtins__=sys.modules["builtins"],
    )
    sys.modules["__main__"] = module
    return vars(module)


def _print_traceback(error: BaseException) -> None:
    """What Python prints, beginning with the script's first frame, without ours."""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<frozen "):
            break
        traceback = traceback.tb_next
    error.__traceback__ = traceback
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, traceback
    sys.excepthook(type(error), error, traceback)


class _PatchOnArrival:
    """Patches the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _patch_here, ()


def _patch_here() -> None:
    wan22.patch()
    _patch_spawned_processes()


def _patch_spawned_processes() -> None:
    """Let every process that multiprocessing spawns patch itself before it imports the script.

    A spawned process knows nothing of ours: it reads one dict from its parent, then runs the
    script's file as __mp_main__. A key that it does not know is unpickled and ignored.
    """
    original = multiprocessing.spawn.get_preparation_data
    if getattr(original, "is_wan_attn", False):
        return

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**original(name), "wan_attn": _PatchOnArrival()}

    get_preparation_data.is_wan_attn = True  # type: ignore[attr-defined]
    multiprocessing.spawn.get_preparation_data = get_preparation_data
