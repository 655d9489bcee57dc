# SPDX-License-Identifier: Apache-2.0
"""proof.py - no CUDA kernel runs in the user's process before it was right on this card in another.

A kernel that hangs, or touches memory that is not its own, ends the CUDA context of its process: no
fallback would come. So on a card, driver, torch and build without a verdict the rows of the kernel
table are tried in a child process, once; the verdict is kept (verdicts.py), and only rows that have
passed are used. Without a verdict torch's kernels compute, and one line says how to get one.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import torch

from wan_attn import config, log
from wan_attn.log import dtype_name
from wan_attn.native import cuda_driver, library, op
from wan_attn.native.bindings import DTYPES
from wan_attn.selfcheck import child, proof_child, verdicts
from wan_attn.selfcheck.verdicts import FAILED, PASSED, RUNNING, UNTRIED, Key, Verdict
from wan_attn.transient import is_transient

COMMAND = "python -m wan_attn prove"


@dataclass(frozen=True)
class Limits:
    """Seconds: of one row, which may have to be compiled; until the first one begins; of all."""

    row: float = 60.0
    start: float = 90.0
    whole: float = 240.0


LIMITS = Limits()
_POLL_S = 0.2

# Device index -> its verdict, or why there is none: looked up once in a process.
_settled: dict[int, Verdict | str] = {}
_lock = threading.Lock()
_DTYPES = {number: dtype for dtype, number in DTYPES.items()}


def find_proof(index: int, row: str, dtype: int) -> int:
    """library.PROOF_...: what the native library asks before a CUDA row is used there.

    A question looks at what is on disk; a call itself makes the proof if there is none.
    """
    if not config.current().self_check:
        return library.PROOF_PASSED
    found = look(index) if cuda_driver.is_question() else ensure(index)
    if found is None or isinstance(found, str):
        # Why a device cannot be asked may pass; why its proof cannot be made is kept.
        return library.PROOF_FAILED if index in _settled else library.PROOF_MISSING
    known = found.rows.get(f"{row}/{dtype_name(_DTYPES[dtype])}")
    is_passed = known is not None and known.state == PASSED
    return library.PROOF_PASSED if is_passed else library.PROOF_FAILED


def look(index: int) -> Verdict | str | None:
    """What is known of cuda:`index`: its verdict, or why there can be none; None: not yet."""
    found = _settled.get(index)
    if found is not None:
        return found
    key = verdicts.key_of(index)
    found = key if isinstance(key, str) else verdicts.read(key)
    if isinstance(found, Verdict) and not found.is_complete:
        return None
    return found


def ensure(index: int, limits: Limits | None = None) -> Verdict | str:
    """The verdict for cuda:`index`, made now in a child process if there is none; or why there is
    none. Once in a process."""
    with _lock:
        found = _settled.get(index)
        if found is None:
            found = look(index)
            if isinstance(found, str):
                return found
            if found is None:
                found = _prove(index, limits or LIMITS)
            _settled[index] = found
    return found


def before_work() -> None:
    """For a program's start, before models fill the memory: proves on every card that it sees.

    Does nothing where our CUDA kernels are switched off or cannot run; raises nothing but
    interruptions.
    """
    try:
        settings = config.current()
        is_wanted = settings.self_check and settings.forced_backend in (None, "sdpa")
        if is_wanted and _has_cuda():
            for index in range(torch.cuda.device_count()):
                ensure(index)
    except (RuntimeError, OSError, ValueError) as error:
        if is_transient(error):
            raise
        text = f"the CUDA kernels are not proven: {error}; PyTorch's compute; see: {COMMAND}"
        log.once(("proof", str(error)), logging.WARNING, text)


def has_kernels() -> bool:
    """Whether this process could use CUDA kernels of ours, on a card that they know."""
    return op.binding() != "torch" and torch.version.hip is None


def _has_cuda() -> bool:
    return has_kernels() and torch.cuda.is_available()


def again(index: int, everything: bool, limits: Limits | None = None) -> Verdict | str:
    """Proves once more what has failed on cuda:`index`, or everything."""
    with _lock:
        _settled.pop(index, None)
        states = (FAILED, PASSED) if everything else (FAILED,)
        found = _prove(index, limits or LIMITS, *states)
        _settled[index] = found
    cuda_driver.ask_again()
    return found


def _prove(index: int, limits: Limits, *states: str) -> Verdict | str:
    """The verdict after a proof of the rows in these states, and of the untried; or why none."""
    key = verdicts.key_of(index)
    if isinstance(key, str):
        return key
    try:
        why = child.why_no_python()
        if why is None:
            return _in_turn(index, key, limits, states)
    except OSError as error:
        if is_transient(error):
            raise
        why = str(error)
    return _none(key, why)


def _none(key: Key, why: str) -> str:
    text = (
        f"our CUDA kernels are not used on {key.card}: there is no proof yet that they are right"
        f" there ({why}). PyTorch's kernels compute. To get it: {COMMAND}"
    )
    log.once(("no proof", key), logging.WARNING, text)
    return why


def _in_turn(index: int, key: Key, limits: Limits, states: tuple[str, ...]) -> Verdict | str:
    """_prove, while no other process does; else waits for what that one finds."""
    lock = verdicts.Lock(key)
    try:
        end = time.monotonic() + limits.whole
        if not lock.take():
            text = f"another process proves our CUDA kernels on {key.card}: waiting for it"
            log.LOGGER.info("%s %s", log.PREFIX, text)
            while not lock.take():
                if time.monotonic() > end:
                    return _none(key, f"another process has been at it for {limits.whole:.0f} s")
                time.sleep(_POLL_S)
            states = ()  # what it has found is new
        verdict = verdicts.read(key)
        if verdict is not None:
            _blame(verdict, "the process that tried it ended without a word, or the machine did")
            verdict.put(verdict.names(*states), UNTRIED)
            verdicts.write(verdict)
            if verdict.is_complete:
                return verdict
        return _by_children(index, key, limits, lock)
    finally:
        lock.close()


def _blame(verdict: Verdict, words: str, state: str = FAILED) -> list[str]:
    """Says of the row that was running how that ended."""
    running = verdict.names(RUNNING)
    verdict.put(running, state, words if state == FAILED else "")
    return running


def _by_children(index: int, key: Key, limits: Limits, lock: verdicts.Lock) -> Verdict | str:
    text = (
        f"checking our CUDA kernels on {key.card} in a process of its own, once for this driver,"
        " torch and build: about 10 s"
    )
    log.LOGGER.info("%s %s", log.PREFIX, text)
    start = time.monotonic()
    end, before = start + limits.whole, -1
    while True:
        why, is_done = _one_child(index, key, limits, end, lock)
        verdict = verdicts.read(key)
        left = 0 if verdict is None else len(verdict.names(UNTRIED))
        if is_done or left in (0, before) or time.monotonic() > end:
            break
        before = left
    if verdict is None or not verdict.names(PASSED, FAILED):
        return _none(key, why or "the child process has tried nothing")
    _say(verdict, why if not verdict.is_complete else "", time.monotonic() - start)
    return verdict


def _one_child(
    index: int, key: Key, limits: Limits, end: float, lock: verdicts.Lock
) -> tuple[str, bool]:
    """Runs one child, and blames the row that ended it; (what went wrong, whether all is tried)."""
    words = [str(index), key.digest]
    try:
        process = child.Child(make_command(words), [lock.handle])
    except OSError as error:
        if is_transient(error):
            raise
        return f"no process can be started: {error}", True
    limit, said, is_blamed = limits.start, None, True
    try:
        while True:
            left = end - time.monotonic()
            said = process.next(min(limit, left))
            if said is None:
                why = process.how_it_ended()
                break
            if "end" in said:
                return "", True
            if "trouble" in said:
                return str(said["trouble"]), True
            limit = limits.row
    except TimeoutError:
        # Of the whole time being over no row is guilty.
        is_blamed = left > limit
        why = f"hung: no answer within {limit:.0f} s" if is_blamed else "the time was over"
    except BaseException:
        process.close()
        _settle_running(key, "", UNTRIED)  # its user has ended it
        raise
    finally:
        process.close()
    _settle_running(key, why, FAILED if is_blamed else UNTRIED)
    return why, False


def _settle_running(key: Key, words: str, state: str) -> None:
    verdict = verdicts.read(key)
    if verdict is not None and _blame(verdict, words, state):
        verdicts.write(verdict)


def make_command(words: list[str]) -> list[str]:
    """What starts a child."""
    return child.command(proof_child.CODE, words)


def _say(verdict: Verdict, why: str, seconds: float) -> None:
    card, count = verdict.key.card, f"{len(verdict.names(PASSED))} of {len(verdict.rows)}"
    text = f"{count} CUDA kernels are right on {card} ({seconds:.0f} s)"
    log.LOGGER.info("%s %s", log.PREFIX, text)
    for name in verdict.names(FAILED):
        text = f"{name} is not used on {card}: {verdict.rows[name].said}"
        log.once(("proof", verdict.key, text), logging.WARNING, text)
    if why:
        text = f"the others were not tried ({why}) and are not used; to try them: {COMMAND}"
        log.once(("proof", verdict.key, text), logging.WARNING, text)


def forget() -> None:
    """Look again, as a new process would."""
    with _lock:
        _settled.clear()
    cuda_driver.ask_again()


_self_check: bool | None = None


def _follow(settings: config.Settings) -> None:
    """The library keeps what it was told, also that the check was off."""
    global _self_check
    before, _self_check = _self_check, settings.self_check
    if before is not None and before != settings.self_check:
        cuda_driver.ask_again()


config.memory(forget)
config.follow(_follow)
