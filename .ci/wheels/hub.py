# SPDX-License-Identifier: Apache-2.0
"""hub.py - the wheels of one folder in the layout that Hugging Face's package `kernels` loads:

    PYTHONPATH=.ci python -m wheels.hub [dist] [--out build/wheels/hub]

build/VARIANT/ for each system and each major version of CUDA: metadata.json, an __init__.py and the
package. One wheel serves torch 2.9 and newer (an older one has no name of its own there) and every
CUDA, so that its files lie there several times. The wheel for any platform is the last resort.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from wheels.running import ROOT
from wheels.targets import TARGETS, Target

SYSTEMS = {"linux": "linux", "win32": "windows", "darwin": "darwin"}
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
# The oldest of each major version for which PyTorch has had wheels since 2.9.
CUDA = ("cu126", "cu130")
OLDEST_TORCH = "29"
VERSION = 1  # the hub's own numbers are whole ones; the next one when a call changes

# kernels loads this file under a name of its own, but our modules import each other as wan_attn.
ENTRY = '''# SPDX-License-Identifier: Apache-2.0
"""wan_attn as the package `kernels` loads it. If one is installed or loaded already, that one is
used, because its op can be registered only once.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

if "wan_attn" not in sys.modules and importlib.util.find_spec("wan_attn") is None:
    sys.path.append(str(Path(__file__).parent))
_wan_attn = importlib.import_module("wan_attn")
__all__ = list(_wan_attn.__all__)
globals().update({_name: getattr(_wan_attn, _name) for _name in __all__})
'''


def variants(target: Target) -> list[tuple[str, str]]:
    """[(name of a folder, kind of backend)] that this wheel serves."""
    if not target.triple:
        return [("torch-universal", "cpu")]
    system = f"{MACHINES[target.machine]}-{SYSTEMS[target.system]}"
    backends = [("cpu", "cpu"), *((cuda, "cuda") for cuda in CUDA if target.has_cuda)]
    return [(f"torch-stable-abi{OLDEST_TORCH}-{name}-{system}", kind) for name, kind in backends]


def digest(folder: Path) -> dict[str, str]:
    """{file: its hash} as kernels compares them."""
    return {
        file.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(file.read_bytes()).digest()
        ).decode()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "metadata.json"
    }


def lay_out(wheel: Path, out: Path) -> list[str]:
    """Writes every variant of one wheel into out/build; their names."""
    match = re.fullmatch(r"wan_attn-[\w.]+-py3-none-(\w+)", wheel.stem)
    if match is None or match[1] not in TARGETS:
        raise SystemExit(f"wheels: {wheel.name} is not one of ours")
    made = variants(TARGETS[match[1]])
    with zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if name.startswith("wan_attn/")]
        licence = next(n for n in packed.namelist() if n.endswith("dist-info/licenses/LICENSE"))
        record = json.loads(packed.read("wan_attn/build_record.json"))
        for name, kind in made:
            folder = out / "build" / name
            shutil.rmtree(folder, ignore_errors=True)
            packed.extractall(folder, names)
            (folder / "LICENSE").write_bytes(packed.read(licence))
            (folder / "__init__.py").write_text(ENTRY)
            about = {
                "id": f"_wan_attn_{kind}_{str(record['commit'])[:12].replace('-', '_')}",
                "name": "wan-attn",
                "version": VERSION,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": kind},
                "digest": {"algorithm": "sha256", "files": digest(folder)},
            }
            (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    return [name for name, _ in made]


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if there is no wheel."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("dist", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument("--out", type=Path, default=ROOT / "build/wheels/hub")
    args = parser.parse_args(arguments)
    wheels = sorted(args.dist.glob("wan_attn-*.whl"))
    shutil.rmtree(args.out, ignore_errors=True)
    for wheel in wheels:
        print(f"   {wheel.name}: {', '.join(lay_out(wheel, args.out))}")
    if not wheels:
        print(f"wheels: there is none in {args.dist}", file=sys.stderr)
    return int(not wheels)


if __name__ == "__main__":
    raise SystemExit(main())
