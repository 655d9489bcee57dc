# SPDX-License-Identifier: Apache-2.0
"""wan_attn.cuda - from the sources of the CUDA kernels to their machine code on a device."""
