"""Tiles through cp.async: all threads of the loading warps copy, mbarriers count them as their copies land."""

from __future__ import annotations

from cutlass import Int32, cute

from flash_attn_sm120.device.scheduler import Tile
from flash_attn_sm120.device.seqlen import Sequence, head_address
from flash_attn_sm120.device.tile import load_tile


class CpAsyncLoader:
    """Brings the tiles of (m_block, head, batch) and of its KV head to `shared`, from tensors in any layout."""

    def __init__(
        self,
        config,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        shared: Int32,
        tile: Tile,
        seq_q: Sequence,
        seq_k: Sequence,
    ):
        problem, plan = config.problem, config.plan
        self.config, self.shared, self.seq_q, self.seq_k = config, shared, seq_q, seq_k
        self.warps = plan.loading_warps
        self.arrivals = 32 * plan.loading_warps
        thread, _, _ = cute.arch.thread_idx()
        self.thread = thread - 32 * plan.num_warps
        self.first_row = tile.m_block * plan.tile_m
        head_kv = tile.head // config.heads_per_kv(mQ, mK)
        self.q = head_address(mQ, seq_q, tile.head, problem.packed_q)
        self.k = head_address(mK, seq_k, head_kv, problem.packed_k)
        self.v = head_address(mV, seq_k, head_kv, problem.packed_k)

    def load_q(self, barrier: cute.Pointer) -> None:
        config = self.config
        self._load(config.layout_q, 0, self.q, self.first_row, config.problem.head_dim, self.seq_q.length, barrier)

    def load_k(self, n: Int32, barrier: cute.Pointer) -> None:
        config, layout = self.config, self.config.layout_k
        place = (config.offset_k, self.k, n * layout.rows)
        self._load(layout, *place, config.problem.head_dim, self.seq_k.length, barrier)

    def load_v(self, n: Int32, barrier: cute.Pointer) -> None:
        config, layout = self.config, self.config.layout_v
        place = (config.offset_v, self.v, n * layout.rows)
        self._load(layout, *place, config.problem.head_dim_v, self.seq_k.length, barrier)

    def _load(self, layout, offset: int, source: tuple, first_row: Int32, cols: int, end_row: Int32, barrier) -> None:
        address, stride = source
        load_tile(layout, self.shared + offset, address, first_row, stride, self.thread, self.arrivals, cols, end_row)
        cute.arch.cp_async_mbarrier_arrive_noinc(barrier)
