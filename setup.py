# SPDX-License-Identifier: Apache-2.0
"""setup.py - compiles libwan_attn, its torch shim (both C11) and the CUDA kernels.

Needs a C compiler; asks nothing of torch, a GPU, a driver or a CUDA toolkit. A build says what it
leaves out, and writes it into wan_attn/build_record.json, which `wan-attn doctor` reads. Runs with
setuptools 64 and newer, with or without the package `wheel`. The environment can say:

WAN_ATTN_NATIVE=1|0      the C library and the shim (default), or PyTorch's attention alone
WAN_ATTN_CUDA=auto|0|1   ready CUDA kernels: if NVRTC 12 is here (default), never, or always
WAN_ATTN_KEPT=DIR        where builds keep ready CUDA kernels for the next one (build/cubin)
WAN_ATTN_TARGET=PLATFORM another platform of .ci/wheels/targets.py, by zig's compiler (ziglang)
CC, CFLAGS, LDFLAGS      as everywhere; without effect if WAN_ATTN_TARGET is set
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools

# An older one knows no editable build, and would install without anything compiled.
if int(setuptools.__version__.split(".")[0]) < 64:
    sys.exit(
        f"wan_attn: setuptools must be 64 or newer, got {setuptools.__version__}: leave out"
        ' --no-build-isolation, or run first: pip install "setuptools>=64,<82"'
    )

from setuptools import Command, find_packages, setup
from setuptools.command.build import build
from setuptools.dist import Distribution

try:  # moved into setuptools itself in a later version
    from setuptools._distutils.ccompiler import new_compiler
    from setuptools._distutils.sysconfig import customize_compiler
except ImportError:
    from distutils.ccompiler import new_compiler
    from distutils.sysconfig import customize_compiler

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'__version__ = "(.+)"', (ROOT / "wan_attn/version.py").read_text())


def bdist_wheel() -> Any:
    """The command that packs a wheel: of setuptools (>= 70.1), of `wheel`, or our own plain one."""
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:
        try:
            from wheel.bdist_wheel import bdist_wheel
        except ImportError:  # a stock environment of Python 3.10 or 3.11, without isolation
            bdist_wheel = runpy.run_path(str(ROOT / ".ci/plain_wheel.py"))["bdist_wheel"]
    return bdist_wheel


def target() -> Any:
    """The platform to build for (a Target of .ci/wheels/targets.py); None: this machine."""
    name = os.environ.get("WAN_ATTN_TARGET")
    if not name:
        return None
    known = runpy.run_path(str(ROOT / ".ci/wheels/targets.py"))["TARGETS"]
    if name not in known:
        sys.exit(f"WAN_ATTN_TARGET must be one of {' '.join(known)}, got {name}")
    return known[name]


TARGET = target()
SYSTEM = TARGET.system if TARGET else sys.platform
HEADERS = (".h", ".cuh", ".def", ".inc")
SHIM_SOURCE = "csrc/torch/shim.c"
C_SOURCES = sorted(
    source
    for source in (p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.c"))
    if source != SHIM_SOURCE
)

IS_MSVC = sys.platform == "win32" and not TARGET
C_FLAGS = (
    ["/std:c11", "/O2", "/utf-8", "/fp:precise"]
    if IS_MSVC
    else ["-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-g0"]
) + (TARGET.compile_flags() if TARGET else [])
# torch throws C++ exceptions through the shim: without unwind tables they would end the process.
# (MSVC always writes them on 64 bits.)
SHIM_FLAGS = C_FLAGS if IS_MSVC else [*C_FLAGS, "-fexceptions", "-funwind-tables"]
# These make sums and comparisons wrong; at link time they also switch denormal numbers off for the
# whole process.
UNSAFE_FLAGS = re.compile(
    r"-Ofast|-ffast-math|-funsafe-math-optimizations|-fassociative-math|-freciprocal-math"
    r"|-ffinite-math-only|-fno-honor-(?:nans|infinities)|-ffp-model=fast|-mdaz-ftz|[-/]fp:fast"
)
NO_COMPILER = """
wan_attn: there is no C compiler here: {why}
    Debian, Ubuntu: apt install gcc          Fedora: dnf install gcc
    macOS: xcode-select --install            Windows: Visual Studio Build Tools with C++
Or install without our kernels, so that PyTorch computes everything: WAN_ATTN_NATIVE=0
"""


def shared_library(stem: str) -> str:
    prefix, suffix = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(
        SYSTEM, ("lib", ".so")
    )
    return f"{prefix}{stem}{suffix}"


def link_flags(library: str) -> list[str]:
    if TARGET:
        return list(TARGET.link_flags(library))
    if SYSTEM != "linux":
        return []
    return ["-s", "-Wl,--no-undefined,-z,relro,-z,now,-z,noexecstack"]


def asked(variable: str, default: str, *others: str) -> str:
    """What the environment wants."""
    wanted = os.environ.get(variable) or default
    if wanted not in (default, *others):
        sys.exit(f"{variable} must be {default} or {' or '.join(others)}, got {wanted}")
    return wanted


def compiler() -> Any:
    if TARGET:
        made = new_compiler(compiler="unix")
        words = TARGET.compiler()
        made.set_executables(compiler=words, compiler_so=words, linker_so=[*words, "-shared"])
        return made
    made = new_compiler()
    customize_compiler(made)
    for name, words in vars(made).items():
        if not isinstance(words, list) or not name.startswith(("compiler", "linker", "preproc")):
            continue
        words = [word for word in words if not UNSAFE_FLAGS.fullmatch(word)]
        if name.startswith("linker"):
            # Some Pythons put a folder of their own into the search path of all that they link.
            words = [w for w in words if not w.startswith(("-Wl,-rpath", "-L"))]
        setattr(made, name, words)
    return made


def refuse_without_compiler() -> None:
    try:
        made = compiler()
        if IS_MSVC:
            made.initialize()
        elif not shutil.which(made.compiler_so[0]):
            sys.exit(NO_COMPILER.format(why=f"no command {made.compiler_so[0]}"))
    except Exception as error:  # distutils has several for «no Visual Studio»
        sys.exit(NO_COMPILER.format(why=error))


def say_ignored_flags() -> None:
    words = " ".join(os.environ.get(v, "") for v in ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS")).split()
    ignored = sorted({word for word in words if UNSAFE_FLAGS.fullmatch(word)})
    if ignored:
        print(f"wan_attn: compiled without {' '.join(ignored)}, which would make results wrong")


def commit() -> str | None:
    """The commit that is built, "-dirty" if files of it are changed; None: nobody knows."""
    packed = ROOT / ".commit"  # .ci/wheels puts it into what it packs
    if packed.exists():
        return packed.read_text().strip()
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 and (ROOT / ".git").exists() else None


def hashes(package: Path) -> dict[str, str]:
    """{name below the package: SHA-256} of what was compiled, for `wan-attn verify`."""
    made = [package / shared_library(stem) for stem in ("wan_attn", "wan_attn_shim")]
    made += sorted((package / "cuda/cubin").glob("*"))
    return {
        file.relative_to(package).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in made
        if file.is_file()
    }


def hidden_packages() -> list[str]:
    """Packages that pip has fetched for this build, and that this Python does not see.

    pip names them by PYTHONPATH, which a Python with a ._pth file (ComfyUI portable's) ignores.
    """
    named = os.environ.get("PYTHONPATH", "") if sys.flags.ignore_environment else ""
    folders = [Path(entry).parent for entry in named.split(os.pathsep) if entry]
    return [str(found) for f in folders for found in f.glob("overlay/**/site-packages")]


class build_native(Command):
    """Builds all that is not Python, in the build folder or in the source tree."""

    description = "compile libwan_attn, the torch shim and the CUDA kernels"
    user_options = [("inplace", "i", "build in the source tree")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: Any = None  # a folder once it is finalized
        self.build_temp: Any = None
        self.inplace = False

    def finalize_options(self) -> None:
        self.set_undefined_options(
            "build", ("build_lib", "build_lib"), ("build_temp", "build_temp")
        )

    def run(self) -> None:
        in_place = self.editable_mode or self.inplace
        target = ROOT / "wan_attn" if in_place else Path(self.build_lib) / "wan_attn"
        target.mkdir(parents=True, exist_ok=True)
        left_out = self.build_libraries(target)
        record = self.build_cuda(target / "cuda", in_place)
        record["left_out"] = left_out + record["left_out"]
        record["platform"] = TARGET.platform if TARGET else sysconfig.get_platform()
        record["commit"] = commit()
        record["files"] = hashes(target)
        (target / "build_record.json").write_text(json.dumps(record, indent=2) + "\n")

    def build_libraries(self, target: Path) -> list[str]:
        """Compiles the C library and the shim; returns what was left out, and how to get it."""
        why = None
        if TARGET and not TARGET.triple:
            why = "our kernels (a wheel for any platform); to get them, install one for yours"
        elif asked("WAN_ATTN_NATIVE", "1", "0") == "0":
            why = "our kernels (WAN_ATTN_NATIVE=0); to get them, install again without it"
        if why:
            for stem in ("wan_attn", "wan_attn_shim"):
                (target / shared_library(stem)).unlink(missing_ok=True)
            print(f"wan_attn: this build leaves out {why}")
            return [why]
        refuse_without_compiler()
        say_ignored_flags()
        system = {"linux": ["m", "pthread", "dl"], "darwin": ["m", "pthread"]}.get(SYSTEM, [])
        libraries = {"wan_attn": (C_SOURCES, C_FLAGS, system)}
        libraries["wan_attn_shim"] = ([SHIM_SOURCE], SHIM_FLAGS, [])
        for stem, (sources, flags, needed) in libraries.items():
            made = target / shared_library(stem)
            objects = self.compile(sources, flags)
            self.link(objects, made, libraries=needed, extra_postargs=link_flags(made.name))
        return []

    def compile(self, sources: list[str], flags: list[str]) -> list[str]:
        def compile_one(source: str) -> list[str]:
            # A compiler object is not safe to share between threads, hence one each.
            made: list[str] = compiler().compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=["csrc"],
                macros=[("WAN_ATTN_BUILD", "1")],
                extra_postargs=flags,
            )
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [o for made in pool.map(compile_one, sources) for o in made]

    def link(self, objects: list[str], library: Path, **options: object) -> None:
        """Links under another name first: a process may be running what is replaced."""
        made = Path(self.build_temp) / library.name
        compiler().link_shared_object(objects, str(made), **options)
        partial = library.with_name(f"{library.name}.new")
        shutil.copy2(made, partial)
        os.replace(partial, library)

    def build_cuda(self, target: Path, in_place: bool) -> dict[str, Any]:
        """The CUDA kernels as text, and as machine code for most GPUs if NVRTC is here."""
        has_none = not TARGET.has_cuda if TARGET else SYSTEM == "darwin"
        if has_none:
            return {"cubins": 0, "left_out": []}
        wanted = asked("WAN_ATTN_CUDA", "auto", "0", "1")
        # A program of its own, because it imports modules of the package, and that wants torch.
        # build/ outlives an isolated build, which has no other place to keep things.
        record = Path(self.build_temp) / "cuda.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        ship: list[str | Path] = [sys.executable, ROOT / "wan_attn/cuda/ship.py", "--into", target]
        kept = Path(os.environ.get("WAN_ATTN_KEPT") or ROOT / "build/cubin").resolve()
        ship += ["--kept", kept, "--record", record, "--cubins", wanted]
        ship += ["--machine", TARGET.machine if TARGET else platform.machine().lower()]
        ship += [f"--site={folder}" for folder in hidden_packages()]
        if in_place:
            ship.append("--editable")
        if subprocess.run(ship, check=False).returncode != 0:
            sys.exit("WAN_ATTN_CUDA=1, but the CUDA kernels cannot be compiled, see above")
        found: dict[str, Any] = json.loads(record.read_text())
        return found

    def get_source_files(self) -> list[str]:
        return [
            *C_SOURCES,
            SHIM_SOURCE,
            *(str(p.relative_to(ROOT)) for s in HEADERS for p in ROOT.glob(f"csrc/**/*{s}")),
        ]

    def get_outputs(self) -> list[str]:
        return [
            str(Path(self.build_lib) / "wan_attn" / shared_library(s))
            for s in ("wan_attn", "wan_attn_shim")
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildWithNative(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]

    def run(self) -> None:
        # A build folder outlives its build: a module that was moved since would be installed, too.
        shutil.rmtree(Path(self.build_lib) / "wan_attn", ignore_errors=True)
        super().run()


class PlatformWheel(bdist_wheel()):  # type: ignore[misc] # which one there is, shows at run time
    """No CPython symbol is used, so one wheel serves every Python: py3-none-<platform>."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = bool(TARGET and not TARGET.triple)

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", TARGET.platform if TARGET else super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return not TARGET or bool(TARGET.triple)


setup(
    version=VERSION,
    # Not in pyproject.toml, whose two ways of saying it exclude each other's setuptools.
    license="Apache-2.0",
    packages=find_packages(include=["wan_attn", "wan_attn.*"]),
    # With this an editable install is a line in a .pth file. Without it Python, started in the
    # folder that holds the checkout, would take the checkout itself for the package.
    package_dir={"": "."},
    package_data={"wan_attn.integrations.comfyui_node": ["LICENSE.md"]},
    cmdclass={"build": BuildWithNative, "build_native": build_native, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
