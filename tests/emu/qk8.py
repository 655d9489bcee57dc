# SPDX-License-Identifier: Apache-2.0
"""qk8.py - the passes that make q and k INT8, with torch tensors: what the loader does on a GPU.

A pass is run by a function (helper's name, args, threads' blocks, tensors), so that the emulated
sources and what the PTX machine executes get the same calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracle
import qk8_oracle
from emu.args import Qk8Args
from emu.build import library
from emu.rows import helpers
from emu.run import LOG2_E, SMALLEST_SCALE, Memory, _lengths, _view, launch

KEYS = 64
NUMBER = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
Runner = Callable[[str, Qk8Args, int, list[Any]], None]


def emulated(name: str, args: Qk8Args, grid: int, tensors: list[Any]) -> None:
    """Runs the pass on the emulated GPU."""
    launch(library(helpers()[name]), args, grid, tensors)


@dataclass(frozen=True)
class Integers:
    """What the attention kernel reads, as args_qk8.h has it."""

    keys: Tensor  # int8 [batch, heads_k, tiles, 64 * (head_dim + 8)]
    queries: Tensor  # int8 [batch, heads_q, seqlen_q, head_dim]
    rows: Tensor  # float32 [batch, heads_q, seqlen_q, 2]
    sums: Tensor  # float32 [batch, heads_k, tiles, head_dim]
    mean: Tensor  # float32 [batch, heads_k, head_dim]


def place_of_step(key: int) -> int:
    """Where key number `key` of a tile has its step: beside those that its lane needs as well."""
    j, t, e = key // 8, key % 8 // 2, key % 2
    return 4 * (4 * (j // 2) + t) + 2 * (j % 2) + e


def chunk_order(head_dim: int) -> Tensor:
    """[64, head_dim / 16]: where in its row each 16 bytes of a key lie."""
    chunks, keys = torch.arange(head_dim // 16), torch.arange(KEYS)[:, None]
    return chunks ^ keys % 8 if head_dim == 128 else chunks ^ keys // 2 % 4


def split_tile(tiles: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """[.., 64 * (head_dim + 8)] bytes -> integers [.., 64, head_dim], steps [.., 64]."""
    integers, steps, _ = tiles.split([KEYS * head_dim, KEYS * 4, KEYS * 4], dim=-1)
    in_place = torch.tensor([place_of_step(n) for n in range(KEYS)])
    chunks = integers.unflatten(-1, (KEYS, head_dim // 16, 16))
    chunks = chunks[..., torch.arange(KEYS)[:, None], chunk_order(head_dim), :]
    return (
        chunks.flatten(-2),
        steps.contiguous().view(torch.float32)[..., in_place],
    )


def quantised(
    query: Tensor,
    key: Tensor,
    *,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    scale: float | None = None,
    wants_lse: bool = True,
    runner: Runner = emulated,
) -> Integers:
    """Runs the four passes."""
    batch, seqlen_q, heads_q, head_dim = query.shape
    seqlen_k, heads_k = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    tiles = max(1, -(-seqlen_k // KEYS))
    made = Integers(
        torch.full((batch, heads_k, tiles, KEYS * (head_dim + 8)), 0x55, dtype=torch.int8),
        torch.full((batch, heads_q, seqlen_q, head_dim), 0x55, dtype=torch.int8),
        torch.full((batch, heads_q, seqlen_q, 2), math.nan),
        torch.full((batch, heads_k, tiles, head_dim), math.nan),
        torch.full((batch, heads_k, head_dim), math.nan),
    )

    def step(name: str, x: Tensor, lens: Tensor | None, warps: int, *outputs: str) -> None:
        memory = Memory()
        source, lens = memory.add("x", x), memory.maybe("lens", lens)
        at = {
            field: memory.add(field, getattr(made, field), field in outputs)
            for field in ("keys", "queries", "rows", "sums", "mean")
        }
        args = Qk8Args(
            *(_view(source), _lengths(lens), at["sums"].data_ptr(), at["mean"].data_ptr()),
            at["keys" if "keys" in outputs else "queries"].data_ptr(),
            at["rows"].data_ptr(),
            *(batch, x.shape[1], x.shape[2], head_dim, NUMBER[x.dtype], tiles),
            *(heads_q // heads_k, int(scale < 0)),
            *(max(abs(scale) * LOG2_E / head_dim, SMALLEST_SCALE), scale if wants_lse else 0.0),
        )
        runner(f"wan_attn_{name}", args, -(-warps // 4), memory.tensors)
        for field in outputs:
            getattr(made, field).copy_(at[field])

    step("sum_keys", key, k_lens, batch * heads_k * tiles, "sums")
    step("mean_of_keys", key, k_lens, batch * heads_k * head_dim // 32, "mean")
    step("quantise_k", key, k_lens, batch * heads_k * tiles * KEYS, "keys")
    step("quantise_q", query, q_lens, batch * heads_q * seqlen_q, "queries", "rows")
    return made


def false_ties(head_dim: int) -> Tensor:
    """Rows [1, rows, 1, head_dim] whose numbers lie half way between two integers once the product
    is rounded, and not before: two channels make a row of sums and differences alone."""
    made = np.random.default_rng(0)
    largest, other = (made.integers(2**11, 2**12, 2**23).astype(np.float32) for _ in range(2))
    inverse = np.float32(127.0) / largest
    exact = other.astype(np.float64) * inverse.astype(np.float64)
    rounded = other * inverse
    ties = (other < largest) & (rounded % 1 == 0.5) & (np.rint(rounded) != np.rint(exact))
    pairs = np.stack([largest + other, largest - other], axis=1)[ties] / 2
    rows = torch.zeros(1, len(pairs), 1, head_dim)
    rows[0, :, 0, :2] = torch.from_numpy(pairs)
    return rows


def check_integers(query: Tensor, key: Tensor, **call: Any) -> Integers:
    """Runs the passes and holds every bit that they have to make against the definition."""
    got = quantised(query, key, **call)
    batch, seqlen_q, heads_q, head_dim = query.shape
    scale = call.get("scale")
    scale = head_dim**-0.5 if scale is None else scale
    q_lens, k_lens = (
        [n] * batch if lens is None else [min(max(int(x), 0), n) for x in lens]
        for lens, n in ((call.get("q_lens"), seqlen_q), (call.get("k_lens"), key.shape[1]))
    )
    for b in range(batch):
        means = _check_keys(got, key, b, k_lens[b])
        for h in range(heads_q):
            mean = means[h * key.shape[2] // heads_q]
            _check_queries(got, query[b, : q_lens[b], h], b, h, mean, scale, call)
            left = got.queries[b, h, q_lens[b] :]
            assert (left == 0x55).all(), "a query behind the real length was written"
    return got


def _check_keys(got: Integers, key: Tensor, b: int, used: int) -> list[Any]:
    head_dim, means = key.shape[3], []
    for h in range(key.shape[2]):
        x = oracle.as_float64(key[b, :used, h]).astype(np.float32)
        mean = qk8_oracle.mean_of(x)
        np.testing.assert_array_equal(got.mean[b, h].numpy(), mean, "mean")
        with np.errstate(all="ignore"):
            want, want_step = qk8_oracle.quantised(x - mean) if used else (x, x[:, 0])
        tiles, tile_steps = split_tile(got.keys[b, h], head_dim)
        integers, steps = tiles.flatten(0, 1).numpy(), tile_steps.flatten().numpy()
        np.testing.assert_array_equal(integers[:used], want, "integers of a key")
        np.testing.assert_array_equal(steps[:used], want_step, "steps of keys")
        end = -(-used // KEYS) * KEYS
        assert not integers[used:end].any() and not steps[used:end].any(), "rest of the tile"
        assert (got.keys[b, h, end // KEYS :] == 0x55).all(), "a tile without keys was written"
        means.append(mean)
    return means


def _check_queries(
    got: Integers, query: Tensor, b: int, h: int, mean: Any, scale: float, call: dict[str, Any]
) -> None:
    if not len(query):
        return
    x = oracle.as_float64(query).astype(np.float32)
    with np.errstate(all="ignore"):
        want, step = qk8_oracle.quantised(np.copysign(np.float32(1.0), scale) * x)
        of_mean = scale * (x.astype(np.float64) @ mean.astype(np.float64))
        sizes = abs(scale) * (np.abs(x.astype(np.float64)) @ np.abs(mean.astype(np.float64)))
    rows = got.rows[b, h, : len(x)].numpy()
    np.testing.assert_array_equal(got.queries[b, h, : len(x)].numpy(), want, "integers of a query")
    factor = step.astype(np.float64) * abs(scale) * LOG2_E / x.shape[1]
    factor = np.where(np.isnan(factor), factor, np.clip(factor, SMALLEST_SCALE, 2.0**127))
    np.testing.assert_allclose(rows[:, 0], factor, rtol=4e-7, err_msg="factor")
    if not call.get("wants_lse", True):
        assert not rows[:, 1].any()
        return
    fine = sizes < 3e38  # NaN is not; beyond, a float32 has no room for the sum
    off = np.abs(rows[fine, 1] - of_mean[fine])
    assert (off <= 1e-6 * sizes[fine] + 1e-37).all(), "<q, mean>"
