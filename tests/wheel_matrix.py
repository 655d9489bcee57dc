# SPDX-License-Identifier: Apache-2.0
"""wheel_matrix.py - builds one wheel and tests it, installed, with several versions of torch.

    python tests/wheel_matrix.py [VERSION ...]                        default: 2.4.1 2.9.1 newest
    python tests/wheel_matrix.py --reuse-venv 2.4.1=DIR --reuse-venv dev=DIR

Run it with a Python that has torch >= 2.10, or the wheel has no shim. Each version gets a virtual
environment of its own, gone afterwards; one that is reused is borrowed from, never written to. Not
part of `make test`: torch is some GB a version.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from source_tree import ROOT, files

VERSIONS = ["2.4.1", "2.9.1", "newest"]
TESTS = ["test_op.py", "test_kernels.py", "test_errors.py"]
TEST_TOOLS = ["pytest", "hypothesis", "numpy", "expecttest"]
SHIM_NEEDS_TORCH = (2, 9)

# What a Python has: printed as JSON, so that nothing else has to be read from its output.
FACTS = """
import json, statistics, subprocess, sys, torch, wan_attn, wan_attn.native.op
from wan_attn.cuda import images
clock = "import time, torch; t = time.perf_counter(); import wan_attn.native.op; print(time.perf_counter() - t)"
times = [float(subprocess.run([sys.executable, "-c", clock], capture_output=True, text=True).stdout) for _ in range(5)]
print(json.dumps(dict(
    file=wan_attn.__file__, binding=wan_attn.native.op.binding(), reason=wan_attn.native.op.binding_reason(),
    ready={a: images.state("wan_attn_merge", a) for a in (75, 80, 89, 90, 100, 121)},
    torch=torch.__version__, import_ms=1000 * statistics.median(times), cuda=torch.cuda.is_initialized())))
"""  # noqa: E501


@dataclass(frozen=True)
class Row:
    """One line of the result; problem is "" if all is well."""

    torch: str
    binding: str
    import_ms: float
    tests: str
    problem: str


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """The command's output; raises with all of it if the command fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WAN_ATTN_SHIM")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,  # never ROOT: its wan_attn/ would be imported instead of the wheel's
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def pip(python: Path | str, *words: str | Path, cwd: Path) -> str:
    return run([python, "-m", "pip", "--disable-pip-version-check", *words], cwd)


def build_wheel(folder: Path, *, isolated: bool) -> Path:
    """Builds from a copy, because a `build/` folder of the source tree may hold old files.

    Isolated, the build sees no torch and leaves out the shim; a C compiler is all it needs.
    """
    source = folder / "source"
    if not source.exists():
        for file in files():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, source / file)
    out = folder / ("isolated" if isolated else "wheel")
    started = time.monotonic()
    words = ["wheel", "--quiet", "--no-deps", "--wheel-dir", out]
    if not isolated:
        words.append("--no-build-isolation")
    pip(sys.executable, *words, source, cwd=folder)
    (wheel,) = out.glob("*.whl")
    members = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    names = {member.stem.removeprefix("lib") for member in members}
    cubins = sum(member.suffix == ".cubin" for member in members)
    print(
        f"{'isolated build' if isolated else 'build with the shim'}: {wheel.name},"
        f" {wheel.stat().st_size / 1024:.0f} KiB, {cubins} cubins,"
        f" {time.monotonic() - started:.0f} s",
        flush=True,
    )
    if not re.match(r"wan_attn-[^-]+-py3-none-", wheel.name):
        raise SystemExit("the tag must be py3-none-<platform>")
    if "wan_attn" not in names or ("wan_attn_shim" in names) == isolated:
        raise SystemExit(f"the wheel must have the shim ({not isolated}), and has {sorted(names)}")
    if isolated and sys.platform != "darwin" and not cubins:
        raise SystemExit("an isolated build must have ready CUDA kernels, and has none")
    if Path("wan_attn/cuda/src/cuda/sdpa_rows.def") not in members:
        raise SystemExit("the wheel must have the text of the CUDA kernels")
    return wheel


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@contextmanager
def environment(version: str, reused: Path | None) -> Iterator[tuple[Path, Path]]:
    """(Python that has this torch and pytest, a folder to work in)."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-") as name:
        folder = Path(name)
        venv = folder / "venv"
        base = python_of(reused) if reused else Path(sys.executable)
        run([base, "-m", "venv", venv], folder)
        python = python_of(venv)
        if reused:
            # Packages of the reused one are found after our own; its .pth files are not read.
            find = "import sysconfig; print(sysconfig.get_path('purelib'))"
            theirs = run([python_of(reused), "-c", find], folder).strip()
            ours = run([python, "-c", find], folder).strip()
            Path(ours, "reused.pth").write_text(theirs + "\n")
        else:
            torch = "torch" if version == "newest" else f"torch=={version}"
            pip(python, "install", "--quiet", torch, cwd=folder)
        pip(python, "install", "--quiet", *TEST_TOOLS, cwd=folder)
        yield python, folder


def torch_of(python: Path, folder: Path) -> tuple[str, str]:
    print_torch = "import torch; print(torch.__version__); print(torch.__file__)"
    version, file = run([python, "-c", print_torch], folder).splitlines()[-2:]
    return version, file


def test_wheel(wheel: Path, python: Path, folder: Path, tests: Sequence[str]) -> Row:
    before = torch_of(python, folder)
    pip(python, "install", "--quiet", wheel, cwd=folder)  # with its dependencies: it has none
    facts = json.loads(run([python, "-c", FACTS], folder).splitlines()[-1])
    problems = []
    if torch_of(python, folder) != before:
        problems.append(f"pip has changed torch {before} to {torch_of(python, folder)}")
    if not Path(facts["file"]).is_relative_to(folder):
        problems.append(f"imported {facts['file']}, not the wheel")
    ready = {arch for arch, state in facts["ready"].items() if state == "shipped"}
    with zipfile.ZipFile(wheel) as members:
        has_cubins = any(name.endswith(".cubin") for name in members.namelist())
    if ready != ({"75", "80", "89", "90", "121"} if has_cubins else set()):
        problems.append(f"ready CUDA kernels: {facts['ready']}")
    if facts["cuda"]:
        problems.append("importing has started CUDA")
    major, minor = (int(n) for n in facts["torch"].split(".")[:2])
    expected = "shim" if (major, minor) >= SHIM_NEEDS_TORCH else "ctypes"
    if facts["binding"] != expected:
        problems.append(f"binding {facts['binding']}, not {expected}: {facts['reason']}")
    files = [ROOT / "tests" / test for test in tests]
    try:
        report = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], folder)
    except RuntimeError as error:
        report = str(error)
        problems.append(report)
    return Row(
        torch=facts["torch"],
        binding=facts["binding"],
        import_ms=facts["import_ms"],
        tests=report.splitlines()[-1],
        problem="\n".join(problems),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="torch: 2.9.1, newest, ...")
    parser.add_argument(
        "--reuse-venv",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a virtual environment that has its torch already; it is not changed",
    )
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help="of tests/")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    reused = {name: Path(folder) for name, _, folder in (r.partition("=") for r in args.reuse_venv)}
    versions = args.versions or ([] if reused else VERSIONS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="wan-attn-wheel-") as folder:
        build_wheel(Path(folder), isolated=True)
        wheel = build_wheel(Path(folder), isolated=False)
        for version in [*versions, *(name for name in reused if name not in versions)]:
            print(f"  torch {version} ...", flush=True)
            try:
                with environment(version, reused.get(version)) as (python, where):
                    rows.append(test_wheel(wheel, python, where, args.tests))
            except RuntimeError as error:
                rows.append(Row(version, "", 0.0, "not run", str(error)))
    print(f"\n{'torch':16} {'binding':8} {'import ms':>9}  tests")
    for row in rows:
        print(f"{row.torch:16} {row.binding:8} {row.import_ms:9.1f}  {row.tests}")
    for row in rows:
        if row.problem:
            print(f"\ntorch {row.torch}: {row.problem}")
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(str(error))
