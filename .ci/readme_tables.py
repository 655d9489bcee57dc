# SPDX-License-Identifier: Apache-2.0
"""readme_tables.py - generated tables of the documentation: kernels and environment variables;
and the lines that install, by wan_attn.version.PUBLISHED.

    python .ci/readme_tables.py            prints them
    python .ci/readme_tables.py --check    exit code 1 if a table in a file is not current
    python .ci/readme_tables.py --write    brings the files up to date

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. The rest of the file is left alone.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from wan_attn import config
from wan_attn.native import op
from wan_attn.native.kernels import backward_kernels
from wan_attn.version import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 130  # of a page
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


def variable_list(is_for_development: bool) -> str:
    """config.VARIABLES as Markdown: those for users, or those for development and tests."""
    lines = []
    for variable in config.VARIABLES:
        if variable.is_for_development != is_for_development:
            continue
        has_words = variable.kind in ("choice", "flag")
        values = " ".join(f"`{value}`" if has_words else value for value in variable.values)
        default = f"default `{variable.default}`" if variable.default else "unset by default"
        text = f"- `{variable.name}` ({values}; {default}): {variable.meaning}"
        lines += textwrap.wrap(
            text, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)


# The file, the name of its table, and what makes the table.
TABLES: tuple[tuple[Path, str, Callable[[], str]], ...] = (
    (Path("README.md"), "variables", functools.partial(variable_list, False)),
    (
        Path(".github/CONTRIBUTING.md"),
        "development variables",
        functools.partial(variable_list, True),
    ),
    (Path("docs/cards.md"), "kernels", kernel_table),
    (
        Path("docs/cards.md"),
        "kernels of gradients",
        lambda: kernel_table(backward_kernels()),
    ),
)


def up_to_date(text: str, name: str, table: str) -> str:
    """`text` with `table` between the markers of `name`.

    Raises:
        ValueError: the pair of markers is not there exactly once.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or begin in after or end in after:
        raise ValueError(f"{begin.strip()} ... {end} must be there exactly once")
    return f"{before}{begin}{table}\n{end}{after}"


def install_lines(text: str, is_published: bool = PUBLISHED) -> str:
    """`text` with our name instead of our folder in every `pip install`, once it is published."""
    if not is_published:
        return text
    return re.sub(
        r"(pip install(?: --[\w-]+)*) \.{1,2}[/\\]wan_attn\b(?![/\\])", r"\1 wan-attn", text
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python .ci/readme_tables.py", description=__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="1 if a table is not current")
    action.add_argument("--write", action="store_true", help="make the tables current")
    args = parser.parse_args(argv)
    exit_code = 0
    for file, name, make in TABLES:
        if not (args.check or args.write):
            print(f"{make()}\n")
            continue
        old = (ROOT / file).read_text(encoding="utf-8")
        new = up_to_date(old, name, make())
        if args.write:
            (ROOT / file).write_text(new, encoding="utf-8")
        elif new != old:
            print(f"{file}: the table of {name} is not current; run: make tables")
            exit_code = 1
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        old = page.read_text(encoding="utf-8")
        new = install_lines(old)
        if args.write:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            print(f"{page.relative_to(ROOT)}: wan_attn is published now; run: make tables")
            exit_code = 1
    return exit_code


if __name__ == "__main__":
    raise SystemExit(main())
