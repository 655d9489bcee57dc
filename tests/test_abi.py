# SPDX-License-Identifier: Apache-2.0
"""test_abi.py - what libwan_attn and the shim export and need, and every mirror of wan_attn.h.

tests/abi.txt is the ABI in text: the exported functions, and size and offsets of every struct on a
64-bit machine. A change there is a decision: fields are only ever appended, anything else raises
WAN_ATTN_ABI_VERSION.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from source_tree import ROOT
from wan_attn.native import library as native
from wan_attn.native import shim

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "wan_attn_tensor": native.Tensor,
    "wan_attn_params": native.Params,
    "wan_attn_guard": native.Guard,
    "wan_attn_backward_params": native.BackwardParams,
    "wan_attn_rope_params": native.RopeParams,
    "wan_attn_error": native.Error,
    "wan_attn_call": native.Call,
    "wan_attn_kernel_info": native.KernelInfo,
    "wan_attn_cuda_config": native.CudaConfig,
    "wan_attn_cuda_device": native.CudaDevice,
}

# Name in wan_attn.h -> the mirrored number.
NUMBERS = {
    "WAN_ATTN_ABI_VERSION": native.ABI_VERSION,
    "WAN_ATTN_MAX_NDIM": native.MAX_NDIM,
    **{f"WAN_ATTN_{name}": getattr(native, name) for name in (
        "OK", "INVALID_ARGUMENT", "UNSUPPORTED", "DEVICE_ERROR", "INTERNAL",
        "EXACT", "QK8", "PROOF_MISSING", "PROOF_PASSED", "PROOF_FAILED",
        "F32", "F16", "BF16", "I32", "I64", "F64", "DTYPE_OTHER", "CPU", "CUDA", "DEVICE_OTHER",
    )},
    "WAN_ATTN_CPU_KNOWN": native.CPU_KNOWN,
}  # fmt: skip

C_DIALECTS = ["c99", "c11", "c17", "c++17"]
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libpthread|libgcc_s|ld-linux[\w-]*)\.so\.\d+")

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def tool(name: str, *arguments: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    done = subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name} {arguments}:\n{done.stderr}"
    return done.stdout


def compiler() -> str:
    names = [os.environ.get("CC", "cc").split()[0], "gcc", "clang"]
    found = next((name for name in names if shutil.which(name)), None)
    if found is None or sys.platform == "win32":
        pytest.skip("no C compiler with gcc's options here")
    return found


def abi() -> tuple[set[str], dict[str, int]]:
    """tests/abi.txt as (exported functions, sizes and offsets)."""
    lines = (ROOT / "tests/abi.txt").read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    return {w[0] for w in words if len(w) == 1}, {w[0]: int(w[1]) for w in words if len(w) == 2}


def symbols(library: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) as nm prints them, without symbol versions."""
    listed = tool("nm", "-D", *options, library).splitlines()
    return [(w[-2], w[-1].split("@")[0]) for w in (line.split() for line in listed)]


def needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", tool("readelf", "-d", library))


@linux_only
def test_the_library_exports_its_functions_and_nothing_else() -> None:
    exported = {name for _, name in symbols(native.lib_path(), "--defined-only")}
    assert exported == abi()[0]


def test_python_declares_every_exported_function() -> None:
    assert set(native._FUNCTIONS) == abi()[0]


@linux_only
def test_the_library_needs_the_c_library_only() -> None:
    assert [n for n in needed(native.lib_path()) if not SYSTEM_LIBRARIES.fullmatch(n)] == []


@linux_only
def test_the_shim_exports_its_functions_and_nothing_else() -> None:
    exported = {name for _, name in symbols(shim.path(), "--defined-only")}
    assert exported == set(shim.EXPORTED)


@linux_only
def test_the_shim_needs_neither_torch_nor_cpp_nor_python_to_load() -> None:
    assert [n for n in needed(shim.path()) if not SYSTEM_LIBRARIES.fullmatch(n)] == []
    undefined = {name for _, name in symbols(shim.path(), "--undefined-only")}
    assert [name for name in undefined if re.match(r"_Z|Py|aoti_|torch_|wan_attn_", name)] == []


@linux_only
def test_exceptions_can_pass_through_the_shim() -> None:
    """Without unwind tables for its frames the first error would end the process."""
    section = re.search(r"\.eh_frame +\S+ +\S+ \S+ (\S+)", tool("readelf", "-SW", shim.path()))
    assert section and int(section[1], 16) > 100, "4 bytes are the end of an empty table"


@linux_only
@pytest.mark.parametrize("library", [native.lib_path, shim.path], ids=["libwan_attn", "shim"])
def test_no_folder_of_the_building_machine_is_linked_in(
    library: Callable[[], Path],
) -> None:
    assert "PATH" not in tool("readelf", "-d", library())


@pytest.mark.parametrize("dialect", C_DIALECTS)
def test_the_header_compiles_alone(dialect: str, tmp_path: Path) -> None:
    source = tmp_path / "alone.c"
    source.write_text('#include "wan_attn.h"\n#include "wan_attn.h"\n')
    tool(
        compiler(),
        *("-x", "c++" if dialect.startswith("c++") else "c", f"-std={dialect}"),
        *("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-fsyntax-only"),
        *(f"-I{ROOT / 'csrc'}", source),
    )


@pytest.mark.parametrize("flag", ("-ffast-math", "-ffinite-math-only"))
def test_fast_math_is_refused(flag: str) -> None:
    """Results would be wrong by 0.1, and the process would lose its subnormal numbers."""
    source = ROOT / "csrc/core/check.c"
    command = [compiler(), "-std=c11", "-fsyntax-only", f"-I{ROOT / 'csrc'}", str(source)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    done = subprocess.run([*command, flag], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "must be built without -ffast-math" in done.stderr


def layout() -> dict[str, int]:
    """Sizes and offsets as ctypes sees them."""
    found = {}
    for name, struct in STRUCTS.items():
        found[name] = ctypes.sizeof(struct)
        for field, _ in ((f[0], f[1]) for f in struct._fields_):
            found[f"{name}.{field}"] = getattr(struct, field).offset
    return found


def test_ctypes_agrees_with_the_c_header(tmp_path: Path) -> None:
    """Compiles a program of nothing but assertions, one for every size, offset and number."""
    lines = ['#include "wan_attn.h"']
    for name, value in layout().items():
        struct, _, field = name.partition(".")
        c_value = f"offsetof({struct}, {field})" if field else f"sizeof({struct})"
        lines.append(f'_Static_assert({c_value} == {value}, "{name}");')
    # Features have their names from C; this says that each is the bit of its own macro.
    features = {f"WAN_ATTN_CPU_{n.upper()}": 1 << bit for n, bit in native.cpu_features().items()}
    assert features
    for name, value in (NUMBERS | features).items():
        lines.append(f'_Static_assert({name} == {value}u, "{name}");')
    source = tmp_path / "layout.c"
    source.write_text("\n".join(lines) + "\n")
    tool(compiler(), "-std=c11", "-fsyntax-only", f"-I{ROOT / 'csrc'}", source)


def test_ctypes_mirrors_every_field(tmp_path: Path) -> None:
    """A field that only the header has would hide in padding or behind the end."""
    header = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc/wan_attn.h").read_text(), flags=re.DOTALL)
    for name, struct in STRUCTS.items():
        body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", header, re.DOTALL)
        assert body, name
        declared = re.findall(r"(\w+)\s*(?:\[\w+\])?\s*[,;]", body[1])
        assert declared == [field[0] for field in struct._fields_], name


def test_every_number_of_the_header_is_mirrored() -> None:
    header = (ROOT / "csrc/wan_attn.h").read_text()
    names = set(re.findall(r"^    (WAN_ATTN_\w+) = ", header, re.MULTILINE))
    names |= set(re.findall(r"^#define (WAN_ATTN_(?:CPU|MAX|ABI)_\w+) ", header, re.MULTILINE))
    assert names | set(re.findall(r"(WAN_ATTN_(?:CPU|CUDA|DEVICE_OTHER)) =", header)) == set(
        NUMBERS
    )


@pytest.mark.skipif(ctypes.sizeof(ctypes.c_void_p) != 8, reason="abi.txt is for 64-bit machines")
def test_the_layout_is_the_recorded_one() -> None:
    assert layout() == abi()[1], "see the docstring of this file before you change tests/abi.txt"
