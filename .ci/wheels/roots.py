# SPDX-License-Identifier: Apache-2.0
"""roots.py - folders with the system of another Debian release or processor, to run wheels there:

    PYTHONPATH=.ci python -m wheels.roots NAME ...

Each is unpacked from Debian's packages, which this machine's own apt finds, checks and downloads;
nothing is installed here. A machine that is no Debian gets none, and hears why (NoRoot).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wheels.running import ROOT

KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS = ("apt-get", "dpkg-deb")
# A Debian since 2017 has these folders below /usr, and links in their places.
MERGED = ("bin", "sbin", "lib", "lib64")


class NoRoot(RuntimeError):
    """This machine cannot make it; says why."""


class Root(NamedTuple):
    """One system.

    Attributes:
        release: Debian's name of the release.
        machine: Debian's name of the processor.
        packages: what to unpack, each with what it depends on.
        pythons: those of its Pythons that this machine itself can run; see python().
    """

    release: str
    machine: str
    packages: tuple[str, ...]
    pythons: tuple[str, ...] = ()


ROOTS = {
    # With what torch's wheel for arm64 needs: the C++ library.
    "arm64": Root("trixie", "arm64", ("python3", "libstdc++6")),
    # The oldest that Debian's mirrors still carry: glibc 2.31.
    "oldest": Root("bullseye", "amd64", ("libc6",)),
    # The newest Pythons that torch has wheels for, and the C++ library for these.
    "newest": Root(
        "sid", "amd64", ("python3.14", "python3.15", "libstdc++6"), ("python3.14", "python3.15")
    ),
}

# Starts a Python of a root with that root's own C library. It goes by the name it was called by,
# so that Python finds the virtual environment whose link this is.
START = """#!/bin/sh
exec {root}/lib64/ld-linux-x86-64.so.2 --argv0 "$0" \\
    --library-path {root}/usr/lib/x86_64-linux-gnu {root}/usr/bin/{name} "$@"
"""


def mirror() -> str:
    """Where this machine's apt gets Debian from."""
    listing = ["apt-get", "indextargets", "--format", "$(SITE) $(ORIGIN)", "Created-By: Packages"]
    done = subprocess.run(listing, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        site, _, origin = line.partition(" ")
        if origin == "Debian" and not site.rstrip("/").endswith("security"):
            return site
    raise NoRoot("apt knows no mirror of Debian here; perhaps `apt-get update` has not run")


def apt(folder: Path, root: Root, site: str) -> list[str]:
    """apt-get's command with nothing of this machine but its keys."""
    for name in ("lists/partial", "cache/archives/partial", "preferences"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    source = f"deb [signed-by={KEYS}] {site} {root.release} main\n"
    (folder / "sources.list").write_text(source)
    settings = {
        "APT::Architecture": root.machine,
        "APT::Architectures": root.machine,
        "APT::Sandbox::User": "",
        "APT::Install-Recommends": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Dir::Cache": str(folder / "cache"),
        "Dir::Etc::parts": "-",
        "Dir::Etc::preferencesparts": str(folder / "preferences"),
        "Dir::Etc::sourcelist": str(folder / "sources.list"),
        "Dir::Etc::sourceparts": "-",
        "Dir::State": str(folder),
        "Dir::State::status": str(folder / "status"),
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    return ["apt-get", "-qq", *options]


def call(words: Sequence[str | Path]) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [str(word) for word in words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NoRoot(f"{words[0]} took longer than {error.timeout:.0f} s") from error
    if done.returncode != 0:
        last = " ".join(done.stdout.split())[-400:]
        raise NoRoot(f"{words[0]} has failed: {last}")


def make(name: str, folder: Path) -> Path:
    """The root of that name in the folder, made only once.

    Raises:
        NoRoot: it cannot be made here.
    """
    root, made = ROOTS[name], folder / name
    if (made / "complete").exists():
        return made
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or not KEYS.exists():
        raise NoRoot(f"only a Debian can make a root of Debian's packages: no {[*missing, KEYS]}")
    shutil.rmtree(made, ignore_errors=True)
    shutil.rmtree(folder / f"{name}-apt", ignore_errors=True)
    words = apt(folder / f"{name}-apt", root, mirror())
    call([*words, "update"])
    call([*words, "install", "--yes", "--download-only", *root.packages])
    for entry in MERGED:
        (made / "usr" / entry).mkdir(parents=True)
        (made / entry).symlink_to(f"usr/{entry}")
    for entry in ("dev", "proc", "tmp"):
        (made / entry).mkdir()
    for package in sorted((folder / f"{name}-apt").glob("cache/archives/*.deb")):
        call(["dpkg-deb", "--extract", package, made])
    shutil.rmtree(folder / f"{name}-apt")
    (made / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    for program in root.pythons:
        start = python(made, program)
        start.write_text(START.format(root=shlex.quote(str(made.absolute())), name=program))
        start.chmod(0o755)
    (made / "complete").touch()
    return made


def python(made: Path, name: str) -> Path:
    """A program that runs this Python of a root that was made; it can make environments too."""
    return made / "usr/local/bin" / name


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or ROOTS:
            print(make(wanted, ROOT / "build/wheels/roots"))
    except NoRoot as reason:
        sys.exit(f"wheels: {reason}")
