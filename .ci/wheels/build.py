# SPDX-License-Identifier: Apache-2.0
"""build.py - makes the wheels of every platform, the sdist, a manifest with their hashes and a page
for `pip install --find-links`, on one Linux machine:

    PYTHONPATH=.ci python -m wheels.build [--out dist] [--work build/wheels] [--only PLATFORM ...]

`make wheels` does it in an environment of .ci/wheels/requirements.txt. What is packed are the
tracked files as they lie here. The same files give the same bytes: nothing that is packed tells the
time, the folder or the user (SOURCE_DATE_EPOCH is the commit's time, if it is not set).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from wheels.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
OLDEST = 315532800  # the first second that a zip archive can hold
TOOLS = ("ziglang", "nvidia-cuda-nvrtc-cu12", "setuptools")


class BuildError(RuntimeError):
    """Something cannot be made; says what and why."""


def git(*words: str) -> str:
    """What git says; "" outside of a repository."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    packed = ROOT / ".commit"
    if packed.exists():
        return packed.read_text().strip()
    return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*") or "unknown"


def copy_sources(to: Path) -> None:
    """The tracked files, with the same permissions on every machine, and their commit."""
    shutil.rmtree(to, ignore_errors=True)
    names = git("ls-files").splitlines()
    if not names:
        raise BuildError("wheels are made of the files that git tracks, and there is no git here")
    for name in names:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
            (to / name).chmod(0o644)
    (to / ".commit").write_text(commit() + "\n")


def environment(work: Path) -> dict[str, str]:
    """That of every build, without what could change its result."""
    kept = ("PATH", "HOME", "TMPDIR", "LANG", "SOURCE_DATE_EPOCH", "WAN_ATTN_KEPT")
    found = {name: os.environ[name] for name in kept if name in os.environ}
    found.setdefault("SOURCE_DATE_EPOCH", git("log", "-1", "--format=%ct") or str(OLDEST))
    found.setdefault("WAN_ATTN_KEPT", str(ROOT / "build/cubin"))
    zig = str(work / "zig")
    return found | {"ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig, "PYTHONHASHSEED": "0"}


def setup(source: Path, words: Sequence[str], more: dict[str, str]) -> None:
    """Runs setup.py; its output is shown only if it fails."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *words],
        cwd=source,
        env=more,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(f"setup.py {' '.join(words)} has failed:\n{done.stdout[-6000:]}")


def build_wheel(platform: str, source: Path, out: Path, work: Path) -> Path:
    """One platform's wheel, in the folder `out`."""
    target, built = TARGETS[platform], work / "built" / platform
    shutil.rmtree(built, ignore_errors=True)
    cubins = "1" if target.has_cuda else "0"
    more = environment(work) | {"WAN_ATTN_TARGET": platform, "WAN_ATTN_CUDA": cubins}
    words = ["build", "--build-base", str(built), "bdist_wheel"]
    setup(source, [*words, "--bdist-dir", str(built / "laid-out"), "-d", str(built / "dist")], more)
    (made,) = (built / "dist").glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    wheel = out / made.name
    shutil.copyfile(made, wheel)
    shutil.rmtree(built)
    return wheel


def build_sdist(source: Path, out: Path, work: Path) -> Path:
    """The source archive. setuptools writes times and owners into it, so it is packed again."""
    built, more = work / "built/sdist", environment(work)
    shutil.rmtree(built, ignore_errors=True)
    setup(source, ["sdist", "--formats=tar", "-d", str(built)], more)
    (made,) = built.glob("*.tar")
    out.mkdir(parents=True, exist_ok=True)
    sdist = out / f"{made.name}.gz"
    epoch = int(more["SOURCE_DATE_EPOCH"])
    tarred = io.BytesIO()
    with tarfile.open(made) as old, tarfile.open(fileobj=tarred, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda m: m.name):
            plain = tarfile.TarInfo(member.name)
            plain.size, plain.type, plain.mtime = member.size, member.type, epoch
            plain.mode = 0o755 if member.isdir() else 0o644
            new.addfile(plain, old.extractfile(member) if member.isfile() else None)
    with sdist.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=epoch) as packed:
        packed.write(tarred.getvalue())
    shutil.rmtree(built)
    return sdist


def manifest(made: Sequence[Path]) -> dict[str, object]:
    """What was made of what, for people who want to make it again and compare."""
    tools = {name: importlib.metadata.version(name) for name in TOOLS}
    return {
        "commit": commit(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "tools": tools,
        "files": {
            file.name: {
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "size": file.stat().st_size,
            }
            for file in sorted(made)
        },
    }


def page(made: Sequence[Path], url: str) -> str:
    """A page for `pip install --find-links`: pip checks each file against its hash there."""
    links = (
        f'<a href="{url}{file.name}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}">'
        f"{file.name}</a><br>"
        for file in sorted(made)
    )
    return "\n".join(["<!DOCTYPE html>", "<title>wan_attn: wheels</title>", *links, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 and the reason."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--work", type=Path, default=ROOT / "build/wheels")
    parser.add_argument("--only", nargs="+", choices=[*TARGETS, "sdist"], metavar="PLATFORM")
    parser.add_argument("--url", default="", help="where the files will lie, for index.html")
    args = parser.parse_args(arguments)
    os.umask(0o022)
    wanted, made = args.only or [*TARGETS, "sdist"], []
    out, work = args.out.resolve(), args.work.resolve()
    source = work / "source"
    try:
        copy_sources(source)
        for platform in wanted:
            start = time.monotonic()
            if platform == "sdist":
                made.append(build_sdist(source, out, work))
            else:
                made.append(build_wheel(platform, source, out, work))
            size = made[-1].stat().st_size / 1024
            print(
                f"   {made[-1].name:66} {size:6.0f} KiB {time.monotonic() - start:6.1f} s",
                flush=True,
            )
    except BuildError as error:
        print(f"wheels: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(source)
    (out / "index.html").write_text(page(made, args.url and args.url.rstrip("/") + "/"))
    (out / "manifest.json").write_text(json.dumps(manifest(made), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
