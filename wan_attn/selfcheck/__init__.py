# SPDX-License-Identifier: Apache-2.0
"""selfcheck - known calls with float64 results, which kernels and paths are held against."""
