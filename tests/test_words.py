# SPDX-License-Identifier: Apache-2.0
"""test_words.py - pages, messages and comments name only what exists.

Every option, command, make target, variable, file and Python name is looked up where it is made:
parsers, the Makefile, config.VARIABLES, git, the package itself. Names of other programs stand in
lists below, with their owner. An entry of these lists that is named nowhere is an error, too.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

import wan_attn.__main__
import words
from source_tree import c_code, expect_none, files, python_nodes, read, sources
from wan_attn import config, version
from wan_attn.bench import plots
from wan_attn.demo import options as demo_options
from words import C_SUFFIXES, Text

README = Path("README.md")
USERS = [README, *sorted(file for file in files() if file.parts[0] == "docs")]
QUICK_STARTS = [Path("docs/README.ko.md"), Path("docs/README.zh.md")]

# Options of other programs, by their owner.
EXTERNAL_OPTIONS = {
    "pip": "--no-build-isolation --force-reinstall --no-deps --editable --upgrade"
    " --no-index --find-links --only-binary --no-compile --no-binary --require-hashes --target"
    " --platform --python-version",
    "the dynamic linker": "--library-path --argv0",
    "venv": "--without-pip",
    "delvewheel": "--analyze-existing",
    "apt-get and dpkg-deb": "--yes --download-only --extract",
    "git": "--always --abbrev --dirty --exclude --detach",
    "setuptools' commands": "--build-base --bdist-dir --formats --inplace --quiet",
    "twine": "--strict",
    "xcode-select": "--install",
    "Wan2.2's generate.py": "--size --ckpt_dir --offload_model --convert_model_dtype --t5_cpu"
    " --base_seed --frame_num --sample_steps --save_file",
    "torchrun": "--nproc_per_node",
    "nvidia-smi": "--query-gpu --format --id",
    "compute-sanitizer": "--tool --error-exitcode",
    "NVRTC": "--gpu-architecture",
    "linkers": "--no-undefined",
    "argparse": "--help --version",
    "ComfyUI, from --use-...-attention on": "--use",
}
EXTERNAL_MODULES = {"pip", "venv", "pytest"}
# Variables of other programs, by their owner.
EXTERNAL_VARIABLES = {
    "CC CFLAGS LDFLAGS SOURCE_DATE_EPOCH": "compilers",
    "OMP_WAIT_POLICY": "OpenMP",
    "DIFFUSERS_ATTN_BACKEND": "diffusers",
    "CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_PATH": "CUDA",
    "FLASH_ATTN_2_AVAILABLE": "a name in Wan2.2's attention.py, not a variable",
    "COMFYUI_DIR FLASH_ATTN_DIR": "tests/integrations: checkouts of hosts",
    "INVALID_ARGUMENT": "a status, WAN_ATTN_INVALID_ARGUMENT",
}
# Files of other programs and of users, and of builds, by their owner.
EXTERNAL_FILES = {
    "Wan2.2": "generate.py requirements.txt prompt_extend.py face_blocks.py utils/prompt_extend.py"
    " wan/modules/attention.py wan/modules/model.py",
    "the user, as the recipe makes it": "requirements-wan.txt",
    "ComfyUI": "main.py comfy/ldm/modules/attention.py"
    " ComfyUI/custom_nodes/ComfyUI-wan-attn/__init__.py",
    "Wan2GP": "wgp.py shared/attention.py",
    "LightX2V": "template.py",
    "FlashAttention": "flash_attn/flash_attn_interface.py hopper/flash_attn_interface.py"
    " bert_padding.py tests/test_flash_attn.py",
    "SageAttention": "sageattention/core.py",
    "comfy-kitchen": "comfy_kitchen/sage_attention.py",
    "xFormers": "xformers/ops/fmha/__init__.py common.py attn_bias.py",
    "PyTorch": "aten/src/ATen/native/transformers/cuda/sdp_utils.cpp",
    "setuptools": "requires.txt entry_points.txt top_level.txt",
    "CPython": "Python.h",
    "CUDA": "cuda.h nvml.h",
    "an example in a docstring": "cuda/x.cuh",
    "wan_attn, as results": "kernels.md report.md",
    "builds": "wan_attn/build_record.json wan_attn/cuda/cubin wan_attn/*.so wan_attn/*.dll"
    " wan_attn/*.dylib manifest.json index.html",
    "linkers for Windows": "abi.def abi.lib",
    "tests that make them": "golden.ptx",
}


def owned(table: Iterable[str]) -> set[str]:
    return {name for names in table for name in names.split()}


@cache
def shown() -> tuple[Text, ...]:
    """What people read of the program, and all pages: not the tests' own strings."""
    other = words.texts("csrc", "benchmarks", ".ci", "setup.py")
    return (*of_package(), *other, *page_code())


@cache
def of_package() -> tuple[Text, ...]:
    return tuple(words.texts("wan_attn"))


@cache
def page_code() -> tuple[Text, ...]:
    return tuple(text for file in words.pages() for text in words.page_texts(file))


@cache
def notes_of_tests() -> tuple[Text, ...]:
    """Comments and docstrings of the tests; their strings name what must not exist, too."""
    return tuple(t for t in words.texts("tests") if t.kind in ("comment", "docstring"))


# --- options, commands, targets ------------------------------------------------------------------


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set()
    for action in parser._actions:
        found |= {option for option in action.option_strings if option.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found |= options_of(child)
    return found


@cache
def options_of_command(name: str) -> frozenset[str]:
    _, parser = wan_attn.__main__._parser(name)
    assert parser is not None, name
    return frozenset(options_of(parser))


PROGRAMS = ("ship.py", "selftest_run.py", "worker.py")
"""Modules of the package that a process of their own runs."""


@cache
def options_of_scripts() -> frozenset[str]:
    """First arguments of add_argument() in all that has a command line beside wan_attn."""
    found = set()
    for file in sources("*.py"):
        if file.parts[0] in ("benchmarks", ".ci", "tests") or file.name in PROGRAMS:
            for node in python_nodes(file):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                    found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return frozenset(found)


def test_options_exist() -> None:
    known = set().union(*map(options_of_command, wan_attn.__main__.COMMANDS))
    known |= options_of_scripts() | owned(EXTERNAL_OPTIONS.values())

    def problems() -> Iterator[str]:
        for text in shown():
            for option in words.OPTION.findall(text.text):
                if option not in known:
                    yield f"{text.place}: no program of ours has {option}"

    expect_none(problems())


def test_commands_exist_and_have_their_options() -> None:
    def problems() -> Iterator[str]:
        for text in shown():
            for command, options in words.our_commands(text.text):
                if command not in wan_attn.__main__.COMMANDS:
                    yield f"{text.place}: there is no command {command!r}"
                    continue
                for option in options:
                    if option not in options_of_command(command):
                        yield f"{text.place}: `{command}` has no option {option}"

    expect_none(problems())


def test_modules_that_are_run_exist() -> None:
    names = {file.as_posix() for file in files()}

    def problems() -> Iterator[str]:
        for text in shown():
            for module in words.MODULE.findall(text.text):
                path = module.replace(".", "/")
                ours = {f"{path}.py", f".ci/{path}.py", f"{path}/__main__.py"} & names
                if not ours and module not in EXTERNAL_MODULES and not module.isupper():
                    yield f"{text.place}: python -m {module} cannot be run"

    expect_none(problems())


COMMAND_OF_OURS = re.compile(r"python (?:-m )?benchmarks")


def test_only_people_with_a_checkout_are_sent_to_benchmarks() -> None:
    """An installed package has no folder `benchmarks`."""

    def problems() -> Iterator[str]:
        for text in (*of_package(), *page_code()):
            # measured.md says of its commands that they need a checkout.
            is_read = text.kind == "message" or (text.file in USERS and text.kind == "code")
            if is_read and text.file.name != "measured.md" and COMMAND_OF_OURS.search(text.text):
                yield f"{text.place}: {text.text[:80]}"

    expect_none(problems())


def test_make_targets_exist() -> None:
    known = set(re.findall(r"^([a-z][a-z-]*):", read(Path("Makefile")), re.MULTILINE))

    def problems() -> Iterator[str]:
        for text in shown():
            pattern = words.TARGET["code" if text.kind == "code" else "message"]
            for target in " ".join(pattern.findall(text.text)).split():
                if target not in known:
                    yield f"{text.place}: there is no `make {target}`"

    expect_none(problems())


# --- variables -----------------------------------------------------------------------------------


@cache
def variables() -> frozenset[str]:
    """Those of config.py, of setup.py and of the tests."""
    ours = {variable.name for variable in config.VARIABLES}
    ours |= set(re.findall(r'(?:asked|environ\.get)\("(\w+)"', read(Path("setup.py"))))
    ours |= set(re.findall(r"^(\w+) \?=", read(Path("Makefile")), re.MULTILINE))
    return frozenset(ours | owned(EXTERNAL_VARIABLES))


@cache
def c_identifiers() -> frozenset[str]:
    c_files = [file for file in sources() if file.suffix in C_SUFFIXES]
    found = {name for file in c_files for name in re.findall(r"\b[A-Z]\w+", c_code(file))}
    return frozenset(found | set(re.findall(r"\b[A-Z]\w+", read(Path("csrc/cuda/sdpa_rows.def")))))


@cache
def python_identifiers() -> frozenset[str]:
    found = set()
    for file in (f for f in files() if f.suffix == ".py"):
        for node in python_nodes(file):
            if isinstance(node, ast.Name) and node.id.isupper():
                found.add(node.id)
    return frozenset(found)


def test_variables_exist() -> None:
    """In pages for users any word in capitals must be a variable; elsewhere it may be code."""

    def problems() -> Iterator[str]:
        for text in shown():
            if text.file.name == "CHANGELOG.md":
                continue  # names what is gone, too
            for_users = text.file in USERS
            named = set(words.VARIABLE.findall(text.text)) | set(words.ASSIGNED.findall(text.text))
            if for_users:
                named |= set(words.ANY_VARIABLE.findall(text.text))
            for name in named - variables():
                if for_users or name not in c_identifiers() | python_identifiers():
                    yield f"{text.place}: no program reads {name}"

    expect_none(problems())


# --- files and names -----------------------------------------------------------------------------


@cache
def endings() -> frozenset[str]:
    """Every path of the repository and of its folders, and what they end in."""
    found = set()
    for file in files():
        parts = file.parts
        for end in range(1, len(parts) + 1):
            found |= {"/".join(parts[begin:end]) for begin in range(end)}
    return frozenset(found)


def is_there(path: str) -> bool:
    path = re.sub(r"^(?:\.\./)+", "", path)
    stem = path.rpartition("/")[2].partition(".")[0]
    if path in endings() or stem.isupper():  # FILE.csv stands for a file of the user's
        return True
    return "*" in path and any(fnmatch(ending, path) for ending in endings())


def test_files_exist() -> None:
    known = owned(EXTERNAL_FILES.values())
    scripts = [f for f in files() if f.parts[0] in (".ci", ".github") or f.name == "Makefile"]
    commands = [Text(f, 0, read(f), "code") for f in scripts if f.suffix not in (".py", ".md")]

    def problems() -> Iterator[str]:
        for text in (*shown(), *notes_of_tests(), *commands):
            for path in words.paths(text.text):
                if path not in known and not is_there(path):
                    yield f"{text.place}: there is no {path}"

    expect_none(problems())


def test_links_lead_somewhere() -> None:
    def anchors(page: Path) -> set[str]:
        heads = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
        kept = (re.sub(r"[^\w\- ]", "", head.lower()) for head in heads)
        return {head.replace(" ", "-") for head in kept}

    def problems() -> Iterator[str]:
        for page in words.pages():
            for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
                if re.match(r"https?:", target):
                    continue
                name, _, anchor = target.partition("#")
                path = (page.parent / name) if name else page
                parts = [p for p in path.parts if p != "."]
                while ".." in parts:
                    at = parts.index("..")
                    parts[at - 1 : at + 1] = []
                path = Path(*parts)
                if path not in files():
                    yield f"{page}: ({target}) leads nowhere"
                elif anchor and anchor not in anchors(path):
                    yield f"{page}: {path} has no heading #{anchor}"

    expect_none(problems())


def resolves(name: str) -> bool:
    """Whether wan_attn.a.b is a module, or an attribute of one."""
    found: object = wan_attn
    done = "wan_attn"
    for part in name.split(".")[1:]:
        done = f"{done}.{part}"
        if len(part) == 1:
            return True  # one letter stands for any name
        if not hasattr(found, part):
            if not hasattr(found, "__path__") or importlib.util.find_spec(done) is None:
                return False
            try:
                importlib.import_module(done)
            except ImportError:
                return True  # it is there, and a host's program is not: comfyui_node
        found = getattr(found, part)
    return True


def test_python_names_exist() -> None:
    def problems() -> Iterator[str]:
        for text in shown():
            for name in words.NAME.findall(text.text):
                is_file = name.split(".")[1] in words.SUFFIXES
                if not is_file and not resolves(name):
                    yield f"{text.place}: there is no {name}"

    expect_none(problems())


def test_examples_in_pages_import_what_exists() -> None:
    def problems() -> Iterator[str]:
        for page in words.pages():
            for block in words.blocks(read(page), "python"):
                tree = ast.parse(block)
                known: dict[str, str] = {}
                for node in ast.walk(tree):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wan_"):
                        for alias in node.names:
                            known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                        known.setdefault(f"{node.value.id}.{node.attr}", "")
                for name, origin in list(known.items()):
                    head, _, attribute = name.partition(".")
                    if attribute and known.get(head):
                        origin = f"{known[head]}.{attribute}"
                    if origin and not resolves(origin):
                        yield f"{page}: there is no {origin}"

    expect_none(problems())


# --- installing ----------------------------------------------------------------------------------


@pytest.mark.skipif(version.PUBLISHED, reason="an index has it")
def test_nothing_is_installed_by_a_name_that_no_index_has() -> None:
    """PyPI has no package of our name. Whoever registers it would be installed."""
    everything = [f for f in files() if f.suffix in (".md", ".toml", ".yml", ".yaml", ".html")]
    everything += [f for f in files() if f.name in ("Makefile", "setup", "run", "check-c")]

    def problems() -> Iterator[str]:
        for text in (*shown(), *notes_of_tests()):
            for word in words.unpublished(text.text):
                yield f"{text.place}: pip install {word}"
        for file in everything:
            for word in words.unpublished(read(file)):
                yield f"{file}: pip install {word}"

    expect_none(problems())


def test_messages_share_one_line_for_installing_again() -> None:
    assert version.REINSTALL.endswith("./wan_attn")

    def problems() -> Iterator[str]:
        for text in of_package():
            is_line = re.search(r"pip install[^`\n]*\./wan_attn", text.text)
            if is_line and text.kind == "message" and text.file.name != "version.py":
                yield f"{text.place}: say version.REINSTALL"

    expect_none(problems())


def test_extras_are_installed_by_the_names_of_their_packages() -> None:
    """Who has the package has not its source: the message names what the extra would bring."""
    project = read(Path("pyproject.toml"))

    def extra(name: str) -> set[str]:
        (listed,) = re.findall(rf"^{name} = \[([^\]]*)\]", project, re.MULTILINE)
        return set(re.findall(r'"([^"]+)"', listed))

    def installed(line: str) -> set[str]:
        return set(line.partition("pip install ")[2].rstrip(")").replace('"', "").split())

    assert installed(demo_options.INSTALL) == extra("demo")
    assert installed(plots.MISSING) == extra("bench")


# --- README and its translations -----------------------------------------------------------------


def quick_start(page: Path) -> list[str]:
    """The commands of a quick start, in order, without comments."""
    section = read(page).partition("<!-- quick-start -->")[2].partition("<!-- /quick-start -->")[0]
    lines = "".join(re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    return [re.sub(r"\s+#.*", "", line) for line in lines.splitlines() if line.strip()]


def test_the_quick_starts_are_the_same_in_every_language() -> None:
    english = quick_start(README)
    assert len(english) >= 9
    for page in QUICK_STARTS:
        assert quick_start(page) == english, page
        named = words.ANY_VARIABLE.findall(read(page))
        assert set(named) <= set(words.ANY_VARIABLE.findall(read(README))), page


def test_the_readme_is_short() -> None:
    lines = read(README).splitlines()
    assert len(lines) < 250
    expect_none(f"README.md:{n}: {len(x)} columns" for n, x in enumerate(lines, 1) if len(x) > 130)


def test_the_readme_has_short_sentences() -> None:
    prose = re.sub(r"```.*?```|<!--.*?-->", "", read(README), flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not re.match(r"[|#]", line))
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`", " X ", prose)
    sentences = [s.split() for s in re.split(r"[.:!?](?:\s|$)|\n\n|\n- ", prose) if s.split()]
    lengths = [len(s) for s in sentences]
    assert sum(lengths) / len(lengths) <= 18
    expect_none(" ".join(s) for s in sentences if len(s) > 40)


def test_every_name_of_another_program_is_named() -> None:
    said = "\n".join(text.text for text in (*shown(), *notes_of_tests()))
    said += "\n".join(read(file) for file in (*words.pages(), Path("Makefile")))
    tables = (EXTERNAL_OPTIONS.values(), EXTERNAL_VARIABLES, EXTERNAL_FILES.values())
    names = set().union(*map(owned, tables)) | EXTERNAL_MODULES
    expect_none(name for name in names if name not in said)
