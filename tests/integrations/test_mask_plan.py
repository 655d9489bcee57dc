# SPDX-License-Identifier: Apache-2.0
"""test_mask_plan.py - a mask becomes calls that mean the same, or a reason."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from wan_attn.signatures import _mask_plan
from wan_attn.signatures._mask_plan import Planner, make_plan

LOWEST = torch.finfo(torch.float32).min


def causal(rows: int, keys: int, offset: int | None = None, window: int = 0) -> Tensor:
    """[rows, keys]: row i sees key j <= i + offset, and `window` keys at most."""
    offset = keys - rows if offset is None else offset
    distance = torch.arange(rows)[:, None] + offset - torch.arange(keys)
    return (distance >= 0) & (distance < (window or keys + 1))


def compute(mask: Tensor, heads: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor, str]:
    """(ours, the same in float64 by the mask itself, reason); [batch, rows, heads, 8]."""
    batch, _, rows, keys = mask.shape
    query = torch.randn(batch, rows, heads[0], 8)
    key, value = torch.randn(2, batch, keys, heads[1], 8).unbind()
    plan = make_plan(mask, batch, rows, keys)
    out = _mask_plan.attend(query, key, value, plan, 0.3)
    wide = [x.double().transpose(1, 2) for x in (query, key, value)]
    wide[1:] = [x.repeat_interleave(heads[0] // heads[1], dim=1) for x in wide[1:]]
    visible = mask if mask.dtype == torch.bool else mask == 0
    scores = (wide[0] @ wide[1].transpose(2, 3) * 0.3).masked_fill(~visible, -torch.inf)
    truth = scores.softmax(-1).nan_to_num(0.0) @ wide[2]
    return out, truth.transpose(1, 2), plan.reason


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """What hosts write: causal or not, a window or none, padding on either side, a cache."""
    batch = draw(st.integers(1, 4))
    rows = draw(st.integers(1, 9))
    keys = rows + draw(st.sampled_from([0, 0, 1, 5]))
    mask = torch.ones(rows, keys, dtype=torch.bool)
    if draw(st.booleans()):
        mask = causal(rows, keys, window=draw(st.sampled_from([0, 0, 1, 3])))
    mask = mask.expand(batch, 1, rows, keys).clone()
    side = draw(st.sampled_from(["none", "left", "right"]))
    for sample in mask:
        hidden = draw(st.integers(0, keys))
        if side == "left":
            sample[..., :hidden] = False
        elif side == "right":
            sample[..., keys - hidden :] = False
    if draw(st.booleans()):
        zero = torch.zeros(mask.shape)
        return zero.masked_fill(~mask, draw(st.sampled_from([LOWEST, -torch.inf])))
    return mask


@hypothesis.given(mask=masks())
def test_masks_of_hosts_are_obeyed(mask: Tensor) -> None:
    out, truth, reason = compute(mask)
    assert not reason
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [0, 3], ids=["causal", "window"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [8, 3, 1])
def test_the_usual_masks_are_understood(rows: int, side: str, window: int) -> None:
    mask = causal(rows, 8, window=window).expand(3, 1, rows, 8).clone()
    for sample, hidden in zip(mask, (0, 2, 5), strict=True):
        sample[..., slice(None, hidden) if side == "left" else slice(8 - hidden, None)] = False
    out, truth, reason = compute(mask)
    assert not reason
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [
        causal(4, 4).T,
        causal(5, 2, offset=0),
        causal(6, 6, window=3) | causal(6, 6, window=3).T,
        causal(6, 9, offset=2, window=2),
        causal(6, 4, offset=0, window=3),
    ],
    ids=["not yet", "aligned top-left", "both sides", "ahead", "ends before its rows"],
)
def test_other_masks_of_one_rule_are_understood(mask: Tensor) -> None:
    out, truth, reason = compute(mask.expand(2, 1, *mask.shape))
    assert not reason
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "mask, calls",
    [
        (torch.ones(2, 1, 4, 6, dtype=torch.bool), 1),
        (torch.ones(1, 1, 1, 6, dtype=torch.bool), 1),
        (causal(4, 4).expand(2, 1, 4, 4), 1),
        (causal(2, 16, offset=5).expand(2, 1, 2, 16), 1),  # a static cache of 16, 5 of them used
        (torch.zeros(2, 1, 4, 6, dtype=torch.bool), 0),
        (torch.ones(2, 1, 4, 6, dtype=torch.bool).tril(5), 1),
    ],
    ids=["all", "one for the batch", "causal", "static cache", "nothing", "all, by tril"],
)
def test_a_batch_without_padding_is_one_call(mask: Tensor, calls: int) -> None:
    plan = make_plan(mask, 2, mask.shape[2], mask.shape[3])
    assert (plan.reason, len(plan.parts)) == ("", calls)


def test_right_padding_is_one_call_with_lengths() -> None:
    keys = torch.arange(6) < torch.tensor([6, 2, 4]).view(3, 1, 1, 1)
    (part,) = make_plan(keys.expand(3, 1, 5, 6), 3, 5, 6).parts
    assert part.q_lens is None and part.k_lens is not None and part.k_lens.tolist() == [6, 2, 4]
    part, *rows_of_padding = make_plan(keys & causal(6, 6), 3, 6, 6).parts
    assert part.is_causal and part.q_lens is not None and part.q_lens.tolist() == [6, 2, 4]
    assert [(p.samples.start, p.rows.start) for p in rows_of_padding] == [(1, 2), (2, 4)]


def refused() -> list[tuple[str, Tensor]]:
    holes = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    holes[..., 1] = False
    packed = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool() & causal(4, 4)
    prefix = causal(4, 4)
    prefix[:, :2] = True
    heads = causal(4, 4).expand(1, 2, 4, 4).clone()
    heads[0, 1] = True
    return [
        ("holes", holes),
        ("neither padding nor causal", packed[None, None]),
        ("neither padding nor causal", prefix[None, None]),
        ("differs from head to head", heads),
        ("is a bias", torch.full((1, 1, 4, 4), -1.0)),
        ("is a bias", torch.full((1, 1, 4, 4), torch.nan)),
        ("is int64", causal(4, 4)[None, None].long()),
        ("has the shape", causal(4, 4)),
        ("has the shape", causal(4, 4).expand(3, 1, 4, 4)),
        ("has the shape", causal(3, 4)[None, None]),
    ]


@pytest.mark.parametrize("reason, mask", refused(), ids=lambda x: x if isinstance(x, str) else "")
def test_other_masks_are_refused_with_a_reason(reason: str, mask: Tensor) -> None:
    assert reason in make_plan(mask, 1, 4, mask.shape[-1]).reason


def test_a_longer_mask_is_cut_to_the_keys() -> None:
    mask = causal(4, 9, offset=0)[None, None]
    assert make_plan(mask, 1, 4, 4).parts[0].is_causal


def test_a_planner_reads_a_mask_once_and_again_after_it_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[Tensor] = []
    real = make_plan

    def counted(mask: Tensor, *sizes: int) -> _mask_plan.Plan:
        read.append(mask)
        return real(mask, *sizes)

    monkeypatch.setattr(_mask_plan, "make_plan", counted)
    planner = Planner()
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for _ in range(3):
        assert not planner.plan(mask, 1, 4, 4).parts[0].is_causal
    assert len(read) == 1
    mask.tril_()
    for _ in range(3):
        assert planner.plan(mask, 1, 4, 4).parts[0].is_causal
    assert len(read) == 2
    for _ in range(20):
        planner.plan(torch.ones(1, 1, 2, 2, dtype=torch.bool), 1, 2, 2)
    assert len(read) == 22, "another mask, even at the same place in memory, is read"
    with torch.inference_mode():
        mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        assert not planner.plan(mask, 1, 4, 4).parts[0].is_causal
        mask.tril_()
        assert planner.plan(mask, 1, 4, 4).parts[0].is_causal
