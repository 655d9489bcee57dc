# SPDX-License-Identifier: Apache-2.0
"""stub_wan.py - writes a package with Wan2.2's module tree and its import statements, nothing else.

Same names bound in the same places by the same kinds of import; the bodies are ours.
"""

from __future__ import annotations

from pathlib import Path

ATTENTION = """
try:
    import flash_attn_interface
    FLASH_ATTN_3_AVAILABLE = True
except ModuleNotFoundError:
    FLASH_ATTN_3_AVAILABLE = False
try:
    import flash_attn
    FLASH_ATTN_2_AVAILABLE = True
except ModuleNotFoundError:
    FLASH_ATTN_2_AVAILABLE = False

def flash_attention(q, k, v, q_lens=None, k_lens=None, dropout_p=0., softmax_scale=None,
                    q_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
                    dtype=None, version=None):
    return "stock"

def attention(q, k, v, k_lens=None, fa_version=None):
    if FLASH_ATTN_2_AVAILABLE or FLASH_ATTN_3_AVAILABLE:
        return flash_attention(q=q, k=k, v=v, k_lens=k_lens, version=fa_version)
    return "without lengths"
"""

MODEL = """
import torch
from .attention import flash_attention

class WanAttentionBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((), 3.0))
    def forward(self, x, e=None):
        return x * self.scale + (0 if e is None else e[0])
"""

FLASH_ATTN_FUNC = """
try:
    from flash_attn import flash_attn_qkvpacked_func, flash_attn_func
except ImportError:
    flash_attn_func = None

def attention(q, k, v):
    return flash_attn_func(q, k, v)
"""

USES = """
from ..model import flash_attention

def call(*args, **kwargs):
    return flash_attention(*args, **kwargs)
"""

FILES = {
    "__init__.py": "from . import distributed, modules\nfrom .utils import prompt_extend\n",
    "utils/__init__.py": "",
    "utils/prompt_extend.py": (
        "try:\n    from flash_attn import flash_attn_varlen_func\n    FLASH_VER = 2\n"
        "except ModuleNotFoundError:\n    FLASH_VER = None\n"
    ),
    "distributed/__init__.py": "from . import ulysses\n",
    "distributed/ulysses.py": "from ..modules.attention import flash_attention\n",
    "modules/__init__.py": (
        "from .attention import flash_attention\nfrom . import model\nfrom . import animate, s2v\n"
    ),
    "modules/attention.py": ATTENTION,
    "modules/model.py": MODEL,
    "modules/animate/__init__.py": "from . import clip, face_blocks, model_animate\n",
    "modules/animate/clip.py": "from ..attention import flash_attention\n",
    "modules/animate/model_animate.py": USES,
    "modules/animate/face_blocks.py": FLASH_ATTN_FUNC,
    "modules/s2v/__init__.py": "from . import auxi_blocks, model_s2v, motioner\n",
    "modules/s2v/model_s2v.py": USES,
    "modules/s2v/motioner.py": "from ..model import flash_attention\n",
    "modules/s2v/auxi_blocks.py": FLASH_ATTN_FUNC,
}

FLASH_ATTENTION = (
    "modules",
    "modules.attention",
    "modules.model",
    "modules.animate.clip",
    "modules.animate.model_animate",
    "modules.s2v.model_s2v",
    "modules.s2v.motioner",
    "distributed.ulysses",
)
FLASH_ATTN_FUNC_HOLDERS = ("modules.animate.face_blocks", "modules.s2v.auxi_blocks")


def write(root: Path, package: str = "wan") -> Path:
    """Write the package below ``root``; returns its folder."""
    folder = root / package
    for name, source in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def write_flash_attn(root: Path, body: str) -> None:
    """Write a flash_attn package with this body."""
    (root / "flash_attn").mkdir(exist_ok=True)
    (root / "flash_attn" / "__init__.py").write_text(body)
