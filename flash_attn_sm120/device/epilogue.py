"""From a warp's accumulators to out and lse in global memory."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.ptx import load_shared_v4, pack_pair, store_global_v4, store_shared_b32
from flash_attn_sm120.device.tile import VECTOR, TileLayout
from flash_attn_sm120.problem import ELEMENT_BYTES


def stage_output(layout: TileLayout, shared: Int32, tOrO, factors: list[Float32], lane: Int32, dtype: str) -> None:
    """Normalises a warp's O, rounds it and puts it into its rows of a shared tile (`shared`: the warp's first row)."""
    group, quad = lane // 4, lane % 4
    for m in range(tOrO.shape[0]):
        for n in range(tOrO.shape[1]):
            chunk, col = divmod(8 * n, layout.chunk_cols)
            for half in range(2):
                factor = factors[2 * m + half]
                pair = pack_pair(tOrO[m, n, 2 * half] * factor, tOrO[m, n, 2 * half + 1] * factor, dtype)
                row = 8 * half + group
                offset = layout.unit_offset(row, Int32(col // VECTOR)) + 4 * quad
                store_shared_b32(shared + chunk * layout.chunk_bytes + 16 * m * layout.row_bytes + offset, pair)


@cute.jit
def store_output(
    layout: cutlass.Constexpr,
    shared: Int32,
    rows: cutlass.Constexpr,
    glob: Int64,
    row_stride: Int32,
    lane: Int32,
    rows_left: Int32,
    cols: cutlass.Constexpr,
) -> None:
    """A warp writes its `rows` staged rows in 16-byte pieces, but none from row rows_left or column cols on."""
    unit, first_row = lane % layout.units, lane // layout.units
    rows_a_pass = 32 // layout.units
    for chunk in cutlass.range_constexpr(layout.chunks):
        for step in cutlass.range_constexpr(rows // rows_a_pass):
            row = first_row + step * rows_a_pass
            col = chunk * layout.chunk_cols + unit * VECTOR
            if row < rows_left and col < cols:
                values = load_shared_v4(shared + chunk * layout.chunk_bytes + layout.unit_offset(row, unit))
                store_global_v4(glob + Int64(row) * Int64(row_stride) + Int64(col * ELEMENT_BYTES), values)


def transposed(words: list[Int32], quad: Int32) -> list[Int32]:
    """Of a 4 x 4 matrix whose column c lane c of each four lanes holds: the lane's row."""
    odd, high = quad % 2 == 1, quad >= 2
    pairs = []  # of rows 0 or 1, then of rows 2 or 3, as the lane is even or odd; from the even and the odd neighbour
    for even_word, odd_word in (words[:2], words[2:]):
        got = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, even_word, odd_word), offset=1)
        pairs.append([cutlass.select_(odd, got, even_word), cutlass.select_(odd, odd_word, got)])
    low_pair, high_pair = pairs
    own = [cutlass.select_(high, b, a) for a, b in zip(low_pair, high_pair, strict=True)]
    other = [cutlass.select_(high, a, b) for a, b in zip(low_pair, high_pair, strict=True)]
    got = [cute.arch.shuffle_sync_bfly(word, offset=2) for word in other]
    left = [cutlass.select_(high, theirs, mine) for mine, theirs in zip(own, got, strict=True)]
    right = [cutlass.select_(high, mine, theirs) for mine, theirs in zip(own, got, strict=True)]
    return left + right


@cute.jit
def store_transposed(
    tOrO: cute.Tensor,
    factors: list,
    glob: Int64,
    row_stride: Int32,
    lane: Int32,
    rows_left: Int32,
    dtype: cutlass.Constexpr,
) -> None:
    """Normalises a warp's O, rounds it and writes it in 16-byte pieces that four lanes exchange for, but no row from
    rows_left on. glob: of the warp's first row. Takes no shared memory; O has a multiple of 32 columns."""
    group, quad = lane // 4, lane % 4
    for m in cutlass.range_constexpr(tOrO.shape[0]):
        for half in cutlass.range_constexpr(2):
            row, factor = 16 * m + 8 * half + group, factors[2 * m + half]
            address = glob + Int64(row) * Int64(row_stride) + Int64(quad * 16)
            for n in cutlass.range_constexpr(0, tOrO.shape[1], 4):
                values = [[tOrO[m, n + j, 2 * half + i] * factor for i in range(2)] for j in range(4)]
                words = transposed([pack_pair(low, high, dtype) for low, high in values], quad)
                if row < rows_left:
                    store_global_v4(address + n * 8 * ELEMENT_BYTES, words)


@cute.jit
def store_lse(
    mLSE: cute.Tensor,
    packed: cutlass.Constexpr,
    head: Int32,
    batch: Int32,
    start: Int32,
    first_row: Int32,
    lses: list,
    lane: Int32,
    rows_left: Int32,
) -> None:
    """mLSE (batch, heads, seqlen_q), or (heads, total_q) when packed. lses: the thread's rows, 8 apart; four lanes hold
    the same rows and the first of them writes."""
    group = lane // 4
    if cutlass.const_expr(packed):
        offset = Int64(head) * Int64(mLSE.stride[0]) + Int64(start)
    else:
        offset = Int64(batch) * Int64(mLSE.stride[0]) + Int64(head) * Int64(mLSE.stride[1])
    offset = offset + Int64(first_row + group)
    if lane % 4 == 0:
        for r in cutlass.range_constexpr(len(lses)):
            if 8 * r + group < rows_left:
                cute.make_tensor(mLSE.iterator + (offset + 8 * r), cute.make_layout(1))[0] = lses[r]
