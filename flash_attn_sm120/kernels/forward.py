"""The plain forward kernel: loading warps feed shared memory with cp.async, matrix warps multiply with mma.sync.

FlashAttentionForwardSm80 holds the algorithm for any chip that has these instructions; FlashAttentionForwardSm120 pins
it to what SM120 can hold. Source: Dao, FlashAttention-2 (2023), algorithm 1, with KV blocks from last to first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import cutlass
from cutlass import Int32, cute

from flash_attn_sm120.arguments import Lengths, Modifiers, Numbers
from flash_attn_sm120.device.block_range import block_range
from flash_attn_sm120.device.fp8_query import Q_SHIFT
from flash_attn_sm120.device.load_cp_async import CpAsyncLoader
from flash_attn_sm120.device.load_fp8 import Fp8Loader
from flash_attn_sm120.device.load_fp8_boxes import Fp8BoxLoader
from flash_attn_sm120.device.load_pages import PagedBoxes, PageLoader, box_rows
from flash_attn_sm120.device.load_tma import TmaLoader, TmaSource, tile_maps
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.mainloop_sparse import SparseTile
from flash_attn_sm120.device.paged_kv import RowSource, warps_that_copy
from flash_attn_sm120.device.ptx import PTX_DTYPE
from flash_attn_sm120.device.scheduler import Tile, dense_tile, heads_in_l2, packed_tile
from flash_attn_sm120.device.seqlen import sequences
from flash_attn_sm120.device.softmax import in_base_2
from flash_attn_sm120.device.tile import TileLayout
from flash_attn_sm120.dispatch import can_implement
from flash_attn_sm120.problem import AttentionProblem, padded

if TYPE_CHECKING:
    from flash_attn_sm120.dispatch import Plan

COUNTED_BYTES_8 = 4  # of an 8-bit element, where heads are put together whose K and V L2 holds: 2% faster than 1 or 2


class FlashAttentionForwardSm80:
    """One Q tile a thread block, a loop over its KV blocks."""

    name = "forward"  # in dispatch.py's tables

    def __init__(self, problem: AttentionProblem, plan: Plan):
        self.problem = problem
        self.plan = plan
        self.dtype = PTX_DTYPE[problem.dtype]
        # 8-bit values are exact in f16, which takes one conversion a pair where bf16 takes four; P is up to 2^GROWTH
        self.mma_dtype = "f16" if problem.kv_dtype else self.dtype
        self.loads_own_q = bool(problem.kv_dtype or problem.dual_group)  # the matrix warps do
        self.q_to_f16 = self.mma_dtype != self.dtype
        self.num_threads = 32 * (plan.num_warps + plan.loading_warps)
        self.warp_rows = plan.tile_m // plan.num_warps
        self.layout_q = TileLayout(plan.tile_m, padded(problem.head_dim))
        self.layout_k = TileLayout(plan.tile_n, padded(problem.head_dim))
        self.layout_v = TileLayout(plan.tile_n, padded(problem.head_dim_v))
        self.layout_o = TileLayout(plan.tile_m, padded(problem.head_dim_v))
        self.offset_k = self.layout_q.bytes
        self.offset_v = self.offset_k + self.layout_k.bytes
        self.box_rows = 0  # of TMA, where pages come by it
        if plan.way in ("page_boxes", "fp8_boxes"):
            self.box_rows = box_rows(problem.page_size, plan.tile_n // warps_that_copy(self, RowSource))
        self.stage_bytes = self.layout_k.bytes + self.layout_v.bytes

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
        lengths: Lengths,
        modifiers: Modifiers,
        numbers: Numbers,
        stream,
    ):
        """q, out (batch, seqlen_q, heads, d) or (total_q, heads, d); k, v as key_sequence takes them; lse (batch,
        heads, seqlen_q) or (heads, total_q). `stream` stays last."""
        problem, plan = self.problem, self.plan
        heads = mQ.shape[-2]
        if cutlass.const_expr(problem.packed_q):
            batch = lengths.cu_seqlens_q.shape[0] - 1
            grid = (mQ.shape[0] // plan.tile_m + batch, heads, 1)
        else:
            batch = mQ.shape[0]
            grid = (cute.ceil_div(mQ.shape[1], plan.tile_m) * heads * batch, 1, 1)
        row_bytes = (problem.head_dim + problem.head_dim_v) * (COUNTED_BYTES_8 if problem.kv_dtype else 2)
        seqlen_k = mK.shape[0] // batch if problem.packed_k else mK.shape[1]
        if cutlass.const_expr(problem.paged):
            seqlen_k = lengths.page_table.shape[1] * problem.page_size
        group = heads_in_l2(heads // mK.shape[-2], seqlen_k, row_bytes)
        if cutlass.const_expr(self.q_to_f16):
            numbers = numbers._replace(softmax_scale=numbers.softmax_scale * 2.0**Q_SHIFT)
        maps = (None,) * 6
        if cutlass.const_expr(plan.way == "tma"):
            maps = tile_maps((mQ, mK, mV), (self.layout_q, self.layout_k, self.layout_v))
        if cutlass.const_expr(self.box_rows):
            pools = ((mK, self.layout_k), (mV, self.layout_v))
            maps = (None, None)
            for pool, layout in pools:
                maps = (*maps, *PagedBoxes.map(*self.as_boxes(pool, layout), self.box_rows))
        self.kernel(mQ, mK, mV, *maps, mO, mLSE, lengths, modifiers, in_base_2(problem, numbers), group).launch(
            grid=grid, block=(self.num_threads, 1, 1), smem=plan.smem_bytes, stream=stream,
            min_blocks_per_mp=plan.blocks_per_sm, preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        atom_q: cute.CopyAtom | None,
        gQ: cute.Tensor | None,
        atom_k: cute.CopyAtom | None,
        gK: cute.Tensor | None,
        atom_v: cute.CopyAtom | None,
        gV: cute.Tensor | None,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        lengths: Lengths,
        modifiers: Modifiers,
        numbers: Numbers,
        group: Int32,
    ):
        problem, plan = self.problem, self.plan
        heads = mQ.shape[-2]
        lane = cute.arch.lane_idx()
        block, block_y, _ = cute.arch.block_idx()
        if cutlass.const_expr(problem.packed_q):
            batch = lengths.cu_seqlens_q.shape[0] - 1
            tile = packed_tile(block, block_y, batch, mQ.shape[0], lengths.cu_seqlens_q, plan.tile_m, lane)
        else:
            m_blocks = cute.ceil_div(mQ.shape[1], plan.tile_m)
            tile = dense_tile(block, m_blocks, heads, mQ.shape[0], group)
        if tile.valid:
            maps = (atom_q, gQ, atom_k, gK, atom_v, gV)
            self.compute(mQ, mK, mV, maps, mO, mLSE, lengths, modifiers, numbers, tile)

    @cute.jit
    def compute(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        maps: tuple,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        lengths: Lengths,
        modifiers: Modifiers,
        numbers: Numbers,
        tile: Tile,
    ):
        problem, plan = self.problem, self.plan
        seq_q, seq_k, total_k = sequences(problem, mQ, mK, lengths, tile.batch)
        of_keys = (seq_k.length, total_k)
        blocks = block_range(problem, tile.m_block, plan.tile_m, plan.tile_n, seq_q.length, *of_keys, numbers)
        if cutlass.const_expr(problem.aux):  # no row, and no place where a mod may read
            end = cutlass.select_(seq_q.length > 0, Int32(blocks.end), Int32(blocks.begin))
            blocks = replace(blocks, end=end)
        heads_per_kv = mQ.shape[-2] // mK.shape[-2]
        if cutlass.const_expr(problem.k_descale and not self.q_to_f16):
            scale = numbers.softmax_scale * modifiers.k_descale[tile.batch, tile.head // heads_per_kv]
            numbers = numbers._replace(softmax_scale=scale)
        kind = SparseTile if problem.block_sparse else ForwardTile
        work = kind(self, tile, seq_q, seq_k, total_k, modifiers, numbers, heads_per_kv)
        atom_k, gK, atom_v, gV = maps[2:]
        inputs = (mQ, mK, mV, work.shared, tile, seq_q, seq_k, lengths)
        if cutlass.const_expr(self.box_rows):
            boxes = []
            for atom, coordinates, pool, layout in ((atom_k, gK, mK, self.layout_k), (atom_v, gV, mV, self.layout_v)):
                dtype, layout = self.box_layout(pool.element_type, layout)
                boxes.append(PagedBoxes(atom, coordinates, dtype, layout, self.box_rows))
            head_kv = tile.head // heads_per_kv
            if cutlass.const_expr(problem.kv_dtype):
                work.run(Fp8BoxLoader(self, *boxes, head_kv, *inputs), blocks, mO, mLSE)
            else:
                work.run(PageLoader(self, *boxes, head_kv, *inputs), blocks, mO, mLSE)
        elif cutlass.const_expr(plan.way == "tma"):
            work.run(self.tma_loader(maps, (mQ, mK, mV), tile, heads_per_kv), blocks, mO, mLSE)
        elif cutlass.const_expr(problem.kv_dtype):
            work.run(Fp8Loader(self, *inputs), blocks, mO, mLSE)
        else:
            work.run(CpAsyncLoader(self, *inputs), blocks, mO, mLSE)

    def box_layout(self, element: type, layout: TileLayout) -> tuple[type, TileLayout]:
        """Element type and layout of a tile as boxes bring it: 8-bit elements as 16-bit ones, two each."""
        if element.width == 8:
            return cutlass.BFloat16, TileLayout(layout.rows, layout.cols // 2)
        return element, layout

    def as_boxes(self, pool: cute.Tensor, layout: TileLayout) -> tuple[cute.Tensor, TileLayout]:
        """A pool and its tile as PagedBoxes.map takes them."""
        dtype, layout = self.box_layout(pool.element_type, layout)
        return (cute.recast_tensor(pool, dtype) if dtype is not pool.element_type else pool), layout

    def tma_loader(self, maps: tuple, tensors: tuple, tile: Tile, heads_per_kv: Int32) -> TmaLoader:
        """maps: atom and coordinates of each of q, k and v, `tensors`."""
        layouts = ((self.layout_q, 0), (self.layout_k, self.offset_k), (self.layout_v, self.offset_v))
        sources = [
            TmaSource(*maps[2 * i : 2 * i + 2], tensors[i].element_type, *layout) for i, layout in enumerate(layouts)
        ]
        shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        return TmaLoader(*sources, shared, tile, tile.head // heads_per_kv)


class FlashAttentionForwardSm120(FlashAttentionForwardSm80):
    """The Sm80 kernel within SM120's limits. pack_gqa is always off: the base has no packed layout for it to store."""

    def __init__(self, problem: AttentionProblem, plan: Plan):
        super().__init__(problem, plan)
        self.pack_gqa = False
