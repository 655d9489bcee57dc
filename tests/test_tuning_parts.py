# SPDX-License-Identifier: Apache-2.0
"""test_tuning_parts.py - slices of calls, the check against float64, what a measurement costs, and
PyTorch's kernels asked one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from calls import BF16, F16, F32, operands
from wan_attn import __main__ as command_line
from wan_attn import config
from wan_attn.backends import _torch_kernels, torch_sdpa
from wan_attn.native import op
from wan_attn.request import Call, Request
from wan_attn.tuning import agree, kinds, measure, slices, turn
from wan_attn.tuning.candidates import Candidate, runner, title
from wan_attn.workloads import WORKLOADS, parse_shape

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (40, 9)},
    "lengths": {"q_lens": torch.tensor([200, 131]), "k_lens": torch.tensor([150, 301])},
    "causal lengths": {"is_causal": True, "q_lens": torch.tensor([256, 9])},
    "lse": {"return_lse": True},
}


def inputs(dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    return operands(batch=2, seqlen_q=256, seqlen_k=301, heads_q=4, heads_k=2, dtype=dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_a_slice_is_the_last_rows_of_the_call(mask: str) -> None:
    q, k, v = inputs()
    call = Call(**MASKS[mask])
    whole, _ = torch_sdpa.run(q, k, v, call)
    part = slices.Slice(1, 100, 0.0)
    cut = slices.cut(q, k, v, call, part)
    out, _ = torch_sdpa.run(*cut)
    longest = 256 if call.q_lens is None else int(call.q_lens.max())
    assert out.shape == (2, 100, 2, 64) and cut[1].shape[1] == 301
    torch.testing.assert_close(out, whole[:, longest - 100 : longest, :2])
    assert cut[0].data_ptr() != 0 and cut[1].data_ptr() == k.data_ptr(), "views, not copies"


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_slice_has_the_share_that_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_units", lambda device: 128)
    for want in (1e-4, 0.003, 0.2, 1.0):
        request = Request.of(WORKLOADS[name], BF16, "cuda")
        part = slices.choose(request, want)
        assert 1 <= part.heads_k <= request.num_heads_k and 1 <= part.rows <= request.seqlen_q
        share = part.heads_k / request.num_heads_k * part.rows / request.seqlen_q
        assert part.share == pytest.approx(share)
        least = 128 * 128 / (request.num_heads_q * request.seqlen_q)
        assert part.share >= 0.5 * min(1.0, max(want, least))
        assert part.share <= 1.3 * max(want, least) + 512 / request.seqlen_q
    assert slices.choose(request, 1.0).share == 1


def test_wans_longest_calls_pay_for_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card like RTX 4090 with ours, and PyTorch's flash and cuDNN. All within a step."""
    monkeypatch.setattr(slices, "_units", lambda device: 128)
    needed = {}
    for name, call in WORKLOADS.items():
        request = Request.of(call, BF16, "cuda")
        part = turn.part_of(request, 3)
        needed[name] = turn.calls_needed(request, part, 3)
        check = 3 * turn.CHECK["cuda"] / kinds.work(request)
        assert needed[name] * turn.COST >= measure.runs(3) * part.share + check - 1e-6
    assert needed["a14b-720p"] <= 4 and needed["a14b-480p"] <= 10
    assert needed["ti2v-5b-720p"] <= 30


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_exact_results_agree(mask: str, dtype: torch.dtype) -> None:
    for mixed in (False, True):
        q, k, v = inputs(dtype)
        if mixed:
            q, k = q.float(), k.float()
        call = Call(**MASKS[mask])
        out, lse = torch_sdpa.run(q, k, v, call)
        assert agree.wrong(q, k, v, call, out, lse) is None
        if op.binding() != "torch":
            q_lens, k_lens = call.q_lens, call.k_lens
            options: dict[str, Any] = {"is_causal": call.is_causal, "return_lse": call.return_lse}
            options |= dict(zip(("window_left", "window_right"), call.window, strict=True))
            out, lse = torch.ops.wan_attn.sdpa(q, k, v, q_lens, k_lens, **options)
            assert agree.wrong(q, k, v, call, out, lse if call.return_lse else None) is None


def test_long_and_strong_scores_agree() -> None:
    """bf16 rounds weights and scores; the bound grows with them, and not beyond."""
    torch.manual_seed(3)
    for rows, keys, factor in ((8, 20000, 1.0), (64, 300, 20.0), (64, 3000, 6.0)):
        q, k, v = operands(batch=1, seqlen_q=rows, seqlen_k=keys, dtype=BF16)
        q = q * factor
        out, _ = torch_sdpa.run(q, k, v, Call())
        assert agree.wrong(q, k, v, Call(), out, None) is None


WRONG: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "no last tile": lambda q, k, v: torch_sdpa.run(q, k[:, :-64], v[:, :-64], Call())[0],
    "causal": lambda q, k, v: torch_sdpa.run(q, k, v, Call(is_causal=True))[0],
    "another scale": lambda q, k, v: torch_sdpa.run(q, k, v, Call(scale=0.1))[0],
    "another head": lambda q, k, v: torch_sdpa.run(q, k.flip(2), v, Call())[0],
    "keys in steps of an eighth": lambda q, k, v: torch_sdpa.run(q, (k * 8).round() / 8, v, Call())[
        0
    ],
    "last row": lambda q, k, v: torch_sdpa.run(q, k, v, Call())[0].index_fill(
        1, torch.tensor(q.shape[1] - 1), 0
    ),
    "another shape": lambda q, k, v: q[:, :5],
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_wrong_results_do_not(how: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)
    assert agree.wrong(q, k, v, Call(), WRONG[how](q, k, v), None)


def test_padding_that_is_not_0_and_a_wrong_lse_are_wrong() -> None:
    q, k, v = inputs()
    call = Call(q_lens=torch.tensor([200, 131]), return_lse=True)
    out, lse = torch_sdpa.run(q, k, v, call)
    assert lse is not None
    assert agree.wrong(q, k, v, call, out.masked_fill(out == 0, 1e-3), lse)
    assert agree.wrong(q, k, v, call, out, lse + 0.01) == "its log-sum-exp is wrong"
    assert agree.wrong(q, k, v, call, out, None)


def test_calls_of_one_kind_and_of_others() -> None:
    base = Request.of(parse_shape("1x2000x24x128"), BF16, "cpu")
    same = Request.of(parse_shape("1x1500x20x128"), BF16, "cpu")
    assert kinds.kind_of(base) == kinds.kind_of(same)
    others = [
        Request.of(parse_shape("1x3000x24x128"), BF16, "cpu"),
        Request.of(parse_shape("1x2000:512x24x128"), BF16, "cpu"),
        Request.of(parse_shape("1x2000x24x64"), BF16, "cpu"),
        Request.of(parse_shape("1x2000x24x128"), F16, "cpu"),
        Request.of(parse_shape("1x2000x24x128"), BF16, "cpu", qk_dtype=F32),
        Request.of(parse_shape("1x2000x24x128", None, 8), BF16, "cpu"),
        Request.of(parse_shape("1x2000x4x128"), BF16, "cpu"),
        *(Request.of(parse_shape("1x2000x24x128"), BF16, "cpu", **flags) for flags in (
            {"is_causal": True}, {"window": (9, 9)}, {"has_k_lens": True}, {"return_lse": True},
            {"needs_grad": True},
        )),
    ]  # fmt: skip
    texts = [kinds.kind_of(request).text for request in (base, *others)]
    assert len(set(texts)) == len(texts)
    assert kinds.why_never(Request.of(parse_shape("1x64x2x64"), F32, "cpu"))
    assert not kinds.why_never(base)
    assert "cpu" in kinds.SMALL and kinds.why_never(
        Request.of(parse_shape("1x9000x9x64"), F32, "meta")
    )


class Asked:
    """PyTorch's kernels on a card: each is asked by its name, and some refuse."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *refusing: SDPBackend) -> None:
        self.kernels: list[SDPBackend] = []
        order = _torch_kernels._ORDER
        monkeypatch.setattr(_torch_kernels, "order_for", lambda device: order)
        monkeypatch.setattr(_torch_kernels, "_enabled", lambda order: list(order))

        def by(kernel: SDPBackend, call: Callable[[], Tensor]) -> Tensor:
            self.kernels.append(kernel)
            if kernel in refusing:
                raise RuntimeError("No available kernel. Aborting execution.")
            return call()

        monkeypatch.setattr(_torch_kernels, "_by", by)


def test_pytorchs_kernels_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config.forget()
    asked = Asked(monkeypatch, SDPBackend.CUDNN_ATTENTION)
    q, k, v = operands(dtype=F32)
    request = Request.from_tensors(q, k, v)
    want, _ = torch_sdpa.run(q, k, v, Call())
    for name, alone in itertools.product(("flash", "cudnn", "efficient"), (True, False)):
        kernel, asked.kernels = _torch_kernels.VARIANTS[name].kernel, []
        if alone and name == "cudnn":
            for _ in range(2):  # also when it is known that it refuses
                with pytest.raises(RuntimeError):
                    torch_sdpa.run_by(kernel, True, q, k, v, Call())
            assert set(asked.kernels) == {kernel}
            continue
        run = runner(Candidate("torch", name), request)
        if alone:
            run = lambda *args, kernel=kernel: torch_sdpa.run_by(kernel, True, *args)  # noqa: E731
        out, _ = run(q, k, v, Call())
        assert torch.equal(out, want)
        assert asked.kernels[:1] == [kernel] or name == "cudnn"
        assert len(asked.kernels) == 1 or not alone
    asked.kernels = []
    torch_sdpa.run(q, k, v, Call())
    assert asked.kernels in ([], [SDPBackend.FLASH_ATTENTION]), "its own order, as before"
    config.forget()


def test_titles() -> None:
    names = ("torch", "torch:cudnn", "sdpa:sdpa_avx2", "fa2", "of another version")
    told = [title(name) for name in names]
    assert told == ["torch", "torch cuDNN", "sdpa_avx2", "Flash Attention 2", "of another version"]


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WAN_ATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kinds, "SMALL", {"cpu": 0.0, "cuda": 0.0})
    words = "tune --shape 1x128x2x64,1x64x2x64 --dtype fp32 --device cpu".split()
    assert command_line.main(words) == 2  # WAN_ATTN_TUNE=off
    assert "nothing would obey" in capsys.readouterr().err
    monkeypatch.setenv("WAN_ATTN_TUNE", "auto")
    for again in (False, True):
        code = command_line.main([*words, *(["--again"] if again else [])])
        told = capsys.readouterr()
        assert "[2/2] 1x64x2x64 fp32, plain" in told.err
        if op.binding() == "torch":
            assert code == 1 and "torch alone takes it" in told.out
        else:
            words_told = " ".join(told.out.split())  # names of rows are of many lengths
            assert code == 0 and "the whole call; today" in words_told
            assert " ms, torch" in words_told or ", torch " in words_told
            assert len(list((tmp_path / "tuning").glob("*.json"))) == 2
    assert (
        command_line.main(["why", "--shape", "1x128x2x64", "--dtype", "fp32", "--device", "cpu"])
        == 0
    )
    if op.binding() != "torch":
        assert "to repeat: python -m wan_attn tune --again" in " ".join(
            capsys.readouterr().out.split()
        )
    assert command_line.main(["tune", "--shape", "1x0x2x64"]) == 2
    config.refresh()
