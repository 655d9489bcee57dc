# SPDX-License-Identifier: Apache-2.0
"""integrations - where wan_attn meets the programs that use it; importing it patches nothing."""
