# SPDX-License-Identifier: Apache-2.0
"""report.py - doctor's report as text: 100 columns, no colour, problems where they belong."""

from __future__ import annotations

from typing import Any

from wan_attn.console import heading, pairs, table, wrap
from wan_attn.doctor.known import cudnn_name

Report = dict[str, Any]

# What selftest.py does, for a reader of the report; said here because that module needs torch.
SELFTEST = (
    "calls: lengths 1, 257, 513; head_dim 64, 80, 128; bf16, fp16, fp32; causal, window, ragged; "
    "NaN as padding. The bound is twice what rounding the softmax weights and the result to the "
    "dtype can cost; libraries other than wan_attn may round the scores too."
)


def render(report: Report) -> str:
    """The whole text."""
    sections = (
        _versions,
        _devices,
        _settings,
        _choices,
        _memory,
        _backends,
        _kernels,
        _rope,
        _precision,
        _sparse,
        _cuda_kernels,
        _proofs,
        _selftest,
        _known,
        _failed,
        _next,
    )
    text = "wan_attn doctor" + "".join(
        "\n" + part for section in sections if (part := section(report))
    )
    return f"{text}\n{heading('result')}\n{wrap(report['verdict'])}"


def _versions(report: Report) -> str:
    v = report["versions"]
    cudnn = f", cuDNN {cudnn_name(v['cudnn'])}" if v["cudnn"] else ""
    cuda = (
        f"CUDA {v['cuda']}{cudnn}" if v["cuda"] else f"ROCm {v['hip']}" if v["hip"] else "no CUDA"
    )
    rows = [
        (
            "wan_attn",
            v["wan_attn"] + (f" (ABI {v['abi']}; {v['build']})" if v.get("build") else ""),
        ),
        (
            "binding",
            v.get("binding", "unknown")
            + (f": {v['binding_reason']}" if v.get("binding_reason") else ""),
        ),
        ("python", f"{v['python']} on {v['platform']}"),
        ("torch", f"{v['torch']} ({cuda})" if v["torch"] else "cannot be imported"),
        ("driver", f"NVIDIA {v['driver']}" if v["driver"] else "no NVIDIA driver found"),
        (
            "packages",
            ", ".join(f"{name} {number}" for name, number in report["packages"].items())
            or "none of interest",
        ),
    ]
    rows[1:1] = [("left out", f"by the build: {text}") for text in v.get("left_out", ())]
    if v.get("load_error"):
        rows.insert(1, ("native", f"not loaded: {v['load_error']}"))
    return f"{heading('versions')}\n{pairs(rows)}"


def _devices(report: Report) -> str:
    devices = report["devices"]
    rows = []
    if cpu := devices["cpu"]:
        features = " ".join(cpu["features"]) or "no vector extension that a kernel uses"
        rows.append(
            ("cpu", f"{cpu['name']} ({cpu['machine']}), {cpu['threads']} threads; {features}")
        )
    for gpu in devices["gpus"]:
        capability = ".".join(map(str, gpu["capability"]))
        rows.append(
            (
                f"cuda:{gpu['index']}",
                f"{gpu['name']}, compute capability {capability}, {gpu['memory_gib']} GiB",
            )
        )
    if not devices["gpus"]:
        rows.append(("cuda", f"none: {devices['no_gpu']}"))
    return f"{heading('devices')}\n{pairs(rows)}"


def _settings(report: Report) -> str:
    title = heading("environment variables")
    unknown = "".join(f"\n{wrap(f'unknown  {told}')}" for told in report["unknown_variables"])
    if report["settings_error"]:
        return f"{title}\n{wrap('WRONG  ' + report['settings_error'])}{unknown}"
    changed = [(s["name"], s["value"]) for s in report["settings"] if not s["is_default"]]
    rest = ", ".join(s["name"] for s in report["settings"] if s["is_default"])
    text = title + unknown
    if changed:
        text += "\n" + pairs(changed)
    return f"{text}\n{wrap(f'at their defaults: {rest}')}"


def _choices(report: Report) -> str:
    rows = [
        (
            c["device"],
            c["title"],
            c["dtype"],
            c["error"] or _runs(c),
        )
        for c in report["choices"]
    ]
    if not rows:
        return ""
    text = f"{heading('what would run', 'the calls of stock Wan2.2')}\n{table(rows)}"
    if not any(c["measured"] for c in report["choices"]):
        text += "\n" + wrap("none of them is measured here: python -m wan_attn tune")
    return text


def _runs(choice: dict[str, Any]) -> str:
    kernel = choice["kernel"] or choice["variant"]
    text = f"{choice['backend']}: {kernel}" if kernel else str(choice["backend"])
    return text + (f" (measured: {choice['measured']})" if choice["measured"] else "")


def _memory(report: Report) -> str:
    known = [c for c in report["choices"] if c["memory"]]
    if not known:
        return ""
    rows = []
    for c in known:
        whole = c["memory"]["device_bytes"]
        there = f"{c['device']}, {whole / 2**30:.0f} GiB" if whole else c["device"]
        block = f"{c['block_bytes'] / 2**30:.2f} GiB" if c["block_bytes"] else ""
        rows.append((there, c["title"], f"{c['memory']['peak_bytes'] / 2**30:.2f} GiB", block))
    note = "at most, without weights: of an attention call, and of stock Wan2.2's block around it"
    return f"{heading('memory', note)}\n{table(rows, ('device', '', 'call', 'block'))}"


def _backends(report: Report) -> str:
    return _usable("backends", "in the order of preference", report["backends"], "title")


def _kernels(report: Report) -> str:
    if report["backends"] and not report["kernels"]:
        reason = report["versions"].get("binding_reason") or "the table could not be read"
        return f"{heading('kernels of sdpa')}\n{wrap(f'none: {reason}')}"
    here = [row for row in report["kernels"] if row["device_is_here"]]
    text = _usable("kernels of sdpa", "best first", here, "description")
    absent: dict[str, int] = {}
    for row in report["kernels"]:
        if not row["device_is_here"]:
            absent[row["device"]] = absent.get(row["device"], 0) + 1
    for device, count in absent.items():
        text += f"\n{wrap(f'and {count} for {device}: there is no {device} device here')}"
    return text


def _rope(report: Report) -> str:
    rows = [
        (r["device"], r["kernel"] or f"the model's own steps: {r['reason']}")
        for r in report["rope"]
    ]
    if not rows:
        return ""
    note = "of q and k, in one pass, for stock Wan2.2 and diffusers"
    return f"{heading('RMS norm and RoPE', note)}\n{table(rows)}"


def _precision(report: Report) -> str:
    if not report["precision"]:
        return ""
    # Not at import: the module needs torch, and this one has to work without.
    from wan_attn.doctor import precision

    rows = [(found["device"], precision.told(found)) for found in report["precision"]]
    return f"{heading('8-bit scores', 'WAN_ATTN_PRECISION')}\n{table(rows)}"


def _sparse(report: Report) -> str:
    if not report["sparse"]:
        return ""
    from wan_attn.doctor import sparse  # it needs torch, and this module must not

    rows = [(found["device"], sparse.told(found)) for found in report["sparse"]]
    return f"{heading('blocks of keys left out', 'WAN_ATTN_SPARSE')}\n{table(rows)}"


def _cuda_kernels(report: Report) -> str:
    cuda = report["cuda_kernels"]
    if not cuda:
        return ""
    ready = " ".join(f"sm_{arch}" for arch in cuda["shipped"])
    if cuda["also"]:
        ready += f", which also serve {' '.join(f'sm_{arch}' for arch in cuda['also'])}"
    if not ready:
        ready = "none in this build" + (
            ": csrc/cuda has changed since, build again" if cuda["stale"] else ""
        )
    cache = cuda["cache"] or "none: this user has no home directory"
    if cuda["cache"]:
        size = f"{cuda['cached']} kernels, {cuda['cached_bytes'] / 2**20:.1f} MiB"
        cache += f": {cuda['cache_problem'] or size}"
    lines = [
        ("ready-made", ready),
        ("compiler", "; ".join(cuda["nvrtc"]) or f"none: {cuda['nvrtc_problem']}"),
        ("cache", cache),
    ]
    for gpu, states in cuda["gpus"].items():
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        lines.append((gpu, told or "no kernel for a GPU that old"))
    note = "what is not ready-made is compiled at first use, or by: python -m wan_attn compile"
    return f"{heading('CUDA kernels', note)}\n{pairs(lines)}"


def _proofs(report: Report) -> str:
    if not report["proofs"]:
        return ""
    from wan_attn.doctor import proofs  # it needs torch, and this module must not

    return "".join(proofs.render(proof) for proof in report["proofs"])


def _usable(title: str, note: str, rows: list[dict[str, Any]], about: str) -> str:
    lines = [
        (
            row["device"],
            row["name"],
            "yes" if row["usable"] else "no",
            f"{row[about]}; {', '.join(row['dtypes'])}" if row["usable"] else str(row["reason"]),
        )
        for row in rows
    ]
    if not lines:
        return ""
    return f"{heading(title, note)}\n{table(lines, ('device', 'name', 'usable', ''))}"


def _selftest(report: Report) -> str:
    tested = [result for result in report["selftest"] if result["calls"]]
    if not tested and not report["selftest_error"]:
        return ""
    parts, rows, failures = [heading("self-test", "against float64")], [], []
    for r in tested:
        told = f"worst error {r['error']:.1e}, {r['ratio']:.2f} of its bound"
        if r["failed"]:
            told = f"{r['failed']} of {r['calls']} calls wrong, see below"
            failures += [(f"{r['name']} on {r['device']}", failure) for failure in r["failures"]]
        state = "FAIL" if r["failed"] else "ok"
        rows.append((r["device"], r["kind"], r["name"], state, str(r["calls"]), told))
    if rows:
        parts.append(table(rows, ("device", "kind", "name", "", "calls", "")))
    if failures:
        parts += ["", table(failures), ""]
    if report["selftest_error"]:
        parts.append(wrap(f"NOT FINISHED: {report['selftest_error']}"))
    return "\n".join([*parts, wrap(SELFTEST)])


def _known(report: Report) -> str:
    if not report["known"]:
        return f"{heading('known problems')}\n{wrap('none of those that wan_attn knows')}"
    parts = [heading("known problems")]
    for f in report["known"]:
        parts.append(wrap(f"{f['level']:<8}{f['text']}.", "  ", " " * 10))
        parts.append(wrap(f"do: {f['fix']}.", " " * 10))
        parts.append(wrap(f"source: {f['source']}", " " * 10))
    return "\n".join(parts)


def _failed(report: Report) -> str:
    if not report["failed_checks"]:
        return ""
    rows = [(f["check"], f["error"]) for f in report["failed_checks"]]
    return f"{heading('checks that failed themselves', 'please report')}\n{pairs(rows)}"


def _next(report: Report) -> str:
    parts = [heading("what to do next")]
    for number, step in enumerate(report["next"], 1):
        parts.append(wrap(step["text"], f"  {number}. ", "     "))
        parts += [f"     {command}" for command in step["commands"]]  # never wrapped: to be pasted
    return "\n".join(parts) if len(parts) > 1 else ""
