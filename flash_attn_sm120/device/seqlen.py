"""Where a sequence lies and how long it is, for each way of giving lengths."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, cute, cutlass_dsl

from flash_attn_sm120.problem import AttentionProblem


def clamp(value, low, high):
    return cutlass_dsl.max(low, cutlass_dsl.min(value, high))


def divide(value: Int32, divisor) -> Int32:
    """value // divisor for value >= 0, divisor > 0."""
    if isinstance(divisor, int) and divisor & (divisor - 1) == 0:
        return value >> (divisor.bit_length() - 1)
    return Int32(cutlass.Uint32(value) // cutlass.Uint32(divisor))


@dataclass(frozen=True)
class Sequence:
    """Rows of one tensor (q, or k and v) that belong to one batch entry.

    start: first row, in a packed tensor; 0 otherwise.
    batch: index of the leading dimension; 0 in a packed tensor.
    length: rows that take part. room: rows that the sequence has, length <= room.
    """

    start: Int32
    batch: Int32
    length: Int32
    room: Int32


def sequence(
    tensor: cute.Tensor, batch: Int32, cu_seqlens: cute.Tensor | None, seqused: cute.Tensor | None
) -> Sequence:
    """tensor (batch, seqlen, heads, d), or (total, heads, d) with cu_seqlens (batch + 1,); seqused (batch,).

    Lengths are clamped so that whatever the two hold, no row outside the tensor is named.
    """
    if cu_seqlens is None:
        start, index, room = Int32(0), batch, tensor.shape[1]
    else:
        total = tensor.shape[0]
        start, index = clamp(cu_seqlens[batch], Int32(0), total), Int32(0)
        room = clamp(cu_seqlens[batch + 1], start, total) - start
    length = room if seqused is None else clamp(seqused[batch], Int32(0), room)
    return Sequence(start, index, length, room)


def key_sequence(problem: AttentionProblem, mK: cute.Tensor, batch: Int32, lengths) -> Sequence:
    """The keys of a sequence. mK as sequence() takes it, or a pool (num_pages, page_size, heads_kv, d)."""
    if not problem.page_size:
        return sequence(mK, batch, lengths.cu_seqlens_k, lengths.seqused_k)
    room = lengths.page_table.shape[1] * problem.page_size
    length = room if lengths.seqused_k is None else clamp(lengths.seqused_k[batch], Int32(0), room)
    return Sequence(Int32(0), Int32(0), length, room)


def sequences(
    problem: AttentionProblem, mQ: cute.Tensor, mK: cute.Tensor, lengths, batch: Int32
) -> tuple[Sequence, Sequence, Int32]:
    """(queries, keys, keys of all context-parallel ranks) of a batch entry."""
    seq_q = sequence(mQ, batch, lengths.cu_seqlens_q, lengths.seqused_q)
    seq_k = key_sequence(problem, mK, batch, lengths)
    total_k = seq_k.length
    if problem.context_parallel:
        total_k = cutlass.max(lengths.cp_tot_seqused_k[batch], Int32(0))
    return seq_q, seq_k, total_k


def head_address(tensor: cute.Tensor, seq: Sequence, head: Int32, packed: bool) -> tuple[Int64, Int32]:
    """(byte address of the sequence's first row of a head, bytes from row to row, which 31 bits hold)."""
    element = tensor.element_type.width // 8
    row_stride = Int64(tensor.stride[0 if packed else 1])
    head_stride = Int64(tensor.stride[1 if packed else 2])
    offset = Int64(seq.start) * row_stride + Int64(head) * head_stride
    if not packed:
        offset = offset + Int64(seq.batch) * Int64(tensor.stride[0])
    return tensor.iterator.toint() + offset * element, Int32(row_stride) * element
