# SPDX-License-Identifier: Apache-2.0
"""wan_attn - the attention engine for the Wan2.2 video models."""

from wan_attn.version import __version__

__all__ = ["__version__"]
