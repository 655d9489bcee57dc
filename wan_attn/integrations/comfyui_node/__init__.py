# SPDX-License-Identifier: Apache-2.0
"""wan_attn for ComfyUI: registers the attention function `wan_attn` and the node "Wan attention".

This folder belongs into ComfyUI's custom_nodes; `python -m wan_attn comfyui install PATH` copies it
there. All it does is hand ComfyUI's attention module to wan_attn, which must be installed in the
same Python. It is the only part of wan_attn that imports ComfyUI (GPL-3.0): see LICENSE.md.
"""

import importlib

try:
    from wan_attn.integrations import comfyui
except ModuleNotFoundError as error:
    raise ImportError(
        f"the wan_attn node needs the package wan_attn in ComfyUI's own Python ({error}):"
        " install it there with pip"
    ) from error

NODE_CLASS_MAPPINGS = comfyui.start(importlib.import_module("comfy.ldm.modules.attention"))
NODE_DISPLAY_NAME_MAPPINGS = {comfyui.NODE_ID: comfyui.NODE_TITLE}
