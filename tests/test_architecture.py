# SPDX-License-Identifier: Apache-2.0
"""test_architecture.py - the rules that a program can check; csrc/README.md has their reasons.

Each test is one rule over all files, and reports every file that breaks it.
"""

from __future__ import annotations

import ast
import platform
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import readme_tables as tables

import wan_attn.native.op
from source_tree import (
    c_code,
    c_includes,
    files,
    module_name,
    python_imports,
    python_strings,
    read,
    sources,
)

MAX_LINES, MAX_FUNCTION_LINES, MAX_COLUMNS = 500, 60, 100

C_LIBRARY = [f"<{h}.h>" for h in "float limits math stdarg stddef stdint stdio string".split()]
CPP_LIBRARY = [f"<{h}>" for h in "array cstdint optional stdexcept string tuple vector".split()]

# Which file may include what. The first pattern that fits decides; a file that fits none is an
# error, so that a new folder cannot come without its rule.
MAY_INCLUDE: dict[str, list[str]] = {
    "csrc/wan_attn.h": ["<stddef.h>", "<stdint.h>"],
    "csrc/core/atomic.h": ["<stdint.h>", "<stdatomic.h>", "<intrin.h>"],
    "csrc/core/cpuid.c": ["core/*.h", "<cpuid.h>", "<immintrin.h>", "<intrin.h>"],
    "csrc/core/lock.h": ["<pthread.h>", "<windows.h>"],
    "csrc/core/kernels.def": ["cuda/sdpa_rows.def"],
    "csrc/core/*": ["wan_attn.h", "core/*.h", "core/kernels.def", *C_LIBRARY],
    "csrc/cpu/threads.c": [
        "cpu/threads.h",
        "core/atomic.h",
        *("<pthread.h>", "<process.h>", "<windows.h>"),
    ],
    "csrc/cpu/large_pages.c": ["cpu/large_pages.h", "<sys/mman.h>"],
    "csrc/cpu/*.[ch]": [
        *("wan_attn.h", "core/kernel.h", "core/util.h", "cpu/*.h", "cpu/*.inc"),
        *("<immintrin.h>", "<arm_neon.h>"),
        *C_LIBRARY,
    ],
    "csrc/cpu/row.inc": ["cpu/sdpa_*.inc"],
    "csrc/cpu/*.inc": [],  # a body for files that include what it needs
    "csrc/cuda/host/driver.c": [
        *("cuda/host/*.h", "core/lock.h", "<dlfcn.h>", "<windows.h>"),
        *C_LIBRARY,
    ],
    "csrc/cuda/host/*.[ch]": [
        *(
            "core/kernel.h",
            "core/util.h",
            "core/lock.h",
            "cuda/host/*.h",
            "cuda/args*.h",
            "cuda/sdpa_rows.def",
        ),
        *C_LIBRARY,
    ],
    # No system header anywhere else in csrc/cuda: nvcc, NVRTC and the emulator take the same text.
    "csrc/cuda/args.h": [],
    "csrc/cuda/args_sm90.h": ["cuda/args.h"],
    "csrc/cuda/sdpa_rows.def": [],
    "csrc/cuda/ptx/ptx*.cuh": ["cuda/ptx/*.cuh", "emu/*.h"],
    "csrc/cuda/ptx/*.cuh": [],
    "csrc/cuda/tile/*.cuh": ["cuda/args.h", "cuda/ptx/ptx*.cuh", "cuda/tile/*.cuh"],
    "csrc/cuda/*.cuh": ["cuda/args*.h", "cuda/ptx/ptx*.cuh", "cuda/tile/*.cuh"],
    "csrc/torch/shim.cpp": [
        *("wan_attn.h", "<torch/csrc/stable/*>", "<torch/headeronly/*>"),
        *CPP_LIBRARY,
    ],
}

# From the bottom up: a module may import its own layer and those below.
PYTHON_LAYERS = [
    {"version", "workloads", "console"},
    {"config"},
    {"request"},
    {"log", "merge"},
    {"cuda"},
    {"native", "selfcheck"},
    {"backends"},
    {"selection"},
    {"attention"},
    {"signatures"},
    {"integrations"},
    {"doctor"},
    {"", "__main__", "bench", "cli", "demo"},
]
# Without libwan_attn the op is computed by the torch backend, which is above it.
UPWARD = {
    ("wan_attn.native.op", "wan_attn.backends.torch_sdpa"),
    ("wan_attn.selection.profile", "wan_attn.bench"),  # at exit, for the summary
    ("wan_attn.selection.profile", "wan_attn.bench.profile"),
    ("wan_attn.request", "wan_attn.contract"),
}

# Who may import something that is neither torch's, Python's nor ours when it is imported itself.
MAY_NEED = {"wan_attn/demo/*.py": {"PIL", "diffusers", "imageio", "numpy", "tqdm"}}

# Other people's words for what wan_attn.h names otherwise.
SYNONYMS = {
    "seqlen_q, seqlen_k": "Lq Lk L_q L_k qo_len kv_len len_kv seq_len_q seq_len_k N_CTX",
    "seqused_q, seqused_k": "q_lens k_lens kv_lens q_len k_len actual_seqlen",
    "num_heads_q, num_heads_k": "nheads n_heads nh num_kv_heads num_qo_heads",
    "head_dim": "hdim headdim head_size",
    "softmax_scale": "sm_scale inv_temperature",
    "is_causal, window_size_left, window_size_right": "causal local is_local",
    "lse, row_max, row_sum": "softmax_lse logsumexp rowmax rowsum m_i l_i",
    "BLOCK_M, BLOCK_N, STAGES": "kBlockM kBlockN CTA_Q CTA_K Br Bc BLOCK_Q BLOCK_KV NUM_STAGES",
}

BANNED_IN_C = re.compile(
    r"\b(exit|_exit|quick_exit|abort|printf|fprintf|vprintf|puts|putchar|fputs|perror|assert"
    r"|malloc|calloc|realloc|free|alloca|getenv|setenv|putenv|system|longjmp|setlocale)\s*\("
    r"|\berrno\b|\b_Thread_local\b|\bthread_local\b|\bgoto\b|#\s*pragma\s+omp"
)

KERNEL_NAME = re.compile(
    r"sdpa_(?:ref|avx2|avx512|avx512_bf16|amx|neon|(?:qk8_)?sm\d+)"  # instruction set
    r"(?:_[a-z][a-z0-9]*)*?"  # variant
    r"(?:_d(?P<head_dim>\d+))?"
)


def expect_none(problems: Iterator[str]) -> None:
    found = list(problems)
    assert not found, "\n" + "\n".join(found)


def c_sources() -> list[Path]:
    return [f for f in sources() if f.parts[0] == "csrc"]


def package_sources() -> list[Path]:
    return [f for f in sources() if f.parts[0] == "wan_attn"]


def test_c_includes_stay_within_their_layer() -> None:
    def problems() -> Iterator[str]:
        for file in c_sources():
            allowed = next((a for p, a in MAY_INCLUDE.items() if fnmatch(file.as_posix(), p)), None)
            if allowed is None:
                yield f"{file}: MAY_INCLUDE has no rule for it"
            for header in c_includes(file):
                if not any(fnmatch(header, pattern) for pattern in allowed or []):
                    yield f"{file} may not include {header}"

    expect_none(problems())


def layer_of(module: str) -> int | None:
    """The place of wan_attn.<module>... in PYTHON_LAYERS; names of the package itself are in the
    topmost."""
    name = module.split(".")[1] if "." in module else ""
    return next((i for i, layer in enumerate(PYTHON_LAYERS) if name in layer), None)


def test_python_imports_go_downward() -> None:
    def problems() -> Iterator[str]:
        for file in package_sources():
            module = module_name(file)
            own = layer_of(module)
            if own is None:
                yield f"{file}: PYTHON_LAYERS does not have it"
                continue
            for imported, _ in python_imports(file):
                if imported.split(".")[0] != "wan_attn" or (module, imported) in UPWARD:
                    continue
                theirs = layer_of(imported)
                if theirs is None or theirs > own:
                    yield f"{file} may not import {imported}: it is not below"

    expect_none(problems())


def test_importing_needs_nothing_but_torch() -> None:
    def problems() -> Iterator[str]:
        for file in package_sources():
            allowed = {n for p, names in MAY_NEED.items() if file.match(p) for n in names}
            for imported, at_import in python_imports(file):
                top = imported.split(".")[0]
                if re.match(r"flash_attn", top) and file.parts[1] != "backends":
                    yield f"{file}: {imported} is the business of backends/"
                if not at_import or top in {"torch", "wan_attn"} | allowed:
                    continue
                if top not in sys.stdlib_module_names:
                    yield f"{file} imports {imported} when it is imported"

    expect_none(problems())


def test_only_config_reads_the_environment() -> None:
    names = {"environ", "environb", "getenv", "putenv"}

    def problems() -> Iterator[str]:
        for file in package_sources():
            if file.name == "config.py":
                continue
            for node in ast.walk(ast.parse(read(file))):
                used: set[str] = set()
                if isinstance(node, ast.ImportFrom) and node.module == "os":
                    used = {alias.name for alias in node.names}
                elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
                    used = {node.attr}
                if used & names:
                    yield f"{file}:{node.lineno} uses os.{(used & names).pop()}"

    expect_none(problems())


def test_files_are_short() -> None:
    lengths = {file: len(read(file).splitlines()) for file in sources()}
    expect_none(f"{file} has {n} lines" for file, n in lengths.items() if n > MAX_LINES)


def test_lines_are_narrow() -> None:
    def problems() -> Iterator[str]:
        for file in sources():
            if file.suffix in (".py", ".def"):
                continue  # ruff's; a table that is laid out by hand
            for number, line in enumerate(read(file).splitlines(), 1):
                if len(line) > MAX_COLUMNS and not line.endswith("\\"):
                    yield f"{file}:{number} has {len(line)} columns"

    expect_none(problems())


def python_functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """(name, line, lines without the docstring)"""
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node, clean=False) or "").count("\n") + 1
            yield node.name, node.lineno, (node.end_lineno or 0) - node.lineno + 1 - docstring


def c_functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """In the house's format the first line ends in `) {`, the last is a `}` at the margin."""
    name, first = "", 0
    for number, line in enumerate(c_code(file).splitlines(), 1):
        if not first and re.match(r"(\w|\s{5,}\w).*\) \{$", line):
            name, first = line, number
        elif first and line == "}":
            yield name, first, number - first + 1
            first = 0


def test_functions_are_short() -> None:
    def problems() -> Iterator[str]:
        for file in [*c_sources(), *package_sources()]:
            functions = python_functions(file) if file.suffix == ".py" else c_functions(file)
            for name, line, length in functions:
                if length > MAX_FUNCTION_LINES:
                    yield f"{file}:{line} {name.strip()} has {length} lines"

    expect_none(problems())


def test_c_prints_allocates_and_ends_nothing() -> None:
    found = ((file, BANNED_IN_C.search(c_code(file))) for file in c_sources())
    expect_none(f"{file}: {match[0]}" for file, match in found if match)


def test_c_uses_the_words_of_the_house() -> None:
    def problems() -> Iterator[str]:
        for file in c_sources():
            if file.parts[1] == "torch":
                continue  # the op's arguments carry the names that users of Wan2.2 know
            words = set(re.findall(r"[A-Za-z_]\w*", c_code(file)))
            for ours, theirs in SYNONYMS.items():
                for word in words & set(theirs.split()):
                    yield f"{file}: {word}; the house says {ours}"
            for word in words:
                if re.fullmatch(r"[a-z]{2,}[A-Z]\w*", word):
                    yield f"{file}: {word} is not snake_case"
                if word.startswith("wan_attn_") and word.endswith("_t"):
                    yield f"{file}: {word} ends in _t, which is POSIX's"

    expect_none(problems())


def test_nothing_is_left_unfinished() -> None:
    words = ["TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"]
    marks = re.compile(rf"\b({'|'.join(words)})\b")
    found = ((file, marks.search(read(file))) for file in sources())
    expect_none(f"{file}: {match[0]}" for file, match in found if match)


def test_the_licence_is_named_in_the_first_line() -> None:
    line = "SPDX-License-Identifier: Apache-2.0"
    scripts = [f for f in files() if f.name == "Makefile" or (f.parts[0] == ".ci" and not f.suffix)]
    heads = {f: read(f).splitlines()[:2] for f in [*sources(), *scripts]}  # 2: #! goes first
    expect_none(f"{f}" for f, head in heads.items() if line not in "".join(head))


def test_no_paths_of_one_machine() -> None:
    private = re.compile(r"(?<![\w.<])/(work|farm|root)/|[.]pyenv")
    texts = [f for f in files() if f.suffix not in (".png", ".gif", ".mp4", ".jpg")]
    found = ((file, private.search(read(file))) for file in texts)
    expect_none(f"{file}: {match[0]}" for file, match in found if match)


def test_kernel_names_follow_the_grammar() -> None:
    rows = wan_attn.native.op.kernels()
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        match = KERNEL_NAME.fullmatch(row.name)
        assert match, f"{row.name} must be sdpa_<isa>[_variant][_d<head_dim>]"
        if row.device == "cuda" or match["head_dim"]:
            assert match["head_dim"] == str(row.head_dim_max), row.name


def test_a_kernel_is_named_in_its_row_and_its_own_file() -> None:
    for row in wan_attn.native.op.kernels():
        name = re.compile(rf"\b(?:wan_attn_)?{row.name}\b")
        named = {f.as_posix() for f in c_sources() if name.search(c_code(f))}
        named |= {f.as_posix() for f in package_sources() if name.search(python_strings(f))}
        if row.device == "cuda":
            assert named == {"csrc/cuda/sdpa_rows.def"}, f"{row.name} is named in {named}"
            continue
        own = {f for f in named if Path(f).stem.startswith("sdpa_")}
        assert own, f"{row.name} has no file sdpa_*"
        assert named - own == {"csrc/core/kernels.def"}, f"{row.name} is named in {named}"


def test_the_tables_of_the_readme_are_current() -> None:
    if not wan_attn.native.op.kernels() or platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("README shows the kernels of x86-64, and this build has others")
    text = read(Path("README.md"))
    assert tables.up_to_date(text) == text, "run: make tables"
