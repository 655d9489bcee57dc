# SPDX-License-Identifier: Apache-2.0
"""facts.py - what this machine, its torch and its packages are; judges nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from wan_attn.store.machine import cpu_name

__all__ = [
    "Gpu",
    "Guard",
    "Machine",
    "broken_packages",
    "cpu_facts",
    "cpu_name",
    "cuda_devices",
    "machine",
    "native_facts",
    "nvidia_driver",
    "packages",
    "python_h",
]

T = TypeVar("T")

# Distributions that meet in a Wan2.2 environment, in the order in which they are shown.
PACKAGES = (
    "torchvision",
    "numpy",
    "diffusers",
    "transformers",
    "flash_attn",
    "flash_attn_3",
    "sageattention",
    "xformers",
    "triton",
    "triton-windows",
)


class Guard:
    """Runs checks that may break: a broken one is noted, and the report goes on with a default."""

    def __init__(self) -> None:
        self.failed: list[dict[str, str]] = []

    def run(self, name: str, check: Callable[[], T], default: Any) -> T:
        """What `check` answers, or `default`, which is of the same kind."""
        try:
            return check()
        except Exception as error:  # noqa: BLE001 - a doctor that dies of its findings is no use
            text = (str(error).strip().splitlines() or ["no message"])[0]
            self.failed.append({"check": name, "error": f"{type(error).__name__}: {text}"})
            fallback: T = default
            return fallback


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as torch sees it."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass
class Machine:
    """What the rules of known.py look at; plain values: a test can describe any machine."""

    system: str = "Linux"  # platform.system()
    python: tuple[int, int] = (3, 11)
    has_python_h: bool = True
    torch: str = ""  # "" if torch cannot be imported:
    torch_error: str = ""
    torch_cuda: str | None = None
    torch_hip: str | None = None
    torch_archs: list[str] = field(default_factory=list)  # "sm_80", "compute_90"
    cudnn: int | None = None
    gpus: list[Gpu] = field(default_factory=list)
    no_gpu_reason: str = ""  # torch's own words, where it is built for CUDA but sees no device
    driver: str = ""
    driver_gpus: list[str] = field(default_factory=list)  # names, from the driver's own tool
    packages: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)  # package -> why it does not import


def python_h() -> bool:
    """Whether this Python can compile extensions, which Triton does at run time."""
    folders = {sysconfig.get_path(key) for key in ("include", "platinclude")}
    return any(folder and (Path(folder) / "Python.h").exists() for folder in folders)


def packages() -> dict[str, str]:
    """Versions of the installed PACKAGES, from their metadata: nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if importlib.util.find_spec(name.replace("-", "_")) is not None:
                found[name] = "unknown version"
    return found


def nvidia_driver() -> tuple[str, list[str]]:
    """Returns (driver version, GPU names) from nvidia-smi or the kernel module; ("", []): none."""
    tool = shutil.which("nvidia-smi")
    if tool:
        query = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
        rows = [line.split(",", 1) for line in answer.stdout.splitlines() if "," in line]
        if answer.returncode == 0 and rows:
            return rows[0][0].strip(), [row[1].strip() for row in rows]
    module = Path("/sys/module/nvidia/version")
    return (module.read_text(encoding="ascii").strip(), []) if module.exists() else ("", [])


def cuda_devices() -> tuple[list[Gpu], str]:
    """The GPUs of this torch, and why there are none in torch's words."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return [], "this torch is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            return [], _why_no_cuda([str(w.message) for w in caught])
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append(Gpu(i, p.name, (p.major, p.minor), round(p.total_memory / 2**30, 1)))
    return gpus, ""


def _why_no_cuda(said: list[str]) -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # noqa: BLE001 - torch raises several kinds, all with a text
        said.append(str(error))
    return said[-1].splitlines()[0] if said else "torch finds no CUDA device"


def machine(guard: Guard) -> Machine:
    """Looks at this machine."""
    found = Machine(
        system=platform.system(),
        python=sys.version_info[:2],
        has_python_h=guard.run("Python.h", python_h, True),
        packages=guard.run("packages", packages, {}),
    )
    found.driver, found.driver_gpus = guard.run("driver", nvidia_driver, ("", []))
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a missing DLL is an OSError, a bad one anything
        found.torch_error = f"{type(error).__name__}: {error}"
        found.no_gpu_reason = "torch cannot be imported"
        return found
    found.torch = torch.__version__
    guard.run("torch", lambda: _ask_torch(found), None)
    found.gpus, found.no_gpu_reason = guard.run(
        "GPUs", cuda_devices, ([], "the check itself failed")
    )
    return found


def _ask_torch(found: Machine) -> None:
    import torch

    found.torch_cuda, found.torch_hip = torch.version.cuda, torch.version.hip
    if found.torch_cuda:
        found.torch_archs = _archs()
        found.cudnn = torch.backends.cudnn.version()


def _archs() -> list[str]:
    """What this torch was compiled for, also where torch.cuda.get_arch_list() sees no GPU."""
    import torch

    flags: str | None = torch._C._cuda_getArchFlags()
    return flags.split() if flags else []


def broken_packages() -> dict[str, str]:
    """FlashAttention that is installed and does not import, on machines without a GPU as well."""
    from wan_attn.backends._flash_attention import NOT_INSTALLED, load

    found = {}
    for names in (("flash_attn",), ("flash_attn_interface", "flash_attn_3.flash_attn_interface")):
        module, reason = load(*names)
        if module is None and reason != NOT_INSTALLED:
            found[names[0]] = reason
    return found


def native_facts() -> dict[str, Any]:
    """The native library: where it is, what it was built with, how torch reaches it."""
    from wan_attn.native import library, op

    error = library.load_error()
    return {
        "library": str(library.lib_path()),
        "abi": library.ABI_VERSION,
        "load_error": error,
        "build": op.build_info() if error is None else "",
        "binding": op.binding(),
        "binding_reason": op.binding_reason(),
        "left_out": library.left_out(),
    }


def cpu_facts() -> dict[str, Any]:
    """The processor, and what of it kernels may use."""
    import torch

    from wan_attn.native import op

    return {
        "name": cpu_name(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "features": list(op.cpu_features()),
    }
