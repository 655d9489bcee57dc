# SPDX-License-Identifier: Apache-2.0
"""test.py - runs the wheels of one folder, as far as this machine can:

    PYTHONPATH=.ci python -m wheels.test [dist] [--quick] [--only PLATFORM ...] [--torch PYTHON ...]

Installs into fresh environments: beside each torch of --torch (a Python that has one), and without
any; into a real Python for Windows under wine, and one for arm64 under qemu, beside torch's own
wheels. Lets the C drivers of tests/c call each wheel's own library: directly, with an old glibc,
under wine, under qemu. What cannot run here is said. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from wheels import drivers, foreign, hub, roots
from wheels.running import CALL, ROOT, Failed, Skipped, attempt, run
from wheels.targets import TARGETS

# --- installed wheels ----------------------------------------------------------------------------

WITHOUT_TORCH = """
import platform, time, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    start = time.perf_counter()
    import wan_attn
    took = time.perf_counter() - start
assert "needs PyTorch 2.4 or newer" in str(said[0].message)
print(f"Python {platform.python_version()}: imports in {1000 * took:.0f} ms")
"""
UV = ("-m", "uv", "pip", "install", "-q")
HAS_PIP = "import importlib.util; print(importlib.util.find_spec('ensurepip'))"
PACKAGE = "import pathlib, wan_attn; print(pathlib.Path(wan_attn.__file__).parent)"


def environment(folder: Path, name: str, base: Path, wheel: Path | None, see: bool) -> Path:
    """A fresh environment with this wheel, if any; its Python, which can `see` base's packages."""
    venv = folder / name
    has_pip = "ensurepip" in run([base, "-c", HAS_PIP], folder)
    run([base, "-m", "venv", *([] if has_pip else ["--without-pip"]), venv], folder)
    python = venv / "bin/python"
    if not has_pip:  # Debian's Python
        try:
            run([sys.executable, *UV, "--python", python, "pip"], folder)
        except Failed as error:
            raise Skipped(f"there is no pip for {base}: {str(error)[-300:]}") from error
    if wheel is not None:
        run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], folder)
    if see:
        (packages,) = venv.glob("lib/python*/site-packages")
        ask = "import sysconfig, torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"
        (packages / "torch_is_here.pth").write_text(run([base, "-c", ask], folder))
    return python


def damaged(python: Path, folder: Path) -> None:
    """One changed byte is told; without its library the package still computes and says why."""
    package = Path(run([python, "-W", "ignore", "-c", PACKAGE], folder).strip())
    (library,) = package.glob("libwan_attn.so")
    data = bytearray(library.read_bytes())
    data[-1] ^= 1
    library.write_bytes(data)
    if "libwan_attn.so: its bytes" not in run([python, "-m", "wan_attn", "verify"], folder, 1):
        raise Failed("verify does not name the library in which one byte was changed")
    library.unlink()
    if "without our library" not in run([python, "-c", CALL], folder):
        raise Failed("without its library the package does not say so")
    doctor = run([python, "-m", "wan_attn", "verify"], folder, 1)
    if "libwan_attn.so is not in the package" not in " ".join(doctor.split()):
        raise Failed(f"verify does not say that the library is gone:\n{doctor}")


# torch's own list of its files, and what the file system says of each.
TORCH_FILES = """import hashlib, importlib.metadata as m
files = m.distribution("torch").files
stats = [(str(f), s.st_size, s.st_mtime_ns) for f in files for s in [f.locate().stat()]]
record = next(f for f in files if f.name == "RECORD" and f.parent.name[:5] == "torch").read_text()
print(len(stats), hashlib.sha256(repr([stats, record]).encode()).hexdigest())
"""


def by_uv(base: Path, wheel: Path) -> str:
    """uv puts the same files there as pip, and leaves torch alone."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-wheel-") as name:
        folder = Path(name)
        python = environment(folder, "venv", base, None, see=True)
        before = run([python, "-c", TORCH_FILES], folder)
        run([sys.executable, *UV, "--no-index", "--no-deps", "--python", python, wheel], folder)
        if run([python, "-c", TORCH_FILES], folder) != before:
            raise Failed("uv has changed torch")
        run([python, "-m", "wan_attn", "verify"], folder)
        return run([python, "-c", CALL], folder).splitlines()[-1]


def beside_torch(base: Path, wheel: Path, is_whole: bool = True) -> str:
    """Installs, calls, verifies and damages a wheel in an environment that sees base's torch."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-wheel-") as name:
        folder = Path(name)
        before = run([base, "-c", TORCH_FILES], folder)
        python = environment(folder, "venv", base, wheel, see=True)
        if run([python, "-c", TORCH_FILES], folder) != before:
            raise Failed("installing has changed torch")
        said = run([python, "-c", CALL], folder).splitlines()[-1]
        if ("without our library" in said) == is_whole:
            raise Failed(said)
        version = tuple(map(int, re.findall(r"torch (\d+)\.(\d+)", said)[0]))
        if is_whole and (": shim," in said) != (version >= (2, 9)):
            raise Failed(f"another binding than this torch has: {said}")
        run([python, "-m", "wan_attn", "verify"], folder, 0)
        if is_whole:
            damaged(python, folder)
        return said


KERNELS = "kernels==0.17.2"
# The package `kernels` finds our folder among those of other systems, and its own digest agrees.
BY_KERNELS = """import sys; from pathlib import Path
from kernels import get_local_kernel
from kernels.variants import parse_variant
hub = Path(sys.argv[1])
assert all(parse_variant(f.name).variant_str == f.name for f in (hub / "build").iterdir())
import torch
loaded = get_local_kernel(hub, backend="cpu")
torch.manual_seed(0)
q, k, v = (torch.randn(1, 9, 2, 16) for _ in range(3))
want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
torch.testing.assert_close(loaded.sdpa(q, k, v), want.transpose(1, 2))
import wan_attn
assert Path(wan_attn.__file__).is_relative_to(hub), wan_attn.__file__
from wan_attn.native import op
print(f"{Path(loaded.__file__).parent.name}: {op.binding()}, right")
"""


def by_kernels(base: Path, dist: Path) -> str:
    """The layout of the kernels hub, loaded by Hugging Face's own package from PyPI."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-hub-") as name:
        folder = Path(name)
        python = environment(folder, "venv", base, None, see=True)
        try:
            run([python, "-m", "pip", "install", "-q", KERNELS], folder)
        except Failed as error:
            raise Skipped(f"kernels cannot be had: {str(error)[-300:]}") from error
        for wheel in dist.glob("*.whl"):
            hub.lay_out(wheel, folder / "hub")
        more = {"HF_HUB_OFFLINE": "1"}
        return run([python, "-c", BY_KERNELS, folder / "hub"], folder, more=more).strip()


def without_torch(base: Path, wheel: Path) -> str:
    """The package imports, and its commands say what is missing."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-wheel-") as name:
        folder = Path(name)
        python = environment(folder, "venv", base, wheel, see=False)
        said = run([python, "-c", WITHOUT_TORCH], folder).strip()
        run([python, "-m", "wan_attn", "verify"], folder, 0)
        return f"{said}, and says that torch is missing; verify is content"


def newest_without_torch(name: str, wheel: Path) -> str:
    """The same with the newest Pythons that Debian has."""
    try:
        made = roots.make("newest", ROOT / "build/wheels/roots")
    except roots.NoRoot as reason:
        raise Skipped(str(reason)) from reason
    return without_torch(roots.python(made, name), wheel)


# --- all of it -----------------------------------------------------------------------------------


def tests(
    name: str, wheel: Path, torch: Sequence[Path], is_own: bool
) -> Iterator[tuple[str, Callable[[], str]]]:
    """What can be tried with one wheel, each with its title."""
    target = TARGETS[name]
    if is_own or not target.triple:
        for base in torch:
            yield "beside torch", partial(beside_torch, base.absolute(), wheel, is_own)
            if is_own:
                yield "beside torch, by uv", partial(by_uv, base.absolute(), wheel)
        yield "without torch", partial(without_torch, Path(sys.executable), wheel)
    if name == "manylinux_2_17_x86_64":
        for python in roots.ROOTS["newest"].pythons:
            yield "without torch, newest", partial(newest_without_torch, python, wheel)
    if is_own and torch:
        yield "by kernels", partial(by_kernels, torch[0].absolute(), wheel.parent)
    if target.triple:
        yield "C drivers", partial(drivers.run_both, target, wheel)
    if name == "manylinux_2_17_x86_64":
        yield "C drivers, old glibc", partial(drivers.with_oldest_glibc, target, wheel)
    if name == "manylinux_2_17_aarch64":
        yield "Python and torch", partial(foreign.arm64, wheel)
    if name == "win_amd64":
        yield "Python and torch", partial(foreign.windows, wheel)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if a test has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("dist", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument("--torch", type=Path, nargs="+", default=[], metavar="PYTHON")
    parser.add_argument("--quick", action="store_true", help="this machine's own wheel alone")
    parser.add_argument("--only", nargs="+", choices=TARGETS, metavar="PLATFORM")
    args = parser.parse_args(arguments)
    wheels = {w.stem.rpartition("-")[2]: w.resolve() for w in args.dist.glob("*.whl")}
    own = next((t.platform for t in TARGETS.values() if t.machine == platform.machine()), "")
    fine = own in wheels
    if args.only:
        wheels = {name: wheel for name, wheel in wheels.items() if name in args.only}
        fine = len(wheels) == len(args.only)
    if not fine:
        print(f"there is not every wheel that should be in {args.dist}: {sorted(wheels)}")
    for name, wheel in wheels.items():
        if not args.quick or name == own:
            for what, test in tests(name, wheel, args.torch, name == own):
                fine &= attempt(name, what, test)
    return int(not fine)


if __name__ == "__main__":
    raise SystemExit(main())
