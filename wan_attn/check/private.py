# SPDX-License-Identifier: Apache-2.0
"""private.py - what must not get into a report that people attach to a public issue: names of the
user and the machine, and the folders of paths."""

from __future__ import annotations

import functools
import getpass
import platform
import re
from pathlib import Path
from typing import Any

from wan_attn import console

# Names that say nothing of a person or a machine, and words that reports need.
COMMON = {
    *("root", "user", "admin", "administrator", "localhost", "ubuntu", "debian", "runner"),
    *("home", "users", "python", "torch", "cuda", "gpu", "cpu", "nvidia", "linux", "windows"),
}
NAME_MIN = 3  # letters; shorter ones are within too many words

# An absolute path of at least one folder; the last part stays.
_FOLDERS = re.compile(r"(?<![\w.:/\\~])(?:~|[A-Za-z]:)?[\\/]+(?:[^\\/\s'\":;,()]+[\\/]+)+")


@functools.cache
def names() -> dict[str, str]:
    """Word -> what stands in its place."""
    found = {}
    for node in {platform.node(), platform.node().partition(".")[0]}:
        found[node] = "<host>"
    try:
        found[Path.home().name] = "<user>"
    except RuntimeError:  # a user without a home
        pass
    try:
        found[getpass.getuser()] = "<user>"
    except (OSError, KeyError, ImportError):  # a user without a name
        pass
    return {
        word: instead
        for word, instead in sorted(found.items(), key=lambda pair: -len(pair[0]))
        if len(word) >= NAME_MIN and word.lower() not in COMMON
    }


def scrub(value: Any) -> Any:
    """The same value with all of that replaced, in all strings inside; keys stay."""
    if isinstance(value, str):
        return _scrub_text(value)
    if isinstance(value, dict):
        return {name: scrub(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(x) for x in value]
    return value


def _scrub_text(text: str) -> str:
    text = _FOLDERS.sub(".../", console.redact(text))
    for word, instead in names().items():
        text = re.sub(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", instead, text)
    return text
