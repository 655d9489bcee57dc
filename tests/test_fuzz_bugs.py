# SPDX-License-Identifier: Apache-2.0
"""test_fuzz_bugs.py - plants a bug in the CPU rows' gradients or in what checks their calls, and
demands that the fuzz campaign finds it within its first cases.

Those that other drivers cannot see: one byte too far, bits that depend on threads, memory that is
used before it is written, a NaN that should have stayed where it is, a refusal less.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import c_driver
import planted
from wan_attn.native import op

SEED = "12"
CSRC = c_driver.ROOT / "csrc"
CAMPAIGNS = c_driver.ROOT / "tests/fuzz"

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None
    or not sys.platform.startswith("linux")
    or platform.machine() not in ("x86_64", "AMD64")
    or "avx2" not in op.cpu_features(),
    reason="needs Linux on an x86-64 with AVX2, and a C compiler",
)


@dataclass(frozen=True)
class Bug(planted.Bug):
    """`unit`: a source that depends on the file; `cases`: it must be found among so many."""

    unit: str = "cpu/backward_avx2.c"
    campaign: str = "gradient"
    cases: int = 60
    needs: str = "avx2"


TILE, REFERENCE = "cpu/backward_tile.inc", "cpu/backward_ref.c"
BLOCKED, CHECK, TABLE = "cpu/backward_blocked.c", "core/backward_check.c", "core/backward.c"
BF16 = "cpu/backward_avx512_bf16.c"
SINGLE_FAULTS = 520  # of broken_gradient.c, all of them

BUGS = (
    Bug(
        *(
            "keys behind the last are read",
            TILE,
            "to.first + n, to.count - n, pair.head_k);\n        pack",
        ),
        "to.first + n, UNIT_LANES, pair.head_k);\n        pack",
    ),
    Bug(
        *("dV behind the last key is written", TILE, "&p->dv, pair.b, keys.first + n, there - n"),
        "&p->dv, pair.b, keys.first + n, UNIT_LANES",
    ),
    Bug(
        *(
            "what lies between rows is written",
            TILE,
            "rows->row[i], dtype, d, step->call->head_dim,",
        ),
        "rows->row[i], dtype, d, step->plan.width,",
    ),
    Bug("dK begins with what was there", TILE, "memset(to.dk_t, 0, 2 *", "memset(to.dk_t, 0, 1 *"),
    Bug(
        "weights are off by 10^-4",
        TILE,
        "VEC p = EXP2(MUL(x, log2_e))",
        "VEC p = EXP2(MUL(x, SET1(1.44255f)))",
    ),
    Bug(
        *("NaN just before an odd first key", TILE, " || begin % UNIT || end % UNIT", "", BF16),
        needs="avx512_bf16",
    ),
    Bug(
        *("rows that fill up an eight see an infinite key", TILE),
        *("r.is_masked = r.last != rows->count && *panel->has_nonfinite_k;", ""),
    ),
    Bug("strides of lse's gradient", "core/backward.h", "i * p->dlse_row_stride]", "i]"),
    Bug(
        *("scratch is too small", BLOCKED, "2 * MULTIPLE + plan.width", "MULTIPLE", BLOCKED),
    ),
    Bug(
        *("threads share their scratch", BLOCKED, "worker * plan->scratch_floats"),
        *("0 * worker", BLOCKED),
        cases=200,
    ),
    Bug(
        "specification: its workspace",
        REFERENCE,
        "* 2 * sizeof(float)",
        "* sizeof(float)",
        REFERENCE,
    ),
    Bug("specification: a single key", REFERENCE, "if (is_single)", "if (0)", REFERENCE),
    Bug(
        "specification: a row's sums",
        REFERENCE,
        "call->seqlen_q + i;",
        "call->seqlen_q + i / 2;",
        REFERENCE,
    ),
    Bug(
        *("features that may not be used", TABLE, "call->params->cpu_features, reason"),
        *("0, reason", TABLE),
    ),
    *(
        Bug(name, CHECK, right, wrong, CHECK, "broken_gradient", SINGLE_FAULTS)
        for name, right, wrong in (
            ("a gradient's dtype", "if (t->dtype != like->dtype)", "if (0)"),
            ("a gradient's elements", "wan_attn_check_overlap(gradient, t, err)", "WAN_ATTN_OK"),
            (
                "dQ where something is read",
                "FIRST_WRITTEN, ALL, err",
                "FIRST_WRITTEN + 1, ALL, err",
            ),
            ("the workspace's place", "FIRST_WRITTEN, ALL, err", "FIRST_WRITTEN, WORKSPACE, err"),
            ("its size", "wan_attn_check_workspace(&p->call, err)", "WAN_ATTN_OK"),
            ("8-bit scores", "a->forward->precision != WAN_ATTN_EXACT", "0"),
            ("lists", "if (call->has_lists)", "if (0)"),
            ("no out", "may_be_absent = n == GRAD_LSE", "may_be_absent = n == 3 || n == GRAD_LSE"),
        )
    ),
)


def objects_of(csrc: Path, folder: Path, sources: list[Path]) -> None:
    c_driver.compile_objects("cc", folder, csrc, sources, includes=(c_driver.ROOT / "tests",))


@pytest.fixture(scope="module")
def right_objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the library, and in a folder of its own of each campaign."""
    folder = tmp_path_factory.mktemp("right")
    objects_of(CSRC, folder, [s for s in c_driver.sources(CSRC) if s.is_relative_to(CSRC)])
    for name in ("gradient", "broken_gradient"):
        (folder / name).mkdir()
        objects_of(CSRC, folder / name, [CAMPAIGNS / f"{name}.c"])
    return folder


def is_found_by(campaign: str, folder: Path, cases: int) -> bool:
    program = c_driver.link("cc", folder, *map(str, (folder / campaign).glob("*.o")))
    command = [str(program), SEED, "0", str(cases)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=300)
    return done.returncode != 0


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_is_found(bug: Bug, right_objects: Path, tmp_path: Path) -> None:
    if bug.needs not in op.cpu_features():
        pytest.skip(f"the bug is in a row that needs {bug.needs}")
    csrc, objects = bug.plant(CSRC, tmp_path), tmp_path / "objects"
    shutil.copytree(right_objects, objects)
    objects_of(csrc, objects, [csrc / bug.unit])
    assert is_found_by(bug.campaign, objects, bug.cases), f"{bug.name}: no case has noticed"
