# SPDX-License-Identifier: Apache-2.0
"""known.py - combinations known to go wrong: what happens, what to do, who found out.

A rule looks at a Machine and answers None, or what it sees. `problem`: something does not work
here. `note`: it matters in some uses, or something else in the environment suffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from wan_attn.doctor.facts import Machine

TORCH_FLOOR = (2, 4)


@dataclass(frozen=True)
class Rule:
    """One known-bad combination."""

    name: str
    level: str  # "problem" or "note"
    sees: Callable[[Machine], str | None]
    fix: str
    source: str


@dataclass(frozen=True)
class Finding:
    """A rule that applies here."""

    name: str
    level: str
    text: str
    fix: str
    source: str


def version(text: str) -> tuple[int, ...]:
    """The release numbers of a version: "2.9.1+cu128" is (2, 9, 1); () if there are none."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def cudnn_name(number: int) -> str:
    """Writes 91002 as 9.10.2; versions before 9 had a digit less."""
    major = 10_000 if number >= 90_000 else 1_000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def _torch_missing(m: Machine) -> str | None:
    return None if m.torch else f"PyTorch cannot be imported: {m.torch_error}"


def _torch_old(m: Machine) -> str | None:
    if m.torch and version(m.torch) < TORCH_FLOOR:
        return f"torch {m.torch} is older than 2.4, the oldest that Wan2.2 and wan_attn support"
    return None


def _torch_without_cuda(m: Machine) -> str | None:
    if m.torch and m.driver and not m.torch_cuda and not m.torch_hip:
        gpus = f" ({', '.join(m.driver_gpus)})" if m.driver_gpus else ""
        return (
            f"there is an NVIDIA driver{gpus}, but torch {m.torch} is a build without CUDA: "
            "everything will run on the CPU"
        )
    return None


def _cuda_not_working(m: Machine) -> str | None:
    if m.driver and m.torch_cuda and not m.gpus:
        return f"NVIDIA driver {m.driver}, but torch {m.torch} sees no GPU: {m.no_gpu_reason}"
    return None


def _arch_missing(m: Machine) -> str | None:
    for gpu in m.gpus:
        major, minor = gpu.capability
        if m.torch_hip or not m.torch_archs or _runs_on(m.torch_archs, major, minor):
            continue
        return (
            f"torch {m.torch} has no code for {gpu.name} (compute capability {major}.{minor}), "
            f"only for {' '.join(m.torch_archs)}; calls end with 'no kernel image is available'"
        )
    return None


def _runs_on(archs: list[str], major: int, minor: int) -> bool:
    """Machine code (sm_) runs on its own major from its minor up; PTX (compute_) on all newer."""
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", arch)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if match[1] == "sm" and built[0] == major and built[1] <= minor:
            return True
        if match[1] == "compute" and built <= (major, minor):
            return True
    return False


def _rocm(m: Machine) -> str | None:
    return (
        f"torch {m.torch} is a ROCm build: wan_attn has no kernels for AMD GPUs"
        if m.torch_hip
        else None
    )


def _conv3d(m: Machine) -> str | None:
    if m.gpus and m.cudnn and version(m.torch) >= (2, 9) and m.cudnn < 91500:
        cudnn = cudnn_name(m.cudnn)
        return (
            f"torch {m.torch} with cuDNN {cudnn}: Conv3d in half precision takes a path that needs "
            "several times the memory; the VAE runs out of it, and users suspect attention"
        )
    return None


def _bf16_emulated(m: Machine) -> str | None:
    for gpu in m.gpus:
        if gpu.capability < (8, 0) and not m.torch_hip:
            return (
                f"{gpu.name} has no bf16 arithmetic; torch.cuda.is_bf16_supported() answers True "
                "all the same, because torch emulates it, slowly"
            )
    return None


def _windows_flash(m: Machine) -> str | None:
    if m.system == "Windows" and m.gpus and TORCH_FLOOR <= version(m.torch) < (2, 15):
        return (
            f"torch {m.torch} for Windows comes without flash attention: its own SDPA uses the "
            "slower memory-efficient one"
        )
    return None


def _sage_old(m: Machine) -> str | None:
    sage = m.packages.get("sageattention")
    if sage is None or version(sage) > (2, 2, 0) or (version(sage) == (2, 2, 0) and "post" in sage):
        return None
    return (
        f"sageattention {sage} is installed (wan_attn does not use it): before 2.2.0.post it "
        "returns NaN for short sequences and lengths off its block size, which shows as black or "
        "noisy video; PyPI's 1.0.6 is older still"
    )


def _triton_headers(m: Machine) -> str | None:
    triton = next((name for name in ("triton-windows", "triton") if name in m.packages), None)
    if triton and not m.has_python_h:
        return (
            f"{triton} is installed, but this Python has no Python.h, which Triton and "
            "torch.compile compile against"
        )
    return None


def _broken(m: Machine) -> str | None:
    if not m.broken:
        return None
    return f"{'; '.join(m.broken.values())}; stock Wan2.2 fails at `import wan` because of it"


def _numpy(m: Machine) -> str | None:
    if version(m.packages.get("numpy", "")) >= (2,):
        return f"numpy {m.packages['numpy']}: stock Wan2.2 asks for numpy<2"
    return None


def _python(m: Machine) -> str | None:
    if m.python >= (3, 13):
        python = f"Python {m.python[0]}.{m.python[1]}"
        return f"{python}: numpy<2, which stock Wan2.2 asks for, has no wheels for it"
    return None


def _transformers(m: Machine) -> str | None:
    have = m.packages.get("transformers", "")
    if have and not (4, 49) <= version(have) <= (4, 51, 3):
        return f"transformers {have}: stock Wan2.2's requirements.txt asks for 4.49.0 to 4.51.3"
    return None


_GET_TORCH = "choose a build for this system at pytorch.org/get-started/locally"
_WAN_ENV = "nothing, unless you run stock Wan2.2; then give it its own environment"

RULES: tuple[Rule, ...] = (
    Rule("torch-missing", "problem", _torch_missing, f"install it: {_GET_TORCH}", "wan_attn"),
    Rule(
        "torch-too-old",
        "problem",
        _torch_old,
        f"update torch: {_GET_TORCH}",
        "Wan2.2 requirements.txt",
    ),
    Rule(
        "torch-without-cuda",
        "problem",
        _torch_without_cuda,
        f"install a CUDA build: {_GET_TORCH}",
        "pytorch.org",
    ),
    Rule(
        "cuda-not-working",
        "problem",
        _cuda_not_working,
        "update the driver, or install a torch built for an older CUDA; check CUDA_VISIBLE_DEVICES",
        "torch.cuda.init()",
    ),
    Rule(
        "no-code-for-gpu",
        "problem",
        _arch_missing,
        f"newer cards need a newer torch; Pascal and Volta need a CUDA 12.6 build: {_GET_TORCH}",
        "CUDA 13.0 release notes; flash-attention issues 1540, 1763",
    ),
    Rule("rocm", "note", _rocm, "nothing: PyTorch's attention runs here", "wan_attn"),
    Rule(
        "conv3d-memory",
        "problem",
        _conv3d,
        "torch 2.9.1 or newer with nvidia-cudnn 9.15 or newer; or torch 2.8",
        "pytorch issues 166643, 166790; ComfyUI PR 10373, issue 10827",
    ),
    Rule(
        "bf16-emulated",
        "note",
        _bf16_emulated,
        "set WAN_FORCE_FP16=1, so that attention computes in fp16",
        "pytorch PR 115924; x-flux-comfyui PR 87",
    ),
    Rule(
        "windows-no-flash",
        "note",
        _windows_flash,
        "torch 2.15 or newer has it",
        "pytorch PR 186343",
    ),
    Rule(
        "sage-nan",
        "note",
        _sage_old,
        "update it from github.com/woct0rdho/SageAttention, or keep it out of the workflow",
        "SageAttention PR 377; woct0rdho/SageAttention PR 98",
    ),
    Rule(
        "no-python-h",
        "note",
        _triton_headers,
        "copy the folders include and libs of a full Python of the same version (Windows), or "
        "install the python3-dev package (Linux); until then leave WAN_COMPILE unset",
        "triton-windows issues 30, 83",
    ),
    Rule(
        "broken-package",
        "problem",
        _broken,
        "uninstall it, or run Wan2.2 through `python -m wan_attn run`, where it counts as absent",
        "Wan2.1 issue 47; flash-attention issue 982",
    ),
    Rule("numpy-2", "note", _numpy, _WAN_ENV, "Wan2.2 requirements.txt, pyproject.toml"),
    Rule(
        "python-too-new",
        "note",
        _python,
        f"{_WAN_ENV} with Python 3.10 to 3.12",
        "numpy 1.26.4 on PyPI",
    ),
    Rule("transformers-range", "note", _transformers, _WAN_ENV, "Wan2.2 requirements.txt"),
)


def findings(m: Machine) -> list[Finding]:
    """Every rule that applies to this machine, problems first."""
    found = [
        Finding(rule.name, rule.level, text, rule.fix, rule.source)
        for rule in RULES
        if (text := rule.sees(m)) is not None
    ]
    return sorted(found, key=lambda f: f.level != "problem")
