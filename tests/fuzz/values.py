# SPDX-License-Identifier: Apache-2.0
"""values.py - what people give in place of an argument, by the kind of argument it is.

A kind is a table {name: function of the good value that makes the bad one}. functions.py says which
of them a function may take all the same, and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzz import odd_values as odd

Make = Callable[[Any], Any]

HUGE = 2**70


def _quantised(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def _nested(layout: torch.layout) -> Make:
    return lambda x: torch.nested.nested_tensor([x[0], x[0]], layout=layout)


_NO_TENSORS: dict[str, Make] = {
    "None": lambda x: None,
    "str": lambda x: "query",
    "bytes": lambda x: b"query",
    "int": lambda x: 3,
    "float": lambda x: 0.5,
    "bool": lambda x: True,
    "list": lambda x: x.tolist(),
    "tuple of tensors": lambda x: (x, x),
    "numpy": lambda x: x.detach().float().numpy(),
    "object": lambda x: object(),
    "class": lambda x: Tensor,
    "dict": lambda x: {"query": x},
    "module": lambda x: torch.nn.Identity(),
    "shape": lambda x: x.shape,
}

_TENSORS: dict[str, Make] = {
    "sparse_coo": lambda x: x.detach().to_sparse(),
    "nested strided": _nested(torch.strided),
    "nested jagged": _nested(torch.jagged),
    "quantised": _quantised,
    "mkldnn": lambda x: x.detach().float().to_mkldnn(),
    "meta": lambda x: x.to("meta"),
    "complex64": lambda x: x.to(torch.complex64),
    "int8": lambda x: x.to(torch.int8),
    "int32": lambda x: x.to(torch.int32),
    "int64": lambda x: x.to(torch.int64),
    "uint8": lambda x: x.to(torch.uint8),
    "bool tensor": lambda x: x.to(torch.bool),
    "float8": lambda x: x.detach().to(torch.float8_e4m3fn),
    "0d": lambda x: x.sum(),
    "a dimension less": lambda x: x[0],
    "a dimension more": lambda x: x[None],
}

OPERAND: dict[str, Make] = {
    **odd.TENSORS,
    **_NO_TENSORS,
    **_TENSORS,
    "sparse_csr": lambda x: x.detach()[0, 0].to_sparse_csr(),
    "float64": lambda x: x.double(),
    "another half": lambda x: x.to(torch.float16),
    "another batch": lambda x: x[:1],
    "no heads": lambda x: x[:, :, :0],
    "another head_dim": lambda x: x[..., :8],
    "head_dim 0": lambda x: x[..., :0],
    "another dimension": lambda x: x[:, :, :, :, None],
}

# Packed tokens [total, heads, head_dim].
TOKENS: dict[str, Make] = {
    **odd.TENSORS,
    **_NO_TENSORS,
    **{n: f for n, f in _TENSORS.items() if n not in ("nested strided", "nested jagged")},
    "another half": lambda x: x.to(torch.float16),
    "another head_dim": lambda x: x[..., :8],
    "no heads": lambda x: x[:, :0],
    "head_dim 0": lambda x: x[..., :0],
}

# qkv and kv: a dimension of 3 or 2 inside.
PACKED: dict[str, Make] = {
    **odd.TENSORS,
    **_NO_TENSORS,
    **{n: f for n, f in _TENSORS.items() if n not in ("nested strided", "nested jagged")},
    "too few": lambda x: x.narrow(-3, 0, x.shape[-3] - 1),
    "head_dim 0": lambda x: x[..., :0],
}

# So many keys fit every query, and want no memory but years.
PACKED_KEYS = {name: make for name, make in PACKED.items() if name != "2^40 in the second"}

_INTEGER_TENSORS: dict[str, Make] = {
    **odd.INTEGERS,
    "float tensor": lambda x: x.float(),
    "bool tensor": lambda x: x.bool(),
    "int8 tensor": lambda x: x.to(torch.int8),
    "int16 tensor": lambda x: x.to(torch.int16),
    "complex tensor": lambda x: x.to(torch.complex64),
    "0d tensor": lambda x: x.sum(),
    "2d tensor": lambda x: x[:, None],
    "negative": lambda x: x - 1000,
    "too large": lambda x: x + 1000,
    "beyond 32 bit": lambda x: x + (1 << 32),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "quantised": lambda x: _quantised(x),
}

LENGTHS: dict[str, Make] = {
    **odd.LISTS,
    **_INTEGER_TENSORS,
    "too many": lambda x: torch.cat([x, x]),
    "too few": lambda x: x[:1],
    "none of them": lambda x: x[:0],
    "list of fractions": lambda x: [1.7, 2.9],
    "list of whole floats": lambda x: [1.0, 2.0],
    "list of bools": lambda x: [True, False],
    "list of NaN": lambda x: [math.nan, 1],
    "list of inf": lambda x: [math.inf, 1],
    "list of None": lambda x: [None, 1],
    "list of str": lambda x: ["1", "2"],
    "list beyond 64 bit": lambda x: [HUGE, 1],
    "list too long": lambda x: [1, 2, 3],
    "list negative": lambda x: [-1, 2],
    "nested list": lambda x: [[1], [2]],
    "empty list": lambda x: [],
    "str": lambda x: "12",
    "bytes": lambda x: b"\1\2",
    "set": lambda x: {1, 2},
    "dict": lambda x: {0: 1, 1: 2},
    "generator": lambda x: (n for n in (1, 2)),
    "int": lambda x: 2,
    "float": lambda x: 2.5,
    "bool": lambda x: True,
    "numpy floats": lambda x: np.array([1.5, 2.5]),
    "numpy bools": lambda x: np.array([True, False]),
    "object": lambda x: object(),
}

CU_SEQLENS: dict[str, Make] = {
    **odd.OBJECTS,
    **_INTEGER_TENSORS,
    "None": lambda x: None,
    "list": lambda x: x.tolist(),
    "str": lambda x: "cu",
    "int": lambda x: 2,
    "float": lambda x: 2.5,
    "bool": lambda x: True,
    "empty": lambda x: x[:0],
    "falls": lambda x: x.flip(0),
    "begins late": lambda x: x + 1,
    "object": lambda x: object(),
}

SCALE: dict[str, Make] = {
    **odd.NUMBERS,
    "nan": lambda x: math.nan,
    "inf": lambda x: math.inf,
    "-inf": lambda x: -math.inf,
    "str": lambda x: "0.5",
    "bytes": lambda x: b"0.5",
    "list": lambda x: [0.5],
    "tuple": lambda x: (0.5,),
    "dict": lambda x: {},
    "bool": lambda x: True,
    "complex": lambda x: 1j,
    "object": lambda x: object(),
    "beyond float": lambda x: 10**400,
    "numpy nan": lambda x: np.float64("nan"),
    "numpy array": lambda x: np.array([0.5, 0.5]),
    "two numbers": lambda x: torch.tensor([0.5, 0.5]),
    "nan tensor": lambda x: torch.tensor(math.nan),
    "bool tensor": lambda x: torch.tensor(True),
    "meta tensor": lambda x: torch.tensor(0.5, device="meta"),
    "sparse tensor": lambda x: torch.tensor([0.5]).to_sparse(),
    "tensor": lambda x: torch.tensor(0.5),
    "int": lambda x: 1,
    "numpy": lambda x: np.float32(0.5),
    "Fraction": lambda x: Fraction(1, 2),
    "Decimal": lambda x: Decimal("0.5"),
}

PROBABILITY: dict[str, Make] = {
    **{n: f for n, f in SCALE.items() if n not in ("int", "numpy", "Fraction", "Decimal")},
    "None": lambda x: None,
    "negative": lambda x: -0.1,
    "1": lambda x: 1.0,
    "7": lambda x: 7,
    "numpy": lambda x: np.float32(7),
}

SOFTCAP: dict[str, Make] = {
    **{n: f for n, f in PROBABILITY.items() if n not in ("negative", "numpy")},
    "30": lambda x: 30.0,
}

COUNT: dict[str, Make] = {
    **odd.COUNTS,
    "fraction": lambda x: 4.9,
    "nan": lambda x: math.nan,
    "inf": lambda x: math.inf,
    "negative": lambda x: -1,
    "beyond 64 bit": lambda x: HUGE,
    "str": lambda x: "8",
    "list": lambda x: [8],
    "bool": lambda x: True,
    "complex": lambda x: 1j,
    "object": lambda x: object(),
    "two numbers": lambda x: torch.tensor([8, 8]),
    "float tensor": lambda x: torch.tensor(8.5),
    "bool tensor": lambda x: torch.tensor(True),
    "meta tensor": lambda x: torch.tensor(8, device="meta"),
    "numpy fraction": lambda x: np.float64(8.5),
}

WINDOW: dict[str, Make] = {
    **odd.PAIRS,
    "None": lambda x: None,
    "str": lambda x: "12",
    "bytes": lambda x: b"\1\2",
    "int": lambda x: 3,
    "one": lambda x: (1,),
    "three": lambda x: (1, 2, 3),
    "empty": lambda x: (),
    "fractions": lambda x: (1.5, 2),
    "nan": lambda x: (math.nan, 0),
    "inf": lambda x: (0, math.inf),
    "bools": lambda x: (True, False),
    "words": lambda x: ("1", "2"),
    "nones": lambda x: (None, None),
    "lists": lambda x: ([1], [2]),
    "beyond 64 bit": lambda x: (HUGE, 0),
    "below -1": lambda x: (-2, 0),
    "set": lambda x: {1, 2},
    "dict": lambda x: {1: 2, 3: 4},
    "generator": lambda x: (n for n in (1, 2)),
    "float tensor": lambda x: torch.tensor([1.5, 2.0]),
    "bool tensor": lambda x: torch.tensor([True, False]),
    "meta tensor": lambda x: torch.tensor([1, 2], device="meta"),
    "numpy floats": lambda x: np.array([1.5, 2.0]),
    "object": lambda x: object(),
}

FLAG: dict[str, Make] = {
    **odd.FLAGS,
    "None": lambda x: None,
    "str": lambda x: "no",
    "empty str": lambda x: "",
    "list": lambda x: [],
    "list of one": lambda x: [False],
    "dict": lambda x: {},
    "2": lambda x: 2,
    "-1": lambda x: -1,
    "fraction": lambda x: 0.5,
    "nan": lambda x: math.nan,
    "two flags": lambda x: torch.tensor([True, False]),
    "float tensor": lambda x: torch.tensor(0.5),
    "object": lambda x: object(),
}

DTYPE: dict[str, Make] = {
    **odd.OBJECTS,
    "None": lambda x: None,
    "str": lambda x: "float16",
    "int64": lambda x: torch.int64,
    "float64": lambda x: torch.float64,
    "complex64": lambda x: torch.complex64,
    "float": lambda x: float,
    "numpy": lambda x: np.float16,
    "int": lambda x: 3,
    "tensor": lambda x: torch.zeros(1),
}

VERSION: dict[str, Make] = {
    **odd.OBJECTS,
    "1": lambda x: 1,
    "4": lambda x: 4,
    "str": lambda x: "3",
    "bool": lambda x: True,
    "fraction": lambda x: 2.5,
    "nan": lambda x: math.nan,
    "list": lambda x: [3],
    "two numbers": lambda x: torch.tensor([2, 3]),
}

WORD: dict[str, Make] = {
    **odd.OBJECTS,
    "unknown": lambda x: "XYZ",
    "small": lambda x: str(x).swapcase(),
    "empty": lambda x: "",
    "None": lambda x: None,
    "int": lambda x: 3,
    "bool": lambda x: True,
    "bytes": lambda x: str(x).encode(),
    "list": lambda x: [x],
    "tensor": lambda x: torch.zeros(2),
}

MASK: dict[str, Make] = {
    **odd.TENSORS,
    "int32": lambda x: x.to(torch.int32),
    "complex": lambda x: x.to(torch.complex64),
    "another shape": lambda x: x[..., :-1],
    "5d": lambda x: x[None],
    "sparse": lambda x: x.float().to_sparse(),
    "meta": lambda x: x.to("meta"),
    "quantised": lambda x: _quantised(x),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "str": lambda x: "causal",
    "list": lambda x: x.tolist(),
    "bool": lambda x: True,
    "int": lambda x: 3,
    "numpy": lambda x: x.numpy(),
    "object": lambda x: object(),
}

# An argument that must be None, as nothing here has it.
NOTHING: dict[str, Make] = {
    **odd.OBJECTS,
    "tensor": lambda x: torch.ones(4),
    "meta": lambda x: torch.ones(4, device="meta"),
    "sparse": lambda x: torch.ones(4).to_sparse(),
    "int": lambda x: 3,
    "bool": lambda x: True,
    "False": lambda x: False,
    "0": lambda x: 0,
    "str": lambda x: "x",
    "list": lambda x: [1.0],
    "object": lambda x: object(),
}

Q_SCALE: dict[str, Make] = {
    **{
        n: f
        for n, f in SCALE.items()
        if n not in ("int", "numpy", "Fraction", "Decimal", "tensor", "nan tensor")
    },
    "another shape": lambda x: torch.ones(7),
    "complex tensor": lambda x: torch.ones(1, dtype=torch.complex64),
}

# lse of merge_states, [batch, heads, seqlen].
LSE: dict[str, Make] = {
    **odd.TENSORS,
    **_NO_TENSORS,
    **{n: f for n, f in _TENSORS.items() if n not in ("nested strided", "nested jagged")},
    "float16": lambda x: x.to(torch.float16),
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "another batch": lambda x: x[:1],
    "as out": lambda x: x.transpose(1, 2),
}

OUT: dict[str, Make] = {
    **odd.TENSORS,
    **_NO_TENSORS,
    **_TENSORS,
    "another batch": lambda x: x[:1],
    "another head_dim": lambda x: x[..., :8],
}


def _without(kind: dict[str, Make], *names: str) -> dict[str, Make]:
    """For tensors of fewer dimensions: those values that these can have."""
    return {name: make for name, make in kind.items() if not name.startswith(names)}


# Of rms_norm_rope: the norm's weight [n], and angles [positions, head_dim].
WEIGHT: dict[str, Make] = {
    **_without(odd.TENSORS, "transposed", "none in the second", "none in the third", "2^"),
    **_NO_TENSORS,
    **_without(_TENSORS, "nested"),
    "float64": lambda x: x.double(),
    "too many": lambda x: torch.cat((x, x)),
    "too few": lambda x: x[:-1],
}
TABLE: dict[str, Make] = {
    **_without(odd.TENSORS, "none in the third"),
    **_NO_TENSORS,
    **_without(_TENSORS, "nested"),
    "half": lambda x: x.half(),
    "another head_dim": lambda x: x[:, :8],
    "too few": lambda x: x[:2],
}
# Sizes of each sample, [batch, 3].
GRIDS: dict[str, Make] = {
    **{n: f for n, f in _INTEGER_TENSORS.items() if n not in ("2d tensor", "every other number")},
    "2^62 expanded": lambda x: x[:1].expand(1 << 60, 3),
    "named": lambda x: x.rename("A", "B"),
    "1d tensor": lambda x: x[0],
    "3d tensor": lambda x: x[None],
    "turned": lambda x: x.t(),
    "too many": lambda x: torch.cat((x, x)),
    "too few": lambda x: x[:1],
    "two sizes": lambda x: x[:, :2],
    "four sizes": lambda x: torch.cat((x, x), 1)[:, :4],
    "None": lambda x: None,
    "list": lambda x: x.tolist(),
    "list of tuples": lambda x: [tuple(n) for n in x.tolist()],
    "list of tensors": lambda x: list(x),
    "list of numpy's": lambda x: [n.numpy() for n in x],
    "numpy": lambda x: x.numpy(),
    "flat list": lambda x: [1, 2, 2],
    "empty list": lambda x: [],
    "list of empty": lambda x: [[], []],
    "list of fractions": lambda x: [[1.5, 2, 2], [1, 1, 1]],
    "list of whole floats": lambda x: [[1.0, 2, 2], [1, 1, 1]],
    "list of bools": lambda x: [[True, True, True], [1, 1, 1]],
    "list of NaN": lambda x: [[math.nan, 2, 2], [1, 1, 1]],
    "list of None": lambda x: [None, None],
    "list of str": lambda x: ["122", "111"],
    "list of sets": lambda x: [{1, 2, 3}, {1, 2, 3}],
    "list of Raising": lambda x: [odd.Raising(), odd.Raising()],
    "list of itself": lambda x: odd.list_of_itself(),
    "list beyond 64 bit": lambda x: [[HUGE, 1, 1], [1, 1, 1]],
    "list negative": lambda x: [[-1, 1, 1], [1, 1, 1]],
    "list too large": lambda x: [[1, 1, 1], [1, 1, 1000]],
    "list too long": lambda x: [[1, 1, 1]] * 3,
    "endless": lambda x: odd.Endless([[1, 1, 1], [1, 1, 1]]),
    "str": lambda x: "12",
    "bytes": lambda x: b"\1\2",
    "set": lambda x: {(1, 1, 1), (2, 1, 1)},
    "dict": lambda x: {0: [1, 1, 1], 1: [1, 1, 1]},
    "generator": lambda x: ([1, 1, 1] for _ in range(2)),
    "int": lambda x: 2,
    "float": lambda x: 2.5,
    "bool": lambda x: True,
    "object": lambda x: object(),
}
EPS: dict[str, Make] = {**SCALE, "negative": lambda x: -1e-6, "None": lambda x: None}
# A dtype that may be left out: then it is that of another operand.
OUT_DTYPE = _without(DTYPE, "None")

MODEL: dict[str, Make] = {
    **odd.OBJECTS,
    "None": lambda x: None,
    "str": lambda x: "model",
    "int": lambda x: 3,
    "bool": lambda x: True,
    "list": lambda x: [torch.nn.Linear(2, 2)],
    "dict": lambda x: {"transformer": torch.nn.Linear(2, 2)},
    "tensor": lambda x: torch.zeros(2),
    "class": lambda x: torch.nn.Linear,
    "another model": lambda x: torch.nn.Linear(2, 2),
    "object": lambda x: object(),
    "function": lambda x: lambda y: y,
}
