# SPDX-License-Identifier: Apache-2.0
"""functions.py - the public functions whose arguments are broken: a good call of each, what kind of
argument each one is, and what may be taken although it is in values.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import wan_attn
from fuzz import odd_values as odd
from fuzz import values as v

OPERANDS = frozenset({"query", "key", "value"})
ATTENTION, FLASH = "flash_attention", "flash_attn_func"
OP, ROPE_OP = "torch.ops.wan_attn.sdpa", "torch.ops.wan_attn.rms_norm_rope"
WITH_LISTS = f"{OP} with lists"
OPS = frozenset({OP, WITH_LISTS, ROPE_OP})
"""Those whose arguments torch's dispatcher looks at first."""


@dataclass(frozen=True)
class Function:
    """One function under test.

    Attributes:
        good: keyword arguments of a call that works.
        kinds: argument -> the table of values.py that breaks it.
        words: argument -> other names under which a message may speak of it.
        allowed: (argument, value) -> why it may be taken. Whether it is, is not said: what is
            listed may be refused, too, with proper words.
    """

    name: str
    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    kinds: Mapping[str, Mapping[str, v.Make]]
    words: Mapping[str, frozenset[str]] = field(default_factory=dict)
    allowed: Mapping[tuple[str, str], str] = field(default_factory=dict)


# What every function may take: kind -> value -> why.
_NUMBERS = {
    "int": "an integer is a number",
    "numpy": "numpy's numbers are numbers",
    "Fraction": "it has a value as a float",
    "Decimal": "it has a value as a float",
    "tensor": "a tensor of one element is a number to torch",
}
_TENSORS = (v.OPERAND, v.TOKENS, v.PACKED, v.PACKED_KEYS, v.LSE, v.OUT, v.MASK, v.WEIGHT, v.TABLE)
_GENERAL: dict[int, dict[str, str]] = {
    **{id(x): odd.LEGAL_TENSORS for x in _TENSORS},
    id(v.CU_SEQLENS): odd.LEGAL_INTEGERS | {"2^62 expanded": "only memory is wanting"},
    id(v.COUNT): odd.LEGAL_COUNTS,
    id(v.FLAG): odd.LEGAL_FLAGS,
    id(v.WINDOW): odd.LEGAL_PAIRS,
    id(v.SCALE): _NUMBERS | odd.LEGAL_NUMBERS,
    id(v.EPS): _NUMBERS | odd.LEGAL_NUMBERS,
    id(v.GRIDS): odd.LEGAL_INTEGERS
    | dict.fromkeys(("list", "list of tuples", "list of tensors"), "three sizes of each sample")
    | dict.fromkeys(("list of numpy's", "numpy"), "three sizes of each sample")
    | {"list of whole floats": "nothing is lost of 1.0; refusing it is right, too"},
    id(v.Q_SCALE): odd.LEGAL_NUMBERS
    | dict.fromkeys(("leaf", "Parameter"), "a tensor is multiplied in, with its gradient"),
    id(v.PROBABILITY): {"tensor": _NUMBERS["tensor"]} | odd.LEGAL_NUMBERS,
    id(v.SOFTCAP): {"tensor": _NUMBERS["tensor"]} | odd.LEGAL_NUMBERS,
    id(v.LENGTHS): {
        "list of whole floats": "nothing is lost of 1.0; refusing it is right, too",
        **odd.LEGAL_INTEGERS,
        **odd.LEGAL_LISTS,
    },
}


_BESIDE_HALF = "float32 query and key beside a half value are the contract's"


def allowed(function: Function, argument: str, value: str) -> str | None:
    """Why this may be taken; None: it must be refused."""
    if (argument in ("v", "value")) and value == "another half":
        return _BESIDE_HALF
    general = _GENERAL.get(id(function.kinds[argument]), {})
    return function.allowed.get((argument, value)) or general.get(value)


def _operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = ((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16))
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _lens() -> dict[str, Any]:
    return {"q_lens": torch.tensor([5, 3]), "k_lens": torch.tensor([4, 7])}


def _sdpa() -> dict[str, Any]:
    query, key, value = _operands()
    more = {"scale": 0.3, "is_causal": False, "return_lse": False}
    return {"query": query, "key": key, "value": value, **_lens(), **more}


def _op() -> dict[str, Any]:
    return {**_sdpa(), "window_left": -1, "window_right": -1, "kernel": -1}


def _op_with_lists() -> dict[str, Any]:
    counts = torch.ones(2, 4, 1, dtype=torch.int32)
    lists = {"block_counts": counts, "block_indices": torch.zeros_like(counts)[..., None]}
    return {**_sdpa(), **lists, "pools_others": True, "skip_threshold": 0.01}


_THREE = {"query": v.OPERAND, "key": v.OPERAND, "value": v.OPERAND}
_SDPA = {
    **_THREE,
    **{"q_lens": v.LENGTHS, "k_lens": v.LENGTHS, "scale": v.SCALE},
    **{"is_causal": v.FLAG, "return_lse": v.FLAG},
}
_WINDOW_WORDS = frozenset({"window", "window_left", "window_right"})
_QKV_WORDS = {"q": frozenset({"query"}), "k": frozenset({"key"}), "v": frozenset({"value"})}
_ANY_DTYPE = "any floating dtype is converted to the one that is computed in"


def _flash_attention() -> dict[str, Any]:
    q, k, value = _operands()
    return {"q": q, "k": k, "v": value, **_lens(), "dropout_p": 0.0, "softmax_scale": 0.3}


_FLASH_WORDS = {
    **_QKV_WORDS,
    "causal": frozenset({"is_causal"}),
    "softmax_scale": frozenset({"scale"}),
    "window_size": _WINDOW_WORDS,
    "qkv": OPERANDS,
    "kv": frozenset({"key", "value"}),
}
_FLASH = {
    **{"dropout_p": v.PROBABILITY, "softmax_scale": v.SCALE, "causal": v.FLAG},
    **{"window_size": v.WINDOW, "softcap": v.SOFTCAP, "alibi_slopes": v.NOTHING},
    **{"deterministic": v.FLAG, "return_attn_probs": v.FLAG},
}
_ALL_META = "every operand is of shapes alone, and so is the result"
_NEGATIVE_WINDOW = "flash-attn takes every negative bound as none"


def _flash(*names: str) -> Callable[[], dict[str, Any]]:
    def good() -> dict[str, Any]:
        q, k, value = _operands()
        whole = torch.randn(2, 6, 3, 2, 16, generator=torch.Generator().manual_seed(8))
        parts = {"q": q, "k": k, "v": value, "qkv": whole, "kv": torch.stack((k, value), 2)}
        tokens = {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": value.flatten(0, 1)}
        tokens |= {"qkv": whole.flatten(0, 1), "kv": parts["kv"].flatten(0, 1)}
        lists = {
            **{"cu_seqlens_q": torch.tensor([0, 4, 10]), "max_seqlen_q": 6},
            **{"cu_seqlens_k": torch.tensor([0, 9, 14]), "max_seqlen_k": 9},
            **{"cu_seqlens": torch.tensor([0, 5, 12]), "max_seqlen": 7},
        }
        is_packed = any(name.startswith("cu_") for name in names)
        found = {**(tokens if is_packed else parts), **lists}
        return {name: found[name] for name in names} | {"softmax_scale": 0.3}

    return good


def _flash_function(name: str, *names: str, **more: Any) -> Function:
    is_packed = any(n.startswith("cu_") for n in names)
    kinds: dict[str, Mapping[str, v.Make]] = {}
    for n in names:
        if n in ("qkv", "kv"):
            kinds[n] = v.PACKED if n == "qkv" else v.PACKED_KEYS
        else:
            kinds[n] = v.TOKENS if is_packed else v.OPERAND
        if n.startswith("cu_"):
            kinds[n] = v.CU_SEQLENS
        if n.startswith("max_"):
            kinds[n] = v.COUNT
    rules = {("window_size", "below -1"): _NEGATIVE_WINDOW, ("qkv", "meta"): _ALL_META}
    good = _flash(*names)
    return Function(
        name, getattr(wan_attn, name), good, {**kinds, **_FLASH, **more}, _FLASH_WORDS, rules
    )


def _sage() -> dict[str, Any]:
    q, k, value = (x.transpose(1, 2) for x in _operands())
    return {"q": q, "k": k, "v": value, "tensor_layout": "HND", "sm_scale": 0.3}


def _sage_masked() -> dict[str, Any]:
    return {**_sage(), "attn_mask": torch.ones(2, 4, 5, 7, dtype=torch.bool)}


def _like_torchs() -> dict[str, Any]:
    query, key, value = (x.transpose(1, 2) for x in _operands())
    return {"query": query, "key": key, "value": value, "scale": 0.3, "enable_gqa": True}


def _like_torchs_masked() -> dict[str, Any]:
    mask = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    return {**_like_torchs(), "attn_mask": mask.tril(2)}


# Operands that do not fit each other or the mask: either may be named.
_TORCH_WORDS = {"query": frozenset({"key", "attn_mask"}), "key": frozenset({"value"})}


def _of_torchs_meaning() -> dict[tuple[str, str], str]:
    """What torch's function takes, and so does ours."""
    leading = "leading dimensions are broadcast"
    names = ("a dimension less", "a dimension more", "another batch")
    rules = {(n, x): leading for n in OPERANDS for x in names}
    rules |= {("query", x): "none in, none out" for x in ("no heads",)}
    values = ("another head_dim", "head_dim 0", "none in the last")
    rules |= {("value", x): "value may have a head_dim of its own" for x in values}
    return rules | {("dropout_p", "1"): "everything is dropped"}


def _merge() -> dict[str, Any]:
    out, _, _ = _operands()
    lse = out.mean(-1).transpose(1, 2).contiguous()
    return {"out1": out, "lse1": lse, "out2": out.clone(), "lse2": lse.clone()}


def _lightx2v() -> dict[str, Any]:
    q, k, value = (x[0] for x in _operands())
    return {"q": q, "k": k, "v": value, "softmax_scale": 0.3}


def _integration(name: str, function: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        module = importlib.import_module(f"wan_attn.integrations.{name}")
        return getattr(module, function)(**arguments)

    return call


def _of_torchs_dispatcher(
    tensors: tuple[str, ...], numbers: tuple[str, ...], flags: tuple[str, ...], scale: str
) -> dict[tuple[str, str], str]:
    """What torch converts, or refuses in words of its own, before anything of ours is asked."""
    converted = "torch's dispatcher converts it, and nothing of ours sees what it was"
    refused = "torch's dispatcher refuses it, and nothing of ours is asked"
    of_flags = ("None", "2", "-1", "fraction", "nan", "float tensor")
    counts = ("bool", "float tensor", "bool tensor")
    rules = {(n, x): converted for n in flags for x in of_flags}
    rules |= {(n, x): converted for n in numbers for x in counts}
    rules |= {(scale, x): converted for x in ("bool", "bool tensor")}
    rules |= {(n, f"nested {x}"): refused for n in tensors for x in ("strided", "jagged")}
    # numpy's and tensors' scalars are numbers and bools to it, and fractions integers.
    scalars = ["0d numpy", "numpy of one", "0d tensor", "numpy bool", "numpy complex"]
    scalars += ["leaf", "Parameter", "whole float", "Fraction", "10^5000"]
    # It asks for a __torch_function__, which these have, and shows what it cannot convert.
    others = ("Anything", "Raising", "list of Raising", "weak", "deaf subclass")
    rules |= {(n, x): converted for n in (scale, *flags, *numbers) for x in scalars}
    rules |= {(n, x): refused for n in (*tensors, scale, *flags, *numbers, "dtype") for x in others}
    return rules | {(scale, "sparse tensor"): refused}


_BOUNDS = ("window_left", "window_right", "kernel", "precision")
_OF_THE_OP = _of_torchs_dispatcher(
    ("query", "key", "value", "q_lens", "k_lens"),
    _BOUNDS,
    ("is_causal", "return_lse", "out_like_value"),
    "scale",
) | {(n, "negative"): "-1 is no bound, or the best row" for n in _BOUNDS[:3]}


def _core() -> list[Function]:
    wrapper = {**_SDPA, "window": v.WINDOW, "method": v.WORD, "threshold": v.COUNT}
    return [
        Function(
            "sdpa",
            wan_attn.sdpa,
            _sdpa,
            {**_SDPA, "window": v.WINDOW, "out_dtype": v.OUT_DTYPE},
            {"window": _WINDOW_WORDS},
        ),
        Function(
            ATTENTION,
            wan_attn.flash_attention,
            _flash_attention,
            {
                **{"q": v.OPERAND, "k": v.OPERAND, "v": v.OPERAND},
                **{"q_lens": v.LENGTHS, "k_lens": v.LENGTHS, "dropout_p": v.PROBABILITY},
                **{"softmax_scale": v.SCALE, "q_scale": v.Q_SCALE, "causal": v.FLAG},
                **{"window_size": v.WINDOW, "deterministic": v.FLAG, "dtype": v.DTYPE},
                **{"version": v.VERSION, "out_dtype": v.OUT_DTYPE},
            },
            _FLASH_WORDS,
            {(n, x): _ANY_DTYPE for n in "qkv" for x in ("float64", "another half", "float8")},
        ),
        Function(
            OP,
            torch.ops.wan_attn.sdpa,
            _op,
            {**_SDPA, **dict.fromkeys(_BOUNDS, v.COUNT), "out_like_value": v.FLAG},
            {},
            _OF_THE_OP,
        ),
        Function(
            WITH_LISTS,
            torch.ops.wan_attn.sdpa,
            _op_with_lists,
            {
                **{"block_counts": v.NOTHING, "block_indices": v.NOTHING},
                **{"pools_others": v.FLAG, "skip_threshold": v.PROBABILITY},
            },
            {},
            _of_torchs_dispatcher(
                ("block_counts", "block_indices"), (), ("pools_others",), "skip_threshold"
            )
            | {("skip_threshold", "1"): "a weight can be 1"},
        ),
        Function(
            "windows_flash_attention_wrapper",
            wan_attn.windows_flash_attention_wrapper,
            lambda: {**_sdpa(), "method": "chunked", "threshold": 8, "max_elements": 64},
            {**wrapper, "max_elements": v.COUNT, "group": v.NOTHING},
            {"window": _WINDOW_WORDS, "group": frozenset({"method"})},
        ),
        Function(
            "merge_states",
            wan_attn.merge_states,
            _merge,
            {"out1": v.OUT, "lse1": v.LSE, "out2": v.OUT, "lse2": v.LSE},
            {"out1": frozenset({"out2", "lse1", "lse2"}), "out2": frozenset({"lse2"})},
        ),
    ]  # fmt: skip


def _rope() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    angles = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    return {
        "x": torch.randn(2, 5, 4, 16, generator=generator),
        "weight": torch.rand(64, generator=generator) + 0.5,
        "table": torch.stack((angles.cos(), angles.sin()), -1).flatten(-2),
        "grid_sizes": torch.tensor([[1, 2, 2], [4, 1, 1]]),
        **{"eps": 1e-6, "per_head": False, "round_norm": True},
        **{"seqlen_offset": 0, "dtype": torch.float32},
    }


def _rms_norm_rope() -> list[Function]:
    kinds = {
        **{"x": v.OPERAND, "weight": v.WEIGHT, "table": v.TABLE, "grid_sizes": v.GRIDS},
        **{"eps": v.EPS, "per_head": v.FLAG, "round_norm": v.FLAG},
        **{"seqlen_offset": v.COUNT, "dtype": v.OUT_DTYPE},
    }
    words = {
        "x": frozenset({"weight", "table", "grid_sizes"}),
        "table": frozenset({"grid_sizes"}),  # which has more sizes than the table has positions
        "grid_sizes": frozenset({"table"}),
        "eps": frozenset({"weight"}),  # which goes with a norm alone
        "per_head": frozenset({"weight"}),
    }
    rules = {
        ("weight", "None"): "no weight is a weight of 1",
        ("x", "another half"): "any floating dtype, whatever the weight's is",
    }
    op = _of_torchs_dispatcher(
        ("x", "weight", "table", "grid_sizes"),
        ("seqlen_offset", "kernel"),
        ("per_head", "round_norm"),
        "eps",
    )
    return [
        Function("rms_norm_rope", wan_attn.rms_norm_rope, _rope, kinds, words, rules),
        Function(
            ROPE_OP,
            torch.ops.wan_attn.rms_norm_rope,
            _rope,
            kinds | {"kernel": v.COUNT},
            words,
            rules | op | {("kernel", "negative"): "-1 is the best row"},
        ),
    ]


def _of_other_libraries() -> list[Function]:
    plain, packed_q = ("cu_seqlens_q", "cu_seqlens_k"), ("max_seqlen_q", "max_seqlen_k")
    sage_kinds = {
        **{"q": v.OPERAND, "k": v.OPERAND, "v": v.OPERAND, "tensor_layout": v.WORD},
        **{"is_causal": v.FLAG, "sm_scale": v.SCALE, "return_lse": v.FLAG},
        "dropout_p": v.PROBABILITY,
    }
    no_rows = {("q", "no heads"): "without rows, in this layout"}
    sage_words = {**_QKV_WORDS, "sm_scale": frozenset({"scale"})}
    return [
        _flash_function(FLASH, "q", "k", "v"),
        _flash_function("flash_attn_kvpacked_func", "q", "kv"),
        _flash_function("flash_attn_qkvpacked_func", "qkv"),
        _flash_function(
            "flash_attn_varlen_func", "q", "k", "v", *plain, *packed_q, block_table=v.NOTHING
        ),
        _flash_function("flash_attn_varlen_kvpacked_func", "q", "kv", *plain, *packed_q),
        _flash_function("flash_attn_varlen_qkvpacked_func", "qkv", "cu_seqlens", "max_seqlen"),
        Function(
            "scaled_dot_product_attention",
            wan_attn.scaled_dot_product_attention,
            _like_torchs,
            {
                **_THREE,
                **{"dropout_p": v.PROBABILITY, "is_causal": v.FLAG, "scale": v.SCALE},
                "enable_gqa": v.FLAG,
            },
            _TORCH_WORDS,
            _of_torchs_meaning(),
        ),
        Function(
            "scaled_dot_product_attention with attn_mask",
            wan_attn.scaled_dot_product_attention,
            _like_torchs_masked,
            {"attn_mask": v.MASK, **_THREE},
            _TORCH_WORDS,
            _of_torchs_meaning(),
        ),
        Function("sageattn", wan_attn.sageattn, _sage, sage_kinds, sage_words, no_rows),
        Function(
            "sageattn with attn_mask",
            wan_attn.sageattn,
            _sage_masked,
            {"attn_mask": v.MASK, "q": v.OPERAND, "k": v.OPERAND, "v": v.OPERAND},
            {**_QKV_WORDS, "q": frozenset({"query", "attn_mask"})},
        ),
    ]


def _of_hosts() -> list[Function]:
    def enabling(name: str, function: str, argument: str, without: str = "") -> Function:
        title = f"integrations.{name}.{function}"
        kinds = {argument: {n: f for n, f in v.MODEL.items() if n != without}}
        return Function(title, _integration(name, function), lambda: {}, kinds)

    return [
        enabling("diffusers", "enable", "model_or_pipe"),
        enabling("transformers", "enable", "model"),
        enabling("wan2gp", "enable", "module", "None"),  # None: the host's own
        Function(
            "integrations.lightx2v.apply",
            _integration("lightx2v", "apply"),
            _lightx2v,
            {
                **{"q": v.TOKENS, "k": v.TOKENS, "v": v.TOKENS, "softmax_scale": v.SCALE},
                **{"causal": v.FLAG, "drop_rate": v.PROBABILITY},
            },
            _FLASH_WORDS,
            {
                (n, x): "[batch, seqlen, heads, head_dim] is legal, too"
                for n in "qkv"
                for x in ("a dimension more",)
            },
        ),
        Function(
            "patch",
            wan_attn.patch,
            lambda: {"package": "a_package_that_is_not_there"},
            {"package": {n: f for n, f in v.MODEL.items() if n != "str"}, "attention": v.NOTHING},
            {},
            {("package", "text of one's own"): "the name of a package, like any text"},
        ),
    ]


def functions() -> list[Function]:
    """All of them."""
    from fuzz import modes  # which need Function

    ours = [*_core(), *_rms_norm_rope(), *modes.precision(), *modes.leaving_out()]
    return [*ours, *_of_other_libraries(), *_of_hosts()]
