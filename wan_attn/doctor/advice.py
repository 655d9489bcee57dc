# SPDX-License-Identifier: Apache-2.0
"""advice.py - what to do next on this machine: commands to paste, the most urgent first."""

from __future__ import annotations

from typing import Any

from wan_attn.doctor.facts import Machine

FORGOTTEN = "einops decord librosa peft"
"""What `import wan` needs and Wan2.2's requirements.txt does not list."""
# Stock Wan2.2 lists flash_attn in requirements.txt, and building it fails for many.
RECIPE = {
    "sh": (
        "grep -v flash_attn requirements.txt > requirements-wan.txt",
        f"python -m pip install -r requirements-wan.txt {FORGOTTEN}",
    ),
    "powershell": (
        "(Get-Content requirements.txt) -notmatch 'flash_attn' | Set-Content requirements-wan.txt",
        f"python -m pip install -r requirements-wan.txt {FORGOTTEN}",
    ),
}
# Quoted, because a shell may take * for file names; sh and PowerShell both read it so.
RUN = (
    'python -m wan_attn run generate.py --task ti2v-5B --size "1280*704" --ckpt_dir DIR'
    " --prompt ..."
)


def advice(report: dict[str, Any], machine: Machine) -> list[dict[str, Any]]:
    """[{"text": one sentence, "commands": [lines]}], in the order in which to do them."""
    steps: list[dict[str, Any]] = []

    def add(text: str, *commands: str) -> None:
        steps.append({"text": text, "commands": list(commands)})

    if report["settings_error"]:
        add(f"Change or unset the variable: {report['settings_error']}.")
    elif report["import_error"]:
        add(f"Make `import wan_attn` work: {report['import_error']}.")
    rows = [kernel["name"] for kernel in report["kernels"] if kernel["device"] == "cpu"]
    portable = rows[-1] if rows else ""  # best first: the last needs no vector extension
    for result in report["selftest"]:
        if result["failed"] and result["name"] != "flash_attention":
            add(*_around(result, portable))
    for proof in report["proofs"]:
        if proof["is_missing"]:
            add(
                f"Let our CUDA kernels show that they are right on {proof['device']}; until then"
                " PyTorch's compute (the first run does it, too):",
                "python -m wan_attn prove",
            )
    for finding in report["known"]:
        if finding["level"] == "problem":
            add(f"{finding['name']}: {finding['fix']}.")
    load_error = report["versions"].get("load_error")
    if load_error:
        add(f"The native library is missing, PyTorch computes instead: {load_error}.")
    if report["settings_error"] or not any(b["usable"] for b in report["backends"]):
        return steps
    if machine.gpus or machine.driver_gpus:
        if "flash_attn" not in machine.packages:
            windows = machine.system == "Windows"
            add(
                "Stock Wan2.2 asks for flash_attn, which wan_attn makes unnecessary. Install the"
                " rest:",
                *RECIPE["powershell" if windows else "sh"],
            )
        add("Run stock Wan2.2, unchanged, in its own folder:", RUN)
    else:
        add(
            "Stock Wan2.2 itself needs an NVIDIA GPU, and there is none here. In diffusers and"
            " ComfyUI wan_attn serves the CPU."
        )
    add("See it work without any weights:", "python -m wan_attn demo")
    return steps


def _around(result: dict[str, Any], portable: str) -> tuple[str, str]:
    """How to work without a path that is wrong, until it is fixed."""
    name, device = result["name"], result["device"]
    where = f"{result['kind']} {name} is wrong on {device}"
    report = "and report it with the output of doctor --json"
    if name in ("fa2", "fa3"):
        return f"{where}: leave FlashAttention out, and reinstall it.", "DISABLE_FLASH_ATTN=1"
    if result["kind"] == "kernel" and device == "cpu" and name != portable:
        return f"{where}: use the portable kernel, {report}.", "WAN_ATTN_CPU_ISA=portable"
    other = "sdpa" if name in ("torch", "chunked") else "torch"
    return f"{where}: use another backend, {report}.", f"USE_ATTENTION_BACKEND={other}"
