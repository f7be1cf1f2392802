"""Ready-made mask mods: mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors) -> keep.

Every function here makes a mod; its attribute in_torch is the same in PyTorch, the mod itself where its arithmetic
runs on torch tensors as it is. Positions are those of keys: row i stands at i + seqlen_k - seqlen_q, the last row at
the last column.
vec_size: elements of a row that one call of the mod takes, 1, 2, 4 or 8; the results are the same, and more of them
share what they need. aux: the place of the mod's tensor or number in aux_tensors. both(...) and either(...) join mods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cutlass
from cutlass import Boolean, Int32

from flash_attn_sm120.checks import check_flag, describe, refuse
from flash_attn_sm120.device.mods import vector
from flash_attn_sm120.mods.parts import finished, index_of, shift


def causal(*, vec_size: int = 1) -> Callable:
    """A row sees the columns up to its own position."""

    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return kv_idx <= q_idx + shift(seqlen_info)

    return finished(mask_mod, mask_mod, vec_size)


def sliding_window(left: int | None, right: int | None, *, vec_size: int = 1) -> Callable:
    """A row sees the columns from its position - left to its position + right, both included; None: no bound there.

    Source: Beltagy et al., "Longformer" (2020).
    """
    left = None if left is None else index_of("left", left)
    right = None if right is None else index_of("right", right)
    if left is None and right is None:
        refuse("left, right", "at least one int", "None and None")

    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        position = q_idx + shift(seqlen_info)
        if right is None:
            return kv_idx >= position - left
        if left is None:
            return kv_idx <= position + right
        return (kv_idx >= position - left) & (kv_idx <= position + right)

    return finished(mask_mod, mask_mod, vec_size)


def prefix_lm(*, per_batch: bool = False, aux: int = 0, vec_size: int = 1) -> Callable:
    """A row sees the prefix, columns below its length, and the columns up to its own position.

    aux_tensors[aux]: the prefix's length, a number (from aux_scalars), or int32 (batch,) with per_batch.
    Source: Raffel et al., "Exploring the Limits of Transfer Learning" (2020).
    """
    check_flag("per_batch", per_batch)
    aux = index_of("aux", aux)

    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        prefix = Int32(aux_tensors[aux][batch[0]] if per_batch else aux_tensors[aux])
        # The later of two ends: one comparison an element, and what is before it once a row.
        return kv_idx <= cutlass.max(q_idx[0] + shift(seqlen_info), prefix - 1)

    def in_torch(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        prefix = aux_tensors[aux][batch] if per_batch else aux_tensors[aux]
        return (kv_idx < prefix) | (kv_idx <= q_idx + shift(seqlen_info))

    return finished(mask_mod, in_torch, vec_size)


def document(*, packed: bool = False, aux: int = 0, vec_size: int = 1) -> Callable:
    """A row sees the columns of its own document; rows before the first column see nothing.

    aux_tensors[aux]: ids, int32, the document of each key: (batch, seqlen_k), or (total_k,) with packed, for k that is
    packed by cu_seqlens_k. Documents needn't be contiguous; both(causal(), document()) for a language model.
    """
    check_flag("packed", packed)
    aux = index_of("aux", aux)

    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        ids = aux_tensors[aux]

        def of(column: Int32) -> Int32:
            return Int32(ids[seqlen_info.offset_k + column] if packed else ids[batch[0], column])

        position = q_idx[0] + shift(seqlen_info)
        own = of(cutlass.max(position, Int32(0)))
        return vector([(of(kv_idx[i]) == own) & (position >= 0) for i in range(vec_size)], Boolean)

    def in_torch(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        ids = aux_tensors[aux]
        start = seqlen_info.offset_k
        ids = ids[start : start + seqlen_info.seqlen_k] if packed else ids[batch]
        position = q_idx + shift(seqlen_info)
        if not seqlen_info.seqlen_k:
            return position == kv_idx  # no column, and no id of a row's position
        return (ids[kv_idx] == ids[position.clamp(min=0)]) & (position >= 0)

    return finished(mask_mod, in_torch, vec_size)


def dilated(step: int, *, vec_size: int = 1) -> Callable:
    """A row sees every step-th column, its own position among them, before and after it.

    Source: Child et al., "Generating Long Sequences with Sparse Transformers" (2019).
    """
    step = index_of("step", step, least=1)

    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return (q_idx + shift(seqlen_info) - kv_idx) % step == 0

    return finished(mask_mod, mask_mod, vec_size)


def dense(*, aux: int = 0, vec_size: int = 1) -> Callable:
    """The mask itself: a row sees the columns where it isn't 0.

    aux_tensors[aux]: bool or uint8 (batch or 1, heads or 1, seqlen_q, seqlen_k).
    """
    aux = index_of("aux", aux)

    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        mask = aux_tensors[aux]
        b, h = (cutlass.min(i, Int32(size) - 1) for i, size in zip((batch[0], head[0]), mask.shape[:2], strict=True))
        return vector([mask[b, h, q_idx[0], kv_idx[i]] != 0 for i in range(vec_size)], Boolean)

    def in_torch(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        mask = aux_tensors[aux]
        b, h = (i.clamp(max=size - 1) for i, size in zip((batch, head), mask.shape[:2], strict=True))
        return mask[b, h, q_idx, kv_idx] != 0

    return finished(mask_mod, in_torch, vec_size)


def both(first: Callable, second: Callable) -> Callable:
    """Columns that two mask mods keep. Their vec_size must agree; they share aux_tensors."""
    return _joined(first, second, lambda a, b: a & b)


def either(first: Callable, second: Callable) -> Callable:
    """Columns that one of two mask mods keeps, or both do. Their vec_size must agree; they share aux_tensors."""
    return _joined(first, second, lambda a, b: a | b)


def _joined(first: Callable, second: Callable, join: Callable[[Any, Any], Any]) -> Callable:
    for name, mod in (("first", first), ("second", second)):
        if not callable(mod):
            refuse(name, "a mask mod", describe(mod), TypeError)
    vec_size = getattr(first, "__vec_size__", 1)
    if getattr(second, "__vec_size__", 1) != vec_size:
        refuse("second", f"a mod of vec_size {vec_size} as first", getattr(second, "__vec_size__", 1))

    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        places = (batch, head, q_idx, kv_idx, seqlen_info, aux_tensors)
        return join(first(*places), second(*places))

    twins: list[Any] = [getattr(mod, "in_torch", None) for mod in (first, second)]
    if None in twins:
        return finished(mask_mod, None, vec_size)
    return finished(mask_mod, lambda *places: join(*(twin(*places) for twin in twins)), vec_size)
