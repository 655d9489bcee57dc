# SPDX-License-Identifier: Apache-2.0
"""sharded_worker.py - one of the processes that train a model together, on CPUs.

    python sharded_worker.py MODELS RANK PROCESSES FILE      FILE: where they meet

Prints a line for each model and wrapper of torch's: how far inference, output and gradient are from
those of the plain model without wan_attn, as a part of the largest value, how many calls went to
wan_attn, and how many did after disable(), which got the wrapper.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from wan_attn import attention

calls: list[Any] = []


def count_calls() -> None:
    sdpa = attention.sdpa

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        calls.append(query.dtype)
        return sdpa(query, key, value, **options)

    attention.sdpa = watched


def of_diffusers(enable: Callable[[Any], object]) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        import diffusers_models

        from wan_attn.integrations import diffusers

        model, inputs = diffusers_models.make("text")
        diffusers.register_backend()
        run = lambda m: m(**inputs, return_dict=False)[0]  # noqa: E731 - one of three
        return model, run, type(model.blocks[0]), enable, diffusers.disable

    return make


def enable_diffusers(model: Any) -> object:
    from wan_attn.integrations import diffusers

    return diffusers.enable(model)


def of_transformers() -> tuple[Any, ...]:
    import transformers_models

    from wan_attn.integrations import transformers

    model = transformers_models.make_language_model("llama", "sdpa")
    tokens = torch.arange(20).view(2, 10) % 90 + 3
    run = lambda m: m(input_ids=tokens, use_cache=False).logits  # noqa: E731 - one of three
    return model, run, type(model.model.layers[0]), transformers.enable, transformers.disable


MODELS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "diffusers": of_diffusers(enable_diffusers),
    "backend": of_diffusers(lambda model: model.set_attention_backend("wan_attn")),
    "transformers": of_transformers,
}


def ddp(model: Any, block: type) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model: Any, block: type) -> Any:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({block}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


def fsdp2(model: Any, block: type[torch.nn.Module]) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, block):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"DDP": ddp, "FSDP": fsdp, "FSDP2": fsdp2}


def weight_of(model: Any) -> Any:
    """One that only attention leads to."""
    names = dict(model.named_parameters())
    return next(p for n, p in names.items() if "q_proj.weight" in n or "to_q.weight" in n)


def gradient(model: Any) -> Tensor:
    """Its gradient; of FSDP's first kind each process has a part of the flat one, or nothing."""
    grad = weight_of(model).grad
    if grad is None:
        return torch.zeros(0)
    whole: Tensor = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return whole.detach().clone()


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def compare(name: str, title: str) -> list[float]:
    model, run, block, enable, disable = MODELS[name]()
    stock = run(model)
    stock.square().mean().backward()
    want = gradient(model)
    model.zero_grad(set_to_none=True)
    enable(model)
    model = WRAPPERS[title](model, block)
    calls.clear()
    with torch.no_grad():
        inferred = run(model)
    out = run(model)
    out.square().mean().backward()
    count, got = len(calls), gradient(model)
    if title == "FSDP":
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            got = gradient(model)
    disable(model)
    calls.clear()
    run(model)
    stock = stock.detach()
    return [off(inferred, stock), off(out.detach(), stock), off(got, want), count, len(calls)]


def main(models: str, rank: int, processes: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    count_calls()
    for name in models.split(","):
        for title in WRAPPERS:
            print("found", name, title, *compare(name, title), flush=True)
    dist.barrier()  # who leaves first takes its connections along
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
