# SPDX-License-Identifier: Apache-2.0
"""test_cpu_bugs.py - plants a bug in the CPU rows' source and demands that the C driver finds it.

A test of the tests: each bug is one that could be made tomorrow. The driver calls every row
of a library that is right but for one file.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import c_driver
import planted
from wan_attn.native import op

CALLS = "100"
CSRC = c_driver.ROOT / "csrc"

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None
    or platform.machine() not in ("x86_64", "AMD64")
    or "avx2" not in op.cpu_features(),
    reason="needs an x86-64 with AVX2, and a C compiler",
)


@dataclass(frozen=True)
class Bug(planted.Bug):
    """`unit`: a source that depends on the file."""

    unit: str = "cpu/sdpa_avx2.c"
    needs: str = "avx2"


GRADIENT, GRADIENTS = "cpu/backward_tile.inc", "cpu/backward_blocked.c"
FEW_GRADIENT = "cpu/backward_few.inc"
FEW, ROPE = "cpu/sdpa_few.inc", "cpu/rope_token.inc"
LISTS, LISTED = "cpu/sdpa_lists.inc", "cpu/sdpa_avx2_listed.c"
UNLISTED = "cpu/sdpa_unlisted.inc"
TILE, PACK, FMA, BLOCKED, AMX = (
    f"cpu/{name}"
    for name in ("sdpa_tile.inc", "sdpa_pack.inc", "sdpa_fma.inc", "blocked.c", "sdpa_amx.c")
)
BUGS = (
    Bug("O is not rescaled", FMA, "FMA(LOAD(TO_VECTOR(r, v)), alpha##v, c##r##v)", "c##r##v"),
    Bug(
        "row_sum is not rescaled",
        TILE,
        "LOAD(x->alpha + v * LANES), sum[v])",
        "SET1(1.0f), sum[v])",
    ),
    Bug(
        *("the end of the mask is not looked at", TILE),
        *(" || x->all.end < keys->first_key + r.last", ""),
    ),
    Bug("the last visible key is hidden", TILE, "end > 0 ? end <", "end > 0 ? --end <"),
    Bug("a row that sees nothing has an lse", TILE, "sees[m] ? lse : -INFINITY", "lse"),
    Bug(
        "rows behind the output are written",
        PACK,
        "from->rows - m, tile->head",
        "PANEL, tile->head",
    ),
    Bug("a row that sees nothing is not zero", PACK, "sees[m + i] ? x[i] : zero_units()", "x[i]"),
    Bug(
        "row_max ignores a block's last keys",
        TILE,
        "(plan, keys, x, r, s, x->alpha), r.last}",
        "(plan, keys, x, r, s, x->alpha), 0}",
    ),
    Bug("a negative scale", BLOCKED, "? -1.0f", "? 1.0f", BLOCKED),
    Bug(
        "blocks that a window cuts are not packed",
        BLOCKED,
        "to.first_key + to.count > begin",
        "to.first_key >= begin",
        BLOCKED,
    ),
    Bug("few: O is not rescaled", FEW, "SET1(alpha), sum[i])", "SET1(1.0f), sum[i])"),
    Bug("few: a tail of O is not rescaled", FEW, "SET1(alpha), sum));", "SET1(1.0f), sum));"),
    Bug("few: row_sum is not rescaled", FEW, ".sum * x->row[m].alpha +", ".sum +"),
    Bug("few: weights behind the last key", FEW, "s[n] = 0.0f;", "s[n] = 1.0f;"),
    Bug("few: the last key's scores twice", FEW, "(n + i < to ? n + i : to - 1)", "(to - 1)"),
    Bug("few: a mask's end is not looked at", FEW, "keys.end < count ?", "0 ?"),
    Bug("few: a row that sees nothing is not zero", FEW, ": zero_units());", ": set_units(1.0f));"),
    Bug("few: heads of a task are one", FEW, "tile->head + m / p->seqlen_q", "tile->head"),
    Bug(
        "few: one task too few",
        BLOCKED,
        "plan.few_heads, comp",
        "plan.few_heads - 1, comp",
        BLOCKED,
    ),
    Bug(
        *("query heads of a group are one", BLOCKED),
        *(" * heads_per_pair + head % heads_per_pair", " * heads_per_pair", BLOCKED),
    ),
    Bug(
        *("lists: a part begins with its packed block", LISTS),
        *("part.first = part.first > 0 ? part.first : 0;", "part.first = 0;", LISTED),
    ),
    Bug(
        *("lists: a part ends with its packed block", LISTS),
        *("part.last < keys.count ? part.last : keys.count", "keys.count", LISTED),
    ),
    Bug(
        *("lists: a short block's mean weighs as a whole one's", UNLISTED),
        *("(float)wan_attn_keys_in_block(n, len_k)", "(float)WAN_ATTN_BLOCK", LISTED),
    ),
    Bug(
        *("lists: the means of listed blocks count, too", UNLISTED),
        *("n = wan_attn_next_other(list, &at, n + 1)) {", "n++) {", LISTED),
    ),
    Bug(
        *("lists: a row that sees no listed block is not zero", LISTS),
        *(" && wan_attn_sees_listed(list, &at, keys)", "", LISTED),
    ),
    Bug(
        *("lists: a row sees the mean of a block that it sees in part", "core/lists.h"),
        *(": keys.end / WAN_ATTN_BLOCK}", ": wan_attn_key_blocks(keys.end)}", LISTED),
    ),
    Bug(
        *("lists: one list for all blocks of queries", "core/lists.h"),
        *("block = row / WAN_ATTN_BLOCK", "block = row / WAN_ATTN_BLOCK * 0", LISTED),
    ),
    Bug(
        *("AMX: the last step of O is not added", AMX),
        *("    do_chores(&last, last.rows);", "", AMX, "amx"),
    ),
    Bug(
        *("AMX: maxima of all but the last step are lost", AMX),
        *("(steps > 1 ? steps - 1 : 0) * STEP", "steps * STEP", AMX, "amx"),
    ),
    Bug(
        *("rope: the tail of a head is not summed", ROPE, "d < p->head_dim; d += UNIT_LANES, n++"),
        *("d + UNIT_LANES <= p->head_dim; d += UNIT_LANES, n++", "cpu/rope_avx2.c"),
    ),
    Bug(
        *("rope: every head has the first one's weight", ROPE, "h * p->weight.head_stride"),
        *("0", "cpu/rope_avx2.c"),
    ),
    Bug(
        *("rope: sines where cosines belong", "cpu/rope_avx2.c", "_mm256_movedup_pd(angle)"),
        *("angle", "cpu/rope_avx2.c"),
    ),
    Bug(
        *("rope: a product is rounded to float32", "cpu/rope_ref.c", "double bc = b * cosine,"),
        *("double bc = (float)(b * cosine),", "cpu/rope_ref.c"),
    ),
    Bug(
        *("rope: lines and columns change places", "cpu/rope.c", "t % grid->width * p->table"),
        *("t / grid->width % grid->height * p->table", "cpu/rope.c"),
    ),
    Bug(
        *("rope: a task's last token is left out", "cpu/rope.c", "for (; token.s < end;"),
        *("for (; token.s + 1 < end;", "cpu/rope.c"),
    ),
    *(
        Bug(f"gradients: {name}", GRADIENT, right, wrong, "cpu/backward_avx2.c")
        for name, right, wrong in (
            ("delta is left out", "SUB(LOAD(dp + at), of_row)", "LOAD(dp + at)"),
            ("lse has none", "dout.row[i], out) -", "dout.row[i], out) - 0.0f *"),
            ("the last visible key is hidden", "end > 0 ? end < PANEL", "end > 0 ? --end < PANEL"),
            ("rows without keys are read", "= sees(keys_of(step, &pair, row));", "= 1;"),
            ("dK is not scaled", "p->dk.dtype, scale,", "p->dk.dtype, 1.0f,"),
            ("dS of a strip before stays", "clear_ds(step, &rows, panel, 0, r.first);", ""),
            ("dK is dV's sum", "first, steps, ds,", "first, steps, p,"),
            ("a masked panel is whole", "r.is_masked = 1;", "r.is_masked = 0;"),
            ("rows that see none of a panel", "r.last = m + 1;", "r.last = m;"),
            ("dQ's last keys", "(count + UNIT - 1) / UNIT,", "(count - 1) / UNIT,"),
        )
    ),
    Bug(
        *("gradients: one key weighs what rounding makes of it", "cpu/backward_blocked.h"),
        *("*p = 1.0f;", "*p *= 1.01f;", "cpu/backward_avx2.c"),
    ),
    *(
        Bug(f"gradients of few rows: {name}", FEW_GRADIENT, right, wrong, "cpu/backward_avx2.c")
        for name, right, wrong in (
            ("a sum of one lane", "sum += x->sum[i] * weight;", "sum += x->sum[0] * weight;"),
            ("delta is not divided", "dp_sum / sum - dlse", "dp_sum - dlse"),
            ("masked keys weigh", "SELECT(seen, weight, SET1(0.0f))", "weight"),
        )
    ),
    Bug(
        *("gradients of few rows: the specification's sum", "cpu/backward_ref.c"),
        *("x->sum *= exp(before - x->top);", "", "cpu/backward_ref.c"),
    ),
    Bug(
        *("gradients: query heads of a pair are one", GRADIENTS, "head_k * share + step->head"),
        *("head_k * share", GRADIENTS),
    ),
    Bug(
        *("gradients: dK and dV of one head alone", GRADIENTS, "step.head < call->num_heads_q /"),
        *("step.head < 1 + 0 /", GRADIENTS),
    ),
    Bug(
        *("gradients: the specification's delta", "cpu/backward_ref.c", "(sum - rows->dlse[m])"),
        *("(sum)", "cpu/backward_ref.c"),
    ),
    Bug(
        *("gradients: lengths are not checked", "core/backward_check.c"),
        *("wan_attn_check_lengths(&p->call, err)", "WAN_ATTN_OK", "core/backward_check.c"),
    ),
    Bug(
        "the last task is left out",
        "cpu/threads.c",
        "job j = {0, 0, count, fn, ctx}",
        "job j = {0, 0, count > 1 ? count - 1 : count, fn, ctx}",
        "cpu/threads.c",
    ),
)


@pytest.fixture(scope="module")
def right_objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("right")
    c_driver.compile_objects("cc", folder, CSRC, c_driver.sources(CSRC))
    return folder


def run_driver(folder: Path) -> subprocess.CompletedProcess[str]:
    program = c_driver.link("cc", folder)
    return subprocess.run(
        [program, CALLS], capture_output=True, text=True, errors="replace", check=False, timeout=120
    )


def test_without_a_bug(right_objects: Path) -> None:
    done = run_driver(right_objects)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_is_found(bug: Bug, right_objects: Path, tmp_path: Path) -> None:
    if bug.needs not in op.cpu_features():
        pytest.skip(f"the bug is in a row that needs {bug.needs}")
    csrc, objects = bug.plant(CSRC, tmp_path), tmp_path / "objects"
    shutil.copytree(right_objects, objects, ignore=shutil.ignore_patterns("driver"))
    c_driver.compile_objects("cc", objects, csrc, [csrc / bug.unit])
    assert run_driver(objects).returncode != 0, f"{bug.name}: no test has noticed"
