# SPDX-License-Identifier: Apache-2.0
"""conftest.py - what every test shares: hypothesis profiles, threads, seeds, binding."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

# A worker that spins while it waits starves the other processes of a small machine. OpenMP reads
# this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What runs must depend neither on how fast this machine is nor on what it has measured before.
# test_tuning.py and its like switch it on, with a cache folder of their own.
os.environ.setdefault("WAN_ATTN_TUNE", "off")

import hypothesis
import pytest
import torch

pytest_plugins = ["integration_fixtures"]  # of tests/support

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,  # the same calls on every run: a red run can be repeated
    deadline=None,  # timings never decide a test
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "explore", parent=hypothesis.settings.get_profile("ci"), derandomize=False
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What a test has recorded as "summary" is printed at the end, also from workers of xdist."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "summary" and report.when == "call":
                terminalreporter.write_line(str(text))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20261121)


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    """log.enable() within caplog.at_level() keeps that level as the one to go back to."""
    logger = logging.getLogger("wan_attn")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def binding() -> str:
    """The binding that this process uses; test_bindings.py runs the op's tests under the others."""
    import wan_attn.native.op

    return wan_attn.native.op.binding()


@pytest.fixture
def native(binding: str) -> str:
    """For tests of the native library itself: skips where WAN_ATTN_BINDING=torch does without."""
    if binding == "torch":
        pytest.skip("computed by torch (WAN_ATTN_BINDING=torch): the native library is not used")
    return binding


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may call torch.set_num_threads; put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def default_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs as if no variable of ours were set."""
    from wan_attn import config

    for variable in config.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("WAN_ATTN_TUNE", "off")  # see above
    config.refresh()
    yield
    monkeypatch.undo()
    config.refresh()


@pytest.fixture
def as_in_a_new_process() -> Iterator[None]:
    """Nothing is known of earlier calls, and nothing is left behind: choices, layers, reports."""
    from wan_attn import config

    config.forget()
    yield
    config.forget()
