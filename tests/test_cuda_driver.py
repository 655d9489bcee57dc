# SPDX-License-Identifier: Apache-2.0
"""test_cuda_driver.py - machine code on its way from Python to C: the callback that libwan_attn
asks, from any thread, and what may go wrong in it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from wan_attn.backends import native
from wan_attn.cuda import images
from wan_attn.native import cuda_driver, library
from wan_attn.request import PLAIN, Request

CODE = b"\x7fELF machine code"


@pytest.fixture(autouse=True)
def _as_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda_driver, "_images", {})
    yield
    vars(cuda_driver._here).clear()


def ask(kernel: str = "sdpa_x", arch: int = 80, room: int = 100) -> tuple[int, int, int, str]:
    """As C does: (status, address, size, message)."""
    image, size = ctypes.c_void_p(), ctypes.c_size_t()
    message = ctypes.create_string_buffer(room + 1)
    message.raw = b"?" * (room + 1)
    status = cuda_driver._FIND_IMAGE(kernel.encode(), arch, image, size, message, room)
    assert message.raw[room:] == b"?", "it writes beyond the message"
    return status, image.value or 0, size.value, message.value.decode("utf-8", "replace")


def give(monkeypatch: pytest.MonkeyPatch, image: Callable[[str, int], bytes]) -> None:
    monkeypatch.setattr(images, "image", image)


def test_an_image_is_found_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def image(kernel: str, arch: int) -> bytes:
        asked.append((kernel, arch))
        return CODE + b"!"

    give(monkeypatch, image)
    status, address, size, _ = ask()
    assert (status, size) == (0, len(CODE) + 1)
    assert ctypes.string_at(address, size) == CODE + b"!"
    assert ask()[1] == address and ask(arch=89)[0] == 0
    assert asked == [("sdpa_x", 80), ("sdpa_x", 89)]


def test_threads_that_ask_at_once_get_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """C reads it after the callback has returned: an image of which only the other thread's is kept
    would be freed memory."""
    both = threading.Barrier(2, timeout=60)

    def image(kernel: str, arch: int) -> bytes:
        both.wait()
        return bytes(bytearray(CODE))  # an object of its own, as read from a file

    give(monkeypatch, image)
    answers: list[tuple[int, int, int, str]] = []
    threads = [threading.Thread(target=lambda: answers.append(ask())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = ctypes.cast(ctypes.c_char_p(cuda_driver._images["sdpa_x", 80]), ctypes.c_void_p).value
    assert [answer[:2] for answer in answers] == [(0, kept)] * 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (images.ImageError("no compiler"), "no compiler"),
        (KeyError("x"), "KeyError('x')"),
        (images.ImageError("é" * 200), "é" * 49),
        (KeyboardInterrupt(), "KeyboardInterrupt()"),
    ],
)
def test_what_goes_wrong_becomes_words(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, words: str
) -> None:
    def image(kernel: str, arch: int) -> bytes:
        raise error

    give(monkeypatch, image)
    status, address, _, message = ask()
    assert (status, address) == (1, 0) and message.rstrip("�") == words


def test_an_interruption_is_raised_behind_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a kernel is compiled ends the program, rather than trying the next backend."""

    def image(kernel: str, arch: int) -> bytes:
        raise KeyboardInterrupt

    def op(*operands: object, **options: object) -> None:
        raise RuntimeError(ask()[3])

    give(monkeypatch, image)
    monkeypatch.setattr(native, "_op", op)
    query = torch.zeros(1, 2, 1, 64)
    with pytest.raises(KeyboardInterrupt):
        native.run(query, query, query, PLAIN)
    give(monkeypatch, lambda kernel, arch: CODE)
    with pytest.raises(RuntimeError):  # and is over then
        native.run(query, query, query, PLAIN)


def test_a_torch_for_amd_is_not_asked_for_nvidias_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may be there; HIP's addresses mean nothing to an NVIDIA card."""
    call = Request(
        1, 8, 8, 1, 1, 64, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.device("cuda:0")
    )
    if library.load() is None:
        pytest.skip("no native library")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in (native.why_not(call) or "")
    monkeypatch.setattr(torch.version, "hip", None)
    assert "AMD" not in (native.why_not(call) or "")
