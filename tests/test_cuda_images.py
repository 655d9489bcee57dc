# SPDX-License-Identifier: Apache-2.0
"""test_cuda_images.py - where machine code comes from, and what happens when that place is broken.

The compiler is a stand-in that writes down what it was asked: test_cuda_nvrtc.py has the real one.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wan_attn import config, log
from wan_attn.cuda import images, nvrtc, rows, sources, store

ROW, MERGE = "sdpa_sm80_bf16_d128", "wan_attn_merge"
WITH_12_8 = nvrtc.Found(Path("lib12/libnvrtc.so.12"), None, (12, 8))
WITH_13_2 = nvrtc.Found(Path("lib13/libnvrtc.so.13"), None, (13, 2))


class StandIn:
    """An NVRTC whose machine code says what it was made from."""

    def __init__(self, found: nvrtc.Found, fails: nvrtc.NvrtcError | None = None) -> None:
        self.version, self.fails = found.version, fails
        self.asked: list[int] = []

    def compile(self, arch: int, texts: dict[str, bytes], options: list[str]) -> bytes:
        self.asked.append(arch)
        time.sleep(0.01)  # so that threads can meet here
        if self.fails:
            raise self.fails
        return f"{self.version} {arch} {options}".encode()


class Machine:
    """What this process finds: compilers, a cache, a package."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.home, self.shipped = monkeypatch, folder / "home", folder / "shipped"
        self.cache = self.home / "cubin"
        self.shipped.mkdir()
        monkeypatch.setenv("WAN_ATTN_CACHE_DIR", str(self.home))
        monkeypatch.setattr(images, "SHIPPED_FOLDER", self.shipped)
        monkeypatch.setattr(log.LOGGER, "propagate", True)
        self.has(WITH_12_8)

    def has(
        self, *found: nvrtc.Found, fails: dict[nvrtc.Found, nvrtc.NvrtcError] | None = None
    ) -> None:
        self.compilers = {one: StandIn(one, (fails or {}).get(one)) for one in found}
        self.patch.setattr(nvrtc, "found", lambda: found)
        self.patch.setattr(nvrtc, "load", lambda one: self.compilers[one])
        self.restart()

    def restart(self) -> None:
        """As if the process had started now."""
        images._made.clear()
        images._failed.clear()
        log.forget()
        config.refresh()

    @property
    def asked(self) -> int:
        return sum(len(one.asked) for one in self.compilers.values())

    def get(self, kernel: str = ROW, arch: int = 89) -> images.Image:
        return images.images([kernel], arch)[kernel]

    def file(self, kernel: str = ROW, arch: int = 89) -> Path:
        (job,) = rows.jobs_for(arch, [kernel])
        return self.cache / f"{job.made_by((12, 8))}.cubin"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    yield Machine(monkeypatch, tmp_path)
    monkeypatch.undo()
    images.forget()
    log.forget()
    config.refresh()


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# --- the three places -------------------------------------------------------------------------


def test_compiled_once_then_read(machine: Machine) -> None:
    assert images.state(ROW, 89) == "to compile"
    first = machine.get()
    assert first.origin == "NVRTC 12.8" and not first.not_kept
    assert images.state(ROW, 89) == "cached"
    assert machine.get() is first, "a process asks once"
    machine.restart()
    again = machine.get()
    assert (again.origin, again.data, machine.asked) == ("cached", first.data, 1)
    assert images.image(ROW, 89) == first.data
    assert images.state(ROW, 89) == "cached"


def test_the_cache_is_private(machine: Machine) -> None:
    machine.get()
    if os.name != "nt":
        assert machine.cache.stat().st_mode & 0o777 == 0o700
        assert [f.stat().st_mode & 0o777 for f in machine.cache.iterdir()] == [0o600]


def test_one_line_says_what_is_compiled(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wan_attn")
    images.images([ROW, MERGE], 89)
    images.images([ROW, MERGE], 89)
    machine.restart()
    images.images([ROW, MERGE], 89)
    assert said(caplog) == f"[Attention] compiling 2 kernels for sm_89, once: {ROW}, {MERGE}"


def ship(machine: Machine, kernel: str, arch: int) -> Path:
    (job,) = rows.jobs_for(arch, [kernel])
    store.write(machine.shipped, job.stem, b"shipped")
    return machine.shipped / f"{job.stem}.cubin"


# A helper is the same on every class; it keeps to the rule all the same.
@pytest.mark.parametrize("kernel", [ROW, MERGE])
@pytest.mark.parametrize(
    ("shipped", "arch", "serves"),
    [
        (86, 86, True),
        (86, 87, False),  # Jetson Orin: what is compiled for cards does not run there
        (87, 87, True),
        (87, 89, False),  # and not the other way round
        (86, 89, True),
        (88, 89, False),
        (120, 121, True),
        (80, 86, False),  # another class of tile
        (86, 80, False),
        (89, 86, False),  # newer
        (90, 100, False),  # another major version
        (100, 110, False),
    ],
)
def test_what_a_shipped_cubin_serves(
    machine: Machine, kernel: str, shipped: int, arch: int, serves: bool
) -> None:
    ship(machine, kernel, shipped)
    assert images.state(kernel, arch) == ("shipped" if serves else "to compile")
    assert machine.get(kernel, arch).origin == ("shipped" if serves else "NVRTC 12.8")
    assert machine.asked == (not serves)


def test_code_of_one_architecture_serves_that_one_alone(machine: Machine) -> None:
    tile = rows.tiles_sm90()[0]
    (job,) = rows.jobs_for(90, [tile.key])
    assert job.target == "sm_90a" and "--gpu-architecture=sm_90a" in job.options()
    assert rows.serving(job) == [job]
    with pytest.raises(images.ImageError, match="has no tile for compute capability 10.0"):
        machine.get(tile.key, 100)


def test_force_replaces_what_is_cached_and_not_what_is_shipped(machine: Machine) -> None:
    ship(machine, MERGE, 86)
    images.images([ROW, MERGE], 86)
    found = images.images([ROW, MERGE], 86, force=True)
    assert [found[name].origin for name in (ROW, MERGE)] == ["NVRTC 12.8", "shipped"]
    assert machine.asked == 2


# --- the name ---------------------------------------------------------------------------------


def test_another_compiler_does_not_read_the_first_ones(machine: Machine) -> None:
    first = machine.get()
    machine.has(WITH_13_2)
    assert machine.get().data != first.data
    assert machine.asked == 1 and len(store.names(machine.cache)) == 2
    machine.has(WITH_12_8, WITH_13_2)
    assert machine.get().data == first.data, "the preferred one's"


def test_without_a_compiler_anything_cached_serves(machine: Machine) -> None:
    first = machine.get()
    machine.has()
    assert (machine.get().origin, machine.get().data) == ("cached", first.data)


def test_another_text_is_another_kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.get()
    texts = sources.closure("cuda/sdpa_sm80.cuh")
    changed = {**texts, "cuda/tile/work.cuh": texts["cuda/tile/work.cuh"] + b"\n"}
    monkeypatch.setattr(sources, "closure", lambda source: changed)
    rows._fingerprint.cache_clear()
    machine.restart()
    assert images.state(ROW, 89) == "to compile"
    monkeypatch.undo()
    rows._fingerprint.cache_clear()


def test_names_are_unique() -> None:
    stems = [job.stem for arch in rows.gpus() for job in rows.jobs_for(arch)]
    assert len(set(stems)) == len(stems)


# --- faults -----------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def change(file: Path) -> None:
    text = bytearray(file.read_bytes())
    text[3] ^= 1
    file.write_bytes(text)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "one bit": change,
    "empty": lambda file: file.write_bytes(b""),
    "digest only": lambda file: file.write_bytes(file.read_bytes()[-32:]),
    "no digest": lambda file: file.write_bytes(file.read_bytes()[:-32]),
    "garbage": lambda file: file.write_bytes(os.urandom(500)),
    "a FIFO": lambda file: [make(file) for make in (os.unlink, os.mkfifo)],
    "1 TiB": lambda file: os.truncate(file, 1 << 40),
    "a folder": lambda file: [make(file) for make in (os.unlink, os.mkdir)],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache(machine: Machine, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    data = machine.get().data
    DAMAGES[damage](machine.file())
    machine.restart()
    again = machine.get()
    assert (again.data, again.origin, machine.asked) == (data, "NVRTC 12.8", 2)
    assert machine.file().name in said(caplog) and "not used" in said(caplog)
    if damage != "a folder":
        machine.restart()
        assert machine.get().origin == "cached", "it has been repaired"


def test_a_kernel_under_another_name_is_refused(machine: Machine) -> None:
    machine.get(MERGE)
    machine.file().write_bytes(machine.file(MERGE).read_bytes())
    machine.restart()
    assert machine.get().origin == "NVRTC 12.8"


def test_a_damaged_package_compiles(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    change(ship(machine, ROW, 89))
    assert machine.get().origin == "NVRTC 12.8"
    assert "damaged" in said(caplog)


def test_a_package_without_its_texts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: str) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", source)

    monkeypatch.setattr(sources, "closure", missing)
    with pytest.raises(images.ImageError, match="the package is damaged.*pip install"):
        machine.get()


def somebody_elses(machine: Machine) -> str:
    machine.cache.mkdir(parents=True, mode=0o700)
    uid = os.geteuid()
    machine.patch.setattr(os, "geteuid", lambda: uid + 1)
    return f"belongs to another user .uid {uid}, this process is {uid + 1}."


def open_to_all(machine: Machine) -> str:
    machine.cache.mkdir(parents=True)
    machine.cache.chmod(0o777)
    return "can be written to by other users"


def linked(machine: Machine) -> str:
    (machine.home / "elsewhere").mkdir(parents=True, mode=0o700)
    machine.cache.symlink_to(machine.home / "elsewhere")
    return "must be a folder, not a link"


def a_file(machine: Machine) -> str:
    machine.home.write_text("")
    return "Not a directory|File exists"


def read_only(machine: Machine) -> str:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    machine.patch.setattr(tempfile, "mkstemp", refuse)
    return "Permission denied"


def full(machine: Machine) -> str:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    machine.patch.setattr(os, "replace", refuse)
    return "cubin is full"


FOLDERS = (somebody_elses, open_to_all, linked, a_file, read_only, full)


@pytest.mark.parametrize("error", [errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP])
def test_a_cache_that_cannot_be_looked_at(
    machine: Machine, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    """A name too long, another user's home: left out, and one line says so."""

    def refuse(path: Path) -> None:
        raise OSError(error, os.strerror(error), str(path))

    machine.patch.setattr(Path, "lstat", refuse)
    assert machine.get().origin == "NVRTC 12.8"
    lines = [r.getMessage() for r in caplog.records if os.strerror(error) in r.getMessage()]
    assert len(lines) == 1 and "WAN_ATTN_CACHE_DIR" in lines[0]


@pytest.mark.skipif(os.name == "nt", reason="owners and modes of POSIX")
@pytest.mark.parametrize("fault", FOLDERS, ids=lambda f: f.__name__)
def test_a_cache_that_cannot_be_used(
    machine: Machine, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    expected = fault(machine)
    made = machine.get()
    assert made.origin == "NVRTC 12.8"
    lines = [r.getMessage() for r in caplog.records if "not kept" in r.getMessage()]
    assert len(lines) == 1 and "WAN_ATTN_CACHE_DIR" in lines[0]
    caplog.clear()
    machine.get(MERGE)
    assert said(caplog) == "", "said once"
    assert machine.get() is made and machine.asked == 2, "kept in this process at least"
    assert re.search(expected, lines[0]) and re.search(expected, made.not_kept)
    left = list(machine.home.rglob("*.new")) if machine.home.is_dir() else []
    assert left == [], "nothing half written"


@pytest.mark.skipif(os.name == "nt", reason="owners and modes of POSIX")
@pytest.mark.parametrize("fault", (somebody_elses, open_to_all), ids=lambda f: f.__name__)
def test_what_somebody_else_may_have_written_is_not_read(
    machine: Machine, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    machine.get()
    kept = machine.file().read_bytes()
    machine.cache.rename(machine.home / "before")
    fault(machine)
    (machine.cache / machine.file().name).write_bytes(kept)
    machine.restart()
    assert machine.get().origin == "NVRTC 12.8"
    assert "the cache of CUDA kernels is not used" in said(caplog)


def test_without_a_home(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    for name in ("WAN_ATTN_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    machine.restart()
    assert "no home directory" in machine.get().not_kept


def test_no_compiler(machine: Machine) -> None:
    machine.has()
    with pytest.raises(images.ImageError) as caught:
        machine.get()
    text = str(caught.value)
    assert text.startswith(f"{ROW} for sm_89: the package has no ready machine code")
    assert "no NVRTC 12.x or 13.x here" in text and "pip install nvidia-cuda-nvrtc-cu12" in text


def test_the_next_compiler_is_tried(machine: Machine) -> None:
    machine.has(
        WITH_12_8,
        WITH_13_2,
        fails={WITH_12_8: nvrtc.NvrtcError("lib12 does not load: no builtins")},
    )
    assert machine.get().origin == "NVRTC 13.2"


def test_a_compiler_that_fails_is_asked_once(machine: Machine) -> None:
    machine.has(WITH_12_8, fails={WITH_12_8: nvrtc.NvrtcError("error: a line of its log")})
    for _ in range(3):
        with pytest.raises(images.ImageError, match="a line of its log"):
            machine.get()
    assert machine.asked == 1
    assert store.names(machine.cache) == {}


def test_a_gpu_that_no_compiler_knows(machine: Machine) -> None:
    unknown = nvrtc.UnknownArch("NVRTC 12.8 does not know sm_130 (it knows 50 to 120)")
    machine.has(WITH_12_8, fails={WITH_12_8: unknown})
    with pytest.raises(images.ImageError, match="it knows 50 to 120.*a newer torch"):
        machine.get(arch=130)


@pytest.mark.parametrize(
    ("kernel", "arch", "message"),
    [
        ("nonsense", 89, "kernel must be one of sdpa_sm80_bf16_d64, .*; got 'nonsense'"),
        ("sdpa_sm75_f16_d64", 89, "has no tile for compute capability 8.9 .class SLIM."),
        (ROW, 61, "CUDA kernels need compute capability 7.5 or newer"),
    ],
)
def test_what_does_not_exist(machine: Machine, kernel: str, arch: int, message: str) -> None:
    for ask in (images.image, images.state):
        with pytest.raises(images.ImageError, match=message):
            ask(kernel, arch)


# --- at once ----------------------------------------------------------------------------------


def test_threads_at_once_compile_once(machine: Machine) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(machine.get().data)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and machine.asked == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_at_once(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """Each reads whole files only, whoever writes them; no file is left half written."""
    expected = {arch: machine.get(arch=arch).data for arch in (86, 89)}
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for turn in range(60):
                    arch = (86, 89)[turn % 2]
                    machine.restart()
                    found = images.images([ROW], arch, force=turn % 3 == 0)[ROW]
                    assert found.data == expected[arch] and not found.not_kept
                status = 1 if "damaged" in said(caplog) else 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert len(list(machine.cache.iterdir())) == 2


def test_a_file_that_another_process_holds(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows: it cannot be replaced, and need not be."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    data = machine.get().data
    monkeypatch.setattr(os, "replace", refuse)
    assert not images.images([ROW], 89, force=True)[ROW].not_kept
    machine.file().unlink()
    assert "Access is denied" in images.images([ROW], 89, force=True)[ROW].not_kept
    assert store.names(machine.cache) == {} and len(list(machine.cache.iterdir())) == 0
    assert machine.get().data == data


# --- time -------------------------------------------------------------------------------------


def test_a_second_start(machine: Machine, record_property: Any) -> None:
    """No time decides; what is done does: nothing is compiled, nothing written."""
    names = [job.name for job in rows.jobs_for(89)]
    images.images(names, 89)
    before = {f: f.stat().st_mtime_ns for f in machine.cache.iterdir()}
    machine.restart()
    for cached in (rows.tiles, rows.helpers, rows.gpus, rows._fingerprint, sources.closure):
        cached.cache_clear()
    start = time.perf_counter()
    found = images.images(names, 89)
    milliseconds = 1000 * (time.perf_counter() - start)
    assert {image.origin for image in found.values()} == {"cached"}
    assert {f: f.stat().st_mtime_ns for f in machine.cache.iterdir()} == before
    record_property("summary", f"{len(names)} CUDA kernels read from cache: {milliseconds:.1f} ms")
