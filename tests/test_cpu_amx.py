# SPDX-License-Identifier: Apache-2.0
"""test_cpu_amx.py - the AMX row: its tile instructions executed by the CPU, where it has them, and
by tests/amx_emulator, everywhere.

For the emulator the row's C is compiled as it ships, but for a trap (ud2) put before every tile
instruction: so the CPU never executes one, whether it could or not, and the handler of the trap
does. Everything else in the row runs on the CPU, which therefore must have AVX512-BF16.
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blocks_oracle
from blocks_oracle import random_lists
from tolerances import assert_close_to_oracle
from wan_attn.native import bindings, op
from wan_attn.native import library as native

ROOT = Path(__file__).parent.parent
REPLACED = ("core/cpuid.c", "cpu/amx_permission.c")
ON_CPU, EMULATED = "cpu", "emulator"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux"
    or platform.machine() != "x86_64"
    or shutil.which("cc") is None
    or "avx512_bf16" not in op.cpu_features(),
    reason="needs Linux on an x86-64 with AVX512-BF16, and a C compiler",
)


def trapped(source: Path, folder: Path, flags: list[str]) -> Path:
    """The source as assembly, with a trap before each tile instruction."""
    made = folder / f"{source.stem}.s"
    subprocess.run(["cc", *flags, "-S", source, "-o", made], check=True)
    text, count = re.subn(
        r"(?m)^(?=\s+(?:ldtilecfg|tile\w+|tdp\w+)\s*)", "\tud2\n", made.read_text()
    )
    assert count >= 20, "no tile instructions found in what the compiler made"
    made.write_text(text)
    return made


def compile_library(folder: Path) -> Path:
    sources = [p for p in ROOT.glob("csrc/c*/**/*.c") if not p.as_posix().endswith(REPLACED)]
    sources += ROOT.glob("tests/amx_emulator/*.c")
    flags: list[str] = ["-std=c11", "-O1", "-fPIC", "-DWAN_ATTN_BUILD", f"-I{ROOT / 'csrc'}"]

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.parent.name}-{source.stem}.o"
        if source.stem == "sdpa_amx":
            source = trapped(source, folder, flags)
        subprocess.run(["cc", *flags, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "libwan_attn_amx.so"
    subprocess.run(
        ["cc", "-shared", *objects, "-lm", "-lpthread", "-ldl", "-o", library], check=True
    )
    return library


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(compile_library(tmp_path_factory.mktemp("amx"))))
    for name, (restype, argtypes) in native._FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    lib.wan_attn_amx_instructions.restype = ctypes.c_long
    assert lib.wan_attn_emulate_amx() == 0
    return lib


def amx_row() -> int:
    names = [info_at(row).name for row in range(native.lib().wan_attn_kernel_count())]
    return names.index(b"sdpa_amx")


def need_amx() -> None:
    if "amx" not in op.cpu_features():
        pytest.skip("this CPU has no AMX: the row runs under the emulator only")


@pytest.fixture(params=(ON_CPU, EMULATED))
def amx(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, threads: None
) -> Iterator[int]:
    """The AMX row's index, in the library as built or in one whose tiles are emulated and used."""
    if request.param == ON_CPU:
        need_amx()
        yield amx_row()
        return
    library = request.getfixturevalue("emulator")
    monkeypatch.setattr(native, "_open", lambda: (library, None))
    torch.set_num_threads(1)  # the emulator counts for each thread
    before = library.wan_attn_amx_instructions()
    yield amx_row()
    assert library.wan_attn_amx_instructions() > before


def info_at(row: int) -> native.KernelInfo:
    info = native.KernelInfo(struct_size=ctypes.sizeof(native.KernelInfo))
    native.lib().wan_attn_kernel_at(row, ctypes.byref(info))
    return info


def check(amx: int, *tensors: torch.Tensor, **call: Any) -> torch.Tensor:
    query, key, value = tensors
    given = dict(call)
    left, right = given.pop("window", (-1, -1))
    k_lens = given.pop("k_lens", None)
    out, lse = bindings.ctypes_sdpa(
        query,
        key,
        value,
        k_lens=None if k_lens is None else torch.tensor(k_lens),
        window_left=left,
        window_right=right,
        return_lse=True,
        kernel=amx,
        **given,
    )
    assert_close_to_oracle(out, *tensors, lse=lse, **call)
    return out


def operands(
    seqlen_q: int, seqlen_k: int, head_dim: int, batch: int = 1, heads: tuple[int, int] = (1, 1)
) -> tuple[torch.Tensor, ...]:
    shapes = ((seqlen_q, heads[0]), (seqlen_k, heads[1]), (seqlen_k, heads[1]))
    return tuple(torch.randn(batch, n, h, head_dim).bfloat16() for n, h in shapes)


@pytest.mark.parametrize("head_dim", (1, 7, 32, 64, 80, 128, 256))
def test_head_dims(amx: int, head_dim: int) -> None:
    check(amx, *operands(19, 35, head_dim))


@pytest.mark.parametrize("length", (1, 2, 15, 17, 31, 33, 64, 65, 255, 257))
def test_any_number_of_queries_or_keys_is_exact(amx: int, length: int) -> None:
    check(amx, *operands(5, length, 32))  # so few rows are no tiles
    check(amx, *operands(33, length, 32))
    check(amx, *operands(length, 40, 32))


@pytest.mark.parametrize(
    "call",
    ({"is_causal": True}, {"window": (9, 4)}, {"window": (0, 0)}, {"scale": -0.3}, {"scale": 0.0}),
    ids=str,
)
def test_masks_and_scales(amx: int, call: dict[str, object]) -> None:
    check(amx, *operands(70, 300, 64), **call)


def test_padding_grouped_heads_and_float32_query(amx: int) -> None:
    query, key, value = operands(40, 77, 64, batch=3, heads=(4, 2))
    for b, n in enumerate((77, 0, 33)):
        key[b, n:], value[b, n:] = float("nan"), float("inf")
    check(amx, query, key, value, k_lens=[77, 0, 33])
    check(amx, query.float(), key, value, k_lens=[77, 0, 33], is_causal=True)


def test_one_key_gives_its_value(amx: int) -> None:
    query, key, value = operands(33, 1, 64)
    assert torch.equal(check(amx, query, key, value), value.expand(-1, 33, -1, -1))


def test_nan_behind_the_mask_stays_there(amx: int) -> None:
    query, key, value = operands(40, 40, 64)
    value[:, 20] = float("nan")
    out = check(amx, query, key, value, is_causal=True)
    assert out[:, :20].isfinite().all() and out[:, 20:].isnan().all()


@pytest.mark.parametrize("call", ({}, {"is_causal": True}, {"k_lens": [301]}), ids=str)
def test_lists_of_blocks(amx: int, call: dict[str, Any]) -> None:
    """Alone, with the others pooled, and under a threshold that leaves nothing out; and a full list
    beside one that is not has the bits of none."""
    query, key, value = operands(70, 500, 48, heads=(2, 1))
    lists = random_lists(1, 1, 2, 70, 500, 0.5)
    lists.named[0, 0] = True
    counts, indices = lists.as_tensors()
    given = {**call, "k_lens": torch.tensor(call["k_lens"]) if "k_lens" in call else None}
    given |= {"block_counts": counts, "block_indices": indices, "kernel": amx}
    for wishes in ({}, {"pools_others": True}, {"skip_threshold": 1e-9}):
        out, _ = bindings.ctypes_sdpa(query, key, value, **given, **wishes)
        pools = bool(wishes.get("pools_others"))
        want, _ = blocks_oracle.attention(query, key, value, lists, pools_others=pools, **call)
        assert np.abs(out.double().numpy() - want).max() < 0.02
        if "skip_threshold" not in wishes:
            assert torch.equal(out[:, :, 0], check(amx, query, key, value, **call)[:, :, 0])


@pytest.mark.parametrize("call", ({}, {"is_causal": True}, {"k_lens": [301]}), ids=str)
def test_the_emulator_computes_what_the_cpu_does(
    emulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, call: dict[str, object]
) -> None:
    """Bit for bit: what is proven under the emulator is proven for the CPU."""
    need_amx()
    tensors = operands(70, 333, 80, heads=(2, 1))
    on_cpu = check(amx_row(), *tensors, **call)
    monkeypatch.setattr(native, "_open", lambda: (emulator, None))
    assert torch.equal(check(amx_row(), *tensors, **call), on_cpu)


def test_permission_is_asked_of_linux(tmp_path: Path) -> None:
    """Granted where the CPU has tiles, refused with a reason elsewhere."""
    library = tmp_path / "permission.so"
    source = ROOT / "csrc/cpu/amx_permission.c"
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", library], check=True
    )
    refusal = ctypes.CDLL(str(library)).wan_attn_amx_refusal
    refusal.restype = ctypes.c_char_p
    if "amx" in op.cpu_features():
        assert refusal() is None
    else:
        assert refusal() == b"Linux does not let this process use the AMX tile registers"
