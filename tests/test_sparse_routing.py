# SPDX-License-Identifier: Apache-2.0
"""test_sparse_routing.py - the order of tokens, which blocks are listed, and the lists of a mask.

What is wanted is written here once more, by numpy's loops and in float64.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import blocks_oracle
import wan_attn
from blocks_oracle import Lists
from tolerances import off
from wan_attn import sparse
from wan_attn.request import blocks_of
from wan_attn.sparse import order, routing
from wan_attn.sparse.routing import DENSE, Routing

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), (4, 4, 4), (5, 16, 9), (3, 1, 70)])
def test_a_curve_visits_every_token_once(grid: tuple[int, int, int]) -> None:
    tokens = grid[0] * grid[1] * grid[2]
    assert sorted(order.morton(grid).tolist()) == list(range(tokens))


def test_blocks_are_cubes_where_the_grid_allows() -> None:
    """64 tokens of a Morton curve through a grid of 4s are 4 x 4 x 4 of them."""
    frames, rows, columns = 8, 4, 12
    at = np.stack(
        np.unravel_index(order.morton((frames, rows, columns)).numpy(), (frames, rows, columns))
    )
    for block in at.T.reshape(-1, 64, 3):
        assert (np.ptp(block, axis=0) == 3).all()


@pytest.mark.parametrize(
    ("grid", "real", "seqlen", "always", "kept"),
    [
        ((2, 3, 5), 30, 30, (), 0),
        ((2, 3, 5), 30, 40, (), 0),  # padding
        ((2, 3, 5), 37, 40, (), 7),  # tokens of a reference behind the grid
        ((2, 3, 5), 30, 30, ((4, 9), (6, 12)), 8),
        (None, 30, 34, ((25, 99),), 5),
    ],
)
def test_an_order_is_a_permutation(
    grid: tuple[int, int, int] | None, real: int, seqlen: int, always: order.Ranges, kept: int
) -> None:
    made = order.of(grid, real, seqlen, always, CPU)
    assert made.forward is not None and made.always == kept
    forward = made.forward.tolist()
    assert sorted(forward) == list(range(seqlen))
    assert forward[real:] == list(range(real, seqlen))
    named = {i for first, behind in always for i in range(first, min(behind, real))}
    named |= set() if grid is None else set(range(math.prod(grid), real))
    assert set(forward[:kept]) == named and len(named) == kept
    x, lse = normal(1, seqlen, 2, 4), normal(1, 2, seqlen)
    (moved,) = order.apply([x], made)
    back, back_lse = order.undo(moved, lse.index_select(2, made.forward), made)
    assert torch.equal(back, x) and back_lse is not None and torch.equal(back_lse, lse)


def test_without_a_grid_nothing_moves() -> None:
    assert order.of(None, 30, 34, (), CPU) == order.Order(None, None, 0)
    for grid, real in (((2, 3, 5), [29]), ((2, 3, 5), [30, 31]), (None, [30])):
        assert order.fitting(grid, real) is None
    assert order.fitting((2, 3, 5), [31, 31]) == (2, 3, 5)


# --- which blocks --------------------------------------------------------------------------------


def wanted_mask(
    q: np.ndarray, k: np.ndarray, tau: float, real: int, always: int
) -> tuple[np.ndarray, np.ndarray]:
    """(whether a block is listed, how far it is from the threshold) of one head."""
    starts = range(0, len(q), 64)
    mask, margin = np.zeros((len(starts),) * 2, bool), np.full((len(starts),) * 2, math.inf)
    keys = [k[j : min(j + 64, real)].mean(0) for j in range(0, real, 64)]
    middle = sum(keys) / len(keys)
    spread = sum((key - middle) ** 2 for key in keys) / len(keys)
    for row, i in enumerate(starts):
        inside = q[i : min(i + 64, real)]
        centre = inside.mean(0) if len(inside) else np.zeros(q.shape[1])
        threshold = middle @ centre + tau * math.sqrt(spread @ centre**2)
        for column, key in enumerate(keys):
            margin[row, column] = centre @ key - threshold
            near = abs(row - column) <= 1 or column == 0
            kept = row < -(-always // 64) or column < -(-always // 64)
            mask[row, column] = margin[row, column] > 0 or near or kept
    return mask, np.abs(margin)


@pytest.mark.parametrize("tau", [-1.0, 0.0, 0.7, 2.0])
@pytest.mark.parametrize(
    ("tokens", "real", "always"), [(640, 640, 0), (700, 650, 70), (150, 150, 0)]
)
def test_the_rule(tau: float, tokens: int, real: int, always: int) -> None:
    q, k = normal(2, tokens, 4, 32), normal(2, tokens, 2, 32, seed=4)
    q[:, real:], k[:, real:] = math.nan, math.nan
    k = k + 2 * normal(2, 1, 2, 32, seed=5)  # all keys have something in common
    found = Routing(q, k, [real, real], always).mask([tau] * 4)
    for sample, head in itertools.product(range(2), range(4)):
        x, y = (t[sample].double().numpy() for t in (q[:, :, head], k[:, :, head // 2]))
        mask, margin = wanted_mask(x, y, tau, real, always)
        clear = torch.from_numpy(margin > 1e-5)
        assert torch.equal(found[sample, head][clear], torch.from_numpy(mask)[clear])
        assert bool(clear.float().mean() > 0.9)


def test_each_head_has_its_own_tau_and_rows_can_be_chosen() -> None:
    q, k = normal(1, 640, 3, 32), normal(1, 640, 3, 32, seed=4)
    made = Routing(q, k, [640])
    whole = made.mask([0.5, DENSE, 3.0])
    assert bool(whole[0, 1].all()) and whole[0, 2].sum() < whole[0, 0].sum() < whole[0, 1].sum()
    assert torch.equal(made.mask([0.5, DENSE, 3.0], [7, 2]), whole[:, :, [7, 2]])


def test_a_negative_scale_turns_the_order_of_scores_around() -> None:
    q, k = normal(1, 640, 1, 32), normal(1, 640, 1, 32, seed=4)
    turned = Routing(q, k, [640], is_negative=True).mask([0.5])
    assert torch.equal(turned, Routing(-q, k, [640]).mask([0.5]))
    assert not torch.equal(turned, Routing(q, k, [640]).mask([0.5]))


def test_samples_of_different_lengths() -> None:
    q, k = normal(2, 256, 1, 16), normal(2, 256, 1, 16, seed=4)
    found = Routing(q, k, [256, 100]).mask([DENSE])
    assert bool(found[0].all()) and found[1, 0, 0].tolist() == [True, True, False, False]


def test_routing_finds_what_matters() -> None:
    """Keys that one block of queries looks for lie in one block far away."""
    q, k = 0.1 * normal(1, 1280, 1, 64), 0.1 * normal(1, 1280, 1, 64, seed=4)
    sought = 3 * normal(64, seed=5)
    q[:, 128:192] += sought
    k[:, 960:1024] += sought
    found = Routing(q, k, [1280]).mask([3.0])[0, 0]
    assert found[2, 15] and found[2].sum() <= 6 and not found[:, 15].all()


# --- lists ---------------------------------------------------------------------------------------


def test_lists_of_a_mask() -> None:
    mask = normal(2, 3, 5, 9) > 0.3
    mask[0, 0, 0] = False
    mask[0, 0, 1] = True
    counts, indices = sparse.block_lists(mask)
    assert counts.dtype == indices.dtype == torch.int32
    assert indices.shape == (2, 3, 5, 9)  # of the longest
    for at in np.ndindex(2, 3, 5):
        listed = indices[at][: int(counts[at])].tolist()
        assert listed == mask[at].nonzero().flatten().tolist()


def test_lists_of_nothing() -> None:
    counts, indices = sparse.block_lists(torch.zeros(1, 2, 3, 4, dtype=torch.bool))
    assert counts.sum() == 0 and indices.shape == (1, 2, 3, 0)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(1, 2, 3, 4), "mask must be bool"),
        (torch.ones(2, 3, 4, dtype=torch.bool), "mask must be bool"),
        ([[True]], "mask must be"),
    ],
)
def test_lists_refuse(mask: object, said: str) -> None:
    with pytest.raises(RuntimeError, match=f"^wan_attn: {said}"):
        sparse.block_lists(mask)  # type: ignore[arg-type]


# --- a caller's own lists ------------------------------------------------------------------------


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("pools_others", [False, True])
@pytest.mark.parametrize(("heads_k", "real"), [(4, [300, 300]), (2, [300, 131])])
def test_a_callers_lists(pools_others: bool, heads_k: int, real: list[int]) -> None:
    q = normal(2, 300, 4, 32)
    k, v = normal(2, 300, heads_k, 32, seed=4), normal(2, 300, heads_k, 32, seed=5)
    mask = normal(2, 4, 5, 5, seed=6) > 0.2
    mask[..., 0] = True
    made = sparse.block_lists(mask)
    out, lse = sparse.sdpa(
        q, k, v, made, pools_others=pools_others, k_lens=torch.tensor(real), return_lse=True
    )
    want, want_lse = blocks_oracle.attention(
        q.double().numpy(),
        k.double().numpy(),
        v.double().numpy(),
        Lists(mask.numpy()),
        pools_others=pools_others,
        k_lens=real,
    )
    assert off(out, torch.from_numpy(want)) < 1e-6 and off(lse, torch.from_numpy(want_lse)) < 1e-6
    dense = wan_attn.sdpa(q, k, v, k_lens=torch.tensor(real))
    assert isinstance(dense, Tensor) and off(out, dense) > 0.05


@pytest.mark.usefixtures("native")
def test_a_callers_lists_are_checked() -> None:
    q = normal(1, 130, 2, 16)
    counts, indices = sparse.block_lists(torch.ones(1, 2, 3, 3, dtype=torch.bool))
    for given, said in (
        ((counts, indices[:, :1]), "block_indices must be int32"),
        ((counts.long(), indices), "block_counts must be int32"),
        (counts, "lists must be BlockLists"),
    ):
        with pytest.raises(RuntimeError, match=said):
            sparse.sdpa(q, q, q, given)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="block_indices must"):
        sparse.sdpa(q, q, q, sparse.BlockLists(counts, indices + 1))
    with pytest.raises(RuntimeError, match="no kernel computes block lists for this call: .*grad"):
        sparse.sdpa(q.clone().requires_grad_(), q, q, sparse.BlockLists(counts, indices))


def test_means_take_real_tokens_only() -> None:
    x = normal(1, 200, 2, 8)
    x[:, 150:] = math.nan
    made = routing.means(x, [150])
    assert made.shape == (1, 2, 4, 8) and blocks_of(200) == 4
    torch.testing.assert_close(made[0, 1, 2], x[0, 128:150, 1].mean(0))
    assert (made[0, :, 3] == 0).all()
