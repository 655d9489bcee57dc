# SPDX-License-Identifier: Apache-2.0
"""first_call.py - a CUDA kernel that is proven shows in this process, too, that it is right.

The proof (proof.py) is made once, on one card of a kind. At the first call of its kind in a process
a kernel answers two or three small calls again: another card of the same name may be broken, or its
memory, or be driven too fast. One that is wrong is refused with what it got wrong, and the next
backend computes: no black frames after an hour's work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from wan_attn import config
from wan_attn.selfcheck import list_reference, skip_calls
from wan_attn.selfcheck.reference import MASKS, UNIT, Case, difference, make_inputs, reference

MASKED = ("full", "causal")
# Both ends ragged, lengths that are no multiple of anything. Five tiles of keys at least: Hopper's
# rings of two go round, and consumers wait for each other in every order that long calls have.
# More than two blocks of queries: both blocks of a cluster have rows, and one has no other.
SEQLEN_Q, SEQLEN_K = 277, 807

# run(query, key, value, q_lens, k_lens, is_causal) -> out, lse; `blocks` behind, where it has them,
# and `guard`
Run = Callable[..., tuple[Tensor, Tensor]]

_verdicts: dict[tuple[object, ...], str | RuntimeError | None] = {}
_NOT_ASKED = "not asked yet"
_lock = threading.Lock()


def wrong(
    run: Run,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    is_lossy: bool = False,
    has_lists: bool = False,
) -> str | None:
    """What `run` gets wrong on this device, in words; None: nothing. is_lossy: it has 8-bit
    scores; has_lists: it takes lists of blocks."""
    for mask in MASKED:
        case = Case(SEQLEN_Q, SEQLEN_K, head_dim, mask)
        operands, more = make_inputs(case), []
        if has_lists:  # once with the means of the others, where they can count
            listed, pools = list_reference.listed(case, 0.5), mask == "full" and not is_lossy
            given = (case, *operands, listed, pools, UNIT[dtype])
            truth = list_reference.attention(*given, is_lossy=is_lossy)
            more = [list_reference.as_blocks(listed, pools, device)]
        else:
            truth = reference(case, *operands, is_lossy)
        query, key, value = (x.to(device, dtype) for x in operands)
        # The CPU by name, here and in reference.py: the program may have another default device.
        q_lens = None if case.q_lens is None else torch.tensor(case.q_lens, device="cpu")
        k_lens = torch.tensor(case.k_lens, device="cpu")
        out, lse = run(query, key, value, q_lens, k_lens, MASKS[mask][0], *more)
        found = difference(case, truth, out, lse, UNIT[dtype], is_lossy or has_lists)
        if found is not None:
            return found
    skips = has_lists and not is_lossy
    return skip_calls.first_wrong(run, device, dtype, head_dim) if skips else None


def verdict(
    run: Run,
    name: Callable[[], str | None],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    is_final: Callable[[RuntimeError], bool] = lambda error: False,
    is_lossy: bool = False,
    has_lists: bool = False,
) -> str | None:
    """wrong(), asked once for each kind of call; None also while a CUDA graph is being captured,
    when the device may not be waited for, and under WAN_ATTN_SELF_CHECK=0.

    Args:
        name: what the last run ran on, for the words of the verdict.
        is_final: whether what `run` raised would be raised by every later run as well, as where
            there is no machine code for the device. That is kept as the verdict.
        is_lossy, has_lists: `run` has 8-bit scores, or takes lists of blocks: kinds of their own.

    Raises:
        RuntimeError: what `run` raised, now or at the first call of this kind.
    """
    kind = (device, dtype, head_dim, is_lossy, has_lists)
    return settled(kind, lambda: wrong(run, *kind), name, is_final)


def settled(
    kind: tuple[object, ...],
    find: Callable[[], str | None],
    name: Callable[[], str | None],
    is_final: Callable[[RuntimeError], bool],
) -> str | None:
    """What `find` says, asked once for each kind; all else as verdict() has it."""
    found: str | RuntimeError | None = _verdicts.get(kind, _NOT_ASKED)
    if found is None:
        return None
    if not config.current().self_check:
        return None
    if found is not _NOT_ASKED:
        return _said(found)
    if torch.cuda.is_current_stream_capturing():
        return None
    with _lock:
        if kind not in _verdicts:
            try:
                words = find()
            except RuntimeError as error:
                if is_final(error):
                    _verdicts[kind] = RuntimeError(str(error))
                raise
            _verdicts[kind] = None if words is None else f"{name()}: {words}"
    return _said(_verdicts[kind])


def _said(found: str | RuntimeError | None) -> str | None:
    if isinstance(found, RuntimeError):
        raise RuntimeError(str(found))  # another one: its traceback is this call's
    return found


def forget() -> None:
    """Check again, as a new process would."""
    with _lock:
        _verdicts.clear()


config.memory(forget)
