# SPDX-License-Identifier: Apache-2.0
"""comfyui.py - `wan-attn comfyui install|remove PATH`: the node folder into a ComfyUI, and out."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import wan_attn
from wan_attn.cli import FINE, refuse

FOLDER = "ComfyUI-wan-attn"
"""What the node folder is called under custom_nodes."""

FILES = ("__init__.py", "LICENSE.md")
_MARK = "wan_attn for ComfyUI"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `wan-attn comfyui`."""
    parser.add_argument("action", choices=("install", "remove"))
    parser.add_argument("path", metavar="PATH", type=Path, help="ComfyUI's folder (with main.py)")


def source() -> Path:
    """The folder in this package that is copied."""
    return Path(wan_attn.__file__).parent / "integrations" / "comfyui_node"


def main(args: argparse.Namespace) -> int:
    """Copy or delete; returns the exit code."""
    nodes = args.path / "custom_nodes"
    if not nodes.is_dir():
        return refuse(
            "comfyui", f"PATH must be ComfyUI's folder, with custom_nodes in it, got {args.path}"
        )
    target = nodes / FOLDER
    if target.exists() and not _is_ours(target):
        return refuse("comfyui", f"{target} exists and is not wan_attn's; it is left alone")
    if args.action == "remove":
        if not target.exists():
            return refuse("comfyui", f"{target} does not exist")
        shutil.rmtree(target)
        print(f"removed {target}; restart ComfyUI")
        return FINE
    target.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(source() / name, target / name)
    print(f'installed {target}; restart ComfyUI: it says "Using wan_attn attention"')
    print(f"ComfyUI must run with a Python that has wan_attn. This one has it: {sys.executable}")
    return FINE


def _is_ours(folder: Path) -> bool:
    init = folder / "__init__.py"
    return init.is_file() and _MARK in init.read_text(encoding="utf-8", errors="replace")
