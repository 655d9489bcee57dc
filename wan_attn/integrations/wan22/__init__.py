# SPDX-License-Identifier: Apache-2.0
"""wan22 - stock Wan2.2: its attention functions rebound to ours, and back."""

from wan_attn.integrations.wan22.patch import patch, report, unpatch

__all__ = ["patch", "report", "unpatch"]
