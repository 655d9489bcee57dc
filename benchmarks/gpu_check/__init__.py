# SPDX-License-Identifier: Apache-2.0
"""gpu_check - what a GPU says of our kernels: right or wrong, and how fast beside others."""
