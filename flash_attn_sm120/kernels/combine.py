"""Brings the parts of a split decode together: out = sum of exp(lse_s - lse) out_s, lse = log of the sum of exp(lse_s).

One block a row (token and head); its warps share out the parts. A part whose lse is -inf is empty and isn't read.
"""

from __future__ import annotations

import operator

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.parts import LaneColumns, add_parts, part_weights
from flash_attn_sm120.device.ptx import (
    PTX_DTYPE,
    load_global_v4_f32_if,
    load_shared_f32,
    pack_pair,
    store_global_v2,
    store_global_v4_f32,
    store_shared_f32,
)
from flash_attn_sm120.device.seqlen import clamp
from flash_attn_sm120.device.softmax import NEG_INF, tree_reduce
from flash_attn_sm120.dispatch import MAX_PARTS
from flash_attn_sm120.problem import CombineProblem

WARPS = 4


@cute.jit
def is_used(token: Int32, cu_seqlens: cute.Tensor, seqused: cute.Tensor) -> cutlass.Boolean:
    """Whether a packed row is one of those that its sequence uses. A warp looks at 32 sequences at a time."""
    lane, batch, found = cute.arch.lane_idx(), seqused.shape[0], cutlass.Boolean(False)
    for first in cutlass.range(0, batch, 32, unroll=1):
        index, here = first + lane, cutlass.Boolean(False)
        if index < batch:
            start = cu_seqlens[index]
            here = (token >= start) & (token < cutlass.min(cu_seqlens[index + 1], start + seqused[index]))
        found = found | cute.arch.vote_any_sync(here)
    return found


class FlashAttentionCombine:
    """One launch combines all rows."""

    def __init__(self, problem: CombineProblem):
        self.problem = problem
        self.dtype = PTX_DTYPE[problem.dtype]
        self.turns = -(-problem.head_dim_v // 128)  # of 4 columns a lane

    @cute.jit
    def __call__(
        self,
        mPartial: cute.Tensor,
        mLSEPartial: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        mCuSeqlensQ: cute.Tensor | None,
        mSeqused: cute.Tensor | None,
        mSink: cute.Tensor | None,
        stream,
    ):
        """partial (num_splits, *out.shape) float32, lse_partial (num_splits, *lse.shape); out (batch, seqlen_q, heads,
        d_v), lse (batch, heads, seqlen_q), or (total_q, heads, d_v), (heads, total_q). Packed rows from
        cu_seqlens_q[-1] on are left alone; those of a sequence from seqused on become 0. `stream` stays last."""
        rows = mO.shape[-2] * mO.shape[-3] * (1 if self.problem.packed else mO.shape[0])
        self.kernel(mPartial, mLSEPartial, mO, mLSE, mCuSeqlensQ, mSeqused, mSink).launch(
            grid=(rows, 1, 1), block=(32 * WARPS, 1, 1), smem=WARPS * self.turns * 512, stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mPartial: cute.Tensor,
        mLSEPartial: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        mCuSeqlensQ: cute.Tensor | None,
        mSeqused: cute.Tensor | None,
        mSink: cute.Tensor | None,
    ):
        row, _, _ = cute.arch.block_idx()
        heads = mO.shape[-2]
        token = row // heads
        head = row - token * heads
        batch, exists, used = Int32(0), cutlass.Boolean(True), cutlass.Boolean(True)
        if cutlass.const_expr(not self.problem.packed):
            batch = token // mO.shape[1]
            token = token - batch * mO.shape[1]
            if cutlass.const_expr(mSeqused is not None):
                used = token < mSeqused[batch]
        elif cutlass.const_expr(mCuSeqlensQ is not None):
            exists = token < clamp(mCuSeqlensQ[mCuSeqlensQ.shape[0] - 1], Int32(0), mO.shape[0])
            if cutlass.const_expr(mSeqused is not None):
                used = is_used(token, mCuSeqlensQ, mSeqused)
        if exists:
            sink = None
            if cutlass.const_expr(mSink is not None):
                sink = cutlass.select_(used, Float32(mSink[head]), Float32(NEG_INF))
            self.row(mPartial, mLSEPartial, mO, mLSE, batch, token, head, used, sink)

    def place(self, strides: tuple, batch: Int32, first: Int32, second: Int32) -> Int64:
        """Elements to (batch, first, second), or to (first, second) where rows are packed."""
        indices = (first, second) if self.problem.packed else (batch, first, second)
        return sum(
            (Int64(index) * Int64(stride) for index, stride in zip(indices, strides, strict=False)), start=Int64(0)
        )

    @cute.jit
    def row(
        self,
        mPartial: cute.Tensor,
        mLSEPartial: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        batch: Int32,
        token: Int32,
        head: Int32,
        used: cutlass.Boolean,
        sink: Float32 | None,
    ):
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
        num_splits = mPartial.shape[0]
        lses = self.lses(mLSEPartial, self.place(mLSEPartial.stride[1:], batch, head, token), lane)
        lses = [cutlass.select_(used, lse, Float32(NEG_INF)) for lse in lses]
        weights, lse = part_weights(lses, sink)
        columns = LaneColumns(self.problem.head_dim_v, lane)
        sums = cute.make_rmem_tensor((4 * self.turns,), Float32)
        sums.fill(0.0)
        offset = self.place(mPartial.stride[1:], batch, token, head) * 4
        address = mPartial.iterator.toint() + offset
        for group in cutlass.range_constexpr(MAX_PARTS // 32):
            if group * 32 < num_splits:
                self.add_group(sums, address, Int64(mPartial.stride[0]) * 4, 32 * group + warp, weights[group], columns)
        shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=16).toint()
        for turn in cutlass.range_constexpr(self.turns):
            own = shared + (warp * self.turns + turn) * 512 + lane * 16
            store_shared_f32(own, [sums[4 * turn + i] for i in range(4)])
        cute.arch.sync_threads()
        col = warp * 128 + lane * 4
        if (warp < self.turns) & (col < self.problem.head_dim_v):
            parts = [load_shared_f32(shared + (w * self.turns + warp) * 512 + lane * 16, 4) for w in range(WARPS)]
            total = [tree_reduce([part[i] for part in parts], operator.add) for i in range(4)]
            self.store(mO, self.place(mO.stride, batch, token, head) + Int64(col), total)
        if cutlass.const_expr(mLSE is not None):
            is_writer = (warp == 0) & (lane == 0)
            if is_writer:
                where = mLSE.iterator + self.place(mLSE.stride, batch, head, token)
                cute.make_tensor(where, cute.make_layout(1))[0] = lse

    @cute.jit
    def lses(self, mLSEPartial: cute.Tensor, offset: Int64, lane: Int32) -> list:
        """Of part lane, lane + 32, ..."""
        values = []
        for group in cutlass.range_constexpr(MAX_PARTS // 32):
            split, value = Int32(32 * group + lane), Float32(NEG_INF)
            if split < mLSEPartial.shape[0]:
                where = mLSEPartial.iterator + (offset + Int64(split) * Int64(mLSEPartial.stride[0]))
                value = cute.make_tensor(where, cute.make_layout(1))[0]
            values.append(value)
        return values

    def add_group(
        self, sums, address: Int64, step: Int64, first: Int32, weights: Float32, columns: LaneColumns
    ) -> None:
        """Adds every WARPS-th of 32 parts, from the warp's `first` on; all are loaded before the first sum."""
        own = [cute.arch.shuffle_sync(weights, (first + i) % 32) for i in range(0, 32, WARPS)]
        loaded = []
        for i, weight in enumerate(own):
            place, is_there = address + Int64(first + i * WARPS) * step, Int32(weight != 0.0)
            loaded.append([load_global_v4_f32_if(place + Int64(col * 4), is_there) for col in columns.within])
        add_parts(sums, loaded, own)

    def store(self, mO: cute.Tensor, offset: Int64, values: list[Float32]) -> None:
        address = mO.iterator.toint() + offset * (mO.element_type.width // 8)
        if self.problem.dtype == "float32":
            store_global_v4_f32(address, values)
        else:
            store_global_v2(address, [pack_pair(*values[i : i + 2], self.dtype) for i in (0, 2)])
