"""The TMA forward kernel: one warp loads through TMA, the others only multiply. Dense tensors, no varlen.

Source of the roles: Shah et al., FlashAttention-3 (2024), section 3.1; the products are mma.sync as in forward.py.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import cpasync

from flash_attn_sm120.device.block_range import block_range
from flash_attn_sm120.device.mainloop_tma import TmaForwardTile, TmaSource, chunk_layout, rows_first
from flash_attn_sm120.device.scheduler import dense_tile, heads_in_l2
from flash_attn_sm120.device.seqlen import sequence
from flash_attn_sm120.kernels.forward import FlashAttentionForwardSm80


class FlashAttentionForwardSm120Tma(FlashAttentionForwardSm80):
    """Takes what FlashAttentionForwardSm80 takes; the length tensors and the dropout seed must be None."""

    name = "forward_tma"

    def __init__(self, problem, plan):
        super().__init__(problem, plan)
        self.pack_gqa = False
        # these two leave the main loop no registers for the range of blocks that need no mask
        self.edges_in_memory = problem.mask == "local" or problem.softcap

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        mCuSeqlensQ: None,
        mCuSeqlensK: None,
        mSeqUsedQ: None,
        mSeqUsedK: None,
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        dropout_seed: None,
        stream,
    ):
        """q, out (batch, seqlen_q, heads, d); k, v (batch, seqlen_k, heads_kv, d); lse (batch, heads, seqlen_q)."""
        assert dropout_seed is None
        problem, plan = self.problem, self.plan
        heads, heads_kv = mQ.shape[2], mK.shape[2]
        group = heads_in_l2(heads // heads_kv, mK.shape[1], 2 * (problem.head_dim + problem.head_dim_v))
        op = cpasync.CopyBulkTensorTileG2SOp()
        atoms = []
        for tensor, layout in ((mQ, self.layout_q), (mK, self.layout_k), (mV, self.layout_v)):
            box = (layout.rows, layout.chunk_cols)
            atoms += [*cpasync.make_tiled_tma_atom(op, rows_first(tensor), chunk_layout(layout), box)]
        tiles = cute.ceil_div(mQ.shape[1], plan.tile_m) * heads * mQ.shape[0]
        score_scale, cap_scale = self.scales(softmax_scale, softcap)
        self.kernel(
            mQ, mK, mV, *atoms, mO, mLSE, score_scale, cap_scale, window_left, window_right, group
        ).launch(
            grid=(tiles, 1, 1), block=(self.num_threads + 32 * plan.loading_warps, 1, 1), smem=plan.smem_bytes,
            stream=stream, min_blocks_per_mp=plan.blocks_per_sm, preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        atom_q: cute.CopyAtom,
        gQ: cute.Tensor,
        atom_k: cute.CopyAtom,
        gK: cute.Tensor,
        atom_v: cute.CopyAtom,
        gV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        score_scale: Float32,
        cap_scale: Float32,
        window_left: Int32,
        window_right: Int32,
        group: Int32,
    ):
        problem, plan = self.problem, self.plan
        block, _, _ = cute.arch.block_idx()
        heads = mQ.shape[2]
        tile = dense_tile(block, cute.ceil_div(mQ.shape[1], plan.tile_m), heads, mQ.shape[0], group)
        seq_q, seq_k = sequence(mQ, tile.batch, None, None), sequence(mK, tile.batch, None, None)
        lengths = (seq_q.length, seq_k.length)
        blocks = block_range(problem.mask, tile.m_block, plan.tile_m, plan.tile_n, *lengths, window_left, window_right)
        work = TmaForwardTile(self, mQ, mK, mV, tile, seq_q, seq_k, score_scale, cap_scale, window_left, window_right)
        shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        sources = {
            "q": TmaSource(atom_q, gQ, mQ.element_type, self.layout_q, 0),
            "k": TmaSource(atom_k, gK, mK.element_type, self.layout_k, work.offset_k),
            "v": TmaSource(atom_v, gV, mV.element_type, self.layout_v, work.offset_v),
        }
        work.run(shared, sources, blocks, mO, mLSE)
