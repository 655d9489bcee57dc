# SPDX-License-Identifier: Apache-2.0
"""diffusers_parallel.py - one of two processes that share a Wan model's tokens, on CPUs.

    python diffusers_parallel.py RANK FILE        FILE: where the two meet

Prints, for each way of sharing, the largest difference from the model on one process, as a part of
the largest value.
"""

from __future__ import annotations

import sys

import diffusers
import torch
import torch.distributed
from diffusers_models import make, predict

from wan_attn.integrations import diffusers as wan_diffusers

PROCESSES = 2


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=PROCESSES
    )
    # diffusers numbers its processes by accelerator, and divides by their number.
    torch.accelerator.device_count = lambda: 1
    wan_diffusers.register_backend()
    for way in ("ring_degree", "ulysses_degree"):
        model, inputs = make("text")
        inputs["hidden_states"] = torch.randn(2, 4, 4, 6, 10)  # 60 tokens: 30 for each process
        torch.distributed.broadcast(inputs["hidden_states"], 0)
        stock = predict(model, inputs)
        model.set_attention_backend("wan_attn")
        config = diffusers.ContextParallelConfig(**{way: PROCESSES})
        model.enable_parallelism(config=config)
        shared = predict(model, inputs)
        print(way, float((shared - stock).abs().max() / stock.abs().max()), flush=True)
        wan_diffusers.disable(model)  # or diffusers' default stays ours, and the next stock with it
    torch.distributed.barrier()  # who leaves first takes its connections along
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
