# SPDX-License-Identifier: Apache-2.0
"""accuracy - how far 8-bit attention is from the exact one, ours and others', in float64."""
