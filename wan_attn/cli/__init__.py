# SPDX-License-Identifier: Apache-2.0
"""cli - the commands behind `python -m wan_attn`: each parses, calls, prints.

Only __main__.py starts them, and nothing imports them.
"""

from __future__ import annotations

import sys

FINE, WRONG, USAGE = 0, 1, 2
EXIT_CODES = {
    FINE: "fine: it did what was asked, and found nothing wrong",
    WRONG: "something is wrong, or failed: the report or the message says what",
    USAGE: "nothing was done: the arguments, or a variable, ask for what cannot be done here",
}
"""Of every command; that of `run` is the script's own, unless the script cannot be started."""


def refuse(command: str, message: object, code: int = USAGE) -> int:
    """Say on stderr why a command does not go on, in argparse's own form; returns the exit code."""
    print(f"wan-attn {command}: error: {message}", file=sys.stderr)
    return code
