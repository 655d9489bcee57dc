# SPDX-License-Identifier: Apache-2.0
"""plain_wheel.py - packs a wheel where neither setuptools (before 70.1) nor `wheel` can.

That is a stock virtual environment of Python 3.10 or 3.11 without build isolation. Does what
setuptools' commands bdist_wheel, dist_info and editable_wheel ask of the package `wheel`, and
nothing more. Importing it is enough for the last of these: it stands in for wheel.wheelfile.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from setuptools import Command


class WheelFile(zipfile.ZipFile):
    """A wheel that is being written; closing it adds RECORD."""

    def __init__(
        self, file: str, mode: Literal["w"] = "w", compression: int = zipfile.ZIP_DEFLATED
    ) -> None:
        super().__init__(file, mode, compression)
        self.record: list[str] = []
        self.dist_info = "-".join(Path(file).name.split("-")[:2]) + ".dist-info"

    def write_files(self, base: str) -> None:
        for path in sorted(p for p in Path(base).rglob("*") if p.is_file()):
            name = path.relative_to(base).as_posix()
            self.write(path, name)
            data = path.read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            self.record.append(f"{name},sha256={digest},{len(data)}")

    def close(self) -> None:
        if self.fp is not None and self.mode == "w":
            name = f"{self.dist_info}/RECORD"
            self.writestr(name, "\n".join([*self.record, f"{name},,", ""]))
        super().close()


def requirements(requires: str) -> list[str]:
    """requires.txt of an .egg-info as lines of METADATA; a section is [extra:condition] there."""
    lines, condition = [], ""
    for line in requires.splitlines():
        if line.startswith("["):
            extra, _, condition = line.strip("[]").partition(":")
            if extra:
                wanted = f'extra == "{extra}"'
                condition = f"({condition}) and {wanted}" if condition else wanted
        elif line:
            lines.append(f"Requires-Dist: {line}" + f" ; {condition}" * bool(condition))
    return lines


class bdist_wheel(Command):
    description = "pack a wheel"
    user_options = [
        ("bdist-dir=", "b", "where to lay out its files"),
        ("dist-dir=", "d", "where to put the wheel"),
        ("plat-name=", "p", "platform of the tag"),
        ("keep-temp", "k", "keep the laid out files"),
    ]
    boolean_options = ["keep-temp"]

    def initialize_options(self) -> None:
        # Strings once they are finalized.
        self.bdist_dir: Any = None
        self.dist_dir: Any = None
        self.plat_name: Any = None
        self.keep_temp = False

    def finalize_options(self) -> None:
        self.set_undefined_options("bdist", ("dist_dir", "dist_dir"))
        self.plat_name = re.sub(r"[-.]", "_", self.plat_name or sysconfig.get_platform())
        self.bdist_dir = self.bdist_dir or "build/plain_wheel"

    @property
    def wheel_dist_name(self) -> str:
        name = self.distribution.get_name().replace("-", "_")
        return f"{name}-{self.distribution.get_version()}"

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", self.plat_name

    def run(self) -> None:
        laid_out = Path(self.bdist_dir)
        shutil.rmtree(laid_out, ignore_errors=True)
        self.run_command("build")
        shutil.copytree(self.get_finalized_command("build").build_lib, laid_out)
        self.run_command("egg_info")
        dist_info = laid_out / f"{self.wheel_dist_name}.dist-info"
        self.egg2dist(self.get_finalized_command("egg_info").egg_info, str(dist_info))
        self.write_wheelfile(str(dist_info))
        Path(self.dist_dir).mkdir(parents=True, exist_ok=True)
        file = Path(self.dist_dir, f"{self.wheel_dist_name}-{'-'.join(self.get_tag())}.whl")
        with WheelFile(str(file)) as wheel:
            wheel.write_files(str(laid_out))
        self.distribution.dist_files.append(("bdist_wheel", "", str(file)))
        if not self.keep_temp:
            shutil.rmtree(laid_out)

    def egg2dist(self, egg_info: str, dist_info: str) -> None:
        """Makes the .dist-info of a wheel from an .egg-info, which goes."""
        source, target = Path(egg_info), Path(dist_info)
        target.mkdir(parents=True, exist_ok=True)
        head, blank, description = (source / "PKG-INFO").read_text("utf-8").partition("\n\n")
        if "\nRequires-Dist:" not in head:
            head = "\n".join([head, *requirements((source / "requires.txt").read_text("utf-8"))])
        (target / "METADATA").write_text(head + blank + description, "utf-8")
        for name in ("entry_points.txt", "top_level.txt"):
            shutil.copyfile(source / name, target / name)
        for name in self.distribution.metadata.license_files or ["LICENSE"]:
            shutil.copyfile(name, target / Path(name).name)
        shutil.rmtree(source)

    def write_wheelfile(self, wheelfile_base: str) -> None:
        self.ensure_finalized()  # setuptools 64 calls this of a command that it has not finalized
        lines = ["Wheel-Version: 1.0", "Generator: wan_attn", "Root-Is-Purelib: false"]
        Path(wheelfile_base, "WHEEL").write_text(
            "\n".join([*lines, f"Tag: {'-'.join(self.get_tag())}", ""]), "utf-8"
        )


for _name in ("wheel", "wheel.wheelfile"):
    sys.modules.setdefault(_name, ModuleType(_name))
vars(sys.modules["wheel.wheelfile"]).update(WheelFile=WheelFile)
