# SPDX-License-Identifier: Apache-2.0
"""config.py - every environment variable, parsed once; the only module that reads os.environ."""

from __future__ import annotations

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
    """One environment variable. README's table, --help and doctor are generated from these.

    Attributes:
        name: as in the environment.
        field: the field of Settings it sets.
        kind: "choice" (one of `values`), "flag" (1 or 0), "integer" (0 or more) or "path".
        values: the accepted words; for kinds without a list, how to describe them.
        default: what holds when the variable is unset or empty.
        meaning: one sentence for the user.
    """

    name: str
    field: str
    kind: str
    values: tuple[str, ...]
    default: str
    meaning: str


_FLAG = ("0", "1")

VARIABLES: tuple[Variable, ...] = (
    Variable(
        "USE_ATTENTION_BACKEND",
        "backend",
        "choice",
        ("auto", "sdpa", "fa3", "fa2", "torch", "chunked"),
        "auto",
        "Which attention runs: `sdpa` is wan_attn's kernels, `fa3` and `fa2` FlashAttention if"
        " installed, `torch` PyTorch's SDPA, `chunked` the memory-bounded wrapper; `auto` takes the"
        " first that can, best first.",
    ),
    Variable(
        "USE_SDPA",
        "use_sdpa",
        "flag",
        _FLAG,
        "0",
        "1 is USE_ATTENTION_BACKEND=sdpa; may not contradict it.",
    ),
    Variable(
        "DISABLE_FLASH_ATTN",
        "disable_flash_attn",
        "flag",
        _FLAG,
        "0",
        "1 leaves FlashAttention 2 and 3 out of `auto`.",
    ),
    Variable(
        "WAN_FORCE_FP16",
        "force_fp16",
        "flag",
        _FLAG,
        "0",
        "1 computes attention in fp16 whatever comes in.",
    ),
    Variable(
        "WAN_COMPILE",
        "compile_model",
        "flag",
        _FLAG,
        "0",
        "1 tries torch.compile on the model; it is switched off again where shapes keep changing or"
        " compilation fails.",
    ),
    Variable(
        "WAN_ATTN_CHUNK_THRESHOLD",
        "chunk_threshold",
        "integer",
        ("0 or more",),
        "1048576",
        "Above this many query-key pairs (Lq*Lk) the memory-bounded wrapper replaces a PyTorch path"
        " that would need Lq*Lk memory, or any on Windows where PyTorch has no flash kernel.",
    ),
    Variable(
        "WAN_ATTN_STRICT",
        "strict",
        "flag",
        _FLAG,
        "0",
        "1 raises instead of falling back when the named backend cannot take a call or one fails.",
    ),
    Variable(
        "WAN_ATTN_LOG",
        "log_level",
        "choice",
        ("debug", "info", "warning", "error", "off"),
        "info",
        "What logger `wan_attn` shows once patched.",
    ),
    Variable(
        "WAN_ATTN_CPU_ISA",
        "cpu_isa",
        "choice",
        ("auto", "portable", "avx2", "avx512", "avx512_bf16", "amx", "neon"),
        "auto",
        "The most a CPU kernel may use of this machine's instruction sets.",
    ),
    Variable(
        "WAN_ATTN_BINDING",
        "binding",
        "choice",
        ("auto", "shim", "ctypes", "torch"),
        "auto",
        "How torch.ops.wan_attn.sdpa reaches the native library: the shim in C, ctypes, or not at"
        " all (`torch`).",
    ),
    Variable(
        "WAN_ATTN_CACHE_DIR",
        "cache_dir",
        "path",
        ("a folder",),
        "",
        "Where CUDA kernels are kept that were compiled on this machine; unset: the user's cache"
        " folder.",
    ),
    Variable(
        "WAN_ATTN_SELF_CHECK",
        "self_check",
        "flag",
        _FLAG,
        "1",
        "1 checks our CUDA kernels on the card, once in a process, before the first call of each"
        " dtype and head_dim; a wrong one is left for the next backend.",
    ),
    Variable(
        "WAN_ATTN_LIBCUDA",
        "libcuda",
        "path",
        ("a file",),
        "",
        "The NVIDIA driver's library to use instead of the system's; for tests, and for drivers in"
        " unusual places.",
    ),
    Variable(
        "WAN_ATTN_COMFYUI",
        "comfyui",
        "choice",
        ("global", "node"),
        "global",
        "In ComfyUI: for all models unless a --use-...-attention flag chooses another, or only for"
        " the models behind the node.",
    ),
    Variable(
        "WAN_ATTN_PROFILE",
        "profile",
        "path",
        ("a file",),
        "",
        "Time every attention call, write the times by call site and layer there as JSON at exit,"
        " and print a summary.",
    ),
    Variable(
        "WAN22_DIR",
        "wan22_dir",
        "path",
        ("a folder",),
        "",
        "A checkout of Wan2.2 for `demo` and for the tests that need the real thing.",
    ),
)


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
    log_level: str = "info"
    cpu_isa: str = "auto"
    binding: str = "auto"
    cache_dir: str | None = None
    self_check: bool = True
    libcuda: str | None = None
    comfyui: str = "global"
    profile: str | None = None
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
    def forced_by(self) -> str:
        """The variable that names the backend, as the user wrote it; "" for auto."""
        if self.backend != "auto":
            return f"USE_ATTENTION_BACKEND={self.backend}"
        return "USE_SDPA=1" if self.use_sdpa else ""


def _parse(variable: Variable, text: str) -> str | bool | int | None:
    word = text.strip()
    if variable.kind == "path":
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
    if word in variable.values:
        return word
    raise ConfigError(f"{variable.name} must be one of {', '.join(variable.values)}; got {text!r}")


def _reject_contradictions(settings: Settings) -> None:
    """Two variables that ask for different things: an error, as whichever won would surprise."""
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


_current: Settings | None = None
_followers: list[Callable[[Settings], None]] = []


def current() -> Settings:
    """The settings of this process, parsed at the first call and kept until refresh()."""
    settings = _current
    return refresh() if settings is None else settings


def refresh() -> Settings:
    """Read the environment again, for scripts that change it after the first call."""
    global _current
    _current = Settings.from_env()
    for follower in _followers:
        follower(_current)
    return _current


def follow(follower: Callable[[Settings], None]) -> None:
    """Call `follower` with the settings, now and whenever they are read again."""
    follower(current())
    _followers.append(follower)


def put(name: str, value: str) -> Settings:
    """Set a variable for this process and those it starts, as if the user had; then refresh()."""
    os.environ[name] = value
    return refresh()


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


def markdown_table() -> str:
    """VARIABLES as the Markdown table of README."""
    rows = ["| Variable | Values | Default | Meaning |", "|---|---|---|---|"]
    for variable in VARIABLES:
        values = " ".join(
            f"`{value}`" if variable.kind in ("choice", "flag") else value
            for value in variable.values
        )
        default = f"`{variable.default}`" if variable.default else "unset"
        rows.append(f"| `{variable.name}` | {values} | {default} | {variable.meaning} |")
    return "\n".join(rows)
