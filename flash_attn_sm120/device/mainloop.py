"""One Q tile against its KV blocks: loads, products and softmax in their order. The plain forward kernel runs it."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.arguments import Numbers
from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.epilogue import stage_output, store_lse, store_output
from flash_attn_sm120.device.fragments import accumulators
from flash_attn_sm120.device.gemm import pv_product, qk_product
from flash_attn_sm120.device.mask import apply_mask
from flash_attn_sm120.device.scheduler import Tile, read_tile_note, write_tile_note
from flash_attn_sm120.device.seqlen import Sequence, head_address
from flash_attn_sm120.device.softmax import OnlineSoftmax, apply_softcap
from flash_attn_sm120.device.tile import load_tile


class ForwardTile:
    """State of a thread block while it works on (m_block, head, batch). `config` is the kernel class's static part."""

    def __init__(
        self,
        config,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        tile: Tile,
        seq_q: Sequence,
        seq_k: Sequence,
        numbers: Numbers,
    ):
        self.config, self.tile, self.seq_q, self.seq_k = config, tile, seq_q, seq_k
        problem, plan = config.problem, config.plan
        heads = mQ.shape[1 if problem.packed_q else 2]
        heads_kv = mK.shape[1 if problem.packed_k else 2]
        self.head_kv = tile.head // (heads // heads_kv)
        self.thread, _, _ = cute.arch.thread_idx()
        self.lane = cute.arch.lane_idx()
        self.warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        self.first_row = tile.m_block * plan.tile_m
        self.shift = seq_k.length - seq_q.length
        self.cap_scale, self.score_scale = numbers.softcap, numbers.softmax_scale
        self.window_left = numbers.window_left if problem.mask == "local" else None
        self.window_right = {"full": None, "causal": Int32(0), "local": numbers.window_right}[problem.mask]

        self.q_address, self.q_stride = head_address(mQ, seq_q, tile.head, problem.packed_q)
        self.k_address, self.k_stride = head_address(mK, seq_k, self.head_kv, problem.packed_k)
        self.v_address, self.v_stride = head_address(mV, seq_k, self.head_kv, problem.packed_k)

        self.shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint()
        self.warp_row = self.warp * config.warp_rows
        self.q_rows = self.shared + self.warp_row * config.layout_q.row_bytes
        self.offset_k = config.layout_q.bytes
        self.offset_v = self.offset_k + plan.stages * config.layout_k.bytes
        self.note = self.shared + plan.note_offset

        m_frags = config.warp_rows // 16
        self.softmax = OnlineSoftmax(m_frags, Float32(1.0) if problem.softcap else self.score_scale)
        self.tSrS = accumulators(m_frags, plan.tile_n // 8)
        self.tOrO = accumulators(m_frags, config.layout_v.cols // 8)
        self.tOrO.fill(0.0)

    def load_q(self) -> None:
        config = self.config
        glob = (self.q_address, self.first_row, self.q_stride)
        threads = (self.thread, config.num_threads)
        load_tile(config.layout_q, self.shared, *glob, *threads, config.problem.head_dim, self.seq_q.length)

    def load_k(self, n: Int32, slot, checked: bool) -> None:
        config = self.config
        shared = self.shared + self.offset_k + slot * config.layout_k.bytes
        self._load_kv(config.layout_k, shared, self.k_address, self.k_stride, n, config.problem.head_dim, checked)

    def load_v(self, n: Int32, slot, checked: bool) -> None:
        config = self.config
        shared = self.shared + self.offset_v + slot * config.layout_v.bytes
        self._load_kv(config.layout_v, shared, self.v_address, self.v_stride, n, config.problem.head_dim_v, checked)

    def _load_kv(self, layout, shared, address, stride, n, cols, checked) -> None:
        threads = (self.thread, self.config.num_threads)
        end_row = self.seq_k.length if checked else None
        load_tile(layout, shared, address, n * layout.rows, stride, *threads, cols, end_row)

    def write_note(self, blocks: BlockRange) -> None:
        edges = (blocks.left_edge, blocks.right_edge, blocks.end)
        write_tile_note(self.note, self.first_row, self.tile.head, self.tile.batch, self.seq_q, edges)

    @cute.jit
    def run(self, blocks: BlockRange):
        """Q and the last KV block are loaded first; each block starts the load of the next."""
        begin, end = blocks.begin, blocks.end
        left_edge, right_edge = blocks.left_edge, blocks.right_edge
        self.load_q()
        if self.thread == 0:
            self.write_note(blocks)
        if begin < end:
            self.load_k(end - 1, 0, True)
            if cutlass.const_expr(self.config.plan.stages > 1):
                self.load_v(end - 1, 0, True)
        cute.arch.cp_async_commit_group()
        for i in cutlass.range(end - begin, unroll=1):
            n = end - 1 - i
            if (n >= right_edge) | (n < left_edge):
                self.block(n, begin, end, True)
            else:
                self.block(n, begin, end, False)
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()

    @cute.jit
    def block(self, n: Int32, begin: Int32, end: Int32, masked: cutlass.Constexpr):
        config = self.config
        slot = 0
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()
        if cutlass.const_expr(config.plan.stages == 1):
            self.load_v(n, 0, masked)
            cute.arch.cp_async_commit_group()
        else:
            slot = (end - 1 - n) % 2
            if n > begin:
                self.load_k(n - 1, 1 - slot, False)
                self.load_v(n - 1, 1 - slot, False)
            cute.arch.cp_async_commit_group()
        self.scores(slot)
        if cutlass.const_expr(config.plan.stages == 1):
            cute.arch.cp_async_wait_group(0)
            cute.arch.sync_threads()
            if n > begin:
                self.load_k(n - 1, 0, False)
            cute.arch.cp_async_commit_group()
        self.accumulate(n, slot, masked)

    def scores(self, slot) -> None:
        config = self.config
        sQ = config.layout_q.matrix(self.q_rows, self.lane)
        shared = self.shared + slot * config.layout_k.bytes
        sK = config.layout_k.matrix(shared, self.lane, self.offset_k, rows_first=False)
        qk_product(sQ, sK, self.tSrS, config.dtype)

    @cute.jit
    def accumulate(self, n: Int32, slot, masked: cutlass.Constexpr):
        config = self.config
        if cutlass.const_expr(config.problem.softcap):
            apply_softcap(self.tSrS, self.score_scale, self.cap_scale)
        if cutlass.const_expr(masked):
            self.mask(n)
        tOrP = self.softmax.update(self.tSrS, self.tOrO, config.dtype)
        shared = self.shared + slot * config.layout_v.bytes
        sV = config.layout_v.matrix(shared, self.lane, self.offset_v)
        pv_product(sV, tOrP, self.tOrO, config.dtype)

    def mask(self, n: Int32) -> None:
        row, col = self.first_row + self.warp_row, n * self.config.plan.tile_n
        bounds = (self.seq_k.length, self.shift, self.window_left, self.window_right)
        apply_mask(self.tSrS, row, col, self.lane, *bounds)

    def store(self, mO: cute.Tensor, mLSE: cute.Tensor | None) -> None:
        """Rows beyond the used length but inside the sequence's room become 0 and -inf."""
        config = self.config
        problem, layout = config.problem, config.layout_o
        first_row, head, batch, seq_q = read_tile_note(self.note)
        row = first_row + self.warp_row
        constant = -0.5 * self.cap_scale if problem.softcap else 0.0
        factors, lses = self.softmax.finish(row + self.lane // 4, seq_q.length, constant)
        shared = self.shared + self.warp_row * layout.row_bytes
        stage_output(layout, shared, self.tOrO, factors, self.lane, config.dtype)
        cute.arch.sync_warp()
        address, stride = head_address(mO, seq_q, head, problem.packed_q)
        glob = address + Int64(row) * Int64(stride)
        rows_left = seq_q.room - row
        store_output(layout, shared, config.warp_rows, glob, stride, self.lane, rows_left, problem.head_dim_v)
        if mLSE is not None:
            place = (head, batch, seq_q.start, row)
            store_lse(mLSE, problem.packed_q, *place, lses, self.lane, rows_left)
