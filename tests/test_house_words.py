# SPDX-License-Identifier: Apache-2.0
"""test_house_words.py - one word for one thing, and where another's word for it may stand.

==========================  ========================  ==========================================
what                        wan_attn/ (Wan's words)   csrc/ (FlashAttention's words)
==========================  ========================  ==========================================
real lengths of a sample    q_lens, k_lens            seqused_q, seqused_k
factor of the scores        scale                     softmax_scale
bounds beside the diagonal  window                    window_size_left, window_size_right
==========================  ========================  ==========================================

wan_attn/native/ translates from the left column to the right one. Functions that are shaped like
another library's (MIRRORS) take that library's words, and call the rest of the package with ours.
csrc/torch is the other side of native/: the op's arguments carry the names that users know.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from source_tree import c_code, c_sources, expect_none, package_sources, python_nodes

# Words that neither language uses: the house's word, then those of other libraries.
SYNONYMS = {
    "seqlen_q, seqlen_k": "Lq Lk L_q L_k qo_len kv_len len_kv seq_len_q seq_len_k N_CTX",
    "num_heads_q, num_heads_k": "nheads n_heads nh num_kv_heads num_qo_heads",
    "head_dim": "hdim headdim head_size",
    "lse, row_max, row_sum": "softmax_lse rowmax rowsum m_i l_i",
    "BLOCK_M, BLOCK_N, STAGES": "kBlockM kBlockN CTA_Q CTA_K Br Bc BLOCK_Q BLOCK_KV NUM_STAGES",
}
IN_C = SYNONYMS | {
    "seqused_q, seqused_k": "q_lens k_lens kv_lens q_len k_len actual_seqlen",
    "softmax_scale": "sm_scale inv_temperature",
    "is_causal, window_size_left, window_size_right": (
        "causal local is_local window_left window_right"
    ),
    "lse": "logsumexp",
}
IN_PYTHON = SYNONYMS | {
    "q_lens, k_lens": "seqused_q seqused_k kv_lens cu_seqlens_q cu_seqlens_k actual_seqlen",
    "scale": "softmax_scale sm_scale inv_temperature",
    "is_causal, window": "causal is_local window_size window_size_left window_size_right",
}
MIRRORS = (
    "wan_attn/native/*",
    "wan_attn/signatures/*",
    "wan_attn/integrations/*",
    "wan_attn/attention.py",  # flash_attention has the signature of Wan2.2's
)


def synonyms(words: set[str], table: dict[str, str]) -> Iterator[str]:
    for ours, theirs in table.items():
        for word in sorted(words & set(theirs.split())):
            yield f"{word}; the house says {ours}"


def names(file: Path) -> set[str]:
    """What the code of a Python file names itself; the keywords of a call are its callee's."""
    found = set()
    for node in python_nodes(file):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
    return found


def is_mirror(file: Path) -> bool:
    return any(fnmatch(file.as_posix(), pattern) for pattern in MIRRORS)


def test_c_speaks_flash_attentions_words() -> None:
    def problems() -> Iterator[str]:
        for file in c_sources():
            if file.parts[1] == "torch":
                continue
            words = set(re.findall(r"[A-Za-z_]\w*", c_code(file)))
            yield from (f"{file}: {problem}" for problem in synonyms(words, IN_C))

    expect_none(problems())


def test_python_speaks_wans_words() -> None:
    def problems() -> Iterator[str]:
        for file in package_sources():
            table = SYNONYMS if is_mirror(file) else IN_PYTHON
            used = names(file)
            yield from (f"{file}: {problem}" for problem in synonyms(used, table))

    expect_none(problems())


def test_c_names_are_snake_case() -> None:
    def problems() -> Iterator[str]:
        for file in c_sources():
            for word in set(re.findall(r"[A-Za-z_]\w*", c_code(file))):
                if file.parts[1] != "torch" and re.fullmatch(r"[a-z]{2,}[A-Z]\w*", word):
                    yield f"{file}: {word} is not snake_case"
                if word.startswith("wan_attn_") and word.endswith("_t"):
                    yield f"{file}: {word} ends in _t, which is POSIX's"

    expect_none(problems())
