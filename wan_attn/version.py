# SPDX-License-Identifier: Apache-2.0
"""version.py - the one place that states the package's version; setup.py reads it as text."""

__version__ = "0.2.0.dev0"

PUBLISHED = False
"""Whether an index has wan_attn; `make tables` then changes every line that installs."""

_WHERE, _WHAT = (
    ("", "wan-attn")
    if PUBLISHED
    else (", in the folder that holds the folder wan_attn", "./wan_attn")
)
REINSTALL = f"to install it again{_WHERE}: pip install --force-reinstall --no-deps {_WHAT}"
"""The end of every message about a damaged installation."""
