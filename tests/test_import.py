# SPDX-License-Identifier: Apache-2.0
"""test_import.py - what importing wan_attn does: almost nothing; and what it does when damaged.

Each test needs a Python that has not imported wan_attn yet. Importing torch takes seconds, so one
process does it for all of them and forks where it can.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import wan_attn

ROOT = Path(wan_attn.__file__).parents[1]
MODULES = ("wan_attn", "wan_attn.native.op", "wan_attn.attention", "wan_attn.integrations.wan22")


SERVER = """
import json, os, sys, traceback, torch
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(job["env"])
        sys.path.insert(0, job["path"])
        try:
            exec(compile(job["code"], "<test>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def clean_environment() -> dict[str, str]:
    """Without what the user of this test has set for wan_attn; no bytecode is written."""
    ours = ("WAN_", "USE_", "DISABLE_FLASH", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"}


class Fresh:
    """Runs code in a Python that has torch and has not seen wan_attn."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.server: subprocess.Popen[str] | None = None
        if hasattr(os, "fork"):
            self.server = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                env=clean_environment(),
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    def __call__(self, code: str, *, path: Path = ROOT, **env: str) -> Any:
        """What the code prints last, as JSON. `path` is where it finds wan_attn."""
        self.count += 1
        log = self.folder / f"{self.count}.log"
        code = textwrap.dedent(code)
        if self.server:
            job = {"code": code, "path": str(path), "env": env, "log": str(log)}
            assert self.server.stdin and self.server.stdout
            self.server.stdin.write(json.dumps(job) + "\n")
            self.server.stdin.flush()
            status = int(self.server.stdout.readline())
        else:
            env = clean_environment() | {"PYTHONPATH": str(path)} | env
            with log.open("w") as out:
                command = [sys.executable, "-c", code]
                status = subprocess.call(command, env=env, cwd=self.folder, stdout=out, stderr=out)
        text = log.read_text(encoding="utf-8")
        assert status == 0, text
        return json.loads(text.splitlines()[-1])

    def close(self) -> None:
        if self.server:
            assert self.server.stdin and self.server.stdout
            self.server.stdin.close()
            self.server.wait(30)
            self.server.stdout.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    fresh = Fresh(tmp_path_factory.mktemp("fresh"))
    yield fresh
    fresh.close()


WATCH = """
    import json, sys, torch
    events, watching = [], False

    def watch(event, args):
        if not watching:
            return
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            events.append(f"writes {args[0]}")
        elif event.split(".")[0] in ("socket", "subprocess", "shutil", "tempfile", "urllib"):
            events.append(f"{event} {args!r}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.putenv", "os.system", "os.exec"):
            events.append(f"{event} {args!r}")

    sys.addaudithook(watch)
    F = torch.nn.functional
    watched = (torch, torch.Tensor, torch.nn, F, torch.nn.Module, torch.backends.cuda, torch.cuda)
    before = [(owner, dict(vars(owner))) for owner in watched]
    settings = lambda: (
        torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.flash_sdp_enabled(), torch.get_default_dtype(), torch.initial_seed(),
    )
    old_settings = settings()
    import logging
    old_handlers = list(logging.getLogger().handlers)
    before_modules = set(sys.modules)
    watching = True
"""


def test_importing_has_no_side_effects(run: Fresh) -> None:
    """No CUDA, no network, no file written, no process, no heavy package, nothing patched."""
    found = run(
        WATCH
        + f"""
    import importlib
    modules = {MODULES!r}
    for name in modules:
        importlib.import_module(name)
    watching = False
    patched = [
        f"{{owner.__name__}}.{{name}}"
        for owner, members in before
        for name, member in members.items()
        if vars(owner).get(name) is not member
    ]
    heavy = (
        "diffusers", "transformers", "flash_attn", "flash_attn_interface", "flash_attn_3", "wan",
        "xformers", "triton", "accelerate", "imageio", "torch._inductor", "setuptools", "requests",
    )
    import wan_attn
    print(json.dumps({{
        "events": events,
        "patched": patched,
        "cuda": torch.cuda.is_initialized(),
        "heavy": [name for name in heavy if name in set(sys.modules) - before_modules],
        "settings": [str(x) for x in settings()] == [str(x) for x in old_settings],
        "handlers": old_handlers == logging.getLogger().handlers,
        "own_handlers": len(logging.getLogger("wan_attn").handlers),
        "version": wan_attn.__version__,
    }}))
    """
    )
    assert found["events"] == []
    assert found["patched"] == []
    assert found["cuda"] is False
    assert found["heavy"] == []
    assert found["settings"] and found["handlers"]
    assert found["own_handlers"] <= 1, "at most a NullHandler"
    assert found["version"] == wan_attn.__version__


def test_first_call_has_no_side_effects_either(run: Fresh) -> None:
    found = run(
        WATCH
        + """
    import wan_attn
    q, k, v = (torch.randn(1, n, 2, 64) for n in (5, 9, 9))
    out = wan_attn.sdpa(q, k, v)
    watching = False
    events = [e for e in events if "/dev/" not in e]
    print(json.dumps([events, torch.cuda.is_initialized(), list(out.shape)]))
    """
    )
    assert found == [[], False, [1, 5, 2, 64]]


def test_the_import_itself_is_cheap(run: Fresh, record_property: Any) -> None:
    """No number of seconds decides; what it loads does: torch's modules were there before."""
    found = run(
        """
        import json, sys, time
        import torch
        before = set(sys.modules)
        start = time.perf_counter()
        import wan_attn
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
        """
    )
    seconds, modules = found
    summary = f"import wan_attn, after torch: {1000 * seconds:.0f} ms, {len(modules)} modules"
    record_property("summary", summary)
    foreign = {name.split(".")[0] for name in modules} - {"wan_attn"}
    allowed = set(sys.stdlib_module_names) | {"torch"}
    assert foreign <= allowed, foreign - allowed


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, to be damaged."""
    shutil.copytree(
        Path(wan_attn.__file__).parent,
        tmp_path / "wan_attn",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path


TRY = """
    import json, torch
    import wan_attn
    from wan_attn.native import library, op
    q, k, v = (torch.randn(2, n, 2, 16) for n in (5, 9, 9))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    lens = torch.tensor([9, 4])
    right = [
        torch.allclose(torch.ops.wan_attn.sdpa(q, k, v)[0], want, atol=1e-5),
        torch.allclose(wan_attn.sdpa(q, k, v), want, atol=1e-5),
        torch.allclose(
            torch.ops.wan_attn.sdpa(q, k, v, None, lens)[0][1],
            torch.ops.wan_attn.sdpa(q[1:], k[1:, :4], v[1:, :4])[0][0],
            atol=1e-5,
        ),
        torch.ops.wan_attn.sdpa(q, k, v, return_lse=True)[1].isfinite().all().item(),
    ]
    print(json.dumps([op.binding(), op.binding_reason(), library.load_error(), right,
                      len(op.kernels())]))
"""


def libraries(folder: Path) -> tuple[Path, Path]:
    """(libwan_attn, the shim) of the package in this folder."""
    from wan_attn.native import library as native
    from wan_attn.native import shim

    return folder / "wan_attn" / native.lib_path().name, folder / "wan_attn" / shim.path().name


def refuse_to_run_without_a_native_library(library: Path) -> None:
    if not library.exists():
        pytest.fail(f"{library.name} has not been built: nothing here could be damaged")


@pytest.mark.parametrize("damage", ("missing", "corrupt", "empty", "another_library"))
def test_without_the_native_library(run: Fresh, copy: Path, damage: str) -> None:
    """The op is still there, computes right, and the package says what is wrong and what to do."""
    library, _ = libraries(copy)
    refuse_to_run_without_a_native_library(library)
    if damage == "missing":
        library.unlink()
    elif damage == "corrupt":
        library.write_bytes(b"not a library" * 100)
    elif damage == "empty":
        library.write_bytes(b"")
    else:  # loads, but has none of our functions
        import _ctypes

        if not getattr(_ctypes, "__file__", None):
            pytest.skip("this Python has no extension module to put in its place")
        shutil.copy(_ctypes.__file__, library)
    binding, reason, error, right, kernels = run(TRY, path=copy)
    assert (binding, kernels) == ("torch", 0)
    assert right == [True] * 4
    assert reason == error and library.name in error
    assert "pip install" in error, "says what to do"
    expected = {"missing": "is not in the package", "another_library": "undefined symbol|not found"}
    assert re.search(expected.get(damage, "does not load"), error), error


def test_with_a_library_of_another_version(run: Fresh, copy: Path) -> None:
    library, _ = libraries(copy)
    refuse_to_run_without_a_native_library(library)
    native = copy / "wan_attn" / "native" / "library.py"
    source = native.read_text(encoding="utf-8")
    assert "ABI_VERSION = 1\n" in source
    native.write_text(source.replace("ABI_VERSION = 1\n", "ABI_VERSION = 99\n"), encoding="utf-8")
    binding, reason, error, right, _ = run(TRY, path=copy)
    assert binding == "torch" and right == [True] * 4
    assert "ABI 1" in error and "99" in error and reason == error


@pytest.mark.parametrize("damage", ("missing", "corrupt"))
def test_without_the_shim(run: Fresh, copy: Path, damage: str) -> None:
    library, shim = libraries(copy)
    refuse_to_run_without_a_native_library(library)
    shim.unlink(missing_ok=True)
    if damage == "corrupt":
        shim.write_bytes(b"not a library" * 100)
    binding, reason, error, right, kernels = run(TRY, path=copy)
    assert binding == "ctypes" and kernels > 0 and error is None
    assert right == [True] * 4
    expected = {"missing": "is not in the package;", "corrupt": "does not load"}
    assert shim.name in reason and expected[damage] in reason


def test_binding_by_environment(run: Fresh) -> None:
    for wanted in ("ctypes", "torch"):
        binding, reason, error, right, _ = run(TRY, WAN_ATTN_BINDING=wanted)
        assert binding == wanted and right == [True] * 4
        assert f"WAN_ATTN_BINDING={wanted}" in reason and error is None


def test_an_unknown_binding_is_an_error_that_lists_the_known(run: Fresh) -> None:
    found = run(
        """
        import json
        try:
            import wan_attn.backends
        except ValueError as error:
            print(json.dumps(str(error)))
        """,
        WAN_ATTN_BINDING="fast",
    )
    assert "WAN_ATTN_BINDING" in found and "auto, shim, ctypes, torch" in found and "fast" in found


def test_backends_is_a_package_that_may_be_called() -> None:
    """wan_attn.backends() of 0.1 hid the package of that name."""
    import wan_attn.backends as package

    assert package is sys.modules["wan_attn.backends"] is wan_attn.backends
    assert package.REGISTRY["torch"].NAME == "torch"
    with pytest.warns(DeprecationWarning, match=r"wan_attn\.available\(\)"):
        old = cast(Any, wan_attn.backends)("cpu", dtype=torch.float32)  # a module that is called
    assert old == wan_attn.available("cpu", torch.float32)
    assert list(old) == list(package.REGISTRY)
