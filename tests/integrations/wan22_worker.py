# SPDX-License-Identifier: Apache-2.0
"""wan22_worker.py - what the tests of the real Wan2.2 run in a process of its own.

    python wan22_worker.py TASK RESULT.json [RANK RENDEZVOUS]

PYTHONPATH must name wan_attn's folder, tests/ and tests/integrations/. Writes what it saw to
RESULT.json and judges nothing.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import wan22_harness
from torch import Tensor

import oracle
import tolerances
import wan_attn
from wan_attn import config
from wan_attn.integrations import wan22
from wan_attn.native import bindings, op

HALF = (torch.float16, torch.bfloat16)
calls: list[str] = []


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
    compute: Callable[..., Any] = oracle.attention,
) -> Tensor:
    """Wan2.2's flash_attention in float64, from the values as they come in."""
    assert q_scale is None and not dropout_p
    # No call site of Wan2.2 names more keys than there are, or fewer than none.
    assert k_lens is None or (0 <= int(k_lens.min()) and int(k_lens.max()) <= k.shape[1])
    calls.append(
        f"{list(q.shape)} {list(k.shape)} {q.dtype} {k.dtype} {v.dtype} "
        f"{None if k_lens is None else k_lens.tolist()}"
    )
    options = {"scale": softmax_scale, "is_causal": causal, "window": window_size}
    out, _ = compute(q, k, v, q_lens=q_lens, k_lens=k_lens, **options)
    return torch.from_numpy(out).to(q.dtype)


def of_torch(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same through torch's own SDPA, at the dtype that wan_attn computes this call in."""
    dtype = compute_dtype(v, kwargs.get("dtype", torch.bfloat16))
    compute = functools.partial(exact, compute=tolerances.torch_sdpa)
    return compute(q.to(dtype), k.to(dtype), v.to(dtype), *args, **kwargs).to(q.dtype)


def compute_dtype(v: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What stock Wan2.2 computes in: half inputs as they are, others in `dtype`."""
    return v.dtype if v.dtype in HALF else dtype


def nothing(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An attention that returns 0: shows whether the model's output depends on attention."""
    return torch.zeros_like(q)


def error(got: Tensor, want: Tensor) -> dict[str, float]:
    difference = (got.double() - want.double()).abs()
    return {"max": float(difference.max()), "rms": float(difference.square().mean().sqrt())}


def who(names: dict[str, Any]) -> dict[str, str]:
    return {name: getattr(value, "__module__", repr(value)) for name, value in names.items()}


def compare(
    pieces: dict[str, Callable[[], Tensor]], of_torch: Callable[..., Tensor] = of_torch
) -> dict[str, Any]:
    """Each piece with wan_attn (patched by the caller), exact, torch's and no attention."""
    outputs = {"ours": {name: run() for name, run in pieces.items()}}
    seen = {}
    wan22.unpatch()
    for title, attention in (("exact", exact), ("torch", of_torch), ("nothing", nothing)):
        wan22.patch(attention=attention)
        outputs[title] = {}
        for name, run in pieces.items():
            calls.clear()
            outputs[title][name] = run()
            if title == "exact":
                seen[name] = list(calls)
        wan22.unpatch()
    want = outputs.pop("exact")
    return {
        name: {title: error(output[name], want[name]) for title, output in outputs.items()}
        | {"calls": seen[name], "largest": float(want[name].abs().max())}
        for name in pieces
    }


def patch_first() -> dict[str, Any]:
    report = wan22.patch()
    import wan.utils.prompt_extend
    import wan22_models

    result: dict[str, Any] = {
        "pending": len(report.pending),
        "patched": who(wan22_harness.binding_names()),
        "fake flash_attn": "flash_attn" in sys.modules,
        "FLASH_VER": wan.utils.prompt_extend.FLASH_VER,
        "report": str(wan22.patch()),
        "pieces": compare(wan22_models.PIECES),
    }
    result["unpatched"] = who(wan22_harness.binding_names())
    # Wan2.2 computes attention of float32 tensors in bf16; asked to, we do in float32.
    in_float32: dict[str, Any] = {"dtype": torch.float32}
    wan22.patch(attention=functools.partial(wan_attn.flash_attention, **in_float32))
    result["pieces"]["in float32"] = compare(
        {"wan_model": wan22_models.wan_model_float32}, functools.partial(of_torch, **in_float32)
    )["wan_model"]
    return result


def import_first() -> dict[str, Any]:
    import wan  # noqa: F401

    before = wan22_harness.binding_names()
    wan22.patch()
    during = wan22_harness.binding_names()
    wan22.unpatch()
    after = wan22_harness.binding_names()
    return {
        "patched": who(during),
        "unpatched": who(after),
        "restored": [name for name in before if after[name] is before[name]],
        "compiled": compiled(),
    }


def compiled() -> dict[str, Any]:
    """WAN_COMPILE=1 on the real blocks, without generating code."""
    config.put("WAN_COMPILE", "1")
    torch.compile = functools.partial(torch.compile, backend="eager")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("wan_attn").addHandler(handler)
    import wan22_models

    report = wan22.patch()
    got = wan22_models.wan_model_float32()
    state = wan22.report()
    wan22.unpatch()
    wan22.patch(attention=exact)
    want = wan22_models.wan_model_float32()
    return {
        "before": report.compile,
        "after": state.compile if state else "",
        "lines": lines,
        "error": error(got, want),
        "largest": float(want.abs().max()),
    }


def ulysses(rank: int, rendezvous: str) -> dict[str, Any]:
    wan22_harness.start_gloo(rank, 2, rendezvous)
    wan22.patch()
    import wan22_models

    pieces = {"ulysses": wan22_models.wan_model_ulysses, "s2v_ulysses": wan22_models.s2v_ulysses}
    return {"pieces": compare(pieces)}


def rope() -> dict[str, Any]:
    """The fused norm and rotation: the models with it and without, and compiled."""
    import wan22_models

    names = ("wan_model_as_shipped", "wan_model_converted", "s2v", "animate", "wan_model_float32")
    pieces = {name: getattr(wan22_models, name) for name in names}

    def outputs() -> dict[str, Tensor]:
        return {name: run() for name, run in pieces.items()}

    def without() -> dict[str, Tensor]:
        wan22.patch(attention=wan_attn.flash_attention)
        found = outputs()
        wan22.unpatch()
        return found

    before = without()
    counted = {name: 0 for name in names}
    rows: dict[str, str] = {}
    report = wan22.patch()
    ours = {}
    for name, run in pieces.items():
        with torch.profiler.profile() as profile:
            ours[name] = run()
        found = [e.count for e in profile.key_averages() if e.key == "wan_attn::rms_norm_rope"]
        counted[name] = sum(found)
        rows[name] = op.kernels()[bindings.last_kernel()].name
    compiled = whole_block()
    wan22.unpatch()
    after = without()
    return {
        "report": list(report.rope),
        "ops": counted,
        "rows": rows,
        "changed": {n: error(ours[n], before[n]) for n in names},
        "largest": {n: float(before[n].abs().max()) for n in names},
        "same afterwards": [n for n in names if torch.equal(before[n], after[n])],
        "compiled": compiled,
    }


def whole_block() -> dict[str, Any]:
    """A stock block as one graph: the largest difference to the same without torch.compile."""
    import wan22_models

    model = wan22_models.wan_model()
    given: list[Any] = []
    block = model.blocks[0]
    hook = block.register_forward_pre_hook(lambda _, *a: given.append(a), with_kwargs=True)
    with torch.no_grad():
        wan22_models.run(model)
        hook.remove()
        args, kwargs = given[0]
        plain = block(*args, **kwargs)
        amp: Any = torch.amp
        harness, amp.autocast = amp.autocast, amp.autocast_mode.autocast
        try:  # dynamo knows torch's own; without CUDA it does nothing
            graph: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
            return error(graph(*args, **kwargs), plain)
        finally:
            amp.autocast = harness


def wrapped(rank: int, rendezvous: str) -> dict[str, Any]:
    """What trainers do to the patched model: how far output and gradient move, of the largest."""
    wan22_harness.start_gloo(rank, 1, rendezvous)
    wan22.patch()
    import wan22_models
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.checkpoint import checkpoint
    from wan.distributed.fsdp import shard_model

    model: Any = wan22_models.wan_model()
    want = wan22_models.run(model)

    def saved() -> Any:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def sharded() -> Any:
        options = {"param_dtype": torch.float32, "sync_module_states": False}
        return shard_model(copy.deepcopy(model), torch.device("cpu"), **options)

    def gradient(use_reentrant: bool | None) -> Tensor:
        other = copy.deepcopy(model)
        names = ("e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens")
        for block in other.blocks if use_reentrant is not None else ():
            block.forward = functools.partial(
                lambda plain, x, **k: checkpoint(
                    plain, x, *(k[name] for name in names), use_reentrant=use_reentrant
                ),
                block.forward,
            )
        with torch.enable_grad():
            wan22_models.run(other).square().mean().backward()
        grad: Tensor = other.blocks[0].self_attn.q.weight.grad
        return grad

    def off(got: Tensor, want: Tensor) -> float:
        return error(got, want)["max"] / float(want.abs().max())

    models = {"deepcopy": copy.deepcopy(model), "torch.save": saved(), "FSDP": sharded()}
    models["DDP"] = DistributedDataParallel(copy.deepcopy(model))
    plain = gradient(None)
    found = {title: off(wan22_models.run(other), want) for title, other in models.items()}
    return found | {f"checkpoint {way}": off(gradient(way), plain) for way in (False, True)}


def precision() -> dict[str, Any]:
    import wan22_precision

    return wan22_precision.lossy()


def ulysses_precision(rank: int, rendezvous: str) -> dict[str, Any]:
    wan22_harness.start_gloo(rank, 2, rendezvous)
    import wan22_precision

    return wan22_precision.parallel(rank)


def main() -> None:
    task, result, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    wan22_harness.prepare()
    arguments = (int(rest[0]), rest[1]) if rest else ()
    alone = (patch_first, import_first, rope, precision)
    tasks = {f.__name__: f for f in (*alone, ulysses, ulysses_precision, wrapped)}
    Path(result).write_text(json.dumps(tasks[task](*arguments)))


if __name__ == "__main__":
    main()
