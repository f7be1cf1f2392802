"""Calling a mask_mod: the vectors that it takes, what it is told of a sequence, and what it may return."""

from __future__ import annotations

from typing import Any, NamedTuple

from cutlass import Boolean, Int32, cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import vector as vector_dialect

from flash_attn_sm120.checks import describe, refuse
from flash_attn_sm120.problem import Mod


class SeqlenInfo(NamedTuple):
    """What a mod is told of the sequence: rows of its queries and keys, and where they start in a packed batch, else 0.

    Int32 each."""

    seqlen_q: Int32
    seqlen_k: Int32
    offset_q: Int32
    offset_k: Int32


def vector(values: list, dtype: type) -> cute.TensorSSA:
    """Scalars of a dtype -> TensorSSA of shape (len(values),)."""
    kind = ir.VectorType.get([len(values)], dtype.mlir_type)
    elements = vector_dialect.from_elements(kind, [dtype(value).ir_value() for value in values])
    return cute.TensorSSA(elements, (len(values),), dtype)


def call_mask_mod(
    mod: Mod, batch: Int32, head: Int32, q_idx: Int32, kv_indices: list[Int32], info: SeqlenInfo, aux: tuple
) -> list[Boolean]:
    """Whether the row sees each of the columns; mod.width of them, neighbours.

    aux: the caller's tensors, then the scalars. Raises TypeError and ValueError, while a kernel is compiled, for what a
    mask_mod mustn't return."""
    width = len(kv_indices)
    batch, head, q_idx = (vector([value] * width, Int32) for value in (batch, head, q_idx))
    return visible(mod.function(batch, head, q_idx, vector(kv_indices, Int32), info, aux), width)


def visible(result: Any, width: int) -> list[Boolean]:
    """What a mask_mod returned as a Boolean for each column; one stands for all."""
    expected = f"a vector of {width} Booleans, or one Boolean, from the function"
    if isinstance(result, cute.TensorSSA):
        if result.dtype is not Boolean:
            refuse("mask_mod", expected, f"a vector of {result.dtype.__name__}", TypeError)
        count = cute.size(result.shape)
        if count not in (1, width):
            refuse("mask_mod", expected, f"a vector of {count}")
        return [Boolean(result[i if count == width else 0]) for i in range(width)]
    if not isinstance(result, (bool, Boolean)):
        refuse("mask_mod", expected, describe(result), TypeError)
    return [Boolean(result)] * width
