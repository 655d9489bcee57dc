# SPDX-License-Identifier: Apache-2.0
"""cuda_mock - a CUDA driver for machines without one, with the emulated GPU behind it."""
