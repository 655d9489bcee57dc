# SPDX-License-Identifier: Apache-2.0
"""check.py - what must be true of every wheel, without running it:

    PYTHONPATH=.ci python -m wheels.check [dist] [--again DIR]

Names, RECORD, manifest and contents; of each library: its machine, exports, what it needs, how it
is hardened. With --again the files of DIR, built a second time, must be the same bytes. auditwheel,
delvewheel and twine have their say, too. Prints one line a file; exit code 1 and the reasons.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lief
from wheels.targets import TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]
STEMS = ("wan_attn", "wan_attn_shim")
LIBRARY = {"linux": "lib{}.so", "win32": "{}.dll", "darwin": "lib{}.dylib"}

# What a library may load: the C library of every system, and nothing else.
SYSTEM_LIBRARIES = {
    "linux": r"(libc|libm|libpthread|libdl)\.so\.\d|ld-linux-(x86-64|aarch64)\.so\.\d",
    "win32": r"KERNEL32\.dll|api-ms-win-crt-\w+-l1-1-0\.dll",
    "darwin": r"/usr/lib/libSystem\.B\.dylib",
}
MACHINES = {
    "x86_64": ("X86_64", "CPU_TYPE.X86_64"),
    "aarch64": ("AARCH64",),
    "amd64": ("AMD64",),
    "arm64": ("ARM64", "CPU_TYPE.ARM64"),
}
# zig's linker for macOS exports these two names of its own with every library.
LINKERS_OWN = {"__mh_dylib_header", "___dso_handle"}
NEWEST_GLIBC = (2, 17)
# IMAGE_DLLCHARACTERISTICS_...: any address of 64 bits is right, and data is never run
PE_HARDENED = {"HIGH_ENTROPY_VA": 0x20, "DYNAMIC_BASE": 0x40, "NX_COMPAT": 0x100}


def exported(stem: str) -> set[str]:
    """What this library must export: tests/abi.txt, or the shim's own declarations."""
    if stem == "wan_attn":
        lines = (ROOT / "tests/abi.txt").read_text("utf-8").splitlines()
        return {line for line in lines if re.fullmatch(r"\w+", line)}
    source = (ROOT / "csrc/torch/shim.c").read_text("utf-8")
    return set(re.findall(r"^WAN_ATTN_API .*?(wan_attn_shim_\w+)\(", source, re.MULTILINE))


def plain(name: object) -> str:
    """The last part of one of lief's names."""
    return str(name).rpartition(".")[2]


def elf_problems(library: Any, target: Target, stem: str) -> Iterator[str]:
    """Of a library for Linux."""
    tags = {plain(entry.tag): entry for entry in library.dynamic_entries}
    for tag in ("RPATH", "RUNPATH", "TEXTREL"):
        if tag in tags:
            yield f"has {tag}"
    segments = {plain(segment.type): segment for segment in library.segments}
    if "GNU_RELRO" not in segments or "NOW" not in str(tags.get("FLAGS_1")):
        yield "its tables of addresses stay writable (no full RELRO)"
    stack = segments.get("GNU_STACK")
    if stack is None or int(stack.flags) & 1:
        yield "its stack is executable"
    versions = {
        tuple(map(int, version.name.removeprefix("GLIBC_").split(".")))
        for needed in library.symbols_version_requirement
        for version in needed.get_auxiliary_symbols()
    }
    if max(versions, default=(0,)) > (*NEWEST_GLIBC, 99):
        yield f"needs glibc {max(versions)}, newer than {NEWEST_GLIBC}"
    frames = library.get_section(".eh_frame")
    if stem == "wan_attn_shim" and (frames is None or frames.size < 100):
        yield "has no unwind tables: torch's errors cannot pass through"
    if "GNU_PROPERTY" not in segments:
        yield f"has no note of guarded jumps for {target.machine}"


def pe_problems(library: Any, target: Target, stem: str) -> Iterator[str]:
    """Of a library for Windows."""
    flags = library.optional_header.dll_characteristics
    for name, bit in PE_HARDENED.items():
        if not flags & bit:
            yield f"lacks {name}"
    if library.has_debug:
        yield "has debug information, which names folders"
    if stem == "wan_attn_shim" and not library.has_exceptions:
        yield "has no unwind tables: torch's errors cannot pass through"


def macho_problems(library: Any, target: Target, stem: str) -> Iterator[str]:
    """Of a library for macOS."""
    if library.has_rpath:
        yield "has an RPATH"
    oldest = [int(n) for n in re.findall(r"\d+", target.platform)[:2]]
    if list(library.build_version.minos)[:2] != oldest:
        yield f"is for macOS {library.build_version.minos}, not {oldest}"
    if target.machine == "arm64" and not library.has_code_signature:
        yield "is not signed, and arm64 loads nothing that is not"
    (own,) = (c.name for c in library.commands if plain(c.command) == "ID_DYLIB")
    if own != f"@rpath/lib{stem}.dylib":
        yield f"calls itself {own}"


def needed(library: Any) -> Iterator[str]:
    for entry in library.libraries:
        if isinstance(entry, str):
            yield entry
        elif plain(entry.command) != "ID_DYLIB":
            yield entry.name


def library_problems(data: bytes, target: Target, stem: str) -> Iterator[str]:
    """What is wrong with one library of a wheel."""
    library: Any = lief.parse(data)
    if isinstance(library, lief.MachO.FatBinary):
        library = library.at(0)
    header = library.header
    machine = next(
        plain(getattr(header, n))
        for n in ("machine_type", "machine", "cpu_type")
        if hasattr(header, n)
    )
    if machine not in {plain(name) for name in MACHINES[target.machine]}:
        yield f"is for {machine}"
    names = {function.name for function in library.exported_functions} - LINKERS_OWN
    if target.system == "darwin":
        names = {name.removeprefix("_") for name in names}
    if names != exported(stem):
        yield f"exports differ from what is declared: {sorted(names ^ exported(stem))}"
    for name in needed(library):
        if not re.fullmatch(SYSTEM_LIBRARIES[target.system], name):
            yield f"needs {name}"
    rules = {"linux": elf_problems, "win32": pe_problems, "darwin": macho_problems}
    yield from rules[target.system](library, target, stem)


def record_problems(files: dict[str, bytes]) -> Iterator[str]:
    """RECORD lists every file with its hash, and nothing else."""
    (name,) = (n for n in files if n.endswith(".dist-info/RECORD"))
    listed = {row[0]: row[1] for row in csv.reader(files[name].decode().splitlines())}
    for missing in sorted(listed.keys() ^ files.keys()):
        yield f"{missing} is in the wheel or in RECORD, but not in both"
    for file, told in listed.items():
        digest = hashlib.sha256(files.get(file, b"")).digest()
        real = "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("=")
        if told and told != real:
            yield f"{file} is not what RECORD says"


def content_problems(files: dict[str, bytes], target: Target) -> Iterator[str]:
    """Each wheel is whole: what its platform can use is there."""
    record = json.loads(files["wan_attn/build_record.json"])
    cubins = [name for name in files if name.startswith("wan_attn/cuda/cubin/")]
    if record["platform"] != target.platform or len(cubins) != record["cubins"]:
        yield f"has {len(cubins)} kernels, its record says {record['cubins']}, {record['platform']}"
    if bool(cubins) != target.has_cuda:
        yield f"has {len(cubins)} ready CUDA kernels"
    if any("-sm_87-" in name for name in cubins) != (target.machine == "aarch64"):
        yield "has machine code for Jetson Orin, or lacks it (what is compiled for cards is no use)"
    if bool(record["left_out"]) != (not target.triple):
        yield f"leaves out {record['left_out']}"
    if bool([n for n in files if n.endswith(".cuh")]) != target.has_cuda:
        yield "has no text of the CUDA kernels, or has one that is of no use"
    for name, told in record["files"].items():
        if hashlib.sha256(files.get(f"wan_attn/{name}", b"")).hexdigest() != told:
            yield f"{name} is not what its record says"
    stems = STEMS if target.triple else ()
    expected = {LIBRARY[target.system].format(stem) for stem in stems}
    here = {n.removeprefix("wan_attn/") for n in files if n.endswith((".so", ".dll", ".dylib"))}
    if here != expected or not expected <= record["files"].keys():
        yield f"has the libraries {sorted(here)}, not {sorted(expected)}"
    for stem in stems if here == expected else ():
        name = LIBRARY[target.system].format(stem)
        for problem in library_problems(files[f"wan_attn/{name}"], target, stem):
            yield f"{name} {problem}"


def wheel_problems(wheel: Path) -> Iterator[str]:
    """What is wrong with one wheel."""
    match = re.fullmatch(r"wan_attn-[\w.]+-py3-none-(\w+)\.whl", wheel.name)
    if match is None or match[1] not in TARGETS:
        yield "its name is not one of ours"
        return
    target = TARGETS[match[1]]
    with zipfile.ZipFile(wheel) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    (about,) = (data.decode() for name, data in files.items() if name.endswith("/WHEEL"))
    if f"\nTag: py3-none-{target.platform}\n" not in about:
        yield f"WHEEL says another tag: {about}"
    if ("Root-Is-Purelib: true" in about) != (not target.triple):
        yield "WHEEL says another kind"
    yield from record_problems(files)
    yield from content_problems(files, target)
    # Documents name folders of that kind as examples; what was compiled must not.
    for name, data in files.items():
        if not name.endswith((".py", ".md", "METADATA")) and str(ROOT).encode() in data:
            yield f"{name} names the folder in which it was built"
    if target.system == "linux":
        said = tool("auditwheel", "show", str(wheel))
        # A newer tag may stand there, too: it is enough that ours is fulfilled.
        if f'"{target.platform}"' not in said.replace("\n", " "):
            yield f"auditwheel: {said}"
    if target.system == "win32":
        # Without this option it looks at Python's own extensions alone, and we have none.
        said = tool("delvewheel", "show", "--analyze-existing", str(wheel))
        if "copied into the wheel.\n    None" not in said:
            yield f"delvewheel: {said}"


def tool(*words: str) -> str:
    """What a tool of this environment says; its failure is part of the text."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False
        )
    return done.stdout + (f"{done.stderr} exit code {done.returncode}" if done.returncode else "")


def folder_problems(dist: Path, files: Sequence[Path]) -> Iterator[str]:
    """The manifest, and whether an index would take the files."""
    listed = json.loads((dist / "manifest.json").read_text())["files"]
    real = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    if real != {name: entry["sha256"] for name, entry in listed.items()}:
        yield "manifest.json does not list these files with these hashes"
    said = tool("twine", "check", "--strict", *map(str, files))
    if "exit code" in said or said.count("PASSED") != len(files):
        yield f"twine: {said}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 and the reasons."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("dist", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument("--again", type=Path, metavar="DIR", help="what a second build has made")
    args = parser.parse_args(arguments)
    lief.logging.disable()
    dist = args.dist.resolve()
    files = sorted([*dist.glob("wan_attn-*.whl"), *dist.glob("wan_attn-*.tar.gz")])
    wrong = list(folder_problems(dist, files))
    for file in files:
        found = list(wheel_problems(file)) if file.suffix == ".whl" else []
        if args.again and (args.again / file.name).read_bytes() != file.read_bytes():
            found.append("a second build has made other bytes")
        print(f"   {file.name:66} {'PROBLEM' if found else 'ok'}", flush=True)
        wrong += [f"{file.name}: {problem}" for problem in found]
    print("\n".join(wrong) or f"   {len(files)} files, nothing wrong")
    return int(bool(wrong) or not files)


if __name__ == "__main__":
    raise SystemExit(main())
