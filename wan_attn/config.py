# SPDX-License-Identifier: Apache-2.0
"""config.py - every environment variable, parsed once; the only module that reads os.environ."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("0", "false", "no", "off")
FLASH_ATTENTION_BACKENDS = ("fa3", "fa2")


class ConfigError(ValueError):
    """An environment variable holds something it must not, or two contradict each other."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable. Tables in the docs, --help and doctor are generated from these.

    Attributes:
        name: as in the environment.
        field: the field of Settings it sets.
        kind: "choice" (one of `values`), "flag" (1 or 0), "integer" (0 or more), "share" (a number
            between 0 and 1) or "path".
        values: the accepted words; for kinds without a list, how to describe them.
        default: what holds when the variable is unset or empty.
        meaning: what it does, for the user.
        is_for_development: tests and developers need it; README lists only the others.
        waits_for: when a change that refresh() sees takes effect; "": at once, with the next call.
    """

    name: str
    field: str
    kind: str
    values: tuple[str, ...]
    default: str
    meaning: str
    is_for_development: bool = False
    waits_for: str = ""


_FLAG = ("0", "1")

VARIABLES: tuple[Variable, ...] = (
    Variable(
        "USE_ATTENTION_BACKEND",
        "backend",
        "choice",
        ("auto", "sdpa", "fa3", "fa2", "xformers", "torch", "chunked", "sage", "comfy_kitchen"),
        "auto",
        "Which attention runs. `sdpa`: wan_attn's kernels; `fa3`, `fa2`, `xformers`: FlashAttention"
        " and xFormers, if installed; `torch`: PyTorch's SDPA; `chunked`: our wrapper that computes"
        " in chunks. `auto` takes the best of these that supports the call. `sage`,"
        " `comfy_kitchen`: others' 8-bit attention, if installed; not exact, so only by name.",
    ),
    Variable(
        "USE_SDPA",
        "use_sdpa",
        "flag",
        _FLAG,
        "0",
        "1 means the same as USE_ATTENTION_BACKEND=sdpa; naming another backend there is an error.",
    ),
    Variable(
        "DISABLE_FLASH_ATTN",
        "disable_flash_attn",
        "flag",
        _FLAG,
        "0",
        "1 makes `auto` skip FlashAttention 2 and 3.",
    ),
    Variable(
        "WAN_FORCE_FP16",
        "force_fp16",
        "flag",
        _FLAG,
        "0",
        "1 computes attention in fp16 for every input dtype.",
    ),
    Variable(
        "WAN_COMPILE",
        "compile_model",
        "flag",
        _FLAG,
        "0",
        "1 compiles the model's blocks with torch.compile, while that works.",
        waits_for="the next patch()",
    ),
    Variable(
        "WAN_ATTN_CHUNK_THRESHOLD",
        "chunk_threshold",
        "integer",
        ("0 or more",),
        "1048576",
        "Calls with more query-key pairs than this are computed in chunks where PyTorch would store"
        " every score, and on Windows where PyTorch has no flash kernel.",
    ),
    Variable(
        "WAN_ATTN_STRICT",
        "strict",
        "flag",
        _FLAG,
        "0",
        "1 raises an error where a backend fails or the named one refuses a call.",
    ),
    Variable(
        "WAN_ATTN_ROPE",
        "rope",
        "choice",
        ("auto", "off"),
        "auto",
        "`auto`: our kernels norm and rotate q and k where they can; `off`: the model does.",
        waits_for="the next patch()",
    ),
    Variable(
        "WAN_ATTN_LOG",
        "log_level",
        "choice",
        ("debug", "info", "warning", "error", "off"),
        "info",
        "How much the logger `wan_attn` shows after patch().",
    ),
    Variable(
        "WAN_ATTN_CPU_ISA",
        "cpu_isa",
        "choice",
        ("auto", "portable", "avx2", "avx512", "avx512_bf16", "amx", "neon", "avx512_vnni"),
        "auto",
        "The newest instruction set that CPU kernels may use.",
        is_for_development=True,
    ),
    Variable(
        "WAN_ATTN_BINDING",
        "binding",
        "choice",
        ("auto", "shim", "ctypes", "torch"),
        "auto",
        "How torch.ops.wan_attn.sdpa calls the native library: through the shim or through ctypes;"
        " `torch` means not at all.",
        is_for_development=True,
        waits_for="a new process",
    ),
    Variable(
        "WAN_ATTN_CACHE_DIR",
        "cache_dir",
        "path",
        ("a folder",),
        "",
        "Where compiled kernels and measurements are kept. Unset: the user's cache.",
    ),
    Variable(
        "WAN_ATTN_SELF_CHECK",
        "self_check",
        "flag",
        _FLAG,
        "1",
        "1 uses our CUDA kernels only where they have been right on this card in another process"
        " (`prove`), and checks each once more before its first call. 0 uses all of them unproven.",
    ),
    Variable(
        "WAN_ATTN_TUNE",
        "tune",
        "choice",
        ("auto", "off", "again"),
        "auto",
        "`auto` measures which backend and kernel is the fastest here, once for each kind of call,"
        " and keeps that in the cache folder. `off` keeps the fixed order, `again` measures anew.",
    ),
    Variable(
        "WAN_ATTN_LIBCUDA",
        "libcuda",
        "path",
        ("a file",),
        "",
        "The NVIDIA driver's library to use instead of the system's: for tests, and for drivers in"
        " unusual places.",
        is_for_development=True,
        waits_for="a new process",
    ),
    Variable(
        "WAN_ATTN_COMFYUI",
        "comfyui",
        "choice",
        ("global", "node"),
        "global",
        "In ComfyUI, `global` serves all models, unless a --use-...-attention flag chooses another"
        " attention; `node` serves only the models behind the node.",
        waits_for="the next start of ComfyUI",
    ),
    Variable(
        "WAN_ATTN_PROFILE",
        "profile",
        "path",
        ("a file",),
        "",
        "Times every attention call; writes this JSON file and a summary at exit.",
    ),
    Variable(
        "WAN_ATTN_PRECISION",
        "precision",
        "choice",
        ("exact", "balanced", "fast", "auto"),
        "exact",
        "Where scores may be in 8 bits: docs/precision.md.",
    ),
    Variable(
        "WAN_ATTN_GUARD",
        "guard",
        "choice",
        ("auto", "off", "all"),
        "auto",
        "Which calls are watched for NaN and overflow: 8-bit ones, none, or all.",
    ),
    Variable(
        "WAN_ATTN_ERROR_BUDGET",
        "error_budget",
        "share",
        ("between 0 and 1",),
        "",
        "What `auto` (unset: 0.02) and WAN_ATTN_SPARSE (0.05) may be off by.",
    ),
    Variable(
        "WAN_ATTN_SCHEDULE",
        "schedule",
        "path",
        ("a file",),
        "",
        "Rules of your own: which steps, layers and heads are exact (JSON).",
    ),
    Variable(
        "WAN_ATTN_PRECISION_REPORT",
        "precision_report",
        "path",
        ("a file",),
        "",
        "At exit, writes error and time of each layer to it (JSON).",
    ),
    Variable(
        "WAN_ATTN_SPARSE",
        "sparse",
        "choice",
        ("off", "near_exact", "sparse"),
        "off",
        "Leaves out keys that hardly matter: docs/sparse.md.",
    ),
    Variable(
        "WAN_ATTN_SPARSE_REPORT",
        "sparse_report",
        "path",
        ("a file",),
        "",
        "At exit, writes density, error and time of each layer to it (JSON).",
    ),
    Variable(
        "WAN_ATTN_SPARSE_PROFILE",
        "sparse_profile",
        "path",
        ("a file",),
        "",
        "Such a report of an earlier run, whose densities this one begins with.",
    ),
    Variable(
        "WAN22_DIR",
        "wan22_dir",
        "path",
        ("a folder",),
        "",
        "A checkout of Wan2.2, for `demo --ckpt-dir` and for the tests that need the real one.",
        is_for_development=True,
    ),
)

PREFIX = "WAN_ATTN_"
# setup.py reads these, and a shell may still have them when wan_attn runs.
BUILD_VARIABLES = ("WAN_ATTN_NATIVE", "WAN_ATTN_CUDA", "WAN_ATTN_KEPT", "WAN_ATTN_TARGET")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for; hashable: a choice is cached by it. Fields as in VARIABLES."""

    backend: str = "auto"
    use_sdpa: bool = False
    disable_flash_attn: bool = False
    force_fp16: bool = False
    compile_model: bool = False
    chunk_threshold: int = 1_048_576
    strict: bool = False
    rope: str = "auto"
    log_level: str = "info"
    cpu_isa: str = "auto"
    binding: str = "auto"
    cache_dir: str | None = None
    self_check: bool = True
    tune: str = "auto"
    libcuda: str | None = None
    comfyui: str = "global"
    profile: str | None = None
    precision: str = "exact"
    guard: str = "auto"
    error_budget: float | None = None
    schedule: str | None = None
    precision_report: str | None = None
    sparse: str = "off"
    sparse_report: str | None = None
    sparse_profile: str | None = None
    wan22_dir: str | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Parse `env` (default: os.environ).

        Raises:
            ConfigError: names the variable, what it may hold and what it holds.
        """
        source = os.environ if env is None else env
        values = {
            variable.field: _parse(variable, source.get(variable.name, ""))
            for variable in VARIABLES
        }
        settings = cls(**values)  # type: ignore[arg-type]  # _parse gives each kind its type; a test checks all
        _reject_contradictions(settings)
        return settings

    @property
    def forced_backend(self) -> str | None:
        """The backend the user named, None for auto. USE_SDPA=1 names `sdpa`."""
        if self.use_sdpa:
            return "sdpa"
        return None if self.backend == "auto" else self.backend

    @property
    def precision_budget(self) -> float:
        """The relative error that `auto` allows."""
        return 0.02 if self.error_budget is None else self.error_budget

    @property
    def sparse_budget(self) -> float:
        """The relative error that leaving blocks out may make."""
        return 0.05 if self.error_budget is None else self.error_budget

    @property
    def forced_by(self) -> str:
        """The variable that names the backend, as the user wrote it; "" for auto."""
        if self.backend != "auto":
            return f"USE_ATTENTION_BACKEND={self.backend}"
        return "USE_SDPA=1" if self.use_sdpa else ""


def _parse(variable: Variable, text: str) -> str | bool | int | float | None:
    word = text.strip()
    if variable.kind == "path" or not (word or variable.default):
        return word or None
    word = word.lower() or variable.default
    if variable.kind == "flag":
        if word in TRUE_WORDS:
            return True
        if word in FALSE_WORDS:
            return False
        raise ConfigError(
            f"{variable.name} must be 1 or 0 (also true/false, yes/no, on/off), got {text!r}"
        )
    if variable.kind == "integer":
        if word.isascii() and word.isdigit():
            return int(word)
        raise ConfigError(f"{variable.name} must be an integer, 0 or more, got {text!r}")
    if variable.kind == "share":
        try:
            share = float(word)
        except ValueError:
            share = -1.0
        if 0.0 < share < 1.0:
            return share
        raise ConfigError(f"{variable.name} must be a number between 0 and 1, got {text!r}")
    if word in variable.values:
        return word
    raise ConfigError(f"{variable.name} must be one of {', '.join(variable.values)}; got {text!r}")


def _reject_contradictions(settings: Settings) -> None:
    """Two variables that ask for different things: an error, because neither may win silently."""
    if settings.use_sdpa and settings.backend not in ("auto", "sdpa"):
        raise ConfigError(
            f"USE_SDPA=1 and USE_ATTENTION_BACKEND={settings.backend} contradict each other: "
            "unset USE_SDPA, or set USE_ATTENTION_BACKEND to sdpa"
        )
    if settings.disable_flash_attn and settings.backend in FLASH_ATTENTION_BACKENDS:
        raise ConfigError(
            f"DISABLE_FLASH_ATTN=1 and USE_ATTENTION_BACKEND={settings.backend} contradict each"
            " other: unset DISABLE_FLASH_ATTN, or name another backend"
        )


def unknown(env: Mapping[str, str] | None = None) -> list[str]:
    """A sentence for each variable in `env` (default: os.environ) that is named like ours, but that
    nothing reads: it is misspelt, or it belongs to another version."""
    known = [*(variable.name for variable in VARIABLES), *BUILD_VARIABLES]
    ours = [name.removeprefix(PREFIX) for name in known if name.startswith(PREFIX)]
    sentences = []
    for name in sorted(os.environ if env is None else env):
        word = name.upper()
        if name in known or not word.startswith(PREFIX):
            continue
        near = difflib.get_close_matches(word.removeprefix(PREFIX), ours, n=1)
        hint = (
            f"did you mean {PREFIX}{near[0]}?"
            if near
            else "`wan-attn --help` lists all that it reads"
        )
        sentences.append(f"{name} is set, but wan_attn reads no variable of that name; {hint}")
    return sentences


_current: Settings | None = None
_followers: list[Callable[[Settings], None]] = []
_memories: list[Callable[[], object]] = []


def current() -> Settings:
    """The settings of this process, parsed at the first call and kept until refresh()."""
    settings = _current
    return refresh() if settings is None else settings


def refresh() -> Settings:
    """Read the environment again, for scripts that change it after the first call.

    A change takes effect with the next call; the log names each variable that has to wait longer
    (`waits_for` in VARIABLES).
    """
    global _current
    settings = Settings.from_env()
    if _current is None or settings != _current:
        _current = settings
        for follower in _followers:
            follower(settings)
    return _current


def follow(follower: Callable[[Settings], None]) -> None:
    """Call `follower` with the settings whenever they are read and not as before."""
    _followers.append(follower)
    if _current is not None:
        follower(_current)


def memory(forget_it: Callable[[], object]) -> None:
    """Have forget() call this, which drops what a module remembers between calls."""
    _memories.append(forget_it)


def forget() -> None:
    """Drop all that the engine remembers between calls, settings included, as a new process."""
    global _current
    _current = None
    for forget_it in _memories:
        forget_it()


def put(name: str, value: str) -> Settings:
    """Set a variable for this process and those it starts, as if the user had; then refresh()."""
    os.environ[name] = value
    return refresh()


def for_child(**defaults: str) -> dict[str, str]:
    """The environment of a process that this one starts: its own, and these where it has none."""
    return {**defaults, **os.environ}


def cache_folder() -> Path | None:
    """Where this user's caches belong on this system, ours among them; None: nowhere."""
    if named := current().cache_dir:
        return Path(named)
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA")
            return Path(base, "wan_attn", "Cache") if base else None
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "wan_attn"
        base = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "wan_attn"
    except RuntimeError:  # a user without a home
        return None


def cuda_homes() -> list[str]:
    """CUDA toolkits that the environment names."""
    return [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
