# SPDX-License-Identifier: Apache-2.0
"""backends - the libraries that can compute one attention call, each behind one interface."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from wan_attn.backends import (
    chunked,
    comfy_kitchen,
    fa2,
    fa3,
    native,
    sage,
    torch_sdpa,
    xformers,
)
from wan_attn.request import Call, Request

__all__ = [
    "LOSSY",
    "REGISTRY",
    "Backend",
    "chunked",
    "comfy_kitchen",
    "fa2",
    "fa3",
    "native",
    "reads_float32",
    "sage",
    "torch_sdpa",
    "xformers",
]


class Backend(Protocol):
    """What a module in this package offers; all of them keep the contract of wan_attn.sdpa.

    Attributes:
        NAME: its value of USE_ATTENTION_BACKEND.
        TITLE: how the log calls it.
    """

    NAME: str
    TITLE: str

    def why_not(self, request: Request) -> str | None:
        """Why it cannot take the call; None: it can. Asks no tensor, starts no device."""

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """(out in query's dtype, lse or None) for a call that why_not does not refuse; out may be
        in call.out_dtype instead.

        Args:
            query: [batch, seqlen_q, num_heads_q, head_dim]; key, value: [batch, seqlen_k,
                num_heads_k, head_dim]; head_dim has stride 1.
            call: the other arguments; its dtype and version have done their work by now.

        Returns:
            out [batch, seqlen_q, num_heads_q, head_dim], and with call.return_lse lse [batch,
            num_heads_q, seqlen_q] float32.
        """


# Best first. A new backend is a module here and a line there (and its name in config.VARIABLES).
# The lossy ones are asked only where they are named.
REGISTRY: dict[str, Backend] = {
    module.NAME: module
    for module in (fa3, fa2, native, xformers, torch_sdpa, chunked, sage, comfy_kitchen)
}
LOSSY = frozenset({sage.NAME, comfy_kitchen.NAME})


def reads_float32(name: str, request: Request, variant: str = "") -> tuple[bool, bool]:
    """Whether this backend reads a query, and a key, of float32 beside a half value where they lie.

    What it would copy, it had better be given in value's dtype by who can let go of the original.

    Args:
        variant: the row of `sdpa` that computes; "": the best one that takes the call.
    """
    if name == native.NAME:
        return native.reads_float32(request, variant)
    is_read = name == chunked.NAME and chunked.reads_float32(request)
    return is_read, is_read
