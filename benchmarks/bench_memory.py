# SPDX-License-Identifier: Apache-2.0
"""bench_memory.py - the peak memory of a Wan block, with its own attention and with wan_attn's.

    python benchmarks/bench_memory.py [--wan22 DIR] [--model NAME] [--video WxHxF] [--json FILE]

One block with random weights in bfloat16 on the CPU, where torch's profiler sees every allocation:
stock Wan2.2's own block from a checkout (WAN22_DIR), and diffusers'. Two figures, both beyond what
is held when the block is entered: the most in the whole block, and the most while an attention call
runs. They are also given in bytes for each of the tokens * dim elements of the block's input, which
is what they grow with: a block of 4 heads (without --full) tells what one of 24 takes.

Stock Wan2.2 is computed as on a GPU: under autocast, by its own flash_attention in front of a
stand-in for FlashAttention 2 that allocates what that does (the result and its log-sum-exp). Its
file is compiled without asserts, because one asks for a CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from wan_attn import attention, config, workloads
from wan_attn.bench import facts, model
from wan_attn.bench.accuracy import _no_chatter
from wan_attn.integrations import diffusers as diffusers_host
from wan_attn.integrations import wan22

MARK = "bench_memory: attention"
BF16, F32 = torch.bfloat16, torch.float32
PACKAGE = model.ALIAS

Block = Callable[[], Tensor]


def peaks(block: Block) -> tuple[int, int]:
    """The most memory of the block, and the most within an attention call, in bytes."""
    block()  # what is made once does not count
    with _no_chatter(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        block()
    events: Any = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    calls = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == MARK]
    held = most = in_calls = 0
    for event in events:
        if event.name() != "[memory]":
            continue
        held += event.nbytes()
        most = max(most, held)
        if any(begin <= event.start_ns() <= end for begin, end in calls):
            in_calls = max(in_calls, held)
    return most, in_calls


def marked(function: Any) -> Any:
    """Wan2.2's flash_attention with a mark around each call, keeping no operand while that runs: a
    call with *args or **kwargs would."""

    def attention(
        q: Any, k: Any, v: Any, k_lens: Any = None, window_size: tuple[int, int] = (-1, -1)
    ) -> Any:
        given = [q, k, v]
        del q, k, v
        with record_function(MARK):
            return function(
                given.pop(0), given.pop(0), given.pop(0), k_lens=k_lens, window_size=window_size
            )

    return attention


def marked_sdpa(function: Any) -> Any:
    """The same for a function that is called with query, key, value and options, of which diffusers
    keeps the first three itself."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK):
            return function(*args, **kwargs)

    return attention


class _WithoutAsserts(importlib.abc.Loader):
    """Compiles a module as `python -O` does."""

    def __init__(self, path: str) -> None:
        self.path = path

    def exec_module(self, module: ModuleType) -> None:
        """Runs it."""
        code = compile(Path(self.path).read_bytes(), self.path, "exec", optimize=1)
        exec(code, vars(module))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    """FlashAttention 2's memory, by PyTorch: one sequence after the other, nothing copied."""
    outs = []
    begins = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    ends = zip(cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist()[1:], strict=True)
    for (q_begin, k_begin), (q_end, k_end) in zip(begins, ends, strict=False):
        parts = q[q_begin:q_end], k[k_begin:k_end], v[k_begin:k_end]
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in parts)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        outs.append(out.squeeze(0).transpose(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@contextmanager
def stock_wan22(checkout: Path) -> Iterator[ModuleType]:
    """Stock Wan2.2's model module, unedited, with FlashAttention's stand-in."""
    name = f"{PACKAGE}.modules.attention"
    path = str(checkout / "wan" / "modules" / "attention.py")
    spec = importlib.util.spec_from_loader(name, _WithoutAsserts(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    flash = ModuleType("flash_attn")
    flash.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"flash_attn": flash}):
        spec.loader.exec_module(module)
    sys.modules[name] = module
    try:
        yield model.import_wan22(checkout)
    finally:
        wan22.unpatch()
        for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE]:
            del sys.modules[name]


def wan22_block(module: Any, arch: model.Arch, video: model.Video) -> Block:
    """WanAttentionBlock as WanModel calls it for one video."""
    call, dim = arch.call, arch.dim
    tokens = call.tokens(video.width, video.height, video.frames)
    _, frames, rows, columns = video.latent(arch)
    with model._made_on(torch.device("cpu"), BF16):
        block = module.WanAttentionBlock(
            dim, arch.ffn, call.num_heads, (-1, -1), qk_norm=True, cross_attn_norm=True
        )
    model._prepare(block)
    block.norm3.float()  # a layer_norm of float32 by bfloat16 weights, which only CUDA has
    width = call.head_dim - 4 * (call.head_dim // 6)
    parts = (width, 2 * (call.head_dim // 6), 2 * (call.head_dim // 6))
    given = {
        "x": torch.randn(1, tokens, dim),
        "e": torch.randn(1, tokens, 6, dim),
        "seq_lens": torch.tensor([tokens]),
        "grid_sizes": torch.tensor([[frames, rows // call.patch, columns // call.patch]]),
        "freqs": torch.cat([module.rope_params(1024, part) for part in parts], dim=1),
        "context": torch.randn(1, workloads.TEXT_TOKENS, dim).to(BF16),
        "context_lens": None,
    }

    def forward() -> Tensor:
        with warnings.catch_warnings(), torch.inference_mode(), torch.autocast("cpu", BF16):
            warnings.filterwarnings("ignore", message="CUDA is not available")
            out: Tensor = block(**given)
            return out

    return forward


def diffusers_block(arch: model.Arch, video: model.Video) -> tuple[Any, Block]:
    """diffusers' transformer, and its block with what the transformer gives it."""
    stack = model.DiffusersStack(arch, 1, BF16, torch.device("cpu"))
    stack.show(video, 1, (1.0,))
    seen: list[Any] = []
    block = stack.blocks[0]
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.inference_mode():
        stack.forward()
    hook.remove()
    (given,) = seen

    def forward() -> Tensor:
        with torch.inference_mode():
            out: Tensor = block(*given)
            return out

    return stack.model, forward


def measure_wan22(checkout: Path, arch: model.Arch, video: model.Video) -> Iterator[dict[str, Any]]:
    """Its own attention, and ours on two backends."""
    module: Any
    with stock_wan22(checkout) as module:
        block = wan22_block(module, arch, video)
        own = module.flash_attention
        module.flash_attention = marked(own)
        yield row("Wan2.2", "its own, FlashAttention 2", arch, video, peaks(block))
        module.flash_attention = own
        wan22.patch(package=PACKAGE)
        ours = module.flash_attention
        for backend in ("sdpa", "torch"):
            module.flash_attention = marked(ours)
            with forced(backend):
                yield row("Wan2.2", f"patched, {backend}", arch, video, peaks(block))
        module.flash_attention = ours


def measure_diffusers(arch: model.Arch, video: model.Video) -> Iterator[dict[str, Any]]:
    """Its own attention, and ours."""
    transformer, block = diffusers_block(arch, video)
    functional: Any = torch.nn.functional
    name, ours = "scaled_dot_product_attention", {"sdpa": marked_sdpa(attention.sdpa)}
    with (
        mock.patch.object(functional, name, marked_sdpa(getattr(functional, name))),
        mock.patch.dict(vars(attention), ours),
    ):
        yield row("diffusers", "its own, PyTorch", arch, video, peaks(block))
        diffusers_host.enable(transformer)
        for backend in ("sdpa", "torch"):
            with forced(backend):
                yield row("diffusers", f"enabled, {backend}", arch, video, peaks(block))
        diffusers_host.disable(transformer)


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """wan_attn computes by this backend."""
    with mock.patch.dict(os.environ, {"USE_ATTENTION_BACKEND": backend}):
        config.refresh()
        yield
    config.refresh()


def row(
    host: str, how: str, arch: model.Arch, video: model.Video, found: tuple[int, int]
) -> dict[str, Any]:
    """One line of the table."""
    call = arch.call
    tokens = call.tokens(video.width, video.height, video.frames)
    elements = tokens * arch.dim
    return {
        "model": call.name,
        "host": host,
        "attention": how,
        "video": str(video),
        "tokens": tokens,
        "block_bytes": found[0],
        "call_bytes": found[1],
        "block_bytes_per_element": round(found[0] / elements, 2),
        "call_bytes_per_element": round(found[1] / elements, 2),
    }


def show(found: dict[str, Any]) -> str:
    """The line as text."""
    block, call = (found[f"{what}_bytes"] / 2**20 for what in ("block", "call"))
    return (
        f"{found['model']:8} {found['host']:10} {found['attention']:26} {found['tokens']:6} "
        f"{block:9.1f} {found['block_bytes_per_element']:7.2f} "
        f"{call:9.1f} {found['call_bytes_per_element']:7.2f}"
    )


def main() -> int:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wan22", type=Path, default=os.environ.get("WAN22_DIR") or None)
    parser.add_argument("--model", choices=model.ARCHS, default="ti2v-5b")
    parser.add_argument("--video", default="640x352x65")
    parser.add_argument("--full", action="store_true", help="all heads, not 4: minutes on a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    arch, video = model.ARCHS[args.model], model.Video(*map(int, args.video.split("x")))
    arch = arch if args.full else model.reduced(arch)
    print(
        f"{'model':8} {'host':10} {'attention':26} {'tokens':>6} {'block MiB':>9} {'B/elem':>7} "
        f"{'call MiB':>9} {'B/elem':>7}"
    )
    rows = []
    hosts = [measure_diffusers(arch, video)]
    if args.wan22 is not None:
        hosts.insert(0, measure_wan22(Path(args.wan22), arch, video))
    for host in hosts:
        for found in host:
            print(show(found), flush=True)
            rows.append(found)
    if args.json:
        environment = facts.environment(torch.device("cpu"))
        args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
