# SPDX-License-Identifier: Apache-2.0
"""same_cubins.py - whether CUDA kernels have the machine code that they had at another commit.

    python benchmarks/same_cubins.py f466047 [--arch 80 --arch 120]

Compiles every kernel that both have by the oldest NVRTC among Python's packages, for six
architectures, and compares byte by byte. Needs no GPU. Exit status 1 if one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (75, 80, 86, 89, 90, 120)


def hashes(archs: list[int]) -> dict[str, str]:
    """Every kernel's cubin, of the wan_attn that Python finds."""
    from wan_attn.cuda import nvrtc, rows

    found = [nvrtc.load(option) for option in nvrtc.found() if "nvidia" in option.path.parts]
    compiler = min(found, key=lambda one: one.version)
    return {
        f"sm_{arch} {job.name}": hashlib.sha256(
            compiler.compile_and_tell(arch, job.texts(), job.options())[0]
        ).hexdigest()
        for arch in archs
        for job in rows.jobs_for(arch)
    }


def of(folder: Path, archs: list[int]) -> dict[str, str]:
    """Those of the wan_attn in this folder, by a Python of its own."""
    script = "import sys; sys.path[:0] = sys.argv[1:3]; import same_cubins; same_cubins.tell()"
    command = [sys.executable, "-c", script, str(folder), str(ROOT / "benchmarks")]
    done = subprocess.run(
        [*command, *map(str, archs)], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    told: dict[str, dict[str, str]] = json.loads(done.stdout)
    package = told.pop("package")["at"]
    assert Path(package).is_relative_to(folder), f"{package} is another wan_attn"
    return told["hashes"]


def tell() -> None:
    """In of()'s Python."""
    import wan_attn.cuda

    made = hashes([int(arch) for arch in sys.argv[3:]])
    print(json.dumps({"package": {"at": wan_attn.cuda.__file__}, "hashes": made}))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS)
    args = parser.parse_args()
    archs = args.arch or list(ARCHS)
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        then_at = Path(folder).resolve() / "then"
        subprocess.run([*git, "add", "--quiet", "--detach", str(then_at), args.commit], check=True)
        try:
            then = of(then_at, archs)
        finally:
            subprocess.run([*git, "remove", "--force", str(then_at)], check=True)
    now = of(ROOT, archs)
    both = [name for name in now if name in then]
    other = [name for name in both if now[name] != then[name]]
    print(f"{len(both)} kernels that both have: {len(other)} have other machine code")
    for name in other:
        print(f"  {name}")
    return 1 if other or not both else 0


if __name__ == "__main__":
    sys.exit(main())
