"""Sorts the blocks of a mask: those that a mask_mod lets through in full, those in part, and the rest, which drop out.

One thread block a row of blocks. Its warps look at neighbouring blocks side by side, each until it has seen both a True
and a False; then the first warp appends what was found, in order. Nothing of the size of the mask is ever stored.
"""

from __future__ import annotations

import cutlass
from cutlass import Boolean, Int32, cute

from flash_attn_sm120.arguments import Lengths, SeqlenInfo
from flash_attn_sm120.device.mods import call_mask_mod
from flash_attn_sm120.device.seqlen import clamp
from flash_attn_sm120.problem import ClassifyProblem

WARPS = 8
VECTORS = 4  # of columns that a lane looks at between two votes
SOME_TRUE, SOME_FALSE = 1, 2  # bits of what a warp has found; SOME_TRUE alone is a full block


def extent(
    batch: Int32, room: Int32, cu_seqlens: cute.Tensor | None, seqused: cute.Tensor | None
) -> tuple[Int32, Int32]:
    """(first row in a packed batch, or 0; rows that take part, at most `room`)."""
    start = Int32(0)
    if cu_seqlens is not None:
        start = cu_seqlens[batch]
        room = clamp(cu_seqlens[batch + 1] - start, Int32(0), room)
    return start, room if seqused is None else clamp(seqused[batch], Int32(0), room)


class ClassifyBlocks:
    """One launch sorts all blocks."""

    def __init__(self, problem: ClassifyProblem):
        self.problem = problem
        self.rows, self.cols = problem.block_size
        self.width = problem.mask_mod.width
        self.vectors_a_row = -(-self.cols // self.width)

    @cute.jit
    def __call__(
        self,
        mMaskCnt: cute.Tensor,
        mMaskIdx: cute.Tensor,
        mFullCnt: cute.Tensor,
        mFullIdx: cute.Tensor,
        lengths: Lengths,
        aux: tuple,
        seqlen_q: Int32,
        seqlen_k: Int32,
        stream,
    ):
        """cnt (batch, heads, m_blocks), idx (batch, heads, m_blocks, n_blocks), int32; idx beyond cnt isn't written.
        seqlen_q, seqlen_k: of every sequence, or the most that one has. `stream` stays last."""
        blocks = mMaskCnt.shape[0] * mMaskCnt.shape[1] * mMaskCnt.shape[2]
        self.kernel(mMaskCnt, mMaskIdx, mFullCnt, mFullIdx, lengths, aux, seqlen_q, seqlen_k).launch(
            grid=(blocks, 1, 1), block=(32 * WARPS, 1, 1), smem=2 * WARPS * 4, stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mMaskCnt: cute.Tensor,
        mMaskIdx: cute.Tensor,
        mFullCnt: cute.Tensor,
        mFullIdx: cute.Tensor,
        lengths: Lengths,
        aux: tuple,
        seqlen_q: Int32,
        seqlen_k: Int32,
    ):
        block, _, _ = cute.arch.block_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
        row_of_blocks = block // mMaskCnt.shape[2]
        m_block = block - row_of_blocks * mMaskCnt.shape[2]
        batch = row_of_blocks // mMaskCnt.shape[1]
        head = row_of_blocks - batch * mMaskCnt.shape[1]
        offset_q, seqlen_q = extent(batch, seqlen_q, lengths.cu_seqlens_q, lengths.seqused_q)
        offset_k, seqlen_k = extent(batch, seqlen_k, lengths.cu_seqlens_k, lengths.seqused_k)
        info = SeqlenInfo(seqlen_q, seqlen_k, offset_q, offset_k)
        # Two sets of findings, so that one barrier a turn is enough.
        sFound = cute.make_tensor(cute.arch.get_dyn_smem(Int32, alignment=16), cute.make_layout((WARPS, 2)))
        n_blocks = Int32(0)
        if m_block * self.rows < seqlen_q:
            n_blocks = cute.ceil_div(seqlen_k, self.cols)
        partly, fully = Int32(0), Int32(0)  # blocks in the lists so far
        for turn in cutlass.range(cute.ceil_div(n_blocks, WARPS), unroll=1):
            n_block = turn * WARPS + warp
            found = Int32(0)
            if n_block < n_blocks:
                found = self.look(batch, head, m_block, n_block, info, aux, lane)
            if lane == 0:
                sFound[warp, turn & 1] = found
            cute.arch.sync_threads()
            if warp == 0:
                place = (batch, head, m_block)
                own = Int32(0)
                if lane < WARPS:
                    own = sFound[lane, turn & 1]
                n_block = turn * WARPS + lane
                partly += self.append(mMaskIdx, place, partly, n_block, own == SOME_TRUE | SOME_FALSE, lane)
                fully += self.append(mFullIdx, place, fully, n_block, own == SOME_TRUE, lane)
        if (warp == 0) & (lane == 0):
            mMaskCnt[batch, head, m_block] = partly
            mFullCnt[batch, head, m_block] = fully

    @cute.jit
    def append(self, mIdx: cute.Tensor, place: tuple, count: Int32, n_block: Int32, belongs: Boolean, lane: Int32):
        """The lanes' blocks that belong to the list go behind its `count` first; returns how many they are."""
        lanes = cute.arch.vote_ballot_sync(belongs)
        if belongs:
            mIdx[(*place, count + cute.arch.popc(lanes & ((1 << lane) - 1)))] = n_block
        return cute.arch.popc(lanes)

    @cute.jit
    def look(
        self, batch: Int32, head: Int32, m_block: Int32, n_block: Int32, info: SeqlenInfo, aux: tuple, lane: Int32
    ) -> Int32:
        """SOME_TRUE and SOME_FALSE of the block's elements that exist; the warp stops once it has seen both."""
        first_row, first_col = m_block * self.rows, n_block * self.cols
        rows = cutlass.min(info.seqlen_q - first_row, self.rows)
        cols = cutlass.min(info.seqlen_k - first_col, self.cols)
        some_true, some_false, unit = Boolean(False), Boolean(False), lane
        vectors, is_open = rows * self.vectors_a_row, Boolean(True)
        while is_open:
            for _ in cutlass.range_constexpr(VECTORS):
                row = unit // self.vectors_a_row
                col = (unit - row * self.vectors_a_row) * self.width
                q_idx = cutlass.min(first_row + row, info.seqlen_q - 1)
                kv_indices = [cutlass.min(first_col + col + i, info.seqlen_k - 1) for i in range(self.width)]
                seen = call_mask_mod(self.problem.mask_mod, batch, head, q_idx, kv_indices, info, aux)
                for i in cutlass.range_constexpr(self.width):
                    exists = (row < rows) & (col + i < cols)
                    some_true = some_true | (exists & seen[i])
                    some_false = some_false | (exists & ~seen[i])
                unit += 32
            some_true, some_false = cute.arch.vote_any_sync(some_true), cute.arch.vote_any_sync(some_false)
            is_open = (unit - lane < vectors) & ~(some_true & some_false)
        return Int32(some_true) * SOME_TRUE + Int32(some_false) * SOME_FALSE
