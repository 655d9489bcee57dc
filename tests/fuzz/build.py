# SPDX-License-Identifier: Apache-2.0
"""build.py - compiles the C campaigns, against the library that is installed or with all of csrc/,
plain and under the sanitizers, where signed overflow does not wrap around; keeps them under
build/fuzz as long as no source changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emu.build import made
from wan_attn.native.library import lib_path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILT = ROOT / "build" / "fuzz"

_COMMON = [
    *("-std=c11", "-D_GNU_SOURCE", "-DWAN_ATTN_BUILD=1", f"-I{ROOT / 'csrc'}", f"-I{HERE.parent}"),
    *("-g", "-Wall", "-Wextra", "-Werror", "-fno-wrapv"),
]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# name -> compiler, flags
INSTALLED = "installed"
VARIANTS: dict[str, tuple[str, list[str]]] = {
    INSTALLED: ("gcc", ["-O2"]),  # the library that the tests use, as it was built
    "plain": ("gcc", ["-O2"]),
    "sanitized": ("gcc", ["-O1", *_SANITIZERS]),
    "clang": ("clang", ["-O2"]),
    "sanitized clang": ("clang", ["-O1", *_SANITIZERS]),
    "threads": ("gcc", ["-O1", "-fsanitize=thread"]),
}


def compilers() -> Iterator[str]:
    """The variants that can be built here."""
    return (name for name, (compiler, _) in VARIANTS.items() if shutil.which(compiler))


def _object(compiler: str, flags: list[str], source: Path, headers: list[Path]) -> Path:
    command = [compiler, *flags, "-c", str(source)]
    return made(source.stem, ".o", [source, *headers], command, BUILT)


def program(name: str, variant: str) -> Path:
    """The campaign `name`, linked with the library."""
    compiler, more = VARIANTS[variant]
    flags = [*_COMMON, *more]
    if variant == INSTALLED:
        flags.remove("-DWAN_ATTN_BUILD=1")
    csrc = [*(ROOT / "csrc").glob("c*/**/*.[ch]"), *(ROOT / "csrc").glob("c*/**/*.[id][ne][cf]")]
    headers = sorted(f for f in [*csrc, ROOT / "csrc/wan_attn.h"] if f.suffix != ".c")
    own = sorted([*HERE.glob("*.h"), *(HERE.parent / "c").glob("*.h")])
    library = sorted(f for f in csrc if f.suffix == ".c")
    objects = [_object(compiler, flags, HERE / f"{name}.c", headers + own)]
    if variant == INSTALLED:
        objects.append(lib_path())
        more = [f"-Wl,-rpath,{lib_path().parent}"]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects += pool.map(lambda source: _object(compiler, flags, source, headers), library)
    command = [compiler, *more, *map(str, objects), "-lm", "-lpthread", "-ldl"]
    return made(name, "", objects, command, BUILT)
