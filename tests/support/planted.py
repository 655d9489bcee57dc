# SPDX-License-Identifier: Apache-2.0
"""planted.py - a copy of sources with one change in it, which some check has to find."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


def plant(source: Path, folder: Path, file: str, right: str, wrong: str) -> Path:
    """`source` copied into `folder`, with `right` replaced by `wrong` in `file`, where it must
    stand once; the path of that file."""
    shutil.copytree(source, folder)
    at = folder / file
    text = at.read_text(encoding="utf-8")
    count = text.count(right)
    assert count == 1, f"{file} must contain {right!r} once, not {count} times: plant it elsewhere"
    at.write_text(text.replace(right, wrong), encoding="utf-8")
    return at


@dataclass(frozen=True)
class Bug:
    """Replace `right` by `wrong` in `file`."""

    name: str
    file: str
    right: str
    wrong: str

    def plant(self, source: Path, folder: Path) -> Path:
        """A folder of `folder` with `source` and this bug in it."""
        made = folder / "csrc"
        plant(source, made, self.file, self.right, self.wrong)
        return made
