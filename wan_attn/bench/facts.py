# SPDX-License-Identifier: Apache-2.0
"""facts.py - what a figure depends on: the machine, its state meanwhile, peaks to divide by."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from wan_attn import config, console
from wan_attn.bench.timing import Clock, interleave, percentile
from wan_attn.doctor import facts as doctor_facts
from wan_attn.native import op
from wan_attn.version import __version__

# Dense TFLOP/s of bf16 and fp16 products with float32 sums, at the data sheet's clock: NVIDIA's
# architecture papers (GA100, GA102, Ada, Blackwell RTX) and the H100 data sheet. The longest name
# that a device's own name contains counts.
DATASHEET_TFLOPS = {
    "A100": 312.0,
    "A10": 125.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "L40S": 362.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
}

# Words that make another card of the same name.
_OTHER_CARDS = {"Laptop", "Mobile", "Ti", "SUPER", "D", "NVL"}

_SMI_FIELDS = (
    ("clocks.sm", "sm_mhz"),
    ("clocks.max.sm", "sm_mhz_max"),
    ("clocks.mem", "memory_mhz"),
    ("power.draw", "power_w"),
    ("power.limit", "power_limit_w"),
    ("temperature.gpu", "temperature_c"),
)
# What a driver calls the reasons for a lower clock; the older name, then the newer.
_THROTTLE_FIELDS = ("clocks_throttle_reasons.active", "clocks_event_reasons.active")
# Bits of nvmlClocksThrottleReasons / nvmlClocksEventReasons (nvml.h) that slow a busy card down.
_THROTTLE_BITS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "software thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs in order to judge or repeat a figure; no paths of users."""
    driver, _ = doctor_facts.nvidia_driver()
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "wan_attn": __version__,
        "build": op.build_info(),
        "binding": op.binding(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": doctor_facts.cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_features": list(op.cpu_features()),
        "device": device_name(device),
        "driver": driver or None,
        "packages": doctor_facts.packages(),
        "settings": {k: v for k, v in asdict(config.current()).items() if not _is_path(k)},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        }
    return dict(console.redact(facts))


def _is_path(field: str) -> bool:
    return any(v.field == field and v.kind == "path" for v in config.VARIABLES)


def device_name(device: torch.device) -> str:
    """The name people know it by."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{doctor_facts.cpu_name()}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class State:
    """The state of the machine at one moment; facts that cannot be asked for are absent."""

    values: dict[str, float]
    throttled: tuple[str, ...] = ()


def parse_smi(text: str, throttle: str = "") -> State:
    """The State in a line of `nvidia-smi --format=csv,noheader,nounits`, and the reasons' bits."""
    values = {}
    for (_, name), word in zip(_SMI_FIELDS, text.strip().split(","), strict=False):
        try:
            values[name] = float(word)
        except ValueError:  # "[N/A]"
            continue
    try:
        bits = int(throttle.strip(), 16) if throttle.strip() else 0
    except ValueError:
        bits = 0
    return State(values, tuple(said for bit, said in _THROTTLE_BITS.items() if bits & bit))


def state(device: torch.device) -> State:
    """Clocks, power and temperature of a GPU; the load of a CPU."""
    if device.type != "cuda":
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return State({} if load is None else {"load": round(load, 2)})
    index = torch.cuda.current_device() if device.index is None else device.index
    text = _smi(",".join(field for field, _ in _SMI_FIELDS), index)
    reasons = next((answer for field in _THROTTLE_FIELDS if (answer := _smi(field, index))), "")
    return parse_smi(text, reasons)


def _smi(query: str, index: int) -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    words = [tool, f"--id={index}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def warnings_of(before: State, after: State, device: torch.device) -> list[str]:
    """What makes the figures doubtful, in words."""
    said = []
    reasons = sorted({*before.throttled, *after.throttled})
    if reasons:
        said.append(f"the GPU held its clock down while measuring: {', '.join(reasons)}")
    if device.type == "cuda" and not after.values:
        said.append("nvidia-smi does not answer: clocks and throttling are not known")
    load = before.values.get("load")
    if load is not None and load > 0.5 * (os.cpu_count() or 1):
        said.append(f"the machine was busy before measuring began (load {load:g})")
    return said


def datasheet_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns TFLOP/s of the card's data sheet, for half types; None: not known."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    return datasheet_by_name(torch.cuda.get_device_name(device))


def datasheet_by_name(name: str) -> float | None:
    """The figure for the longest known name in this one, as whole words; None: another card's."""
    words = f" {name.replace('-', ' ')} "
    known = [n for n in DATASHEET_TFLOPS if f" {n} " in words]
    if not known or set(words.split()) & _OTHER_CARDS:
        return None
    return DATASHEET_TFLOPS[max(known, key=len)]


def matmul_tflops(
    device: torch.device, dtype: torch.dtype, clock: Clock, seconds: float = 1.5
) -> float:
    """The most that torch's own matrix product reaches here: a peak that software can reach."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found = interleave({"matmul": partial(torch.matmul, a, b)}, clock, seconds=seconds / 2)
        times = found.times.get("matmul", [])
        if times:
            best = max(best, 2 * size**3 / percentile(times, 10) / 1e9)
    return best
