# SPDX-License-Identifier: Apache-2.0
"""test_cli.py - the command line itself: commands, exit codes, a script's arguments untouched."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from wan_attn import __main__ as cli
from wan_attn.config import VARIABLES
from wan_attn.version import __version__

SCRIPT_ARGUMENTS = [
    "--help",
    "--version",
    "--",
    "-m",
    "a b",
    "--backend",
    "--back",
    "",
    "-",
    "--x=1",
]


def exit_code(argv: list[str]) -> int:
    try:
        return cli.main(argv)
    except SystemExit as end:
        return 0 if end.code is None else int(end.code)


def test_version_is_printed_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"wan_attn {__version__}\n"


def test_no_command_shows_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert all(variable.name in out for variable in VARIABLES)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bogus"], "invalid choice: 'bogus' (choose from"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["doctor", "--bogus"], "unrecognized arguments: --bogus"),
        (["doctor", "extra"], "unrecognized arguments: extra"),
        (["doctor", "--js"], "unrecognized arguments: --js"),  # no abbreviations
        (["run"], "the following arguments are required: SCRIPT\n"),
        (["run", "--bogus", "script.py"], "unrecognized arguments: --bogus"),
        (["run", "--backend", "bogus", "script.py"], "argument --backend: invalid choice: 'bogus'"),
    ],
)
def test_bad_arguments_end_with_2_and_say_which(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_an_unknown_option_shows_the_usage_of_its_command(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"why": ["--shape", "1x1x1x1"], "comfyui": ["install", "x"], "run": []}
    assert exit_code([name, *arguments.get(name, []), "--nope"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"usage: wan-attn {name} ") and f"wan-attn {name}: error: " in err


@pytest.mark.parametrize("name", ["run", "doctor", "why", "comfyui", "demo"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([name, "--help"]) == 0
    assert f"usage: wan-attn {name}" in capsys.readouterr().out


def test_help_says_which_page_explains_a_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    readme, contributing = capsys.readouterr().out.split("(README.md")[1].split("(CONTRIBUTING.md")
    for variable in VARIABLES:
        assert (variable.name in contributing) == variable.is_for_development
        assert (variable.name in readme) != variable.is_for_development


def test_only_the_command_that_is_asked_for_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real = importlib.import_module

    def record(name: str) -> types.ModuleType:
        imported.append(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", record)
    exit_code(["why", "--shape", "1x4x2x64", "--device", "cpu"])
    assert set(imported) == {"wan_attn.cli.why"}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[argparse.Namespace]]:
    """`run` replaced by a module that has its arguments and only notes what it is given."""
    seen: list[argparse.Namespace] = []
    fake = types.ModuleType("fake_run")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--backend")
        parser.add_argument("-m", dest="as_module", action="store_true")
        parser.add_argument("script")
        parser.add_argument("script_args", nargs=argparse.REMAINDER)

    def main(args: argparse.Namespace) -> int:
        seen.append(args)
        return 5

    fake.add_arguments, fake.main = add_arguments, main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_run", fake)
    monkeypatch.setitem(cli.COMMANDS, "run", ("fake_run", "run"))
    yield seen


@pytest.mark.parametrize(
    ("ours", "backend", "as_module"),
    [
        ([], None, False),
        (["--backend", "torch"], "torch", False),
        (["--backend=torch", "-m"], "torch", True),
        (["--"], None, False),
        (["--backend", "-1"], "-1", False),
    ],
)
def test_what_follows_script_is_the_scripts(
    ours: list[str], backend: str | None, as_module: bool, recorded: list[argparse.Namespace]
) -> None:
    assert exit_code(["run", *ours, "script.py", *SCRIPT_ARGUMENTS]) == 5
    (args,) = recorded
    assert args.script == "script.py"
    assert args.script_args == SCRIPT_ARGUMENTS
    assert (args.backend, args.as_module) == (backend, as_module)


def test_a_script_without_arguments(recorded: list[argparse.Namespace]) -> None:
    assert exit_code(["run", "script.py"]) == 5
    assert recorded[0].script_args == []


def test_the_real_run_passes_everything_and_returns_the_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nprint(json.dumps(sys.argv))\nsys.exit(7)\n")
    command = [sys.executable, "-m", "wan_attn", "run", str(script), *SCRIPT_ARGUMENTS]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 7, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1]) == [str(script), *SCRIPT_ARGUMENTS]


def test_the_console_script_is_this_main() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'wan-attn = "wan_attn.__main__:main"' in text
