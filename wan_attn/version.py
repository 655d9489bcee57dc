# SPDX-License-Identifier: Apache-2.0
"""version.py - the one place that states the package's version; setup.py reads it as text."""

__version__ = "0.2.0.dev0"

PUBLISHED = False
"""Whether an index has wan_attn. Set to True, and `make tables` changes every line that installs."""

REINSTALL = (
    "to install it again: pip install --force-reinstall --no-deps wan-attn"
    if PUBLISHED
    else "to install it again, in the folder that holds the folder wan_attn:"
    " pip install --force-reinstall --no-deps ./wan_attn"
)
"""The end of every message about a damaged installation."""
