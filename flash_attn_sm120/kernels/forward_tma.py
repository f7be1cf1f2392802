"""The TMA forward kernel: one warp loads through TMA, the others only multiply. Dense tensors, no varlen.

Source of the roles: Shah et al., FlashAttention-3 (2024), section 3.1; the products are mma.sync as in forward.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cutlass
from cutlass import Int32, cute

from flash_attn_sm120.arguments import Lengths, Modifiers, Numbers, Queue
from flash_attn_sm120.device.block_range import BlockRange, block_range
from flash_attn_sm120.device.load_tma import tile_maps
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.mainloop_persistent import PersistentTile
from flash_attn_sm120.device.scheduler import Tile, TileQueue, dense_tile, heads_in_l2
from flash_attn_sm120.device.seqlen import sequences
from flash_attn_sm120.device.softmax import in_base_2
from flash_attn_sm120.kernels.forward import FlashAttentionForwardSm80
from flash_attn_sm120.problem import AttentionProblem

if TYPE_CHECKING:
    from flash_attn_sm120.dispatch import Plan


class FlashAttentionForwardSm120Tma(FlashAttentionForwardSm80):
    """Takes what FlashAttentionForwardSm80 takes; lengths must be empty, and modifiers but for what mods read."""

    name = "forward_tma"

    def __init__(self, problem: AttentionProblem, plan: Plan):
        super().__init__(problem, plan)
        self.pack_gqa = False

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        lengths: Lengths,
        modifiers: Modifiers,
        numbers: Numbers,
        queue: Queue | None,
        stream,
    ):
        """q, out (batch, seqlen_q, heads, d); k, v (batch, seqlen_k, heads_kv, d); lse (batch, heads, seqlen_q).
        queue: for a persistent plan."""
        problem, plan = self.problem, self.plan
        heads = mQ.shape[2]
        group = heads_in_l2(heads // mK.shape[2], mK.shape[1], 2 * (problem.head_dim + problem.head_dim_v))
        maps = tile_maps((mQ, mK, mV), (self.layout_q, self.layout_k, self.layout_v))
        tiles = cute.ceil_div(mQ.shape[1], plan.tile_m) * heads * mQ.shape[0]
        blocks, ticket = tiles, None
        if cutlass.const_expr(plan.persistent):
            blocks, ticket = cutlass.min(tiles, queue.sm_count * plan.blocks_per_sm), queue.ticket
        self.kernel(mQ, mK, mV, *maps, mO, mLSE, modifiers, in_base_2(problem, numbers), group, ticket).launch(
            grid=(blocks, 1, 1), block=(self.num_threads, 1, 1), smem=plan.smem_bytes,
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
        modifiers: Modifiers,
        numbers: Numbers,
        group: Int32,
        mTicket: cute.Tensor | None,
    ):
        problem, plan = self.problem, self.plan
        heads, m_blocks = mQ.shape[2], cute.ceil_div(mQ.shape[1], plan.tile_m)
        seq_q, seq_k, total_k = sequences(problem, mQ, mK, Lengths(), Int32(0))

        def locate(index: Int32) -> tuple[Tile, BlockRange]:
            tile = dense_tile(index, m_blocks, heads, mQ.shape[0], group)
            own = (plan.tile_m, plan.tile_n, seq_q.length, seq_k.length, total_k, numbers)
            return tile, block_range(problem, tile.m_block, *own)

        index, _, _ = cute.arch.block_idx()
        tile, blocks = locate(index)
        heads_per_kv = heads // mK.shape[2]
        maps = (atom_q, gQ, atom_k, gK, atom_v, gV)
        loader = self.tma_loader(maps, (mQ, mK, mV), tile, heads_per_kv)
        arguments = (self, tile, seq_q, seq_k, total_k, modifiers, numbers, heads_per_kv)
        if cutlass.const_expr(plan.persistent):
            residents, _, _ = cute.arch.grid_dim()
            queue = TileQueue(locate, m_blocks * heads * mQ.shape[0], index, residents, mTicket.iterator.toint())
            PersistentTile(*arguments).run(loader, queue, mO, mLSE)
        else:
            ForwardTile(*arguments).run(loader, blocks, mO, mLSE)
