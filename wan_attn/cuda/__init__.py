# SPDX-License-Identifier: Apache-2.0
"""cuda - CUDA kernels as data: which there are, how each is compiled, where its machine code is.

`rows`, `sources`, `nvrtc`, `store` and `ship` import neither torch nor anything that does: setup.py
uses them where there is no torch.
"""
