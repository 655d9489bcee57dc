# SPDX-License-Identifier: Apache-2.0
"""test_selftest.py - doctor's self-test: its float64 is right, planted errors are found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from oracle import attention as oracle
from wan_attn.backends import REGISTRY
from wan_attn.doctor import selftest, selftest_run
from wan_attn.log import DTYPES
from wan_attn.request import Call
from wan_attn.selfcheck import reference as truth


@pytest.fixture(scope="module")
def prepared() -> selftest.Prepared:
    return selftest.prepare()


# --- the float64 results, judged by the tests' own oracle ------------------------------------


def test_the_self_tests_float64_is_the_oracles(prepared: selftest.Prepared) -> None:
    for case, ((q, k, v), expected) in prepared.items():
        is_causal, window = truth.MASKS[case.mask]
        q_lens = None if case.q_lens is None else torch.tensor(case.q_lens)
        out, lse = oracle(
            q,
            k,
            v,
            q_lens=q_lens,
            k_lens=torch.tensor(case.k_lens),
            is_causal=is_causal,
            window=window,
        )
        torch.testing.assert_close(expected.out, torch.from_numpy(out), atol=1e-12, rtol=0)
        torch.testing.assert_close(expected.lse, torch.from_numpy(lse), atol=1e-12, rtol=0)


def test_the_calls_are_the_promised_ones(prepared: selftest.Prepared) -> None:
    assert {case.head_dim for case in prepared} == {64, 80, 128}
    lengths = {case.seqlen_q for case in prepared} | {case.seqlen_k for case in prepared}
    assert lengths == {1, 257, 513}
    for head_dim in truth.HEAD_DIMS:
        kinds = {case.mask for case in prepared if case.head_dim == head_dim}
        assert kinds == set(truth.MASKS)
    for (_, k, v), expected in prepared.values():
        assert torch.isnan(k).any() and torch.isnan(v).any()
        assert not torch.isnan(expected.out).any()
    for dtype in DTYPES.values():  # one float64 result serves every dtype
        (q, k, _), _ = next(iter(prepared.values()))
        assert torch.equal(q.to(dtype).float().nan_to_num(), q.nan_to_num())


# --- planted errors ---------------------------------------------------------------------------


def by_torch(q: Any, k: Any, v: Any, **call: Any) -> selftest.Answer:
    return REGISTRY["torch"].run(q, k, v, Call(return_lse=True, **call))


def path(run: Callable[..., selftest.Answer], is_ours: bool = False) -> selftest.Path:
    return selftest.Path("backend", "planted", "cpu", lambda case, dtype: None, run, is_ours)


def key_too_few(q: Any, k: Any, v: Any, *, k_lens: Any, **call: Any) -> selftest.Answer:
    return by_torch(q, k, v, k_lens=(k_lens - 1).clamp(min=0), **call)


def top_left(q: Any, k: Any, v: Any, *, is_causal: bool, **call: Any) -> selftest.Answer:
    if not is_causal:
        return by_torch(q, k, v, is_causal=False, **call)
    call["window"] = (-1, q.shape[1] - k.shape[1])
    return by_torch(q, k, v, is_causal=False, **call)


def no_padding(q: Any, k: Any, v: Any, *, k_lens: Any, **call: Any) -> selftest.Answer:
    return by_torch(q, k, v, k_lens=None, **call)


def rounded_once_more(q: Any, k: Any, v: Any, **call: Any) -> selftest.Answer:
    out, lse = by_torch(q.float(), k.float(), v.float(), **call)
    return out.to(torch.bfloat16).to(q.dtype), lse


def wrong_lse(q: Any, k: Any, v: Any, **call: Any) -> selftest.Answer:
    out, lse = by_torch(q, k, v, **call)
    assert lse is not None
    return out, lse / 0.6931471805599453  # base 2


def wrong_shape(q: Any, k: Any, v: Any, **call: Any) -> selftest.Answer:
    return by_torch(q, k, v, **call)[0].transpose(1, 2), None


def not_the_same_twice(q: Any, k: Any, v: Any, **call: Any) -> selftest.Answer:
    out, lse = by_torch(q, k, v, **call)
    return out * (1 + (torch.rand(()) - 0.5) * 2**-21), lse  # far below any bound


def infinite(q: Any, k: Any, v: Any, **call: Any) -> selftest.Answer:
    return torch.full_like(q, torch.inf), None


def raises(q: Any, k: Any, v: Any, **call: Any) -> selftest.Answer:
    raise RuntimeError("no kernel image is available\nand more lines")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (key_too_few, "times the bound"),
        (top_left, "off by"),
        (no_padding, "NaN"),
        (rounded_once_more, "fp32: out is off by"),
        (wrong_lse, "lse is off by"),
        (wrong_shape, "out has shape"),
        (not_the_same_twice, "other bits the second time"),
        (infinite, "out is off by 1e+30"),
        (raises, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_planted_error_is_found(
    run: Callable[..., selftest.Answer], message: str, prepared: selftest.Prepared
) -> None:
    result = selftest.check(path(run), prepared)
    assert result.failed > 0
    assert len(result.failures) <= selftest.MAX_FAILURES
    assert any(message in failure for failure in result.failures), result.failures
    assert all("and more lines" not in failure for failure in result.failures)
    json.dumps(asdict(result), allow_nan=False)


def test_a_correct_path_passes(prepared: selftest.Prepared) -> None:
    result = selftest.check(path(by_torch), prepared)
    assert (result.failed, result.failures) == (0, [])
    assert result.calls == 3 * len(list(truth.cases()))
    assert 0 < result.ratio < 1


def test_what_a_path_refuses_is_not_its_failure(prepared: selftest.Prepared) -> None:
    refusing = replace(path(raises), why_not=lambda case, dtype: "needs a GPU")
    result = selftest.check(refusing, prepared)
    assert (result.calls, result.failed, result.skip_reason) == (0, 0, "needs a GPU")
    assert result.skipped == 3 * len(list(truth.cases()))


# --- the child process ------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
done = sys.argv[1].split()
def say(what, value): print(MARK + json.dumps({what: value}), flush=True)
print("a library that chatters")
for name in ("good", "bad", "last"):
    if f"cpu/kernel/{name}" in done: continue
    say("start", ["cpu", "kernel", name])
    if name == "bad": BAD
    say("result", {"kind": "kernel", "name": name, "device": "cpu", "calls": 1})
say("end", True)
""".replace("MARK", repr(selftest_run.MARK))


def child(bad: str) -> Callable[[list[str]], list[str]]:
    """A child without torch, which starts at once."""
    return lambda done: [sys.executable, "-c", CHILD.replace("BAD", bad), " ".join(done)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        pytest.param(
            "os.kill(os.getpid(), 4)",
            "was killed by SIGILL",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
        ),
        ("print('what a pity', file=sys.stderr); os._exit(3)", "ended with code 3: what a pity"),
        ("os._exit(0)", "ended with code 0"),
        ("time.sleep(60)", "no answer within 5 s"),
    ],
)
def test_a_path_that_ends_the_process_is_its_own_failure(bad: str, message: str) -> None:
    outcome = selftest_run.run_isolated(child(bad), timeout=5 if "sleep" in bad else 60)
    assert outcome.error is None
    assert [r.name for r in outcome.results] == ["good", "bad", "last"]
    assert [r.failed for r in outcome.results] == [0, 1, 0]
    assert message in outcome.results[1].failures[0]


def test_a_child_that_cannot_start_is_told() -> None:
    outcome = selftest_run.run_isolated(
        lambda done: [sys.executable, "-c", "import no_such_module"], timeout=60
    )
    assert outcome.results == []
    assert outcome.error is not None and "No module named 'no_such_module'" in outcome.error


def test_crashes_without_end_are_given_up() -> None:
    endless = CHILD.replace("BAD", "0").replace('"good"', "str(len(done))")
    endless = endless.replace('say("result"', 'os._exit(9); say("result"')
    outcome = selftest_run.run_isolated(
        lambda done: [sys.executable, "-c", endless, " ".join(done)], timeout=60, max_children=2
    )
    assert outcome.error == "given up after 2 crashes"
    assert len(outcome.results) == 2
