# SPDX-License-Identifier: Apache-2.0
"""install_matrix.py - installs wan_attn in every way that people do, and says what each way gave.

    python tests/install_matrix.py [--python 3.11 ...] [--torch 2.9.1 newest ...] [--way pip ...]
                                   [--quick] [--tests] [--cache DIR] [--out FILE]

Every Python found here x every torch x every way: pip and uv, isolated or not, with a stock virtual
environment's setuptools and with torch's, from a checkout, an sdist, a wheel, editable. Checked:
the binding, the number of ready CUDA kernels, the build record, a call, and that torch's files are
as before. Not part of `make test`: a torch is some GB, kept in --cache for the next run.

--quick: one torch per Python. --tests: the op's tests as well, with the wheel, once per torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
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
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        verdict = "ok" if not self.problems else "PROBLEM"
        return (
            f"{self.python:7} {self.torch:13} {self.setuptools:10} {self.way:28} {self.binding:7}"
            f" {self.cubins:>6} {self.seconds:5.0f}  {verdict:8} {self.left_out}"
        ).rstrip()


HEAD = (
    f"{'python':7} {'torch':13} {'setuptools':10} {'way':28} {'binding':7} {'cubins':>6}"
    f" {'s':>5}  {'':8} left out (its first words)"
)


def run(command: Sequence[str | Path], cwd: Path, **more: str) -> str:
    """The command's output; raises RuntimeError with all of it if the command fails."""
    environment = {k: v for k, v in os.environ.items() if k not in UNSET}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # Compiled once: they are the same in every build, and NVRTC takes minutes.
    environment |= {"WAN_ATTN_KEPT": str(ROOT / "build/cubin"), **more}
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
        candidates = [shutil.which(f"python{version}")]
        candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for candidate in candidates:
            if candidate and subprocess.run(
                [candidate, "-c", "import venv, ensurepip"], capture_output=True, check=False
            ).returncode == 0:  # fmt: skip
                found[version] = Path(candidate)
    return found


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def packages_of(python: Path) -> Path:
    return Path(
        run([python, "-c", "import site; print(site.getsitepackages()[0])"], Path("/")).strip()
    )


def base(cache: Path, version: str, python: Path, torch: str, uv: Path) -> Path:
    """site-packages of an environment that has this torch; made once. uv shares its files."""
    venv = cache / f"python{version}-torch-{torch}"
    if not (venv / "complete").exists():
        shutil.rmtree(venv, ignore_errors=True)
        run([python, "-m", "venv", "--without-pip", venv], cache)
        wanted = ["torch" if torch == "newest" else f"torch=={torch}"]
        command = [uv, "pip", "install", "--quiet", "--python", python_of(venv)]
        run([*command, *wanted, *TEST_TOOLS], cache, UV_CACHE_DIR=str(cache / "uv"))
        (venv / "complete").touch()
    return packages_of(python_of(venv))


def fingerprint(packages: Path) -> str:
    """Of every file beside ours: path, size and time; and of torch's own list of its files."""
    seen = hashlib.sha256()
    for path in sorted(packages.rglob("*")):
        if path.suffix != ".pyc" and path.name != "__pycache__":
            status = path.stat()
            seen.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    for record in packages.glob("torch-*.dist-info/RECORD"):
        seen.update(record.read_bytes())
    return seen.hexdigest()


class Sources:
    """What is installed: a checkout without anything built, its sdist and its wheel."""

    def __init__(self, folder: Path, uv: Path) -> None:
        self.folder = folder
        self.pristine = folder / "pristine"
        for file in files():
            (self.pristine / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, self.pristine / file)
        # The packager's own environment, as `python -m build` has it anywhere.
        run([sys.executable, "-m", "venv", folder / "packager"], folder)
        packager = python_of(folder / "packager")
        run([packager, "-m", "pip", "install", "--quiet", "build"], folder)
        print("  sdist and wheel ...", flush=True)
        checkout = self.checkout("wan_attn")
        run([packager, "-m", "build", "--outdir", folder / "dist", checkout], folder)
        (self.sdist,) = (folder / "dist").glob("*.tar.gz")
        (self.wheel,) = (folder / "dist").glob("*.whl")
        if not re.match(r"wan_attn-[^-]+-py3-none-", self.wheel.name):
            raise RuntimeError(f"the tag must be py3-none-<platform>, got {self.wheel.name}")

    def checkout(self, name: str) -> Path:
        """A fresh one."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.pristine, target)
        return target

    def find(self, way: Way) -> Path:
        found = {"sdist": self.sdist, "wheel": self.wheel}.get(way.what)
        return found or self.checkout("cell_checkout")


@contextmanager
def environment(python: Path, packages: Path) -> Iterator[Path]:
    """A stock virtual environment that finds the packages of another behind its own."""
    with tempfile.TemporaryDirectory(prefix="wan-attn-install-") as name:
        venv = Path(name, "venv")
        run([python, "-m", "venv", venv], Path(name))
        (packages_of(python_of(venv)) / "torch_is_here.pth").write_text(f"{packages}\n")
        yield python_of(venv)


def setuptools_of(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('setuptools'))"
    try:
        return run([python, "-c", code], python.parent).strip()
    except RuntimeError:
        return "none"


def frozen(python: Path) -> set[str]:
    listed = run([python, "-m", "pip", "freeze", "--all"], python.parent).splitlines()
    return {line for line in listed if "wan_attn" not in line.replace("-", "_")}


def install(way: Way, row: Row, python: Path, packages: Path, sources: Sources, uv: Path) -> None:
    """Does it, and writes into `row` what it gave."""
    if way.setuptools:
        run([python, "-m", "pip", "install", "--quiet", way.setuptools], python.parent)
    row.setuptools = "isolated" if way.isolated else setuptools_of(python)
    before = frozen(python), fingerprint(packages)
    if row.setuptools == "none":
        row.left_out = "all: without setuptools nothing can be built, and pip says so"
        return
    words: list[str | Path] = [python, "-m", "pip", "install"]
    if way.installer == "uv":
        words = [uv, "pip", "install", "--python", python]
    started = time.monotonic()
    run([*words, *way.options(), sources.find(way)], python.parent)
    row.seconds = time.monotonic() - started
    if (frozen(python), fingerprint(packages)) != before:
        row.problems.append("installing has changed other packages")
    check(way, row, json.loads(run([python, "-c", FACTS], python.parent).splitlines()[-1]), python)


def check(way: Way, row: Row, facts: dict, python: Path) -> None:
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
DOCTOR = "import sys; from wan_attn.__main__ import main; sys.argv = ['x', 'doctor']\ntry: main()\nexcept SystemExit: pass"  # noqa: E501


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", nargs="+", metavar="3.x", help="default: all that are here")
    parser.add_argument("--torch", nargs="+", default=TORCH, metavar="VERSION")
    parser.add_argument("--way", nargs="+", metavar="WORDS", help="only ways with these words")
    parser.add_argument("--quick", action="store_true", help="one torch per Python: its newest")
    parser.add_argument("--tests", action="store_true", help="the op's tests, with the wheel")
    parser.add_argument("--cache", type=Path, default=ROOT / "build/install-matrix")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    parser.add_argument("--uv", type=Path, default=shutil.which("uv"), help="default: on PATH")
    return parser.parse_args(arguments)


def cells(args: argparse.Namespace) -> Iterator[tuple[str, Path, str, Way]]:
    here = pythons()
    for version in args.python or here:
        if version not in here:
            raise RuntimeError(f"there is no Python {version} here, only {', '.join(here)}")
        minor = int(version.split(".")[1])
        torches = [t for t in args.torch if minor <= NEWEST_PYTHON.get(t, minor)]
        for torch in torches[-1:] if args.quick else torches:
            for way in WAYS:
                if not args.way or any(word in way.name for word in args.way):
                    yield version, here[version], torch, way


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    args.cache.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="wan-attn-matrix-") as folder:
        if args.uv is None:
            run([sys.executable, "-m", "venv", Path(folder, "uv")], Path(folder))
            run([python_of(Path(folder, "uv")), "-m", "pip", "install", "-q", "uv"], Path(folder))
            args.uv = python_of(Path(folder, "uv")).with_name("uv")
        sources = Sources(Path(folder), args.uv)
        print(HEAD, flush=True)
        for version, python, torch, way in cells(args):
            row = Row(version, torch, "", way.name)
            try:
                packages = base(args.cache, version, python, torch, args.uv)
                with environment(python, packages) as own:
                    install(way, row, own, packages, sources, args.uv)
                    if args.tests and way.name == "pip, wheel":
                        tests = [ROOT / "tests" / test for test in TESTS]
                        run(
                            [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
                            own.parent,
                        )
            except RuntimeError as error:
                row.problems.append(str(error))
            rows.append(row)
            print(row.text(), flush=True)
    wrong = [f"\n{row.text()}\n" + "\n".join(row.problems) for row in rows if row.problems]
    if args.out:
        args.out.write_text("\n".join([HEAD, *(r.text() for r in rows), *wrong, ""]))
    print("".join(wrong))
    print(f"{len(rows)} ways tried, {len(wrong)} with a problem")
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(str(error))
