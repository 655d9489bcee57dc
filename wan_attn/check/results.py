# SPDX-License-Identifier: Apache-2.0
"""results.py - what is known so far, the verdict on each kernel, and the one line of it all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from wan_attn.version import __version__

PASSED, WRONG, SKIPPED, NOT_RUN = STATES = ("passed", "failed", "skipped", "not run")
RIGHT, BAD, UNKNOWN = "right", "WRONG", "not checked"
ENDED_A_WORKER = "not run again, as it has ended a process"  # why an item was skipped
SAME = 1.05  # times that differ by less are those of one kernel
FORMAT = 2  # of the JSON object; 1 was that of a command before this one

# torch's kernels as people call them.
TITLES = {
    "torch-flash": "flash",
    "torch-cudnn": "cuDNN",
    "torch-efficient": "efficient",
    "torch": "its own choice",
}


@dataclass
class Results:
    """What is known so far.

    Attributes:
        plan: items, as dictionaries.
        facts: kernels, shapes, environment and state, as the first worker said them.
        ended: by number of the item: problem, detail, seconds.
        trouble: why the check as a whole ended early.
        no_gpu: why no GPU is checked; "" if one is.
    """

    plan: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    ended: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    trouble: str = ""
    no_gpu: str = ""

    def state(self, number: int) -> str:
        """One of STATES."""
        end = self.ended.get(number)
        if end is None:
            return NOT_RUN
        if end["problem"]:
            return WRONG
        return SKIPPED if isinstance(end["detail"].get("skipped"), str) else PASSED

    def items(self) -> list[dict[str, Any]]:
        """The plan with what became of it."""
        return [
            {**item, "state": self.state(n), **self.ended.get(n, {})}
            for n, item in enumerate(self.plan)
        ]

    @property
    def device(self) -> str:
        return str(self.facts.get("environment", {}).get("device", "an unknown device"))

    @property
    def is_wrong(self) -> bool:
        """Something that ran is wrong, or the check could not go on."""
        states = [self.state(number) for number in range(len(self.plan))]
        return bool(self.trouble) or WRONG in states or bool(self.broken())

    @property
    def is_fine(self) -> bool:
        """Nothing is wrong, and something has run."""
        return not self.is_wrong and PASSED in (item["state"] for item in self.items())

    def broken(self) -> dict[str, str]:
        """Kernels that failed while they were timed, with what they raised."""
        found = {}
        for item in self.speeds():
            for name, why in item["detail"]["broken"].items():
                found[f"{name}/{item['detail']['dtype']}"] = why
        return found

    def speeds(self) -> list[dict[str, Any]]:
        """Items with times."""
        return [i for i in self.items() if i["step"] == "speed" and i["state"] == PASSED]

    def kernels(self) -> dict[str, str]:
        """RIGHT, BAD or UNKNOWN, for every kernel. One that crashes or hangs is bad, too."""
        broken, found = self.broken(), {}
        items = self.items()
        for name in self.facts.get("kernels", []):
            states = [item["state"] for item in items if item["kernel"] == name]
            states += [WRONG for item in items if _is_blamed(item, name)]
            is_bad = WRONG in states or name in broken
            found[name] = BAD if is_bad else RIGHT if PASSED in states else UNKNOWN
        return found


def _is_blamed(item: dict[str, Any], kernel: str) -> bool:
    """Whether a speed item ended its process while this kernel ran."""
    row, _, dtype = kernel.partition("/")
    is_same = item.get("at") == row and item["argument"].endswith(f"/{dtype}")
    return item["state"] == WRONG and is_same


def as_dict(results: Results) -> dict[str, Any]:
    """The JSON object."""
    return {
        "format": FORMAT,
        "kind": "check",
        "verdict": line(results),
        "is_fine": results.is_fine,
        "seconds": round(results.seconds, 1),
        "no_gpu": results.no_gpu,
        "trouble": results.trouble,
        **{name: value for name, value in results.facts.items() if name != "kernels"},
        "kernels": results.kernels(),
        "items": results.items(),
    }


def line(results: Results) -> str:
    """The verdict, to paste."""
    states = results.kernels()
    count = {state: sum(s == state for s in states.values()) for state in (RIGHT, BAD, UNKNOWN)}
    said = f"wan_attn {__version__} on {results.device}: "
    said += f"{count[RIGHT]} of {len(states)} kernels right"
    wrong = [name for name, state in states.items() if state == BAD]
    if wrong:
        said += f", WRONG: {', '.join(wrong)}"
    if count[UNKNOWN]:
        said += f", {count[UNKNOWN]} not checked"
    parts = [said, _headline(results)]
    parts.append("the check ended early" if results.trouble else "")
    parts.append("no GPU was checked" if results.no_gpu else "")
    return "; ".join(part for part in parts if part)


def _headline(results: Results) -> str:
    """The first shape's time, and torch's; "": not measured."""
    speeds = results.speeds()
    if not speeds:
        return ""
    detail = speeds[0]["detail"]
    ours, torchs = best_of_ours(results, detail), best_of_torch(detail)
    said = f"{detail['title']} {detail['dtype']}"
    if ours is None:
        return f"{said}: no right kernel of ours was timed"
    said += f" {ours['p50_ms']:.4g} ms"
    if torchs is not None:
        times = torchs["p50_ms"] / ours["p50_ms"]
        title = TITLES.get(torchs["kernel"], torchs["kernel"])
        said += f", {times:.2f} times as fast as torch's best ({title})"
    return said


def best_of_ours(results: Results, detail: dict[str, Any]) -> dict[str, Any] | None:
    """Our fastest row of a shape that is not known to be wrong."""
    states = results.kernels()
    return best(
        detail, lambda r: r["ours"] and states.get(f"{r['kernel']}/{detail['dtype']}") != BAD
    )


def best_of_torch(detail: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest of torch's own kernels, by its name if torch's own choice is no faster."""
    named = best(detail, lambda r: r["kernel"].startswith("torch-"))
    every = best(detail, lambda r: r["kernel"].startswith("torch"))
    if named and every and named["p50_ms"] < SAME * every["p50_ms"]:
        return named
    return every


def best(
    detail: dict[str, Any], is_wanted: Callable[[dict[str, Any]], bool]
) -> dict[str, Any] | None:
    """The row of a shape with the lowest median among those; None: there is none."""
    found = [row for row in detail["rows"] if row["p50_ms"] and is_wanted(row)]
    return min(found, key=lambda row: float(row["p50_ms"]), default=None)
