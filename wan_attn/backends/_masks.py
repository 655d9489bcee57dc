# SPDX-License-Identifier: Apache-2.0
"""_masks.py - which keys a row may see: lengths known here (HostMask), or not (DeviceMask)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wan_attn.request import Call


@dataclass(frozen=True, slots=True)
class HostMask:
    """The visible keys of a sample whose real lengths are known.

    Row i sees keys i + offset - left … i + offset + right; offset = k_len - q_len aligns the
    diagonal bottom-right, as flash-attn >= 2.1 does. left and right are None where they bound
    nothing, so that a call which needs no mask is seen to need none.
    """

    q_len: int
    k_len: int
    left: int | None
    right: int | None

    @classmethod
    def make(cls, q_len: int, k_len: int, call: Call) -> HostMask:
        """From the contract: a window side of -1 is unlimited, causal is a right side of 0."""
        left = call.window[0]
        right = 0 if call.is_causal else call.window[1]
        return cls(
            q_len,
            k_len,
            None if left < 0 or left >= k_len - 1 else left,  # the last row reaches key 0
            None
            if right < 0 or right >= q_len - 1
            else right,  # the first row reaches key k_len - 1
        )

    @property
    def offset(self) -> int:
        """What turns a row into the key on its diagonal."""
        return self.k_len - self.q_len

    @property
    def is_full(self) -> bool:
        """Every row sees every key."""
        return self.left is None and self.right is None

    @property
    def is_plain_causal(self) -> bool:
        """What torch calls is_causal: square, aligned top-left and bottom-right at once."""
        return self.left is None and self.right == 0 and self.offset == 0

    @property
    def first_row(self) -> int:
        """The first row that sees a key; q_len if none does. Only rows at the start see none."""
        if self.k_len == 0:
            return self.q_len
        if self.right is None:
            return 0
        return min(self.q_len, max(0, -self.offset - self.right))

    def keys(self, begin: int, end: int) -> tuple[int, int]:
        """The keys [lo, hi) that any of the rows [begin, end) sees."""
        low = 0 if self.left is None else max(0, begin + self.offset - self.left)
        high = self.k_len if self.right is None else min(self.k_len, end + self.offset + self.right)
        return low, max(low, high)

    def block(
        self, begin: int, end: int, low: int, high: int, device: torch.device
    ) -> Tensor | None:
        """[end - begin, high - low] bool, True where the key is seen; None if all are."""
        first_diagonal, last_diagonal = begin + self.offset, end - 1 + self.offset
        left_cuts = self.left is not None and low < last_diagonal - self.left
        right_cuts = self.right is not None and high - 1 > first_diagonal + self.right
        if not left_cuts and not right_cuts:
            return None
        diagonal = torch.arange(first_diagonal, last_diagonal + 1, device=device).unsqueeze(1)
        columns = torch.arange(low, high, device=device).unsqueeze(0)
        keep = columns >= diagonal - self.left if left_cuts and self.left is not None else None
        if right_cuts and self.right is not None:
            below = columns <= diagonal + self.right
            keep = below if keep is None else keep & below
        return keep


@dataclass(frozen=True, slots=True)
class DeviceMask:
    """The visible keys of a batch whose lengths may not be read, only used on the device.

    Attributes:
        q_lens, k_lens: [batch, 1, 1, 1] int64, clamped to the padded lengths, on the operands'
            device.
        seqlen_q, seqlen_k: the padded lengths.
        left, right: bounds round the diagonal; None: unlimited.
        rows_matter: two rows of a sample may see different keys.
    """

    q_lens: Tensor
    k_lens: Tensor
    seqlen_q: int
    seqlen_k: int
    left: int | None
    right: int | None
    rows_matter: bool  # a field: torch 2.4's tracer cannot branch on a property

    @classmethod
    def make(
        cls, call: Call, query: Tensor, seqlen_k: int, seqlen_q: int | None = None
    ) -> DeviceMask:
        """From the contract; query is [batch, seqlen_q, heads, head_dim] or a share of that."""
        batch, window = query.shape[0], call.window
        seqlen_q = query.shape[1] if seqlen_q is None else seqlen_q

        def column(lengths: Tensor | None, seqlen: int) -> Tensor:
            if lengths is None:
                return torch.full((batch, 1, 1, 1), seqlen, dtype=torch.int64, device=query.device)
            moved = lengths.to(device=query.device, dtype=torch.int64, non_blocking=True)
            return moved.clamp(0, seqlen).view(batch, 1, 1, 1)

        # A bound that cuts nothing is none: added to an index, a huge one would wrap.
        left = window[0] if 0 <= window[0] < seqlen_k else None
        right: int | None = 0 if call.is_causal else window[1]
        if right is not None and not 0 <= right < seqlen_q:
            right = None
        return cls(
            column(call.q_lens, seqlen_q),
            column(call.k_lens, seqlen_k),
            seqlen_q,
            seqlen_k,
            left,
            right,
            left is not None or right is not None,
        )

    def real_rows(self) -> Tensor:
        """[batch, seqlen_q, 1, 1] bool: rows below q_len."""
        return (
            torch.arange(self.seqlen_q, device=self.q_lens.device).view(1, -1, 1, 1) < self.q_lens
        )

    def real_keys(self) -> Tensor:
        """[batch, seqlen_k, 1, 1] bool: keys below k_len."""
        return (
            torch.arange(self.seqlen_k, device=self.k_lens.device).view(1, -1, 1, 1) < self.k_lens
        )

    def block(self, begin: int, end: int, low: int = 0, high: int | None = None) -> Tensor:
        """[batch, 1, rows, high - low] bool, True where seen; one row if all see the same keys."""
        columns = torch.arange(
            low, self.seqlen_k if high is None else high, device=self.k_lens.device
        ).view(1, 1, 1, -1)
        keep = columns < self.k_lens
        if self.rows_matter:
            rows = torch.arange(begin, end, device=self.q_lens.device).view(1, 1, -1, 1)
            diagonal = rows + (self.k_lens - self.q_lens)
            if self.left is not None:
                keep = keep & (columns >= diagonal - self.left)
            if self.right is not None:
                keep = keep & (columns <= diagonal + self.right)
        return keep
