# SPDX-License-Identifier: Apache-2.0
"""installed.py - whether the files of this package are those that were built and installed, and
what they were built from. Needs no torch: a damaged installation may not get that far.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
BUILD_RECORD = "build_record.json"


@dataclass(slots=True)
class Installed:
    """What is known of an installation.

    Attributes:
        package: its folder.
        installer: who installed it, as RECORD's folder says; "" without one.
        record: what setup.py has written of its build; empty if there is no such file.
        in_record: how many files RECORD gives a hash for.
        compiled: how many compiled files the build has given a hash for.
        problems: one line for every file that is not as it should be.
    """

    package: Path
    installer: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    in_record: int = 0
    compiled: int = 0
    problems: list[str] = field(default_factory=list)


def examine(package: Path = PACKAGE) -> Installed:
    """Compares every file of the package with RECORD, and compiled ones with the build's record."""
    found = Installed(package)
    distribution = _distribution(package)
    if distribution is not None:
        found.installer = (distribution.read_text("INSTALLER") or "").strip()
        found.problems += _against_record(distribution, found)
    found.problems += _against_build(found)
    return found


def _distribution(package: Path) -> importlib.metadata.Distribution | None:
    """The installation that has put this package where it is; None: an editable one, or none."""
    path = [str(package.parent)]
    for distribution in importlib.metadata.distributions(name="wan-attn", path=path):
        if any(file.hash and file.parts[0] == package.name for file in distribution.files or ()):
            return distribution
    return None


def _against_record(
    distribution: importlib.metadata.Distribution, found: Installed
) -> Iterator[str]:
    known = set()
    for file in distribution.files or ():
        path = Path(str(file.locate()))
        known.add(path.resolve())
        if file.hash is None:  # RECORD itself, and what Python has compiled
            continue
        found.in_record += 1
        digest = _digest(path, file.hash.mode)
        if digest is None:
            yield f"{file}: it is gone, or cannot be read"
        elif base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value:
            yield f"{file}: its bytes are not those that were installed"
    for path in sorted(found.package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.resolve() not in known:
            yield f"{path.relative_to(found.package.parent).as_posix()}: it was not installed"


def _against_build(found: Installed) -> Iterator[str]:
    name = f"{found.package.name}/{BUILD_RECORD}"
    try:
        found.record = json.loads((found.package / BUILD_RECORD).read_text(encoding="utf-8"))
        hashes = dict(found.record.get("files", {}))
    except FileNotFoundError:
        return  # a checkout in which nothing was built
    except (OSError, ValueError, TypeError, AttributeError) as error:
        found.record = {}
        yield f"{name}: it cannot be read: {error}"
        return
    found.compiled = len(hashes)
    for file, value in hashes.items():
        digest = _digest(found.package / file, "sha256")
        if digest is None or digest.hex() != value:
            yield f"{found.package.name}/{file}: it is not what the build has made"


def _digest(path: Path, kind: str) -> bytes | None:
    try:
        return hashlib.new(kind, path.read_bytes()).digest()
    except OSError:
        return None
