# SPDX-License-Identifier: Apache-2.0
"""wan_attn - the attention engine for the Wan2.2 video models.

Importing registers ``torch.ops.wan_attn.sdpa`` and ``rms_norm_rope``, and does nothing else: it
patches nothing, starts no CUDA context, reads no file but its own library, opens no connection.
"""

import importlib as _importlib
import types as _types
import warnings as _warnings

from wan_attn.transient import is_transient as _is_transient
from wan_attn.version import __version__

__all__ = [
    "__version__",
    "available",
    "backends",
    "flash_attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "merge_states",
    "patch",
    "precision",
    "rms_norm_rope",
    "sageattn",
    "scaled_dot_product_attention",
    "sdpa",
    "sparse",
    "unpatch",
    "windows_flash_attention_wrapper",
]


def _need_torch() -> None:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"wan_attn needs PyTorch 2.4 or newer, which it never installs itself ({error}): "
            "install the torch that suits this machine first"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 4):
        raise ImportError(f"wan_attn needs PyTorch 2.4 or newer, got {torch.__version__}")


_import_error: Exception | None = None
try:
    _need_torch()
    from wan_attn import backends, precision, sparse  # backends registers torch.ops.wan_attn.sdpa
    from wan_attn.attention import flash_attention, sdpa
    from wan_attn.backends.chunked import windows_flash_attention_wrapper
    from wan_attn.integrations.wan22 import patch, unpatch
    from wan_attn.merge import merge_states
    from wan_attn.native.rope_function import rms_norm_rope
    from wan_attn.selection import profile as _profile
    from wan_attn.selection.choose import available
    from wan_attn.signatures.flash_attn import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from wan_attn.signatures.sageattention import sageattn
    from wan_attn.signatures.scaled_dot_product import scaled_dot_product_attention

    class _Backends(_types.ModuleType):
        """The package wan_attn.backends, which may be called as the function of 0.1."""

        def __call__(self, *args: object, **options: object) -> dict[str, str | None]:
            _warnings.warn(
                "wan_attn.backends() is wan_attn.available() now", DeprecationWarning, stacklevel=2
            )
            return available(*args, **options)  # type: ignore[arg-type]

    backends.__class__ = _Backends

    # bench/ lies above selection/, and is not imported before it is needed.
    _profile.report_with(
        lambda recorder, seconds: _importlib.import_module("wan_attn.bench.profile").finish(
            recorder, seconds
        )
    )

    def __getattr__(name: str) -> object:
        """`wan_attn.bench.measure_step` after `import wan_attn` alone; not imported before."""
        if name == "bench":
            return _importlib.import_module("wan_attn.bench")
        raise AttributeError(f"module 'wan_attn' has no attribute {name!r}")

except (ImportError, OSError, RuntimeError, ValueError) as _error:
    if _is_transient(_error):
        raise  # this import ends, and the next one may go well
    # No torch, one whose DLLs do not load, a variable that holds something impossible: raised at
    # the first use, not here, because `python -m wan_attn doctor` has to import this file in order
    # to say what is wrong.
    _import_error = _error
    _warnings.warn(f"wan_attn cannot be used here: {_error}", RuntimeWarning, stacklevel=2)

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"wan_attn cannot be used here: {_import_error}") from _import_error
        raise AttributeError(f"module 'wan_attn' has no attribute {name!r}")
