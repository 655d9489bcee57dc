# SPDX-License-Identifier: Apache-2.0
"""test_cuda_nvrtc.py - NVRTC is found wherever it may be, and speaks plainly when it cannot work.

That every row compiles with every NVRTC is in test_cuda_static.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wan_attn import config
from wan_attn.cuda import nvrtc, rows, sources

# One of each version, from PyPI.
HERE = list({one.version: one for one in nvrtc.found() if "nvidia" in one.path.parts}.values())

TEXTS = {
    "cuda/main.cuh": b'#include "cuda/deep/scale.cuh"\nextern "C" __global__ void f(float *x)'
    b" { x[threadIdx.x] *= SCALE * FACTOR; }\n",
    "cuda/deep/scale.cuh": b"#define SCALE 3.0f\n",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is found but what a test puts here."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), "", str(tmp_path / "absent")])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(nvrtc, "_TOOLKITS", (str(tmp_path / "toolkit/lib64"),))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    nvrtc.found.cache_clear()
    yield tmp_path
    nvrtc.found.cache_clear()


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def found(tree: Path) -> list[tuple[str, str | None, tuple[int, int] | None]]:
    return [
        (str(one.path.relative_to(tree)), one.builtins.name if one.builtins else None, one.version)
        for one in nvrtc.found()
    ]


def test_nothing_here(tree: Path) -> None:
    assert nvrtc.found() == ()
    assert "nvidia/*/lib/libnvrtc.so.*" in nvrtc.not_found() and "pip" in nvrtc.not_found()


def test_the_order(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's packages, conda, toolkits; in each 12 before 13, and the newest of those."""
    names = ("libnvrtc.so.13", "libnvrtc-builtins.so.13.2", "libnvrtc-builtins.alt.so.13.2")
    put(tree / "site/nvidia/cu13/lib", *names, "libnvrtc.alt.so.13", "libcudart.so.13")
    put(tree / "site/nvidia/cuda_nvrtc/lib", "libnvrtc.so.12", "libnvrtc-builtins.so.12.8")
    put(tree / "site/torch/lib", "libnvrtc-b51b459d.so.12", "libnvrtc-builtins.so.12.9.86")
    put(tree / "prefix/lib", "libnvrtc.so.12", "libnvrtc-builtins.so.12.4")
    put(tree / "home/lib64", "libnvrtc.so.12", "libnvrtc-builtins.so.12.6")
    put(tree / "toolkit/lib64", "libnvrtc.so.13.0.88", "libnvrtc-builtins.so.13.0.88")
    (tree / "toolkit/lib64/libnvrtc.so.13").symlink_to("libnvrtc.so.13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(tree / "home"))
    assert found(tree) == [
        ("site/torch/lib/libnvrtc-b51b459d.so.12", "libnvrtc-builtins.so.12.9.86", (12, 9)),
        ("site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "libnvrtc-builtins.so.12.8", (12, 8)),
        ("site/nvidia/cu13/lib/libnvrtc.so.13", "libnvrtc-builtins.so.13.2", (13, 2)),
        ("prefix/lib/libnvrtc.so.12", "libnvrtc-builtins.so.12.4", (12, 4)),
        ("home/lib64/libnvrtc.so.12", "libnvrtc-builtins.so.12.6", (12, 6)),
        ("toolkit/lib64/libnvrtc.so.13", "libnvrtc-builtins.so.13.0.88", (13, 0)),
    ]


def test_versions_that_were_never_tested_are_left_alone(tree: Path) -> None:
    put(tree / "site/nvidia/old/lib", "libnvrtc.so.11.2", "libnvrtc-builtins.so.11.8")
    put(tree / "site/nvidia/new/lib", "libnvrtc.so.14", "libnvrtc-builtins.so.14.0")
    assert nvrtc.found() == ()


def test_windows(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_WINDOWS", True)
    names = ("nvrtc64_120_0.dll", "nvrtc-builtins64_128.dll")
    put(tree / "site/nvidia/cuda_nvrtc/bin", *names, "nvrtc64_120_0.alt.dll")
    put(tree / "site/nvidia/cu13/bin/x86_64", "nvrtc64_130_0.dll", "nvrtc-builtins64_132.dll")
    put(tree / "site/torch/lib", "nvrtc64_120_0.dll", "nvrtc-builtins64_124.dll")
    assert found(tree) == [
        ("site/nvidia/cuda_nvrtc/bin/nvrtc64_120_0.dll", "nvrtc-builtins64_128.dll", (12, 8)),
        ("site/torch/lib/nvrtc64_120_0.dll", "nvrtc-builtins64_124.dll", (12, 4)),
        ("site/nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll", "nvrtc-builtins64_132.dll", (13, 2)),
    ]
    assert r"nvidia\*\bin\nvrtc64_*.dll" in nvrtc.not_found()


def test_a_library_that_is_none(tree: Path) -> None:
    put(tree / "site/nvidia/cuda_nvrtc/lib", "libnvrtc.so.12")
    (one,) = nvrtc.found()
    assert one.version is None and "of unknown version" in str(one)
    with pytest.raises(nvrtc.NvrtcError, match="libnvrtc.so.12 does not load: .*pip install"):
        nvrtc.load(one)


def test_a_library_of_something_else(tree: Path) -> None:
    import _ctypes

    if not getattr(_ctypes, "__file__", None):
        pytest.skip("this Python has no extension module to put in its place")
    put(tree / "site/nvidia/cuda_nvrtc/lib")
    (tree / "site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12").symlink_to(_ctypes.__file__)
    with pytest.raises(nvrtc.NvrtcError, match="nvrtcGetErrorString"):
        nvrtc.load(nvrtc.found()[0])


@pytest.mark.parametrize("one", HERE, ids=lambda one: nvrtc.version_name(one.version))
def test_the_real_one(one: nvrtc.Found) -> None:
    compiler = nvrtc.load(one)
    assert compiler.version == one.version, "what its files say is what it is"
    assert {75, 80, 86, 89, 90, 120} <= set(compiler.archs)
    options = ["--gpu-architecture=sm_86", "-DFACTOR=2.0f"]
    cubin = compiler.compile(86, TEXTS, options)
    assert cubin.startswith(b"\x7fELF") and cubin == compiler.compile(86, TEXTS, options)
    with pytest.raises(nvrtc.NvrtcError) as caught:
        compiler.compile(86, TEXTS, options[:1])
    message = str(caught.value)
    assert "cannot compile cuda/main.cuh: NVRTC_ERROR_COMPILATION" in message
    assert 'identifier "FACTOR" is undefined' in message, "the compiler's own words"
    assert str(one.path) in message
    with pytest.raises(nvrtc.NvrtcError, match="scale.cuh"):
        compiler.compile(86, {"cuda/main.cuh": TEXTS["cuda/main.cuh"]}, options)
    with pytest.raises(nvrtc.UnknownArch, match="does not know sm_35 .it knows .* to 12"):
        compiler.compile(35, TEXTS, options)
    with pytest.raises(nvrtc.NvrtcError, match="invalid option|INVALID_OPTION"):
        compiler.compile(86, TEXTS, [*options, "--no-such-option"])


@pytest.mark.parametrize("one", HERE, ids=lambda one: nvrtc.version_name(one.version))
def test_the_helpers_compile_for_every_shipped_gpu(one: nvrtc.Found) -> None:
    """Rows are test_cuda_static.py's; it looks at the helpers of two GPUs."""
    compiler = nvrtc.load(one)
    for arch in (*rows.SHIPPED, 89):
        for job in rows.jobs_for(arch, rows.helpers()):
            cubin = compiler.compile(arch, job.texts(), job.options())
            assert job.name.encode() in cubin


# --- the list ---------------------------------------------------------------------------------


def test_a_gpu_that_is_not_listed_takes_the_class_below() -> None:
    assert [rows.class_of(arch) for arch in (75, 76, 85, 91, 130, 999)] == [
        *("TURING", "TURING", "WIDE", "WIDE", "SLIM", "SLIM")
    ]
    with pytest.raises(rows.RowError, match="7.5 or newer"):
        rows.class_of(74)


def test_a_text_brings_what_it_includes_and_nothing_of_the_emulator() -> None:
    texts = sources.closure("cuda/merge.cuh")
    assert next(iter(texts)) == "cuda/merge.cuh"
    assert {"cuda/args.h", "cuda/ptx/ptx.cuh", "cuda/ptx/mma.cuh"} <= set(texts)
    assert not any(name.startswith("emu/") for name in texts)
    assert "cuda/tile/softmax.cuh" not in texts, "a change there leaves this kernel as it is"


def test_line_ends_make_no_difference(tmp_path: Path) -> None:
    for name, text in sources.closure("cuda/merge.cuh").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.replace(b"\n", b"\r\n"))
    same = sources.closure("cuda/merge.cuh", tmp_path)
    assert same == sources.closure("cuda/merge.cuh")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def at(platform: str, **env: str) -> Path | None:
        for name in ("WAN_ATTN_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "platform", platform)
        config.refresh()
        return config.cache_folder()

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert at("linux") == tmp_path / ".cache/wan_attn"
    assert at("linux", XDG_CACHE_HOME="/c") == Path("/c/wan_attn")
    assert at("linux", XDG_CACHE_HOME="relative") == tmp_path / ".cache/wan_attn", "the XDG rule"
    assert at("darwin") == tmp_path / "Library/Caches/wan_attn"
    assert at("win32", LOCALAPPDATA="/l") == Path("/l/wan_attn/Cache")
    assert at("win32") is None
    assert at("linux", WAN_ATTN_CACHE_DIR="/mine") == Path("/mine")
    monkeypatch.undo()
    config.refresh()
