# SPDX-License-Identifier: Apache-2.0
"""library.py - our scheme as the library's own kernel computes it, beside the simulated ones."""

from __future__ import annotations

import numpy as np
import torch

from wan_attn.native import op

from .schemes import Array, Scheme


def lossy_row() -> op.KernelInfo | None:
    """The best row of 8-bit scores that this machine's CPU can run."""
    features = set(op.cpu_features())
    for row in op.kernels():
        if row.is_lossy and row.device == "cpu" and set(row.cpu_features) <= features:
            return row
    return None


def scheme(row: op.KernelInfo) -> Scheme:
    """That row, on float32 operands."""

    def run(q: Array, k: Array, v: Array, scale: float) -> Array:
        query, key, value = (torch.from_numpy(x).float()[None, :, None] for x in (q, k, v))
        out, _ = torch.ops.wan_attn.sdpa(query, key, value, scale=scale, kernel=row.index)
        return np.asarray(out[0, :, 0].double().numpy())

    return run
