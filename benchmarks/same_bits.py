# SPDX-License-Identifier: Apache-2.0
"""same_bits.py - whether the exact CPU rows compute the bits that they had at another commit.

    python benchmarks/same_bits.py 591ef06

Builds that commit's C library in a worktree of its own, and makes the same calls with both: every
exact row that both have and this CPU can run, each dtype, odd and even sizes, masks, lengths,
grouped heads, few queries and many. Exit status 1 if out or lse of any call differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"window_left": 9, "window_right": 20},
    {"lens": True},
    {"lens": True, "is_causal": True, "scale": 0.3},
)
SHAPES = ((1, 300, 4, 4), (5, 5, 4, 2), (17, 33, 3, 3), (70, 200, 4, 1), (200, 513, 2, 2))
HEAD_DIMS = (17, 64, 80, 128, 256)


def calls() -> Iterator[tuple[str, str, str]]:
    """(row, what is called, the bits of out and lse), of the wan_attn that Python finds."""
    import torch

    from wan_attn.native import op

    assert op.binding() != "torch", "the native library must load"
    features = set(op.cpu_features())
    mixed = (torch.float32, torch.float32, torch.bfloat16)
    for row in op.kernels():
        is_for_here = row.device == "cpu" and set(row.cpu_features) <= features
        if not is_for_here or getattr(row, "is_lossy", False):
            continue
        for dtypes in (*((dtype,) * 3 for dtype in row.dtypes), mixed):
            if dtypes == mixed and torch.bfloat16 not in row.dtypes:
                continue
            for head_dim in HEAD_DIMS:
                for number, shape in enumerate(SHAPES):
                    for mask in MASKS:
                        draw = torch.Generator().manual_seed(number)
                        yield (
                            row.name,
                            f"{dtypes} {head_dim} {shape} {mask}",
                            _bits(row, dtypes, head_dim, shape, dict(mask), draw),
                        )


def _bits(row: Any, dtypes: Any, head_dim: int, shape: Any, mask: Any, draw: Any) -> str:
    import torch

    seqlen_q, seqlen_k, heads_q, heads_k = shape
    sizes = ((seqlen_q, heads_q), (seqlen_k, heads_k), (seqlen_k, heads_k))
    operands = [
        (2 * torch.randn(2, seqlen, heads, head_dim, generator=draw)).to(dtype)
        for (seqlen, heads), dtype in zip(sizes, dtypes, strict=True)
    ]
    lens = (None, torch.tensor([seqlen_k, 2])) if mask.pop("lens", False) else (None, None)
    try:
        found = torch.ops.wan_attn.sdpa(*operands, *lens, return_lse=True, kernel=row.index, **mask)
    except RuntimeError as error:
        assert row.name in str(error), error
        return "refused"  # a head_dim that the row does not take
    data = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in found)
    return hashlib.sha256(data).hexdigest()


def of(folder: Path) -> dict[str, str]:
    """Every call's bits, computed by the wan_attn in this folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, str(Path(__file__).resolve()), "--print"]
    done = subprocess.run(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    assert Path(found["package"]).is_relative_to(folder), f"{found['package']} is another wan_attn"
    bits: dict[str, str] = found["bits"]
    return bits


def before(commit: str, folder: Path) -> dict[str, str]:
    """Those of another commit, built in this folder, which must not exist."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        build = [sys.executable, "setup.py", "--quiet", "build_native", "--inplace"]
        environment = {**os.environ, "WAN_ATTN_CUDA": "0"}
        subprocess.run(build, cwd=folder, env=environment, check=True)
        return of(folder)
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", default="591ef06")
    parser.add_argument("--print", action="store_true", help="the bits that this wan_attn computes")
    args = parser.parse_args()
    if args.print:
        import wan_attn

        bits = {f"{row}: {call}": bits for row, call, bits in calls()}
        print(json.dumps({"package": wan_attn.__file__, "bits": bits}))
        return 0
    now = of(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        then = before(args.commit, Path(folder) / "then")
    both = [call for call in now if call in then]
    computed = [call for call in both if now[call] != "refused"]
    other = [call for call in both if now[call] != then[call]]
    rows = sorted({call.partition(":")[0] for call in computed})
    print(f"{len(computed)} calls of {', '.join(rows)}: {len(other)} have other bits")
    for call in other[:20]:
        print(f"  {call}")
    return 1 if other or not computed else 0


if __name__ == "__main__":
    sys.exit(main())
