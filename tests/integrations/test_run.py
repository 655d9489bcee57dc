# SPDX-License-Identifier: Apache-2.0
"""test_run.py - `python -m wan_attn run SCRIPT` is `python SCRIPT` with Wan2.2 patched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stub_wan

import wan_attn

ROOT = Path(wan_attn.__file__).resolve().parent.parent
WAN_ATTN = (sys.executable, "-m", "wan_attn", "run")
SERVER = Path(__file__).resolve().parent / "run_server.py"


def start(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run it with wan_attn importable and its log quiet."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WAN_ATTN_LOG": "warning", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


class Server:
    """Starts `wan_attn run` by forking a process that has torch loaded: 2 seconds less each."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        if not hasattr(os, "fork"):
            return start(*WAN_ATTN, *words, cwd=cwd)
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVER)],
                env={**os.environ, "PYTHONPATH": str(ROOT), "WAN_ATTN_LOG": "warning"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self.process.stdin and self.process.stdout
        output, errors = cwd / "stdout", cwd / "stderr"
        request = {"words": words, "cwd": str(cwd), "out": str(output), "err": str(errors)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(words, code, output.read_text(), errors.read_text())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    if server.process:
        server.process.communicate()


Both = Callable[..., None]


@pytest.fixture
def both(server: Server) -> Both:
    def check(script: str, *args: str, cwd: Path, flags: tuple[str, ...] = ()) -> None:
        """Assert that the script does the same under python and under wan_attn."""
        plain = start(sys.executable, *flags, script, *args, cwd=cwd)
        ours = server(*flags, script, *args, cwd=cwd)
        assert ours.returncode == plain.returncode, ours.stderr
        assert ours.stdout == plain.stdout
        assert ours.stderr == plain.stderr

    return check


# One script, many endings, chosen by its first argument: each process start costs seconds.
ENDINGS = """
import atexit, sys
atexit.register(lambda: print("exit handler", __name__))

class Own(Exception):
    pass

def fail(how):
    if how == "raise":
        raise Own("wrong")
    if how == "chained":
        try:
            {}["key"]
        except KeyError as error:
            raise Own("wrong") from error
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "hook":
        sys.excepthook = lambda kind, error, tb: print("hook", kind.__name__, tb.tb_lineno)
        raise Own("wrong")
    sys.exit({"3": 3, "none": None, "text": "some text", "true": True}[how])

if __name__ == "__main__":
    fail(sys.argv[1])
"""


@pytest.mark.parametrize("how", ["raise", "chained", "interrupt", "hook", "3", "none", "text"])
def test_the_script_ends_as_under_python(tmp_path: Path, both: Both, how: str) -> None:
    (tmp_path / "script.py").write_text(ENDINGS)
    both("script.py", how, cwd=tmp_path)


def test_a_syntax_error_is_shown_as_by_python(tmp_path: Path, both: Both) -> None:
    (tmp_path / "script.py").write_text("a = 1\nb = (\n")
    both("script.py", cwd=tmp_path)


LOOKS_AROUND = """
# -*- coding: latin-1 -*-
from __future__ import annotations
import sys, neighbour
here = sys.modules["__main__"]
assert here.__dict__ is globals() and neighbour.here is here
names = sorted(set(globals()) - {"sys", "neighbour", "here", "annotations", "__annotations__"})
print(names, __name__, __file__, __spec__, __package__, __doc__, type(__loader__).__name__)
print(sys.argv, sys.path[0], neighbour.__file__)
print(__builtins__)
"""


@pytest.mark.parametrize("way", ["in the folder", "from elsewhere", "through a link"])
def test_what_the_script_sees(tmp_path: Path, both: Both, way: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "script.py").write_text(LOOKS_AROUND)
    (folder / "neighbour.py").write_text('import sys\nhere = sys.modules["__main__"]\n')
    arguments = ("--task", "ti2v-5B", "--backend", "x", "--", "-m", "--help", "")
    if way == "in the folder":
        both("script.py", *arguments, cwd=folder)
    elif way == "from elsewhere":
        both(os.path.join("folder", "script.py"), *arguments, cwd=tmp_path)
    else:
        (tmp_path / "link.py").symlink_to(folder / "script.py")
        both("link.py", *arguments, cwd=tmp_path)


@pytest.mark.parametrize("name", ["package", "package.module", "alone"])
def test_modules_by_name(tmp_path: Path, both: Both, name: str) -> None:
    text = "import sys\nprint(sys.argv, sys.path[0], __name__, __package__, __spec__.name)\n"
    (tmp_path / "package").mkdir()
    for file in ("package/__init__.py", "package/__main__.py", "package/module.py", "alone.py"):
        (tmp_path / file).write_text("" if file.endswith("__init__.py") else text)
    both(name, "--backend", "x", cwd=tmp_path, flags=("-m",))


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_folders_and_archives(tmp_path: Path, both: Both, kind: str) -> None:
    text = (
        "import sys, other\nprint(sys.argv, sys.path[0], __name__, __package__, other.__file__)\n"
    )
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").write_text(text)
    (tmp_path / "app" / "other.py").write_text("")
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", text)
        archive.writestr("other.py", "")
    both("app" if kind == "folder" else "app.zip", "x", cwd=tmp_path)


def test_nothing_to_run(tmp_path: Path, server: Server) -> None:
    done = server("absent.py", cwd=tmp_path)
    assert done.returncode == 2 and "No such file" in done.stderr
    assert "Traceback" not in done.stderr
    done = server("-m", "absent", cwd=tmp_path)
    assert done.returncode == 2 and "no module named absent" in done.stderr


USES_WAN = """
import wan, sys
from wan.modules.model import flash_attention
owner = flash_attention.__module__
print(owner)
"""


def test_the_script_is_patched(tmp_path: Path, server: Server) -> None:
    stub_wan.write(tmp_path)
    (tmp_path / "generate.py").write_text(USES_WAN)
    done = server("generate.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wan_attn.attention\n"
    assert start(sys.executable, "generate.py", cwd=tmp_path).stdout == "wan.modules.attention\n"


def test_backend_option(tmp_path: Path, server: Server) -> None:
    (tmp_path / "script.py").write_text(
        "import os, sys\nfrom wan_attn import config\n"
        "print(os.environ['USE_ATTENTION_BACKEND'], config.current().backend, sys.argv[1:])\n"
    )
    done = server("--backend", "chunked", "script.py", "--backend", "y", cwd=tmp_path)
    assert done.stdout == "chunked chunked ['--backend', 'y']\n", done.stderr
    done = server("--backend", "nonsense", "script.py", cwd=tmp_path)
    assert done.returncode == 2 and "invalid choice" in done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_spawned_processes_are_patched(tmp_path: Path, server: Server, method: str) -> None:
    """They import the script as __mp_main__, which imports wan: that must find the patch there."""
    if method == "forkserver" and os.name == "nt":
        pytest.skip("there is no forkserver on Windows")
    stub_wan.write(tmp_path)
    (tmp_path / "script.py").write_text(
        USES_WAN
        + "def child(queue):\n    queue.put((__name__, owner, sys.argv[1:]))\n"
        + "if __name__ == '__main__':\n    import multiprocessing\n"
        + f"    context = multiprocessing.get_context('{method}')\n"
        + "    queue = context.Queue()\n"
        + "    process = context.Process(target=child, args=(queue,))\n"
        + "    process.start()\n    print(queue.get(timeout=60))\n    process.join()\n"
        + "    sys.exit(process.exitcode)\n"
    )
    done = server("script.py", "word", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "('__mp_main__', 'wan_attn.attention', ['word'])" in done.stdout


def test_under_torchrun(tmp_path: Path) -> None:
    stub_wan.write(tmp_path)
    (tmp_path / "generate.py").write_text(
        USES_WAN
        + "import os, torch\n"
        + "torch.distributed.init_process_group('gloo')\n"
        + "total = torch.tensor([1.0])\ntorch.distributed.all_reduce(total)\n"
        + "rank = os.environ['RANK']\n"
        + "open(f'rank{rank}', 'w').write(f'{owner} {total.item()} {sys.argv[1:]}')\n"
        + "torch.distributed.barrier()\ntorch.distributed.destroy_process_group()\n"
        + "sys.exit(7)\n"
    )
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    words = ("--nproc-per-node", "2", "-m", "wan_attn", "run", "generate.py", "--task", "x")
    done = start(*torchrun, *words, cwd=tmp_path)
    for rank in range(2):
        seen = (tmp_path / f"rank{rank}").read_text()
        assert seen == "wan_attn.attention 2.0 ['--task', 'x']"
    assert done.returncode == 1 and "exitcode  : 7" in done.stderr, "the script's own exit code"
