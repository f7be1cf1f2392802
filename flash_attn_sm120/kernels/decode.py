"""The decode kernel: few query rows a sequence, so the query heads of one KV head are rows of one tile and K and V are
read once. Long sequences are cut into parts that further blocks take; the last of them to be done combines the parts.

Source: Dao et al., Flash-Decoding (2023), for the parts; the sharing of a part among the warps of a block is our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cutlass
from cutlass import Boolean, Float32, Int32, cute

from flash_attn_sm120.arguments import Lengths, Modifiers, Numbers, Partials
from flash_attn_sm120.decode_plan import NOTE_BYTES
from flash_attn_sm120.device.decode_gemm import Keys16
from flash_attn_sm120.device.fp8 import Keys8
from flash_attn_sm120.device.mainloop_decode import DecodeLoop
from flash_attn_sm120.device.merge import Merge
from flash_attn_sm120.device.paged_kv import KeysAndValues, RowsReadOnce, prefetch_table
from flash_attn_sm120.device.pieces import WHOLE, Cut, Piece, find_piece, parts
from flash_attn_sm120.device.ptx import PTX_DTYPE, lane_anew
from flash_attn_sm120.device.rows import Heads, RowTile, VisibleRows, write_note
from flash_attn_sm120.device.seqlen import Sequence, divide, sequences
from flash_attn_sm120.device.softmax import in_base_2
from flash_attn_sm120.device.tile import TileLayout
from flash_attn_sm120.device.visible import starts_at_first, visible_columns
from flash_attn_sm120.dispatch import decode_memory
from flash_attn_sm120.problem import AttentionProblem

if TYPE_CHECKING:
    from flash_attn_sm120.dispatch import Plan


class FlashAttentionDecodeSm80:
    """A thread block: the rows of a (batch, head_kv), tile_m at a time, against a part of the keys."""

    def __init__(self, problem: AttentionProblem, plan: Plan):
        self.problem, self.plan = problem, plan
        self.dtype = PTX_DTYPE[problem.dtype]
        self.p_dtype = "f16" if problem.kv_dtype else self.dtype
        self.num_threads = 32 * plan.num_warps
        self.memory = decode_memory(problem, plan.tile_m, plan.tile_n, plan.num_warps, plan.stages)
        self.layout_k = TileLayout(plan.tile_n, self.memory.columns_k)
        self.layout_v = TileLayout(plan.tile_n, self.memory.columns_v)
        self.slot_bytes = max(self.layout_k.bytes, self.layout_v.bytes)

    def operands(self, lane: Int32, shared: Int32, ring: Int32):
        """shared: of the block; ring: the warp's."""
        return (Keys8 if self.problem.kv_dtype else Keys16)(self, lane, shared, ring)

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
        partials: Partials | None,
        stream,
    ):
        """q, out (batch, seqlen_q, heads, d) or (total_q, heads, d); k, v as key_sequence takes them; lse (batch,
        heads, seqlen_q) or (heads, total_q). `stream` stays last."""
        problem, plan = self.problem, self.plan
        heads_kv = mK.shape[-2]
        heads_per_kv = mQ.shape[-2] // heads_kv
        heads = Heads(heads_kv, heads_per_kv, Float32(1.0) / Float32(heads_per_kv))
        if cutlass.const_expr(problem.packed_q):
            pieces = mQ.shape[0] * heads_per_kv // plan.tile_m + lengths.cu_seqlens_q.shape[0] - 1
        else:
            pieces = cute.ceil_div(mQ.shape[1] * heads_per_kv, plan.tile_m) * mQ.shape[0]
        if cutlass.const_expr(problem.split):
            pieces = pieces + partials.slots - 1
        self.kernel(mQ, mK, mV, mO, mLSE, lengths, modifiers, in_base_2(problem, numbers), partials, heads).launch(
            grid=(pieces * heads_kv, 1, 1), block=(self.num_threads, 1, 1), smem=plan.smem_bytes, stream=stream,
            min_blocks_per_mp=plan.blocks_per_sm, preferred_smem_carveout=100,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        lengths: Lengths,
        modifiers: Modifiers,
        numbers: Numbers,
        partials: Partials | None,
        heads: Heads,
    ):
        block, _, _ = cute.arch.block_idx()
        if cutlass.const_expr(self.problem.page_size > 0):
            thread, _, _ = cute.arch.thread_idx()
            prefetch_table(lengths.page_table, block * self.num_threads + thread)
        index = divide(block, heads.heads_kv)
        head_kv = block - index * heads.heads_kv
        cut = Cut(partials.slots, partials.out.shape[0], self.plan.num_warps) if self.problem.split else None
        piece = self.piece(mQ, mK, cut, lengths, numbers, index, heads)
        if piece.valid:
            self.compute(mQ, mK, mV, mO, mLSE, lengths, modifiers, numbers, partials, piece, head_kv, heads)

    def granules(self, seq_q: Sequence, seqlen_k: Int32, total_k: Int32, numbers: Numbers) -> tuple[Int32, Int32]:
        """First and end of the granules that any row of a sequence sees; end <= first: none."""
        bounds = (seqlen_k, total_k, numbers)
        begin, _ = visible_columns(self.problem, total_k - seq_q.length, *bounds)
        _, end = visible_columns(self.problem, total_k - 1, *bounds)
        end = cutlass.select_(seq_q.length > 0, Int32(end), Int32(0))
        return divide(Int32(begin), self.plan.tile_n), divide(end + self.plan.tile_n - 1, self.plan.tile_n)

    @cute.jit
    def piece(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        cut: cutlass.Constexpr,
        lengths: Lengths,
        numbers: Numbers,
        index: Int32,
        heads: Heads,
    ) -> Piece:
        plan, lane = self.plan, cute.arch.lane_idx()
        batch = lengths.cu_seqlens_q.shape[0] - 1 if self.problem.packed_q else mQ.shape[0]

        def extent(b):
            seq_q, seq_k, total_k = sequences(self.problem, mQ, mK, lengths, b)
            first, end = self.granules(seq_q, seq_k.length, total_k, numbers)
            m_blocks = divide(seq_q.room * heads.per_kv + plan.tile_m - 1, plan.tile_m)
            return m_blocks, cutlass.max(end - first, Int32(0))

        if cutlass.const_expr(self.problem.split or self.problem.packed_q):
            piece = find_piece(extent, cut, index, batch, lane)
        else:
            m_blocks = cute.ceil_div(mQ.shape[1] * heads.per_kv, plan.tile_m)
            owner = divide(index, m_blocks)
            piece = Piece(owner, index - owner * m_blocks, Int32(0), Int32(WHOLE), Boolean(True))
        return piece

    @cute.jit
    def compute(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        lengths: Lengths,
        modifiers: Modifiers,
        numbers: Numbers,
        partials: Partials | None,
        piece: Piece,
        head_kv: Int32,
        heads: Heads,
    ):
        problem, plan = self.problem, self.plan
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint()
        seq_q, seq_k, total_k = sequences(problem, mQ, mK, lengths, piece.batch)
        first, end = self.granules(seq_q, seq_k.length, total_k, numbers)
        splits = Int32(1)
        if cutlass.const_expr(problem.split):
            splits = parts(cutlass.max(end - first, Int32(0)), piece.chunk)
            first = first + piece.split * piece.chunk
            end = cutlass.min(end, first + piece.chunk)
        scale = numbers.softmax_scale
        if cutlass.const_expr(problem.k_descale):
            scale = scale * modifiers.k_descale[piece.batch, head_kv]
        keys = KeysAndValues(self, mK, mV, piece.batch, seq_k, head_kv, lengths, lane_anew, source=RowsReadOnce)
        loop = DecodeLoop(self, keys, shared, warp, scale, numbers)
        pages = []
        if cutlass.const_expr(starts_at_first(problem)):  # as early as can be: all else waits for them
            pages = loop.first_pages(first + warp, plan.num_warps)
        rows = VisibleRows(self, mQ, seq_q, piece, head_kv, heads, seq_k.length, total_k, numbers)
        note = shared + self.memory.note_offset + warp * NOTE_BYTES
        if loop.lane == 0:
            write_note(note, piece, splits, head_kv, seq_q)
        keys.bounds = (None if starts_at_first(problem) else rows.begin, rows.end)
        # what the rows of this tile see
        first = cutlass.max(first, divide(rows.begin, plan.tile_n))
        end = cutlass.min(end, divide(rows.end + plan.tile_n - 1, plan.tile_n))
        count = divide(cutlass.max(end - first - warp + plan.num_warps - 1, Int32(0)), plan.num_warps)
        if cutlass.const_expr(not starts_at_first(problem)):
            pages = loop.first_pages(first + warp, plan.num_warps)
        loop.run(rows, pages, first + warp, plan.num_warps, count, modifiers)
        cute.arch.sync_warp()
        tile, splits = RowTile.from_note(self, mQ, note, heads)
        Merge(self, loop, tile, splits, shared, warp, modifiers).run(mO, mLSE, partials)


class FlashAttentionDecodeSm120(FlashAttentionDecodeSm80):
    """The Sm80 kernel within SM120's limits, by its plan."""
