"""What mods are made of: how one is finished, how its arguments are checked, and column numbers."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

from cutlass import Float32, cute

from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.device.mods import vector

VEC_SIZES = (1, 2, 4, 8)


def finished(function: Any, in_torch: Callable | None, vec_size: int, bias: Callable | None = None) -> Callable:
    """The function with the attributes that a kernel (__vec_size__, bias) and the reference (in_torch) look for. bias:
    see Mod."""
    if type(vec_size) is not int or vec_size not in VEC_SIZES:
        refuse("vec_size", f"one of {VEC_SIZES}", describe(vec_size))
    function.__vec_size__ = vec_size
    if in_torch is not None:
        function.in_torch = in_torch
    if bias is not None:
        function.bias = (function, bias)
    return function


def index_of(name: str, value: Any, least: int = 0) -> int:
    """A whole number >= least."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        refuse(name, f"an int >= {least}", describe(value), TypeError)
    if whole < least:
        refuse(name, f"an int >= {least}", whole)
    return whole


def positive(name: str, value: Any) -> float:
    """A finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        refuse(name, "a finite number > 0", describe(value), TypeError)
    if not 0.0 < float(value) < math.inf:
        refuse(name, "a finite number > 0", value)
    return float(value)


def column_numbers(kv_idx: cute.TensorSSA, vec_size: int) -> cute.TensorSSA:
    """kv_idx in Float32, with one conversion for the two columns of a pair, as those are slow."""
    columns = []
    for i in range(0, vec_size, 2):
        columns.append(Float32(kv_idx[i]))
        if vec_size > 1:
            columns.append(columns[-1] + 1.0)
    return vector(columns, Float32)


def shift(seqlen_info: Any) -> Any:
    """Position of row 0: the last row stands at the last column."""
    return seqlen_info.seqlen_k - seqlen_info.seqlen_q
