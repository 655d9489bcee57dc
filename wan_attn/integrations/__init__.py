# SPDX-License-Identifier: Apache-2.0
"""integrations - where wan_attn meets the programs that use it; importing it changes nothing.

Each host has the verbs for what is done to it, and each verb has one that undoes it:

========  ==========  ==============================================  ==============================
verb      undone by   what it does                                    hosts
========  ==========  ==============================================  ==============================
patch     unpatch     rebinds the host's own names to our functions   wan22, wan2gp, comfyui
register  unregister  adds a name that the host can be told to use    lightx2v, transformers,
                                                                      diffusers' backend,
                                                                      torch_flash, comfyui
enable    disable     changes one model (or a clone of it)            diffusers, transformers,
                                                                      comfyui
========  ==========  ==============================================  ==============================

Where the host itself undoes it, the second verb is the host's: torch_flash's is torch's own
restore_flash_attention_impl(), and a ComfyUI model is left alone by bypassing the node.
"""
