"""Attention of two query groups over the same keys in one launch, as zigzag context parallelism asks for.

A thread block has strips of rows of both groups and of the heads of one KV head, whichever reach equally far, and
brings each KV block once for all of them. Idea: Meta, Llama 3 (2024), section 3.3.2 (all-gathered K and V, two chunks a
rank); Dao, FlashAttention-2 (2023), for the loop.
"""

from __future__ import annotations

from dataclasses import replace

import cutlass
from cutlass import Int32, cute

from flash_attn_sm120.arguments import GroupLengths, Numbers
from flash_attn_sm120.device.mainloop_strips import KeyLoader, StripTile
from flash_attn_sm120.device.seqlen import sequence
from flash_attn_sm120.device.softmax import in_base_2
from flash_attn_sm120.device.strips import find_place, most_blocks, strip_at, strip_of, way_over
from flash_attn_sm120.device.visible import starts_at_first
from flash_attn_sm120.kernels.forward import FlashAttentionForwardSm120


class FlashAttentionDualGroupSm120(FlashAttentionForwardSm120):
    """The layouts of the plain kernel; a tile's rows are its warps' strips."""

    name = "dual_group"  # in dispatch.py's tables

    @cute.jit
    def __call__(
        self,
        mQ0: cute.Tensor,
        mQ1: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO0: cute.Tensor,
        mO1: cute.Tensor,
        mLSE0: cute.Tensor,
        mLSE1: cute.Tensor,
        lengths: GroupLengths,
        mSink: cute.Tensor | None,
        numbers: Numbers,
        stream,
    ):
        """As arguments.DualGroupArguments describes them. `stream` stays last."""
        plan = self.plan
        batch = lengths.cu_seqlens_k.shape[0] - 1
        heads_per_kv = mQ0.shape[1] // mK.shape[1]
        totals = (mQ0.shape[0], mQ1.shape[0])
        grid = (most_blocks(totals, batch, heads_per_kv, self.warp_rows, plan.num_warps), mK.shape[1], 1)
        tensors = (mQ0, mQ1, mK, mV, mO0, mO1, mLSE0, mLSE1)
        self.kernel(*tensors, lengths, mSink, in_base_2(self.problem, numbers)).launch(
            grid=grid, block=(self.num_threads, 1, 1), smem=plan.smem_bytes, stream=stream,
            min_blocks_per_mp=plan.blocks_per_sm, preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        mQ0: cute.Tensor,
        mQ1: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO0: cute.Tensor,
        mO1: cute.Tensor,
        mLSE0: cute.Tensor,
        mLSE1: cute.Tensor,
        lengths: GroupLengths,
        mSink: cute.Tensor | None,
        numbers: Numbers,
    ):
        lane = cute.arch.lane_idx()
        block, head_kv, _ = cute.arch.block_idx()
        heads_per_kv = mQ0.shape[1] // mK.shape[1]
        totals = (mQ0.shape[0], mQ1.shape[0])
        marks = (lengths.cu_seqlens_q0, lengths.cu_seqlens_q1)
        batch = lengths.cu_seqlens_k.shape[0] - 1
        sizes = (self.warp_rows, self.plan.num_warps)
        place = find_place(block, batch, totals, marks, heads_per_kv, *sizes, lane)
        if place.valid:
            outputs = ((mO0, mO1), (mLSE0, mLSE1))
            at = (place.batch, place.first_strip, head_kv, heads_per_kv)
            self.compute((mQ0, mQ1), mK, mV, outputs, lengths, mSink, numbers, *at)

    @cute.jit
    def compute(
        self,
        mQs: tuple,
        mK: cute.Tensor,
        mV: cute.Tensor,
        outputs: tuple,
        lengths: GroupLengths,
        mSink: cute.Tensor | None,
        numbers: Numbers,
        batch: Int32,
        first_strip: Int32,
        head_kv: Int32,
        heads_per_kv: Int32,
    ):
        problem, plan = self.problem, self.plan
        marks = (lengths.cu_seqlens_q0, lengths.cu_seqlens_q1)
        seqs_q = tuple(sequence(mQ, batch, mark, None) for mQ, mark in zip(mQs, marks, strict=True))
        seq_k = sequence(mK, batch, lengths.cu_seqlens_k, None)
        limits = (lengths.max_kv_len_q0, lengths.max_kv_len_q1)
        if cutlass.const_expr(problem.seqused_k):
            limits = tuple(limit[batch] for limit in limits)
        seqlens_k = tuple(cutlass.max(cutlass.min(limit, seq_k.length), Int32(0)) for limit in limits)

        warps = plan.num_warps
        index = first_strip + (cute.arch.lane_idx() & (warps - 1))
        sizes = (self.warp_rows, plan.tile_n)
        each = strip_at(problem, index, seqs_q, seqlens_k, head_kv, heads_per_kv, *sizes, numbers)
        way = way_over(each, warps, not starts_at_first(problem))
        own = strip_of(each, seqs_q, cute.arch.make_warp_uniform(cute.arch.warp_idx()) & (warps - 1))
        work = StripTile(self, own, batch, mQs, outputs, mSink, numbers)
        loader = KeyLoader(self, mK, mV, head_kv, replace(seq_k, length=way.seqlen_k))
        work.run(loader, way, *outputs)
