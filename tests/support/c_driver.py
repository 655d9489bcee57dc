# SPDX-License-Identifier: Apache-2.0
"""c_driver.py - compiles csrc/ and the C driver of tests/c into one program, for tests that want
another compiler or another source than the library at hand has.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]


def sources(csrc: Path) -> list[Path]:
    return [*sorted(csrc.glob("c*/**/*.c")), ROOT / "tests/c/test_core.c"]


def compile_objects(
    compiler: str,
    folder: Path,
    csrc: Path,
    of: Iterable[Path],
    optimize: str = "-O2",
    includes: Iterable[Path] = (),
) -> None:
    """folder/ROOM-NAME.o of each source: core/ and cpu/ have files of one name."""
    flags = ["-std=c11", "-D_GNU_SOURCE", optimize, "-DWAN_ATTN_BUILD=1", f"-I{csrc}"]
    flags += [f"-I{folder}" for folder in includes]

    def compile_one(source: Path) -> None:
        made = folder / f"{source.parent.name}-{source.stem}.o"
        subprocess.run([compiler, *flags, "-c", source, "-o", made], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, of))


def link(compiler: str, folder: Path, *flags: str) -> Path:
    program = folder / "driver"
    objects = sorted(folder.glob("*.o"))
    subprocess.run(
        [compiler, *objects, *flags, "-lm", "-lpthread", "-ldl", "-o", program], check=True
    )
    return program
