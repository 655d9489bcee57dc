# SPDX-License-Identifier: Apache-2.0
"""source.py - whether a function of Wan2.2 is, word for word, one that we know; runs nothing."""

from __future__ import annotations

import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from typing import Any

# Between statements, as tokens: these alone say how a program is nested.
_NESTING = {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.NEWLINE: ";"}
_IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}


def fingerprint(*functions: Callable[..., Any]) -> str | None:
    """16 hex digits of these functions' tokens without comments, docstrings and layout.

    The same in every version of Python. None: the source of one cannot be found.
    """
    words: list[str] = []
    for function in functions:
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        except (OSError, TypeError):
            return None
        words += _words(source)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _words(source: str) -> list[str]:
    found: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _IGNORED:
            continue
        is_end = token.type == tokenize.NEWLINE
        if is_end and len(found) > 1 and found[-2] in _NESTING.values():
            if found[-1][:1] in "\"'" or found[-1][:2] in ('r"', "r'"):
                found.pop()  # a string that is a whole statement: a docstring
                continue
        found.append(_NESTING.get(token.type, token.string))
    return found
