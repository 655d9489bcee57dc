# SPDX-License-Identifier: Apache-2.0
"""run.py - `python -m wan_attn run SCRIPT args…`: an unchanged script, with Wan2.2 patched.

The script sees what `python SCRIPT args…` would show it: sys.argv, sys.path[0], a fresh __main__,
and its own exit code and traceback. Processes that it spawns through multiprocessing are patched
too; programs that it starts through subprocess are not.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.machinery
import importlib.util
import io
import multiprocessing.spawn
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from wan_attn import config
from wan_attn.cli import FINE, WRONG, refuse
from wan_attn.integrations import wan22

BACKEND_VARIABLE = "USE_ATTENTION_BACKEND"
PROFILE_VARIABLE = "WAN_ATTN_PROFILE"


class CannotRun(Exception):
    """SCRIPT cannot be run; the message says why."""


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
        return refuse("run", error)
    _patch_spawned_processes()
    sys.argv[:] = [args.script, *args.script_args]
    try:
        if args.as_module:
            _run_module(args.script)
        else:
            _run_script(args.script)
    except SystemExit:
        raise
    except CannotRun as error:
        return refuse("run", error)
    except BaseException as error:  # noqa: BLE001 - this is where Python's own last resort would be
        _print_traceback(error)
        if isinstance(error, KeyboardInterrupt):
            # Python ends by the signal itself, after its exit handlers; it has been reported.
            sys.excepthook = lambda *_: None
            raise
        return WRONG
    return FINE


def _set_path0(directory: str) -> None:
    """Replace the entry that Python made for us by the one it would make for the script."""
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = directory


def _run_module(name: str) -> None:
    """A module by its name, or the __main__ of a package."""
    _set_path0(os.getcwd())
    try:
        is_there = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        is_there = False
    if not is_there:
        raise CannotRun(f"no module named {name}")
    _fresh_main()
    _run_as_python_does(name, True)


def _run_script(script: str) -> None:
    """A Python file, or a folder or zip archive with a __main__.py in it."""
    file = os.path.abspath(script)
    importer = pkgutil.get_importer(file) if os.path.exists(file) else None
    if importer is not None and importer.find_spec("__main__") is not None:
        _set_path0(file)
        _fresh_main()
        _run_as_python_does("__main__", False)
        return
    _set_path0(os.path.dirname(os.path.realpath(script)))
    try:
        with io.open_code(file) as stream:
            source = stream.read()
    except OSError as error:
        raise CannotRun(
            f"can't open file {file!r}: [Errno {error.errno}] {error.strerror}"
        ) from error
    code = compile(source, file, "exec", dont_inherit=True)
    main = _fresh_main()
    main.update(__file__=file, __cached__=None)
    main["__loader__"] = importlib.machinery.SourceFileLoader("__main__", file)
    exec(code, main)


def _run_as_python_does(name: str, set_argv0: bool) -> None:
    """What the interpreter itself calls for `python -m NAME` and, with __main__, for a folder.

    runpy.run_path would give the script another sys.argv[0] or another sys.path[0], and put our
    __main__ back before the script's exit handlers run.
    """
    runpy._run_module_as_main(name, set_argv0)  # type: ignore[attr-defined]


def _fresh_main() -> dict[str, Any]:
    """A __main__ in the place of ours; it stays there, as exit handlers may still need it."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    vars(main)["__builtins__"] = builtins
    return vars(main)


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
