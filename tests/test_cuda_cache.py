# SPDX-License-Identifier: Apache-2.0
"""test_cuda_cache.py - a cache of machine code that may not be looked at."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from test_cuda_images import ROW, Machine, machine
from wan_attn.__main__ import main
from wan_attn.cuda import images
from wan_attn.doctor.cuda import facts

__all__ = ["machine"]  # the fixture


def name_too_long(machine: Machine) -> str:
    machine.cache = machine.home.parent / ("x" * 300) / "cubin"
    machine.patch.setenv("WAN_ATTN_CACHE_DIR", str(machine.cache.parent))
    machine.restart()
    return "File name too long"


def out_of_sight(machine: Machine) -> str:
    """As HOME=/root in a container of another user."""
    see, make = Path.lstat, Path.mkdir

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.is_relative_to(machine.home):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return options.pop("do")(path, *args, **options)

    machine.patch.setattr(Path, "lstat", lambda path: refuse(path, do=see))
    machine.patch.setattr(Path, "stat", lambda path, **o: refuse(path, do=os.stat, **o))
    machine.patch.setattr(Path, "mkdir", lambda path, **o: refuse(path, do=make, **o))
    return "Permission denied"


@pytest.mark.skipif(os.name == "nt", reason="owners and modes of POSIX")
@pytest.mark.parametrize("fault", (name_too_long, out_of_sight), ids=lambda f: f.__name__)
def test_a_cache_that_cannot_be_looked_at_is_left_out(
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    fault: Any,
) -> None:
    expected = fault(machine)
    caplog.set_level(logging.WARNING, logger="wan_attn")
    assert images.state(ROW, 86) == "to compile"
    assert main(["compile", "--list", "--arch", "86"]) == 0
    assert "to compile" in capsys.readouterr().out
    assert facts([86])["cached"] == 0 and expected in facts([86])["cache_problem"]
    made = machine.get()
    assert made.origin == "NVRTC 12.8" and expected in made.not_kept
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and expected in lines[0] and "WAN_ATTN_CACHE_DIR" in lines[0]
