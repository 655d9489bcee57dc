# SPDX-License-Identifier: Apache-2.0
"""later.py - what a call says of itself, on its way from a GPU to the host; nothing waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Later:
    """A small tensor of a device on its way to the host. Nothing waits for it.

    Args:
        api: torch.cuda, or a stand-in.
    """

    def __init__(self, tensor: Tensor, api: Any = torch.cuda) -> None:
        self._event: Any = None
        if tensor.device.type == "cpu":
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = api.Event()
        self._event.record(api.current_stream(tensor.device))

    def is_there(self) -> bool:
        """Whether reading it would not wait."""
        return self._event is None or bool(self._event.query())

    def read(self) -> list[Any]:
        """Its numbers; waits where it is not there yet."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[Any] = self._host.tolist()
        return numbers
