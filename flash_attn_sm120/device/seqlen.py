"""Where a sequence lies and how long it is, for each way of giving lengths."""

from __future__ import annotations

from dataclasses import dataclass

from cutlass import Int32, Int64, cute, cutlass_dsl


def clamp(value, low, high):
    return cutlass_dsl.max(low, cutlass_dsl.min(value, high))


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


def head_address(tensor: cute.Tensor, seq: Sequence, head: Int32, packed: bool) -> tuple[Int64, Int32]:
    """(byte address of the sequence's first row of a head, bytes from row to row, which 31 bits hold)."""
    element = tensor.element_type.width // 8
    row_stride = Int64(tensor.stride[0 if packed else 1])
    head_stride = Int64(tensor.stride[1 if packed else 2])
    offset = Int64(seq.start) * row_stride + Int64(head) * head_stride
    if not packed:
        offset = offset + Int64(seq.batch) * Int64(tensor.stride[0])
    return tensor.iterator.toint() + offset * element, Int32(row_stride) * element
