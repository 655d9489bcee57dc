# SPDX-License-Identifier: Apache-2.0
"""request - one attention call, its rules (call.py, blocks.py), what arguments may be (gate.py),
and what torch.func makes of them (transforms.py)."""

from wan_attn.request.blocks import BLOCK, Blocks, blocks_of, check_blocks
from wan_attn.request.call import (
    DTYPES,
    MAX_HEAD_DIM,
    PLAIN,
    Call,
    Request,
    check,
    check_dense,
    check_floating,
    check_scale,
    dtype_word,
    empty_lse,
    host_lengths,
    wants_grad,
)
from wan_attn.request.gate import Refusal, refuse

__all__ = [
    "BLOCK",
    "DTYPES",
    "MAX_HEAD_DIM",
    "PLAIN",
    "Blocks",
    "Call",
    "Refusal",
    "Request",
    "blocks_of",
    "check",
    "check_blocks",
    "check_dense",
    "check_floating",
    "check_scale",
    "dtype_word",
    "empty_lse",
    "host_lengths",
    "refuse",
    "wants_grad",
]
