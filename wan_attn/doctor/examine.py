# SPDX-License-Identifier: Apache-2.0
"""examine.py - the whole examination: every part in turn, and the verdict; a part that breaks is
noted, and the others go on."""

from __future__ import annotations

import dataclasses
import functools
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import wan_attn
from wan_attn import config
from wan_attn.doctor import advice, facts, known
from wan_attn.doctor.facts import Guard, Machine
from wan_attn.version import __version__

SCHEMA = 1  # of the report; fields are only ever added


def examine(selftest: bool = True, isolated: bool = True) -> dict[str, Any]:
    """The whole report as plain values."""
    start = time.perf_counter()
    guard = Guard()
    machine = facts.machine(guard)
    settings_error, variables = guard.run("settings", _settings, (None, []))
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": _versions(machine),
        "devices": {
            "cpu": {},
            "gpus": [dataclasses.asdict(gpu) for gpu in machine.gpus],
            "no_gpu": machine.no_gpu_reason,
        },
        "packages": machine.packages,
        "settings": variables,
        "settings_error": settings_error,
        "unknown_variables": guard.run("variables", config.unknown, []),
        "import_error": None if wan_attn._import_error is None else str(wan_attn._import_error),
        "backends": [],
        "kernels": [],
        "rope": [],
        "precision": [],
        "sparse": [],
        "cuda_kernels": {},
        "proofs": [],
        "choices": [],
        "selftest": [],
        "selftest_error": None,
        "failed_checks": guard.failed,
    }
    if report["import_error"] is None and settings_error is None:
        _examine_package(report, guard, selftest, isolated)
        machine.broken = guard.run("FlashAttention", facts.broken_packages, {})
    findings = guard.run("known problems", lambda: known.findings(machine), [])
    report["known"] = [dataclasses.asdict(finding) for finding in findings]
    report["verdict"], report["exit_code"] = verdict(report)
    report["next"] = guard.run("advice", lambda: advice.advice(report, machine), [])
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


def _examine_package(report: dict[str, Any], guard: Guard, selftest: bool, isolated: bool) -> None:
    """What needs wan_attn itself: its library, its paths, and the self-test."""
    with ThreadPoolExecutor(1) as pool:
        # The self-test's process has to import torch first; meanwhile this one asks the rest.
        tests = pool.submit(_selftest, True) if selftest and isolated else None
        report["devices"]["cpu"] = guard.run("CPU", facts.cpu_facts, {})
        report["versions"].update(guard.run("native library", facts.native_facts, {}))
        devices = guard.run("devices", _devices, ["cpu"])
        report["cuda_kernels"] = guard.run(
            "CUDA kernels", functools.partial(_cuda_kernels, report), {}
        )
        report["proofs"] = guard.run("proofs", functools.partial(_proofs, report), [])
        for what in ("backends", "kernels", "rope", "precision", "sparse", "choices"):
            report[what] = guard.run(what, functools.partial(_ask, what, devices), [])
        if selftest:
            report["selftest"], report["selftest_error"] = guard.run(
                "self-test",
                lambda: tests.result() if tests else _selftest(False),
                ([], "it could not be started"),
            )


def verdict(report: dict[str, Any]) -> tuple[str, int]:
    """One sentence and the exit code."""
    if report["settings_error"]:
        return "a variable is set to something impossible: nothing can run until it is changed", 1
    if report["import_error"]:
        return f"wan_attn cannot be imported: {report['import_error']}", 1
    for found in (*report.get("precision", ()), *report.get("sparse", ())):
        if found["error"]:
            return f"{found['error']}: nothing can run until it is changed", 1
    wrong = [r for r in report["selftest"] if r["failed"]]
    if wrong:
        names = ", ".join(f"{r['kind']} {r['name']} on {r['device']}" for r in wrong)
        return f"{len(wrong)} of {len(report['selftest'])} paths failed their self-test: {names}", 1
    if report["selftest_error"]:
        return "the self-test did not finish, see above", 1
    if not any(b["usable"] for b in report["backends"]):
        return "nothing is usable on this machine", 1
    problems = [f for f in report["known"] if f["level"] == "problem"]
    tested = [r for r in report["selftest"] if r["calls"]]
    said = (
        f"all {len(tested)} paths computed correctly"
        if tested
        else "usable; nothing was computed (--no-selftest)"
    )
    if problems:
        said += f"; known problems here: {', '.join(f['name'] for f in problems)}"
    return said, 0


def _settings() -> tuple[str | None, list[dict[str, Any]]]:
    error, settings = None, config.Settings()
    try:
        settings = config.refresh()
    except config.ConfigError as problem:
        error = str(problem)
    default = config.Settings()
    rows = []
    for variable in config.VARIABLES:
        value = getattr(settings, variable.field)
        is_set = value != getattr(default, variable.field)
        rows.append(
            {
                "name": variable.name,
                "value": _word(value),
                "is_default": not is_set,
                "meaning": variable.meaning,
            }
        )
    return error, rows


def _word(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else "" if value is None else str(value)


def _devices() -> list[str]:
    from wan_attn.doctor import selftest_paths

    return selftest_paths.devices()


def _ask(what: str, devices: list[str]) -> list[dict[str, Any]]:
    from wan_attn.config import current
    from wan_attn.doctor import paths, precision, rope, sparse

    if what == "precision":
        return [precision.facts(device, current()) for device in devices]
    if what == "sparse":
        return [sparse.facts(device, current()) for device in devices]
    if what == "choices":
        return paths.choices(devices, current())
    if what == "rope":
        return [rope.facts(device, current()) for device in devices]
    return paths.backends(devices) if what == "backends" else paths.kernels(devices)


def _cuda_kernels(report: dict[str, Any]) -> dict[str, Any]:
    from wan_attn.doctor import cuda

    capabilities = (gpu["capability"] for gpu in report["devices"]["gpus"])
    return cuda.facts(sorted({10 * major + minor for major, minor in capabilities}))


def _proofs(report: dict[str, Any]) -> list[dict[str, Any]]:
    from wan_attn.doctor import proofs

    return [proofs.facts(gpu["index"]) for gpu in report["devices"]["gpus"]]


def _versions(machine: Machine) -> dict[str, Any]:
    return {
        "wan_attn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": machine.torch,
        "cuda": machine.torch_cuda,
        "hip": machine.torch_hip,
        "cudnn": machine.cudnn,
        "driver": machine.driver,
    }


def _selftest(isolated: bool) -> tuple[list[dict[str, Any]], str | None]:
    from wan_attn.doctor import selftest_run

    if isolated:
        outcome = selftest_run.run_isolated()
        return [dataclasses.asdict(result) for result in outcome.results], outcome.error
    return [dataclasses.asdict(result) for result in selftest_run.run_here()], None
