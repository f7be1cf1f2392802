"""The plain forward kernel: cp.async feeds shared memory, every warp multiplies its own rows with mma.sync.

FlashAttentionForwardSm80 holds the algorithm for any chip that has these instructions; FlashAttentionForwardSm120 pins
it to what SM120 can hold. Source: Dao, FlashAttention-2 (2023), algorithm 1, with KV blocks from last to first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cutlass
from cutlass import Float32, Int32, cute

from flash_attn_sm120.device.block_range import block_range
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.scheduler import dense_tile, heads_in_l2, packed_tile
from flash_attn_sm120.device.seqlen import sequence
from flash_attn_sm120.device.tile import TileLayout
from flash_attn_sm120.dispatch import can_implement
from flash_attn_sm120.problem import AttentionProblem, padded

if TYPE_CHECKING:
    from flash_attn_sm120.dispatch import Plan

PTX_DTYPE = {"bfloat16": "bf16", "float16": "f16"}


class FlashAttentionForwardSm80:
    """One Q tile a thread block, a loop over its KV blocks; `stages` tiles of K and of V are in flight."""

    name = "forward"  # in dispatch.py's tables

    def __init__(self, problem: AttentionProblem, plan: Plan):
        self.problem = problem
        self.plan = plan
        self.dtype = PTX_DTYPE[problem.dtype]
        self.num_threads = 32 * plan.num_warps
        self.warp_rows = plan.tile_m // plan.num_warps
        self.layout_q = TileLayout(plan.tile_m, padded(problem.head_dim))
        self.layout_k = TileLayout(plan.tile_n, padded(problem.head_dim))
        self.layout_v = TileLayout(plan.tile_n, padded(problem.head_dim_v))
        self.layout_o = TileLayout(plan.tile_m, padded(problem.head_dim_v))

    @classmethod
    def can_implement(cls, problem: AttentionProblem, arch: str) -> bool:
        """Whether this kernel gives right results for the problem on a target such as "sm_120a"."""
        return can_implement(cls.name, problem, arch)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        mCuSeqlensQ: cute.Tensor | None,
        mCuSeqlensK: cute.Tensor | None,
        mSeqUsedQ: cute.Tensor | None,
        mSeqUsedK: cute.Tensor | None,
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        dropout_seed: None,
        stream,
    ):
        """q, out (batch, seqlen_q, heads, d) or (total_q, heads, d); k, v likewise with heads_kv; lse (batch, heads,
        seqlen_q) or (heads, total_q); cu_seqlens (batch + 1,), seqused (batch,) int32. dropout_seed waits for its code.
        `stream` stays last."""
        assert dropout_seed is None
        problem, plan = self.problem, self.plan
        heads = mQ.shape[1 if problem.packed_q else 2]
        heads_kv = mK.shape[1 if problem.packed_k else 2]
        if cutlass.const_expr(problem.packed_q):
            batch = mCuSeqlensQ.shape[0] - 1
            grid = (mQ.shape[0] // plan.tile_m + batch, heads, 1)
        else:
            batch = mQ.shape[0]
            grid = (cute.ceil_div(mQ.shape[1], plan.tile_m) * heads * batch, 1, 1)
        row_bytes = 2 * (problem.head_dim + problem.head_dim_v)
        seqlen_k = mK.shape[0] // batch if problem.packed_k else mK.shape[1]
        group = heads_in_l2(heads // heads_kv, seqlen_k, row_bytes)
        score_scale, cap_scale = self.scales(softmax_scale, softcap)
        self.kernel(
            mQ, mK, mV, mO, mLSE, mCuSeqlensQ, mCuSeqlensK, mSeqUsedQ, mSeqUsedK,
            score_scale, cap_scale, window_left, window_right, group,
        ).launch(
            grid=grid, block=(self.num_threads, 1, 1), smem=plan.smem_bytes, stream=stream,
            min_blocks_per_mp=plan.blocks_per_sm, preferred_smem_carveout=100,
        )  # fmt: skip

    def scales(self, softmax_scale: Float32, softcap: Float32) -> tuple[Float32, Float32]:
        """(what the kernel multiplies a raw score by, cap_scale of apply_softcap)."""
        scale_log2 = softmax_scale * math.log2(math.e)
        if self.problem.softcap:
            return 2.0 * scale_log2 / softcap, softcap * (-2.0 * math.log2(math.e))
        return scale_log2, Float32(0.0)

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        mCuSeqlensQ: cute.Tensor | None,
        mCuSeqlensK: cute.Tensor | None,
        mSeqUsedQ: cute.Tensor | None,
        mSeqUsedK: cute.Tensor | None,
        score_scale: Float32,
        cap_scale: Float32,
        window_left: Int32,
        window_right: Int32,
        group: Int32,
    ):
        problem, plan = self.problem, self.plan
        heads = mQ.shape[1 if problem.packed_q else 2]
        lane = cute.arch.lane_idx()
        block, block_y, _ = cute.arch.block_idx()
        if cutlass.const_expr(problem.packed_q):
            batch = mCuSeqlensQ.shape[0] - 1
            tile = packed_tile(block, block_y, batch, mQ.shape[0], mCuSeqlensQ, plan.tile_m, lane)
        else:
            m_blocks = cute.ceil_div(mQ.shape[1], plan.tile_m)
            tile = dense_tile(block, m_blocks, heads, mQ.shape[0], group)
        if tile.valid:
            seq_q = sequence(mQ, tile.batch, mCuSeqlensQ, mSeqUsedQ)
            seq_k = sequence(mK, tile.batch, mCuSeqlensK, mSeqUsedK)
            lengths = (seq_q.length, seq_k.length)
            blocks = block_range(
                problem.mask, tile.m_block, plan.tile_m, plan.tile_n, *lengths, window_left, window_right
            )
            work = ForwardTile(self, mQ, mK, mV, tile, seq_q, seq_k, score_scale, cap_scale, window_left, window_right)
            work.run(blocks)
            work.store(mO, mLSE)


class FlashAttentionForwardSm120(FlashAttentionForwardSm80):
    """The Sm80 kernel within SM120's limits. pack_gqa is always off: the base has no packed layout for it to store."""

    def __init__(self, problem: AttentionProblem, plan: Plan):
        super().__init__(problem, plan)
        self.pack_gqa = False
