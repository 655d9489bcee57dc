# SPDX-License-Identifier: Apache-2.0
"""install_matrix.py - installs wan_attn in every way that people do, and says what each way gave.

    python tests/install_matrix.py [--python 3.11 ...] [--torch 2.9.1 newest ...] [--way pip ...]
                                   [--quick] [--tests] [--cache DIR] [--out FILE]

Every Python found here x every torch x every way: pip and uv, isolated or not, with a stock virtual
environment's setuptools and with torch's, from a checkout, an sdist, a wheel, editable. Checked:
the binding, the number of ready CUDA kernels, the build record, a call, and that torch's files are
as before. An isolated build is made once a Python, beside the newest torch, and called with all.
Not part of `make test`: a torch is some GB, kept in --cache for the next run.

--quick: one torch per Python. --tests: the op's tests as well, with the wheel, once per torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from source_tree import ROOT, files

TORCH = ["2.4.1", "2.9.1", "newest"]
NEWEST_PYTHON = {"2.4.1": 12}  # 3.x; what a torch has no wheel for is left out
SHIM_NEEDS_TORCH = (2, 9)
TESTS = ["test_op.py", "test_kernels.py", "test_errors.py"]
TEST_TOOLS = ["pytest", "hypothesis", "numpy", "expecttest"]
TORCHS_SETUPTOOLS = "setuptools>=77,<82"
PYENV = Path(os.environ["PYENV_ROOT"]) if os.environ.get("PYENV_ROOT") else None
CCACHE = Path("/usr/lib/ccache")  # Debian's package ccache: every build compiles the same C files
# As on a machine where nothing of this repository is set up.
UNSET = ("PYTHONPATH", "VIRTUAL_ENV", "CFLAGS", "CPPFLAGS", "CC", "UV_PROJECT_ENVIRONMENT")

FACTS = """
import json, sys, torch, wan_attn
from pathlib import Path
from wan_attn.native import op
folder = Path(wan_attn.__file__).parent
q = torch.randn(1, 9, 2, 16)
want = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)
torch.testing.assert_close(torch.ops.wan_attn.sdpa(q, q, q)[0], want)
torch.testing.assert_close(wan_attn.sdpa(q, q, q), want)
print(json.dumps(dict(
    file=wan_attn.__file__, binding=op.binding(), reason=op.binding_reason(),
    torch=torch.__version__, cubins=len(list(folder.glob("cuda/cubin/*.cubin"))),
    record=json.loads((folder / "build_record.json").read_text()), cuda=torch.cuda.is_initialized(),
)))
"""


@dataclass(frozen=True)
class Way:
    """One way to install `what`: a checkout, a sdist or a wheel."""

    installer: str  # "pip" or "uv"
    what: str
    isolated: bool = True
    editable: bool = False
    setuptools: str = ""  # to install before; "": what a stock environment has
    newest_python: int = 99  # 3.x; what is newer cannot run that setuptools

    @property
    def name(self) -> str:
        words = [self.installer, "" if self.isolated else "not isolated"]
        words += ["editable" if self.editable else "", self.what if self.what != "checkout" else ""]
        return ", ".join(word for word in words if word)

    def options(self) -> list[str]:
        return ["--no-build-isolation"] * (not self.isolated) + ["--editable"] * self.editable


WAYS = [
    Way("pip", "checkout"),
    Way("pip", "checkout", editable=True),
    Way("pip", "sdist"),
    Way("pip", "wheel"),
    Way("uv", "checkout"),
    Way("uv", "checkout", editable=True),
    Way("pip", "checkout", isolated=False),
    Way("pip", "checkout", isolated=False, editable=True),
    Way("pip", "sdist", isolated=False),
    Way("uv", "checkout", isolated=False),
    Way("pip", "checkout", isolated=False, setuptools=TORCHS_SETUPTOOLS),
    Way("pip", "checkout", isolated=False, editable=True, setuptools=TORCHS_SETUPTOOLS),
    Way("uv", "checkout", isolated=False, setuptools=TORCHS_SETUPTOOLS),
]


@dataclass
class Row:
    """One line of the result; nothing in `problems` if all is well."""

    python: str
    torch: str
    setuptools: str
    way: str
    binding: str = "-"
    cubins: str = "-"
    left_out: str = ""
    seconds: float = 0.0
    tests: str = ""
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        verdict = "ok" if not self.problems else "PROBLEM"
        seconds = f"{self.seconds:.0f}" if self.seconds else ""
        return (
            f"{self.python:7} {self.torch:13} {self.setuptools:10} {self.way:28} {self.binding:7}"
            f" {self.cubins:>6} {seconds:>5}  {verdict:8} {self.left_out}{self.tests}"
        ).rstrip()


HEAD = (
    f"{'python':7} {'torch':13} {'setuptools':10} {'way':28} {'binding':7} {'cubins':>6}"
    f" {'s':>5}  {'':8} left out (its first words)"
)


def run(command: Sequence[str | Path], cwd: Path, **more: str) -> str:
    """The command's output; raises RuntimeError with all of it if the command fails."""
    environment = {k: v for k, v in os.environ.items() if k not in UNSET}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    # Compiled once: they are the same in every build, and NVRTC takes minutes.
    environment |= {"WAN_ATTN_KEPT": str(ROOT / "build/cubin"), **more}
    if CCACHE.is_dir():  # likewise for the C library; it stands before `gcc` and `cc` on PATH
        environment["PATH"] = f"{CCACHE}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,  # never ROOT: its wan_attn/ would be imported instead of the installed one
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")
    return done.stdout


def pythons() -> dict[str, Path]:
    """{3.x: its executable} of all that are here: on PATH and pyenv's."""
    found: dict[str, Path] = {}
    for minor in range(10, 20):
        version = f"3.{minor}"
        candidates: list[str | Path | None] = [shutil.which(f"python{version}")]
        candidates += sorted(PYENV.glob(f"versions/{version}.*/bin/python")) if PYENV else []
        for candidate in candidates:
            if candidate and subprocess.run(
                [candidate, "-c", "import venv, ensurepip"], capture_output=True, check=False
            ).returncode == 0:  # fmt: skip
                found[version] = Path(candidate)
    return found


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def packages_of(venv: Path) -> Path:
    (folder,) = venv.glob("Lib/site-packages" if sys.platform == "win32" else "lib/python*/site-*")
    return folder


def base(cache: Path, version: str, python: Path, torch: str, uv: Path) -> Path:
    """site-packages of an environment that has this torch; made once. uv shares its files."""
    venv = cache / f"python{version}-torch-{torch}"
    if not (venv / "complete").exists():
        shutil.rmtree(venv, ignore_errors=True)
        run([python, "-m", "venv", "--without-pip", venv], cache)
        wanted = ["torch" if torch == "newest" else f"torch=={torch}"]
        command: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", python_of(venv)]
        run([*command, *wanted, *TEST_TOOLS], cache, UV_CACHE_DIR=str(cache / "uv"))
        (venv / "complete").touch()
    return packages_of(venv)


def fingerprint(packages: Path) -> str:
    """Of every file beside ours: path, size and time; and of torch's own list of its files."""
    seen = hashlib.sha256()
    for path in sorted(packages.rglob("*")):
        status = path.stat()
        # Not folders, whose time changes when Python writes a .pyc into them.
        if path.suffix != ".pyc" and not stat.S_ISDIR(status.st_mode):
            seen.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    for record in packages.glob("torch-*.dist-info/RECORD"):
        seen.update(record.read_bytes())
    return seen.hexdigest()


class Sources:
    """What is installed: a checkout without anything built, its sdist and its wheel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pristine = folder / "pristine"
        for file in files():
            (self.pristine / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, self.pristine / file)

    def checkout(self) -> Path:
        """A fresh one."""
        target = self.folder / "wan_attn"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.pristine, target)
        return target

    def built(self, pattern: str) -> Path:
        """The sdist or the wheel, made by `python -m build` in an environment of its own, once."""
        dist = self.folder / "dist"
        if not dist.exists():
            run([sys.executable, "-m", "venv", self.folder / "packager"], self.folder)
            packager = python_of(self.folder / "packager")
            run([packager, "-m", "pip", "install", "--quiet", "build"], self.folder)
            run([packager, "-m", "build", "--outdir", dist, self.checkout()], self.folder)
        (found,) = dist.glob(pattern)
        return found

    def test(self, python: Path) -> str:
        """Runs the op's tests on what is installed; returns pytest's last line."""
        alone = self.folder / "tests-alone"
        if not alone.exists():  # a checkout without the package, which pytest would import
            shutil.copytree(self.pristine, alone, ignore=shutil.ignore_patterns("wan_attn"))
        tests = [alone / "tests" / test for test in TESTS]
        command: list[str | Path] = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        return run(command, python.parent).splitlines()[-1]

    def find(self, way: Way) -> Path:
        if way.what == "sdist":
            return self.built("wan_attn-*.tar.gz")
        return self.built("wan_attn-*-py3-none-*.whl") if way.what == "wheel" else self.checkout()


@contextmanager
def environment(python: Path, packages: Path, stock: Path) -> Iterator[Path]:
    """A stock virtual environment that finds the packages of another behind its own."""
    if not stock.exists():
        run([python, "-m", "venv", stock], stock.parent)
    with tempfile.TemporaryDirectory(prefix="wan-attn-install-") as name:
        venv = Path(name, "venv")
        # A copy works as long as pip is started as `python -m pip`, and takes a tenth of the time.
        shutil.copytree(stock, venv, symlinks=True)
        show(venv, packages)
        yield venv


def show(venv: Path, packages: Path) -> None:
    """Lets the environment find these packages, behind its own."""
    (packages_of(venv) / "torch_is_here.pth").write_text(f"{packages}\n")


def installed(packages: Path) -> dict[str, str]:
    """{name: version} of what lies in this site-packages itself, but for wan_attn."""
    found = (path.name.split("-")[:2] for path in packages.glob("*.dist-info"))
    return {n: version.removesuffix(".dist") for n, version in found if n != "wan_attn"}


def install(way: Way, row: Row, venv: Path, packages: Path, sources: Sources, uv: Path) -> None:
    """Does it, and writes into `row` what it gave."""
    python = python_of(venv)
    if way.setuptools:
        run([python, "-m", "pip", "install", "--quiet", way.setuptools], venv)
    before = installed(packages_of(venv)), fingerprint(packages)
    known = installed(packages) | before[0]  # Python 3.12 has none of its own, but torch brings one
    row.setuptools = "isolated" if way.isolated else known.get("setuptools", "none")
    if row.setuptools == "none":
        row.left_out = "all: without setuptools nothing can be built, and pip says so"
        return
    words: list[str | Path] = [python, "-m", "pip", "install"]
    if way.installer == "uv":
        words = [uv, "pip", "install", "--python", python]
    started = time.monotonic()
    run([*words, *way.options(), sources.find(way)], venv)
    row.seconds = time.monotonic() - started
    if (installed(packages_of(venv)), fingerprint(packages)) != before:
        row.problems.append("installing has changed other packages")


def check(way: Way, row: Row, python: Path) -> None:
    """Calls what is installed, and writes into `row` what it is."""
    facts = json.loads(run([python, "-c", FACTS], python.parent).splitlines()[-1])
    record = facts["record"]
    row.torch, row.binding, row.cubins = facts["torch"], facts["binding"], str(facts["cubins"])
    row.left_out = "; ".join(text.split(",")[0] for text in record["left_out"])
    version = tuple(int(n) for n in facts["torch"].split(".")[:2])
    expected = "shim" if version >= SHIM_NEEDS_TORCH else "ctypes"
    if row.binding != expected:
        row.problems.append(f"binding {row.binding}, not {expected}: {facts['reason']}")
    if way.isolated and (not facts["cubins"] or record["left_out"]):
        row.problems.append(f"an isolated build must be whole, and says {record}")
    if bool(facts["cubins"]) == bool(record["left_out"]) or record["cubins"] != facts["cubins"]:
        row.problems.append(f"{facts['cubins']} cubins, and the record says {record}")
    if facts["cuda"]:
        row.problems.append("importing has started CUDA")
    if record["left_out"]:
        doctor = run([python, "-c", DOCTOR], python.parent)
        if record["left_out"][0][:40] not in " ".join(doctor.split()):
            row.problems.append("doctor does not repeat what the build has left out")


# Its exit code tells of this machine, which is not the question here.
DOCTOR = "import sys; from wan_attn.__main__ import main; sys.argv = ['x', 'doctor', '--no-selftest']\ntry: main()\nexcept SystemExit: pass"  # noqa: E501


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", nargs="+", metavar="3.x", help="default: all that are here")
    parser.add_argument("--torch", nargs="+", default=TORCH, metavar="VERSION")
    names = sorted({way.name for way in WAYS})
    parser.add_argument("--way", nargs="+", choices=names, metavar="WAY", help="; ".join(names))
    parser.add_argument("--quick", action="store_true", help="one torch per Python: its newest")
    parser.add_argument("--tests", action="store_true", help="the op's tests, with the wheel")
    parser.add_argument("--cache", type=Path, default=ROOT / "build/install-matrix")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    parser.add_argument("--uv", type=Path, default=shutil.which("uv"), help="default: on PATH")
    return parser.parse_args(arguments)


def cells(args: argparse.Namespace) -> Iterator[tuple[Way, str, Path, list[str]]]:
    """way, Python 3.x, its executable, torches of which the first is there at the install.

    The ways first: if the run is cut short, the most common ones have been tried with every Python.
    """
    here = pythons()
    for way in WAYS:
        for version in args.python or here:
            if version not in here:
                raise RuntimeError(f"there is no Python {version} here, only {', '.join(here)}")
            minor = int(version.split(".")[1])
            torches = [t for t in args.torch[::-1] if minor <= NEWEST_PYTHON.get(t, minor)]
            torches = torches[: 1 if args.quick else None]
            if minor > way.newest_python or (args.way and way.name not in args.way):
                continue
            if way.isolated:  # such a build cannot see the torch: one install serves all
                yield way, version, here[version], torches
            else:
                yield from ((way, version, here[version], [torch]) for torch in torches)


def attempt(
    way: Way,
    version: str,
    torches: list[str],
    packages: list[Path],
    venv: Path,
    sources: Sources,
    args: argparse.Namespace,
) -> Iterator[Row]:
    """Installs beside the first torch, then calls what is installed with each of them."""
    rows = [Row(version, torch, "", way.name) for torch in torches]
    try:
        install(way, rows[0], venv, packages[0], sources, args.uv)
    except RuntimeError as error:
        rows[0].problems.append(str(error))
        yield rows[0]
        return
    for row, folder in zip(rows, packages, strict=True):
        row.setuptools = rows[0].setuptools
        try:
            if row.setuptools != "none":
                show(venv, folder)
                check(way, row, python_of(venv))
                if args.tests and way.name == "pip, wheel":
                    row.tests = sources.test(python_of(venv))
        except RuntimeError as error:
            row.problems.append(str(error))
        yield row


def problems(rows: Sequence[Row]) -> list[str]:
    return [f"\n{row.text()}\n" + "\n".join(row.problems) for row in rows if row.problems]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    args.cache.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="wan-attn-matrix-") as folder:
        if args.uv is None:
            run([sys.executable, "-m", "venv", Path(folder, "uv")], Path(folder))
            run([python_of(Path(folder, "uv")), "-m", "pip", "install", "-q", "uv"], Path(folder))
            args.uv = python_of(Path(folder, "uv")).with_name("uv")
        sources = Sources(Path(folder))
        print(HEAD, flush=True)
        for way, version, python, torches in cells(args):
            packages = [base(args.cache, version, python, t, args.uv) for t in torches]
            with environment(python, packages[0], Path(folder, f"stock-{version}")) as venv:
                for row in attempt(way, version, torches, packages, venv, sources, args):
                    rows.append(row)
                    print(row.text(), flush=True)
            if args.out:  # after each: a run takes an hour or two
                args.out.write_text("\n".join([HEAD, *(r.text() for r in rows), *problems(rows)]))
    wrong = problems(rows)
    print("".join(wrong))
    print(f"{len(rows)} ways tried, {len(wrong)} with a problem")
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(str(error))
