# SPDX-License-Identifier: Apache-2.0
"""later.py - numbers on their way from a GPU to the host, or to it; nothing waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers there. From pinned memory: else the copy would wait for all that runs on a
    GPU."""
    is_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=is_cuda).to(device, non_blocking=is_cuda)


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
