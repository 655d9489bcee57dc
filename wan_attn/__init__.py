# SPDX-License-Identifier: Apache-2.0
"""wan_attn - the attention engine for the Wan2.2 video models.

Importing registers ``torch.ops.wan_attn.sdpa`` and does nothing else: it patches nothing, starts no
CUDA context, reads no file but its own library and opens no connection.
"""

try:
    import torch as _torch
except ImportError as _error:
    raise ImportError(
        f"wan_attn needs PyTorch 2.4 or newer, which it never installs itself ({_error}): "
        "install the torch that suits this machine first"
    ) from _error
if tuple(int(part) for part in _torch.__version__.split(".")[:2]) < (2, 4):
    raise ImportError(f"wan_attn needs PyTorch 2.4 or newer, got {_torch.__version__}")

from wan_attn import ops as ops  # registers the op
from wan_attn.attention import flash_attention, sdpa
from wan_attn.backends.chunked import windows_flash_attention_wrapper
from wan_attn.integrations.wan22 import patch, unpatch
from wan_attn.states import merge_states
from wan_attn.version import __version__

# Last, because it hides the package of the same name: that one is reached as `wan_attn.backends.x`
# in import statements, as always; the attribute is the function that users call.
from wan_attn.availability import backends  # isort: skip

__all__ = [
    "__version__",
    "backends",
    "flash_attention",
    "merge_states",
    "patch",
    "sdpa",
    "unpatch",
    "windows_flash_attention_wrapper",
]
