# SPDX-License-Identifier: Apache-2.0
"""test_architecture.py - the rules that a program can check; csrc/README.md has their reasons.

Each test is one rule over all files, and reports every file that breaks it. Nothing of wan_attn is
imported: these rules are part of `make check-fast`. Rules of names: test_house_words.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from source_tree import (
    c_code,
    c_includes,
    c_sources,
    circle,
    expect_none,
    files,
    import_graph,
    package_sources,
    python_imports,
    python_nodes,
    read,
    sources,
)

MAX_LINES, MAX_FUNCTION_LINES, MAX_COLUMNS = 500, 60, 100

C_LIBRARY = [f"<{h}.h>" for h in "float limits math stdarg stddef stdint stdio string".split()]

# Which file may include what. The first pattern that fits decides; a file that fits none is an
# error, so that a new folder cannot come without its rule.
MAY_INCLUDE: dict[str, list[str]] = {
    "csrc/wan_attn.h": ["<stddef.h>", "<stdint.h>"],
    "csrc/core/atomic.h": ["<stdint.h>", "<stdatomic.h>", "<intrin.h>"],
    "csrc/core/cpuid.c": ["core/*.h", "<cpuid.h>", "<immintrin.h>", "<intrin.h>"],
    "csrc/core/platform.h": [
        *("<windows.h>", "<process.h>", "<dlfcn.h>", "<pthread.h>"),
        *("<stddef.h>", "<stdio.h>", "<string.h>"),
    ],
    "csrc/core/kernels.def": ["cuda/sdpa_rows.def"],
    "csrc/core/rope_rows.def": [],
    "csrc/core/backward_rows.def": ["cuda/sdpa_rows.def"],
    "csrc/core/*": [
        *("wan_attn.h", "core/*.h", "core/kernels.def", "core/*_rows.def"),
        *C_LIBRARY,
    ],
    "csrc/cpu/threads.c": [
        "cpu/threads.h",
        "core/atomic.h",
        "core/platform.h",
    ],
    "csrc/cpu/lost.h": ["core/atomic.h", "core/kernel.h", "cpu/half.h"],
    "csrc/cpu/large_pages.c": ["cpu/large_pages.h", "<sys/mman.h>"],
    "csrc/cpu/*.[ch]": [
        *("wan_attn.h", "core/kernel.h", "core/backward.h", "core/lists.h"),
        *("core/rope.h", "core/util.h"),
        *("cpu/*.h", "cpu/*.inc"),
        *("<immintrin.h>", "<arm_neon.h>"),
        *C_LIBRARY,
    ],
    "csrc/cpu/row.inc": ["cpu/sdpa_*.inc", "cpu/squares.inc", "cpu/product.inc"],
    "csrc/cpu/*.inc": [],  # a body for files that include what it needs
    "csrc/cuda/host/*.[ch]": [
        *(
            "core/kernel.h",
            "core/lists.h",
            "core/rope.h",
            "core/backward.h",
            "core/util.h",
            "core/platform.h",
            "core/atomic.h",
            "cuda/host/*.h",
            "cuda/args*.h",
            "cuda/sdpa_rows.def",
        ),
        *C_LIBRARY,
    ],
    # No system header anywhere else in csrc/cuda: nvcc, NVRTC and the emulator take the same text.
    "csrc/cuda/args.h": [],
    "csrc/cuda/args_sm90.h": ["cuda/args.h"],
    "csrc/cuda/args_rope.h": ["cuda/args.h"],
    "csrc/cuda/args_qk8.h": ["cuda/args.h"],
    "csrc/cuda/args_guard.h": ["cuda/args.h"],
    "csrc/cuda/args_backward.h": ["cuda/args.h"],
    "csrc/cuda/args_lists.h": ["cuda/args.h"],
    "csrc/cuda/sdpa_rows.def": [],
    "csrc/cuda/ptx/ptx*.cuh": ["cuda/ptx/*.cuh", "emu/*.h"],
    "csrc/cuda/ptx/*.cuh": [],
    "csrc/cuda/tile/*.cuh": ["cuda/args*.h", "cuda/ptx/ptx*.cuh", "cuda/tile/*.cuh"],
    "csrc/cuda/*.cuh": ["cuda/args*.h", "cuda/ptx/ptx*.cuh", "cuda/tile/*.cuh"],
    "csrc/torch/*": ["wan_attn.h", "torch/torch_abi.h", "<stdbool.h>", *C_LIBRARY],
}

# From the bottom up: a module may import its own layer and those below. "" is the package itself.
PYTHON_LAYERS = [
    {"version", "transient", "workloads", "console"},
    {"config", "store"},
    {"request"},
    {"log", "merge"},
    {"cuda"},
    {"native", "selfcheck"},
    {"backends"},
    {"tuning"},
    {"observe"},
    {"precision"},
    {"sparse"},
    {"selection"},
    {"attention"},
    {"signatures"},
    {"integrations"},
    {""},
    {"doctor"},
    {"bench"},
    {"demo", "check"},
    {"cli"},
    {"__main__"},
]
MAX_TOP_MODULES = 10

# Who may import something that is neither torch's, Python's nor ours when it is imported itself.
MAY_NEED = {"wan_attn/demo/*.py": {"PIL", "diffusers", "imageio", "numpy", "tqdm"}}

BANNED_IN_C = re.compile(
    r"\b(exit|_exit|quick_exit|abort|printf|fprintf|vprintf|puts|putchar|fputs|perror|assert"
    r"|malloc|calloc|realloc|free|alloca|getenv|setenv|putenv|system|longjmp|setlocale)\s*\("
    r"|\berrno\b|\b_Thread_local\b|\bthread_local\b|\bgoto\b|#\s*pragma\s+omp"
)


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


def room_of(module: str) -> str:
    """wan_attn.<room> of wan_attn.<room>.anything; the package itself is a room of its own."""
    return ".".join(module.split(".")[:2])


def layer_of(module: str) -> int | None:
    """The place of a module's room in PYTHON_LAYERS."""
    name = room_of(module).partition(".")[2]
    return next((i for i, layer in enumerate(PYTHON_LAYERS) if name in layer), None)


def test_python_imports_go_downward() -> None:
    def problems() -> Iterator[str]:
        for module, imported in import_graph("wan_attn").items():
            own = layer_of(module)
            if own is None:
                yield f"{module}: PYTHON_LAYERS does not have it"
                continue
            for other in sorted(imported):
                theirs = layer_of(other)
                if theirs is None or theirs > own:
                    yield f"{module} may not import {other}: it is not below"

    expect_none(problems())


def test_imports_have_no_circle() -> None:
    """Neither among modules nor among rooms; imports inside functions count."""
    modules = import_graph("wan_attn")
    rooms: dict[str, set[str]] = {}
    for module, imported in modules.items():
        wanted = {room_of(m) for m in imported}
        rooms.setdefault(room_of(module), set()).update(wanted - {room_of(module)})
    expect_none(" -> ".join(c) for graph in (modules, rooms) if (c := circle(graph)))


def test_nothing_imports_the_command_line() -> None:
    """__main__.py names its modules as strings, and imports the one that is asked for."""

    def problems() -> Iterator[str]:
        for module, imported in import_graph("wan_attn").items():
            for other in imported:
                if room_of(other) in {"wan_attn.cli", "wan_attn.__main__"} - {room_of(module)}:
                    if module != "wan_attn.__main__":
                        yield f"{module} imports {other}"

    expect_none(problems())


def test_the_top_of_the_package_is_small() -> None:
    top = {f.name for f in package_sources() if len(f.parts) == 2}
    assert len(top) <= MAX_TOP_MODULES, f"{len(top)}: {sorted(top)}"


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
            for node in python_nodes(file):
                used: set[str] = set()
                if isinstance(node, ast.ImportFrom) and node.module == "os":
                    used = {alias.name for alias in node.names}
                elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
                    used = {node.attr}
                if used & names:
                    yield f"{file}:{getattr(node, 'lineno', 0)} uses os.{(used & names).pop()}"

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
    for node in python_nodes(file):
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
    # An op returns tensors only: the shim keeps the row that a thread ran for that thread.
    allowed = {("shim.c", "_Thread_local")}
    found = (
        (file, match[0]) for file in c_sources() for match in BANNED_IN_C.finditer(c_code(file))
    )
    expect_none(f"{file}: {word}" for file, word in found if (file.name, word) not in allowed)


# Where systems may be told apart: behind one header, and in files that are whole for one system.
MAY_KNOW_THE_SYSTEM = {
    "csrc/wan_attn.h",  # what a library exports
    "csrc/core/platform.h",
    "csrc/cpu/amx_permission.c",
    "csrc/cpu/large_pages.c",
}


def test_systems_differ_behind_one_header() -> None:
    system = re.compile(r"\b(_WIN32|_WIN64|__linux__|__APPLE__|__MINGW32__|__unix__)\b")
    found = ((file, system.search(c_code(file))) for file in c_sources())
    expect_none(
        f"{file}: {match[0]}"
        for file, match in found
        if match and file.as_posix() not in MAY_KNOW_THE_SYSTEM
    )


def cuda_driver_functions() -> dict[str, tuple[str, list[str]]]:
    """field of wan_attn_cuda_driver -> (CUDA's name, parameters), from the list in driver.h."""
    text = read(Path("csrc/cuda/host/driver.h")).replace("\\\n", " ")
    listed = re.findall(r'\bX\((\w+), "(\w+)",\s*\(([^()]*)\)\)', text)
    return {field: (name, parameters.split(",")) for field, name, parameters in listed}


def call_arguments(code: str, start: int) -> list[str]:
    """The arguments of the C call whose `(` is the character before `start`."""
    arguments, depth = [""], 0
    for character in code[start:]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if depth < 0:
            break
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return [argument.strip() for argument in arguments]


def test_cuda_work_goes_to_the_callers_stream() -> None:
    """The driver is called through its table alone: what takes a stream gets the caller's, and
    nothing is in the table that waits, allocates or works on a stream of its own choice."""
    functions = cuda_driver_functions()
    assert functions["launch"][0] == "cuLaunchKernel", "the list in driver.h cannot be read"

    def problems() -> Iterator[str]:
        for field, (name, parameters) in functions.items():
            if re.match(r"cu(Mem|Launch|.*Synchronize|Stream|Event)", name):
                if not any("wan_attn_cu_stream" in p for p in parameters):
                    yield f"driver.h: {name} ({field}) takes no stream"
        for file in sources("csrc/cuda/host/*.[ch]"):
            code = c_code(file)
            for call in re.finditer(r"(?:->|\.)(\w+)\(", code):
                _, parameters = functions.get(call[1], ("", []))
                given = call_arguments(code, call.end())
                for parameter, argument in zip(parameters, given, strict=False):
                    if "wan_attn_cu_stream" in parameter and not argument.endswith("->stream"):
                        yield f"{file}: {call[1]} gets {argument}, not the caller's stream"

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
    private = re.compile(r"(?<![\w.<])/(work|farm|root)/|[.]pyenv/versions/\d")
    texts = [f for f in files() if f.suffix not in (".png", ".gif", ".mp4", ".jpg")]
    found = ((file, private.search(read(file))) for file in texts)
    expect_none(f"{file}: {match[0]}" for file, match in found if match)
