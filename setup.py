# SPDX-License-Identifier: Apache-2.0
"""setup.py - compiles libwan_attn (C), the CUDA kernels and, only if torch is here, its shim (C++).

Asks nothing of a GPU, a driver or a CUDA toolkit, and fetches nothing. The environment can say:

WAN_ATTN_SHIM=auto|0|1   the shim: if torch >= 2.10 can be imported (default), never, or always
WAN_ATTN_CUDA=auto|0|1   ready CUDA kernels: if NVRTC 12 is here (default), never, or always
CC, CXX, CFLAGS          as everywhere
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.dist import Distribution

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # --no-build-isolation takes whatever setuptools is there
    sys.exit('wan_attn needs a newer setuptools to build: pip install "setuptools>=77"')

try:  # moved into setuptools itself in a later version
    from setuptools._distutils.ccompiler import new_compiler
    from setuptools._distutils.sysconfig import customize_compiler
except ImportError:
    from distutils.ccompiler import new_compiler  # type: ignore[no-redef]
    from distutils.sysconfig import customize_compiler  # type: ignore[no-redef]

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "wan_attn/version.py").read_text()).group(1)

C_SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/c*/**/*.c"))
HEADERS = (".h", ".cuh", ".def", ".inc")
SHIM_SOURCE = "csrc/torch/shim.cpp"
# The oldest torch whose stable ABI the shim may use, and the oldest whose headers can express it.
SHIM_TARGET, SHIM_HEADERS = 0x0209000000000000, (2, 10)

IS_MSVC = sys.platform == "win32"
C_FLAGS = (
    ["/std:c11", "/O2", "/utf-8"]
    if IS_MSVC
    else ["-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-g0"]
)
CXX_FLAGS = (
    ["/std:c++17", "/O2", "/EHsc", "/utf-8"]
    if IS_MSVC
    else ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-g0"]
)


def shared_library(stem: str) -> str:
    prefix, suffix = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(
        sys.platform, ("lib", ".so")
    )
    return f"{prefix}{stem}{suffix}"


def asked(variable: str) -> str:
    """What the environment wants: auto, 0 or 1."""
    wanted = os.environ.get(variable, "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"{variable} must be auto, 0 or 1, got {wanted}")
    return wanted


def torch_root() -> tuple[Path | None, str]:
    """Where torch's headers are, or None and why they cannot be used. Imports nothing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return (
            None,
            "torch is not importable here (pip install --no-build-isolation lets it be)",
        )
    root = Path(spec.submodule_search_locations[0])
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (root / "version.py").read_text())
    version = (int(found.group(1)), int(found.group(2))) if found else (0, 0)
    if version < SHIM_HEADERS or not (root / "include/torch/csrc/stable/library.h").exists():
        return None, f"torch {version[0]}.{version[1]} has no stable-ABI headers (needs 2.10)"
    return root, ""


def compiler():
    made = new_compiler()
    customize_compiler(made)
    # Some Pythons put a folder of their own into the search path of all that is linked for them.
    for name in ("linker_so", "linker_so_cxx"):
        words = getattr(made, name, None) or []
        setattr(made, name, [w for w in words if not w.startswith(("-Wl,-rpath", "-L"))])
    return made


class build_native(Command):
    """Builds all that runs beside wan_attn/__init__.py, in the build folder or the source tree."""

    description = "compile libwan_attn, the torch shim and the CUDA kernels"
    user_options: list = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None
        self.build_temp = None

    def finalize_options(self) -> None:
        self.set_undefined_options(
            "build", ("build_lib", "build_lib"), ("build_temp", "build_temp")
        )

    def run(self) -> None:
        target = ROOT / "wan_attn" if self.editable_mode else Path(self.build_lib) / "wan_attn"
        self.build_core(target)
        self.build_shim(target)
        self.build_cuda(target / "cuda")

    def build_core(self, target: Path) -> None:
        def compile_one(source: str) -> list[str]:
            # A compiler object is not safe to share between threads, hence one each.
            return compiler().compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=["csrc"],
                macros=[("WAN_ATTN_BUILD", "1")],
                extra_postargs=C_FLAGS,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for made in pool.map(compile_one, C_SOURCES) for o in made]
        self.link(
            objects,
            target / shared_library("wan_attn"),
            libraries=[]
            if IS_MSVC
            else ["m", "pthread", *(["dl"] if sys.platform == "linux" else [])],
            extra_postargs=["-Wl,--no-undefined", "-s"] if sys.platform == "linux" else [],
        )

    def link(self, objects: list[str], library: Path, **options: object) -> None:
        """Links under another name first: a process may be running what is replaced."""
        made = Path(self.build_temp) / library.name
        compiler().link_shared_object(objects, str(made), **options)
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_name(f"{library.name}.new")
        shutil.copy2(made, partial)
        os.replace(partial, library)

    def build_shim(self, target: Path) -> None:
        wanted = asked("WAN_ATTN_SHIM")
        root, why = (None, "WAN_ATTN_SHIM=0") if wanted == "0" else torch_root()
        if root is not None:
            try:
                self.compile_shim(root, target)
                return
            except Exception as error:
                # A package that installs beats a faster call; doctor says which binding runs.
                why = f"the compiler failed: {error}"
        if wanted == "1":
            sys.exit(f"WAN_ATTN_SHIM=1, but the torch shim cannot be built: {why}")
        (target / shared_library("wan_attn_shim")).unlink(missing_ok=True)
        print(
            f"wan_attn: no torch shim ({why}); the op will be bound through ctypes,"
            " some 10 us slower a call"
        )

    def compile_shim(self, root: Path, target: Path) -> None:
        objects = compiler().compile(
            [SHIM_SOURCE],
            output_dir=self.build_temp,
            include_dirs=["csrc", str(root / "include")],
            macros=[("TORCH_TARGET_VERSION", hex(SHIM_TARGET))],
            extra_postargs=CXX_FLAGS,
        )
        self.link(
            objects,
            target / shared_library("wan_attn_shim"),
            libraries=["torch_cpu"],
            library_dirs=[str(root / "lib")],
            extra_postargs=["-s"] if sys.platform == "linux" else [],
            target_lang="c++",
        )

    def build_cuda(self, target: Path) -> None:
        """The CUDA kernels as text, and as machine code for most GPUs if NVRTC is here."""
        wanted = asked("WAN_ATTN_CUDA")
        if sys.platform == "darwin":
            wanted = "0"
        # A program of its own, because it imports modules of the package, and that wants torch.
        # build/ outlives an isolated build, which has no other place to keep things.
        ship = [sys.executable, ROOT / "wan_attn/cuda/ship.py", "--into", target]
        ship += ["--kept", ROOT / "build/cubin", "--cubins", wanted]
        if self.editable_mode:
            ship.append("--editable")
        if subprocess.run(ship, check=False).returncode != 0:
            sys.exit("WAN_ATTN_CUDA=1, but the CUDA kernels cannot be compiled, see above")

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


class PlatformWheel(bdist_wheel):
    """No CPython symbol is used, so one wheel serves every Python: py3-none-<platform>."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    version=VERSION,
    packages=[
        "wan_attn",
        "wan_attn.backends",
        "wan_attn.bench",
        "wan_attn.cli",
        "wan_attn.cuda",
        "wan_attn.demo",
        "wan_attn.doctor",
        "wan_attn.integrations",
        "wan_attn.integrations.comfyui_node",
        "wan_attn.integrations.wan22",
        "wan_attn.native",
        "wan_attn.selection",
        "wan_attn.selfcheck",
        "wan_attn.signatures",
    ],
    package_data={"wan_attn.integrations.comfyui_node": ["LICENSE.md"]},
    cmdclass={"build": BuildWithNative, "build_native": build_native, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
