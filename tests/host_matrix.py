# SPDX-License-Identifier: Apache-2.0
"""host_matrix.py - runs the tests of the integrations with other versions of their hosts.

    python tests/host_matrix.py [PACKAGE==VERSION[,PACKAGE==VERSION...] ...]

Each row gets a virtual environment of its own, gone afterwards, that borrows torch and everything
else from the Python that runs this and installs those versions beside it. Not part of `make test`:
it downloads some 20 MB a row.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from source_tree import ROOT

# A host's oldest version that is served, the ones at which something changed, and the newest. Hosts
# that need each other are named together. 4.49 to 4.51.3 is what Wan2.2 asks for.
ROWS = [
    "diffusers==0.34.0,transformers==4.51.3",
    "diffusers==0.35.0,transformers==4.55.4",
    "diffusers==0.36.0,transformers==4.57.1",
    "diffusers==0.39.0,transformers==4.57.1",
    "diffusers",
    "transformers==4.48.0",
    "transformers==4.49.0",
    "transformers==4.51.3",
    "transformers==4.53.0",
    "transformers==4.57.1",
    "transformers==5.0.0",
    "transformers",
]


def run(command: Sequence[str | Path], folder: Path) -> tuple[int, str]:
    """(exit status, output), with the environment's own Python and nothing of this one."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def make_environment(folder: Path) -> Path:
    """A Python that finds its own packages first, then this one's, and wan_attn in the tree."""
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    status, site = run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder
    )
    assert status == 0, site
    # .pth files of a borrowed folder are not read, so what they name is written down here.
    borrowed = [p for p in sys.path if p.endswith("site-packages")]
    lines = [str(ROOT), sysconfig.get_path("purelib"), *borrowed]
    Path(site.strip(), "borrowed.pth").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return python


def summary(output: str) -> str:
    """pytest's last line without its time, and what failed or why it was skipped."""
    last = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    said = re.sub(r" in [\d.]+s.*|=+ ?", "", last[-1]) if last else output[-2000:]
    lines = [line for line in output.splitlines() if re.match(r"(FAILED|ERROR|SKIPPED) ", line)]
    return "\n".join([said, *(f"    {line[:200]}" for line in lines)])


def try_row(row: str, folder: Path) -> bool:
    python = make_environment(folder)
    packages = row.split(",")
    # Those of the borrowed Python count as installed: torch, above all, is not asked for again.
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
    ]
    status, output = run([*pip, "--upgrade", *packages], folder)
    if status != 0:
        print(f"{row}\n    cannot be installed: {output.strip()[-600:]}", flush=True)
        return False
    names = [re.split(r"[=<>!~]", package)[0] for package in packages]
    facts = "import torch, sys; print('torch', torch.__version__, 'Python', sys.version.split()[0]"
    facts += "".join(f", '{name}', __import__('{name}').__version__" for name in names) + ")"
    status, output = run([python, "-W", "ignore", "-c", facts], folder)
    print(f"{row}: {output.strip().splitlines()[-1]}", flush=True)
    tests = [ROOT / "tests" / "integrations" / f"test_{name}.py" for name in names[:1]]
    words: list[str | Path] = [
        "-q",
        "-rfEs",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        ROOT,
        "-c",
        ROOT / "pyproject.toml",
    ]
    status, output = run([python, "-m", "pytest", *words, *tests], folder)
    print("    " + summary(output), flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=ROWS, metavar="PACKAGE==VERSION,...")
    failed = []
    for row in parser.parse_args().rows:
        with tempfile.TemporaryDirectory(prefix="wan-attn-") as name:
            if not try_row(row, Path(name)):
                failed.append(row)
    print(f"failed: {'; '.join(failed)}" if failed else "all good")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
