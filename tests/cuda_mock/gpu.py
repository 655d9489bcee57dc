# SPDX-License-Identifier: Apache-2.0
"""gpu.py - libwan_attn's CUDA path, whole, on the CPU: its own loader and launches talk to the mock
driver, and each launch runs the very kernel on the emulated GPU.

Tensors live in ordinary memory and are said to be on a CUDA device. Every pass may read the call's
inputs and what is in the workspace, and may write just what it is for: the emulator reports
anything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import shutil
from collections.abc import Callable, Iterator
from ctypes import (
    c_char_p,
    c_int,
    c_int32,
    c_longlong,
    c_uint,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emu import build
from emu.args import (
    Args,
    GuardArgs,
    ListedArgs,
    MergeArgs,
    PackArgs,
    PoolArgs,
    PutLengthsArgs,
    Qk8Args,
)
from emu.rows import (
    Helper,
    Tile,
    TileListed,
    TileSm90,
    gpus,
    helpers,
    tiles,
    tiles_listed,
    tiles_listed_qk8,
    tiles_qk8,
    tiles_sm90,
)
from emu.run import Tensor_, launch
from emu.run_sm90 import Sm90Args, aligned_args
from wan_attn.native import library as native
from wan_attn.native.bindings import describe

DRIVER = Path(__file__).with_name("driver.c")
LAUNCH = ctypes.CFUNCTYPE(c_int32, c_char_p, c_void_p, ctypes.POINTER(c_uint), c_void_p)
STREAM = 0x5EED
IMAGE = b"\x7fELF"  # as far as the mock driver looks; behind it, whose machine code this is
_numbers = itertools.count()


@dataclass(frozen=True)
class Card:
    major: int
    minor: int
    name: str
    sms: int = 80


CARDS = {
    75: Card(7, 5, "NVIDIA GeForce RTX 2080 Ti"),
    80: Card(8, 0, "NVIDIA A100-SXM4-80GB"),
    86: Card(8, 6, "NVIDIA RTX A6000"),
    89: Card(8, 9, "NVIDIA GeForce RTX 4090"),
    90: Card(9, 0, "NVIDIA H200"),
    120: Card(12, 0, "NVIDIA GeForce RTX 5090"),
}


def _copy(library: Path, folder: Path) -> Path:
    """To be loaded with state of its own: a loader tells copies apart by their path."""
    copy = folder / f"{next(_numbers)}-{library.name}"
    shutil.copy2(library, copy)
    return copy


def driver_library() -> Path:
    """The mock driver, compiled."""
    compiler = build.compiler() or ""
    command = [compiler, "-x", "c", "-Wall", "-Wextra", "-O1", "-shared", "-fPIC", str(DRIVER)]
    return build.made("mock-driver", ".so", [DRIVER], command)


class Gpu:
    """A machine with these cards; `lib` is a libwan_attn that has seen no other."""

    def __init__(
        self,
        folder: Path,
        *cards: Card,
        find_image: Callable[..., int] | None = None,
        library: Path | None = None,
    ):
        self.driver = ctypes.CDLL(str(_copy(driver_library(), folder)))
        self.driver.mock_log.restype = c_char_p
        self.driver.mock_add_device.argtypes = [c_int, c_int, c_int, c_char_p]
        self.driver.mock_fail.argtypes = [c_char_p, c_int, c_int]
        self.driver.mock_on_launch.argtypes = [LAUNCH]
        for card in cards:
            self.driver.mock_add_device(card.major, card.minor, card.sms, card.name.encode())
        self.cards = cards
        self.asked: list[tuple[str, int]] = []
        self._images: dict[bytes, bytes] = {}
        self.problem: BaseException | None = None
        self.call: _Call | None = None
        self.prepared: native.Call | None = None  # the last one
        self._keep = (LAUNCH(self._launch), native.ImageFn(find_image or self._find_image))
        self.driver.mock_on_launch(self._keep[0])
        self.lib = native.opened(_copy(library or native.lib_path(), folder))
        self.configure(self.driver._name)

    def configure(self, driver: str) -> str | None:
        config = native.CudaConfig(ctypes.sizeof(native.CudaConfig), driver.encode(), self._keep[1])
        error = native.Error()
        status = self.lib.wan_attn_cuda_configure(ctypes.byref(config), ctypes.byref(error))
        return None if status == native.OK else error.text()

    @contextlib.contextmanager
    def green(self, device: int = 0) -> Iterator[None]:
        """This thread's context is a green one of the device, as within torch's GreenContext."""
        self.driver.mock_enter_green(device)
        yield
        self.driver.mock_leave()

    def fail(self, function: str, error: int, after: int = 0) -> None:
        """The next call of this function of the driver fails, or a later one."""
        self.driver.mock_fail(function.encode(), error, after)

    def log(self) -> list[str]:
        """What the driver was asked for since the last time."""
        lines: list[str] = self.driver.mock_log().decode().splitlines()
        self.driver.mock_clear_log()
        return lines

    def _find_image(self, kernel, arch, image, size, message, message_size) -> int:  # type: ignore[no-untyped-def]
        self.asked.append((kernel.decode(), arch))
        code = self._images.setdefault(kernel, IMAGE + kernel)
        image[0] = ctypes.cast(c_char_p(code), c_void_p)
        size[0] = len(code)
        return 0

    def _launch(self, image: bytes, args: int, numbers, stream: int | None) -> int:  # type: ignore[no-untyped-def]
        try:
            assert self.call is not None and stream == STREAM
            self.call.run_pass(image.decode(), args, *(numbers[i] for i in range(3)))
        except BaseException as error:  # noqa: BLE001 - C cannot be passed; raised by sdpa()
            self.problem = error
            return 999
        return 0

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        q_lens: Tensor | None = None,
        k_lens: Tensor | None = None,
        lens_on_device: bool = False,
        scale: float | None = None,
        is_causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        kernel: int = -1,
        device: int = 0,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = True,
        precision: int = 0,
        guard: Tensor | None = None,
        block_counts: Tensor | None = None,
        block_indices: Tensor | None = None,
        pools_others: bool = False,
        skip_threshold: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """wan_attn_prepare and wan_attn_run; `out` and `lse` are dense where bindings call them."""
        if out is None:
            out = torch.full(query.shape, float("nan"), dtype=query.dtype)
        if lse is None:
            lse = torch.full((query.shape[0], query.shape[2], query.shape[1]), float("nan"))
        named = {"q": query, "k": key, "v": value, "out": out}
        lists = {"block_counts": block_counts, "block_indices": block_indices}
        named |= {name: x for name, x in lists.items() if x is not None}
        if return_lse:
            named["lse"] = lse
        params = native.Params(
            kernel=kernel,
            **options_of(scale, is_causal, window),
            precision=precision,
            guard=None if guard is None else guard.data_ptr(),
            guard_size=0 if guard is None else guard.nbytes,
            pools_others=pools_others,
            skip_threshold=skip_threshold,
            **{name: self._on_device(x, device) for name, x in named.items()},
        )
        for name, lens in (("seqused_q", q_lens), ("seqused_k", k_lens)):
            if lens is not None:
                on_device = self._on_device(lens, device) if lens_on_device else describe(lens)
                setattr(params, name, on_device)
        inputs = {"q": query, "k": key, "v": value}
        inputs |= {name: x for name, x in lists.items() if x is not None}
        if lens_on_device:
            inputs |= {n: x for n, x in (("q_lens", q_lens), ("k_lens", k_lens)) if x is not None}
        outputs = {"out": out, "lse": lse} | ({} if guard is None else {"guard": guard})
        return self._forward(params, inputs, outputs, device)

    def _forward(
        self,
        params: native.Params,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        device: int,
    ) -> tuple[Tensor, Tensor]:
        made, error = native.Call(struct_size=ctypes.sizeof(native.Call)), native.Error()
        self._check(self.lib.wan_attn_prepare(params, made, error), error)
        workspace = give_workspace(params, made.workspace_size)
        self.call = _Call(self.cards[device], inputs, outputs, workspace)
        self.prepared = made
        self.problem = None
        status = self.lib.wan_attn_run(params, made, error)
        if self.problem is not None:
            raise self.problem
        self._check(status, error)
        return outputs["out"], outputs["lse"]

    @staticmethod
    def _on_device(x: Tensor, device: int) -> native.Tensor:
        described = describe(x)
        described.device_type, described.device_index = native.CUDA, device
        return described

    @staticmethod
    def _check(status: int, error: native.Error) -> None:
        if status != native.OK:
            raise RuntimeError(f"{status}: {error.text()}")


def options_of(scale: float | None, is_causal: bool, window: tuple[int, int]) -> dict[str, Any]:
    """What every call is described by, beside its tensors."""
    return {
        "struct_size": ctypes.sizeof(native.Params),
        "softmax_scale": 0.0 if scale is None else scale,
        "has_softmax_scale": scale is not None,
        "is_causal": is_causal,
        "window_size_left": window[0],
        "window_size_right": window[1],
        "stream": STREAM,
    }


def give_workspace(params: native.Params, size: int) -> Tensor:
    """Aligned, and of no zeros; the call gets it."""
    workspace = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
    begin = -workspace.data_ptr() % 256
    workspace = workspace[begin : begin + size]
    params.workspace, params.workspace_size = workspace.data_ptr(), size
    return workspace


class _Call:
    """One call's memory, and the passes that ran on it."""

    def __init__(
        self, card: Card, inputs: dict[str, Tensor], outputs: dict[str, Tensor], workspace: Tensor
    ) -> None:
        self.arch = 10 * card.major + card.minor
        self.inputs, self.outputs, self.workspace = inputs, outputs, workspace

    def run_pass(self, image: str, args_at: int, blocks: int, threads: int, smem: int) -> None:
        kernel = self._kernel(image)
        assert threads == kernel.num_threads
        assert smem == (0 if isinstance(kernel, Helper) else kernel.smem_bytes)
        arch = 90 if isinstance(kernel, TileSm90) else 75 if self.arch < 80 else 80
        library = build.library(kernel, arch=arch)
        args, written = _decode(kernel, args_at, library)
        read = {"out", "lse"} if image == "wan_attn_watch" else set()
        conflicts = launch(library, args, blocks, self._memory(written, read))
        assert conflicts == 0

    def _kernel(self, image: str) -> Tile | Helper | TileSm90:
        """What was launched, by what its machine code was asked for by."""
        if image in helpers():
            return helpers()[image]
        if "_sm90_" in image:
            return next(t for t in tiles_sm90() if t.key == image)
        known = (*tiles(), *tiles_listed(), *tiles_qk8(), *tiles_listed_qk8())
        return next(t for t in known if t.symbol == image and t.gpu_class == gpus()[self.arch])

    def _memory(self, written: tuple[int, int], read: set[str]) -> list[Tensor_]:
        """What this pass may touch: inputs, outputs, and the workspace without what it writes.
        read: outputs that it only reads."""
        found = []
        for tensors, is_output in ((self.inputs, 0), (self.outputs, 1)):
            for name, x in tensors.items():
                store = x.untyped_storage()
                if store.nbytes():
                    kind = 0 if name in read else is_output
                    found.append(Tensor_(name.encode(), store.data_ptr(), store.nbytes(), kind))
        begin, end = self.workspace.data_ptr(), self.workspace.data_ptr() + len(self.workspace)
        at, size = written
        if begin <= at < end:
            assert at + size <= end, "a pass writes beyond the workspace"
            found.append(Tensor_(b"written", at, size, 1))
            parts = [(begin, at), (at + size, end)]
        else:
            parts = [(begin, end)]
        found += [Tensor_(b"workspace", a, b - a, 0) for a, b in parts if b > a]
        return found


class _Map(ctypes.Structure):
    """tensor_map of driver.c."""

    _fields_ = [
        *(("address", c_uint64), ("strides", c_uint64 * 3)),
        *(("size", c_uint32 * 4), ("box", c_uint32 * 4)),
        *(("dtype", c_int), ("swizzle", c_int)),
    ]


def _decode_sm90(kernel: TileSm90, at: int, library: ctypes.CDLL) -> Sm90Args:
    """The same arguments with maps as the emulated TMA reads them."""
    args = aligned_args()
    ctypes.memmove(ctypes.addressof(args), at, ctypes.sizeof(args))
    for name in ("q", "k", "v", "out"):
        there = ctypes.addressof(getattr(args, name))
        made = _Map.from_buffer_copy(ctypes.string_at(there, ctypes.sizeof(_Map)))
        if made.address == 0:
            assert name == "out" and not args.stores_by_tma
            continue
        assert (made.dtype, made.swizzle) == ({"F16": 6, "BF16": 9}[kernel.dtype], 3)
        broken = library.emu_encode_tensor_map(
            *(c_void_p(there), c_void_p(made.address), (c_longlong * 4)(*made.size)),
            *((c_longlong * 3)(*made.strides), (c_int * 4)(*made.box), 1),
        )
        assert broken == 0, f"the map of {name} breaks rule {broken}"
    return args


def _decode_qk8(kernel: Helper, at: int) -> tuple[Qk8Args, tuple[int, int]]:
    args = Qk8Args.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(Qk8Args)))
    heads = args.batch * args.heads
    sums = heads * args.tiles * args.head_dim * 4
    if kernel.pack_step == 1:
        return args, (args.sums, sums)
    if kernel.pack_step == 2:
        return args, (args.mean, heads * args.head_dim * 4)
    if kernel.pack_step == 3:
        return args, (args.to, heads * args.tiles * 64 * (args.head_dim + 8))
    # What goes with the queries lies right behind them.
    rows = heads * args.seqlen
    return args, (args.to, -(-rows * args.head_dim // 256) * 256 + rows * 8)


def _decode(
    kernel: Tile | Helper | TileSm90, at: int, library: ctypes.CDLL
) -> tuple[ctypes.Structure, tuple[int, int]]:
    """The arguments of a launch, and (address, bytes) of what it writes into the workspace."""
    if isinstance(kernel, TileSm90):
        return _decode_sm90(kernel, at, library), (0, 0)
    if isinstance(kernel, Tile):
        made = ListedArgs if isinstance(kernel, TileListed) else Args
        whole = made.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(made)))
        args = whole.call if isinstance(whole, ListedArgs) else whole
        rows = args.batch * args.num_heads_q * args.seqlen_q
        size = args.num_splits * rows * kernel.head_dim * (4 if args.out_is_f32 else 2)
        # The parts' lse lie right behind their out: both are written by the same pass.
        return whole, (args.out.data or 0, -(-size // 256) * 256 + args.num_splits * rows * 4)
    if kernel.body == "merge":
        return MergeArgs.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(MergeArgs))), (0, 0)
    if kernel.body == "put_lengths":
        put = PutLengthsArgs.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(PutLengthsArgs)))
        return put, (put.to, 4 * put.count)
    if kernel.body == "guard":
        return GuardArgs.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(GuardArgs))), (0, 0)
    if kernel.body == "qk8":
        return _decode_qk8(kernel, at)
    if kernel.body == "pool":
        pool = PoolArgs.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(PoolArgs)))
        blocks = pool.batch * pool.heads * -(-pool.seqlen // 64)
        return pool, (pool.to, blocks * (2 * pool.head_dim if kernel.pack_step == 1 else 4))
    pack = PackArgs.from_buffer_copy(ctypes.string_at(at, ctypes.sizeof(PackArgs)))
    heads = pack.batch * pack.heads
    if kernel.pack_step == 1:
        return pack, (pack.largest, 4 * heads * pack.num_parts)
    if kernel.pack_step == 2:
        return pack, (pack.scale, 4 * heads)
    return pack, (pack.to, 2 * heads * pack.seqlen * pack.head_dim)
