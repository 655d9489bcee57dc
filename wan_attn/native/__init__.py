# SPDX-License-Identifier: Apache-2.0
"""native - from torch tensors to libwan_attn: the library, its bindings, its table, the op."""
