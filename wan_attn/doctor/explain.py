# SPDX-License-Identifier: Apache-2.0
"""explain.py - the choice for one call and every refusal, as plain values and as text."""

from __future__ import annotations

from typing import Any

import torch

from wan_attn.backends import REGISTRY
from wan_attn.config import Settings
from wan_attn.console import heading, pairs, table, without_name, wrap
from wan_attn.doctor import memory, precision, proofs, rope, sparse
from wan_attn.log import dtype_name
from wan_attn.native import backward, op
from wan_attn.native.kernels import backward_kernels
from wan_attn.request import Request
from wan_attn.selection.choose import Choice, order, select, why_not
from wan_attn.selfcheck import proof
from wan_attn.tuning import words
from wan_attn.tuning.kinds import why_never
from wan_attn.workloads import Workload

LOSSY = " (lossy: only where it is asked for)"
LISTS = "; takes block lists"


def explain(request: Request, call: Workload, settings: Settings) -> dict[str, Any]:
    """The choice, and every backend's and kernel row's own answer, as plain values."""
    error, backend, kernel, variant, measured, needs = None, None, None, None, "", None
    gradient = None
    try:
        choice = select(request, settings)
        backend, kernel, variant = choice.backend, choice.kernel_name, choice.variant or None
        gradient = choice.gradient_name
        measured = _measured(choice, call, settings)
        needs = memory.facts(request, choice.backend, choice.variant)
    except RuntimeError as problem:  # nothing takes it, or WAN_ATTN_STRICT=1 and the named does not
        error = str(problem)
    asked = order(request, settings)
    backends = [
        {
            "name": name,
            "title": REGISTRY[name].TITLE,
            "reason": _why_not(name, request, settings),
            "asked": name in asked,
            "chosen": name == backend,
        }
        for name in [*asked, *(name for name in REGISTRY if name not in asked)]
    ]
    unused = ""
    if op.binding() == "torch":
        unused = f"the native library is not used: {op.binding_reason()}"
    kernels = [
        {
            "index": k.index,
            "name": k.name,
            "description": k.description
            + (LOSSY if k.is_lossy else LISTS if k.takes_block_lists else ""),
            "reason": unused or without_name(op.why_not(request, k.index), k.name),
        }
        for k in op.kernels()
    ]
    return {
        "schema": 1,
        "call": _describe(request, call),
        "note": _absent(request.device),
        "proof": _proof(request.device),
        "settings": {"forced_by": settings.forced_by, "strict": settings.strict},
        "backend": backend,
        "kernel": kernel,
        "variant": variant,
        "gradient": gradient,
        "measured": measured,
        "memory": needs,
        "rope": rope.facts(str(request.device), settings),
        "precision": precision.facts(str(request.device), settings, request),
        "sparse": sparse.facts(str(request.device), settings, request),
        "error": error,
        "backends": backends,
        "kernels": kernels,
        "gradient_kernels": _of_gradients(request, unused) if request.needs_grad else [],
        "no_kernels": "" if kernels else op.binding_reason(),
    }


def _of_gradients(request: Request, unused: str) -> list[dict[str, Any]]:
    """The rows that compute gradients, as those of attention are told."""
    return [
        {
            "index": k.index,
            "name": k.name,
            "description": k.description,
            "reason": unused or without_name(backward.why_not(request, k.index), k.name),
        }
        for k in backward_kernels()
    ]


def _measured(choice: Choice, call: Workload, settings: Settings) -> str:
    """What measurements say about the call, and how to repeat them, in words."""
    if settings.tune == "off":
        return "nothing counts: WAN_ATTN_TUNE=off"
    if settings.forced_backend is not None:
        return f"nothing counts: {settings.forced_by}"
    entry, repeat = choice.entry, f"{words.REPEAT} --shape {call.shape}"
    repeat += " --grad" * choice.request.needs_grad
    if entry is not None and choice.is_measured:
        told = f"{words.figures(entry)}: {choice.candidate.title}. {words.age(entry)}, on"
        return f"{told} {entry.slice}; to repeat: {repeat}"
    if entry is not None:
        return f"not decided: there was no time within a call; to decide: {repeat}"
    if reason := why_never(choice.request):
        return f"nothing: {reason}"
    if choice.request.needs_grad:
        return f"nothing: a call that wants a gradient is measured ahead of time: {repeat}"
    if choice.turn is None:
        return "nothing: there is nothing to choose from"
    needed = choice.turn.needed
    when = "the first call" if needed == 1 else f"call {needed}"
    return f"nothing yet: {when} of this kind will be; to do it now: {repeat}"


def _why_not(name: str, request: Request, settings: Settings) -> str | None:
    """A backend's own answer; of a device in trouble, what it says."""
    try:
        return why_not(name, request, settings, version=None, wrapper_failed=False)
    except RuntimeError as error:
        return str(error)


def _describe(request: Request, call: Workload) -> dict[str, Any]:
    return {
        "shape": call.shape,
        "title": call.title,
        "query": [request.batch, request.seqlen_q, request.num_heads_q, request.head_dim],
        "key": [request.batch, request.seqlen_k, request.num_heads_k, request.head_dim],
        "dtype": dtype_name(request.dtype),
        "qk_dtype": dtype_name(request.query_dtype),
        "device": str(request.device),
        "is_causal": request.is_causal,
        "window": list(request.window),
        "has_q_lens": request.has_q_lens,
        "has_k_lens": request.has_k_lens,
        "needs_grad": request.needs_grad,
        "return_lse": request.return_lse,
        "flops": call.flops,
    }


def render(answer: dict[str, Any]) -> str:
    """The answer as text."""
    call = answer["call"]
    dtype = (
        call["dtype"]
        if call["qk_dtype"] == call["dtype"]
        else f"{call['dtype']} (query, key {call['qk_dtype']})"
    )
    rows = [
        (
            "call",
            f"{call['shape']}  {call['title']}" if call["title"] != "as given" else call["shape"],
        ),
        ("query", f"{call['query']} on {call['device']}, {dtype}"),
        ("key, value", str(call["key"])),
        ("with", ", ".join(_options(call)) or "no mask, no lengths"),
        ("work", f"{_flop(call['flops'])} without masks"),
        ("settings", answer["settings"]["forced_by"] or "auto"),
        ("choice", _choice(answer)),
    ]
    if answer["proof"]:
        rows.append(("proof", f"{answer['proof']['state']}; {proofs.HOW}"))
    if answer["memory"]:
        rows.append(("memory", memory.told(answer["memory"])))
    if answer["measured"]:
        rows.append(("measured", answer["measured"]))
    rows.append(("norm, RoPE", rope.told(answer["rope"], call["dtype"])))
    rows.append(("8-bit scores", precision.told(answer["precision"])))
    rows.append(("blocks left out", sparse.told(answer["sparse"])))
    if answer["note"]:
        rows.append(("note", answer["note"]))
    text = pairs(rows)
    states = [
        (b["name"], _state(b["reason"], b["chosen"], b["asked"]), b["reason"] or b["title"])
        for b in answer["backends"]
    ]
    text += f"\n{heading('backends', 'in the order in which they are asked')}\n{table(states)}"
    rows3 = _told(answer["kernels"], answer["kernel"])
    text += f"\n{heading('kernels of sdpa', 'best first')}\n"
    if not rows3:
        return text + wrap(f"none: {answer['no_kernels']}")
    text += _table_and_others(rows3, answer["kernels"])
    if not answer["gradient_kernels"]:
        return text
    rows4 = _told(answer["gradient_kernels"], answer["gradient"])
    text += f"\n{heading('kernels of gradients', 'best first')}\n"
    return text + _table_and_others(rows4, answer["gradient_kernels"])


def _told(kernels: list[dict[str, Any]], chosen: str | None) -> list[tuple[str, str, str]]:
    return [
        (k["name"], _state(k["reason"], k["name"] == chosen), k["reason"] or k["description"])
        for k in kernels
        if not (k["reason"] or "").startswith("runs on ")
    ]


def _table_and_others(told: list[tuple[str, str, str]], kernels: list[dict[str, Any]]) -> str:
    others = len(kernels) - len(told)
    return table(told) + (f"\n  and {others} for other devices" if others else "")


def _choice(answer: dict[str, Any]) -> str:
    if answer["backend"] is None:
        return f"none. {answer['error']}"
    kernel = answer["kernel"] or answer["variant"]
    told = f"{answer['backend']}, kernel {kernel}" if kernel else str(answer["backend"])
    return f"{told}, gradients by {answer['gradient']}" if answer["gradient"] else told


def _state(reason: str | None, chosen: bool, asked: bool = True) -> str:
    if chosen:
        return "chosen"
    if reason is not None:
        return "no"
    return "available" if asked else "not asked"


def _flop(number: int) -> str:
    return f"{number / 1e12:.3g} TFLOP" if number >= 1e11 else f"{number / 1e9:.3g} GFLOP"


def _proof(device: torch.device) -> dict[str, Any] | None:
    """What is known of our kernels on this card; None: there is no such card."""
    if device.type != "cuda" or not proof.has_kernels():
        return None
    found = proofs.facts(device.index or 0)
    return found if found["card"] else None


def _absent(device: torch.device) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cpu" or (device.index or 0) < count:
        return ""
    return f"there is no {device} here: this is what would be chosen without knowing the card"


def _options(call: dict[str, Any]) -> list[str]:
    words = {
        "is_causal": "causal",
        "has_q_lens": "q_lens",
        "has_k_lens": "k_lens",
        "needs_grad": "gradient",
        "return_lse": "lse",
    }
    said = [word for key, word in words.items() if call[key]]
    if call["window"] != [-1, -1]:
        said.append(f"window {call['window'][0]},{call['window'][1]}")
    return said
