# SPDX-License-Identifier: Apache-2.0
"""readme_tables.py - the tables of README.md, made from the kernel table and from config.VARIABLES.

    python .ci/readme_tables.py              print them
    python .ci/readme_tables.py --check F    exit code 1 if a table in F is not what it would be
    python .ci/readme_tables.py --write F    bring F up to date

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; everything else in F is left alone.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from wan_attn import config
from wan_attn.native import op

NEWEST_ARCH = 999  # WAN_ATTN_NEWEST_ARCH: no upper bound


def _dtypes(row: op.KernelInfo) -> str:
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    return " ".join(short[str(dtype).removeprefix("torch.")] for dtype in row.dtypes)


def _head_dims(row: op.KernelInfo) -> str:
    if row.head_dim_min == row.head_dim_max:
        return str(row.head_dim_min)
    return f"{row.head_dim_min} to {row.head_dim_max}"


def _needs(row: op.KernelInfo) -> str:
    if row.device == "cpu":
        return " ".join(row.cpu_features) or "any CPU"
    low, high = (f"{arch // 10}.{arch % 10}" for arch in (row.arch_min, row.arch_max))
    if row.arch_max >= NEWEST_ARCH:
        return f"compute capability {low} and newer"
    return f"compute capability {low}" + (f" to {high}" if high != low else "")


def _line(rows: Sequence[op.KernelInfo]) -> str:
    """One line for one row, or for rows that differ in head_dim alone."""
    first = rows[0]
    lossy = "; lossy, runs only when asked for" if first.is_lossy else ""
    name, head_dims = first.name, _head_dims(first)
    if len(rows) > 1:
        name = f"{name.rpartition('_d')[0]}_d*"
        head_dims = ", ".join(_head_dims(row) for row in rows)
    return (
        f"| `{name}` | {_needs(first)} | {_dtypes(first)} | {head_dims} |"
        f" {first.description}{lossy} |"
    )


def kernel_table(rows: Sequence[op.KernelInfo] | None = None) -> str:
    """The kernel table (default: of this build) as Markdown, best row first."""
    lines = ["| Kernel | Needs | dtype | head_dim | What it is |", "|---|---|---|---|---|"]
    every = op.kernels() if rows is None else rows

    def family(row: op.KernelInfo) -> tuple[object, ...]:
        stem = re.sub(r"_d\d+$", "_d", row.name)
        return stem, row.description, row.arch_min, row.arch_max, row.is_lossy

    lines += [_line(list(alike)) for _, alike in itertools.groupby(every, family)]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "kernels": kernel_table,
    "variables": config.markdown_table,
}


def up_to_date(text: str) -> str:
    """`text` with every table between markers made anew.

    Raises:
        ValueError: a table's pair of markers is not there exactly once.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end) or begin in after or end in after:
            raise ValueError(f"{begin.strip()} ... {end} must be there exactly once")
        text = f"{before}{begin}{table()}\n{end}{after}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python .ci/readme_tables.py", description=__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", type=Path, metavar="FILE", help="1 if a table is not current")
    action.add_argument("--write", type=Path, metavar="FILE", help="make the tables current")
    args = parser.parse_args(argv)
    file: Path | None = args.check or args.write
    if file is None:
        print("\n\n".join(table() for table in TABLES.values()))
        return 0
    old = file.read_text(encoding="utf-8")
    new = up_to_date(old)
    if args.write:
        file.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{file}: a generated table is not current; run: make tables")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
