"""Tiles through cp.async: one warp copies, mbarriers count its lanes as their copies land."""

from __future__ import annotations

from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.ptx import cp_async_16
from flash_attn_sm120.device.scheduler import Tile
from flash_attn_sm120.device.seqlen import Sequence, head_address
from flash_attn_sm120.device.tile import ELEMENT_BYTES, VECTOR, TileLayout

LANES = 32


class CpAsyncLoader:
    """Brings the tiles of (m_block, head, batch) and of its KV head to `shared`, from tensors in any layout."""

    arrivals = LANES

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
        problem = config.problem
        self.config, self.shared, self.seq_q, self.seq_k = config, shared, seq_q, seq_k
        self.lane = cute.arch.lane_idx()
        self.first_row = tile.m_block * config.plan.tile_m
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

    def _load(
        self,
        layout: TileLayout,
        offset: int,
        source: tuple[Int64, Int32],
        first_row: Int32,
        cols: int,
        end_row: Int32,
        barrier: cute.Pointer,
    ) -> None:
        """Rows from end_row on and columns from `cols` on become zeros. A lane takes one 16-byte unit of a row, in all
        chunks of it, and every LANES // units-th row."""
        address, stride = source
        unit, row = self.lane % layout.units, self.lane // layout.units
        rows_a_pass = LANES // layout.units
        col = unit * VECTOR * ELEMENT_BYTES
        address = address + Int64(first_row + row) * Int64(stride) + Int64(col)
        step = Int64(stride * rows_a_pass)
        for first in range(0, layout.rows, rows_a_pass):
            # the swizzle's phase has a period of 8 rows, which a pass may be shorter than
            target = self.shared + offset + layout.unit_offset(row + first % 8, unit)
            present = first_row + row + first < end_row
            for chunk in range(layout.chunks):
                col_offset = chunk * layout.chunk_cols * ELEMENT_BYTES
                whole = (chunk + 1) * layout.chunk_cols <= cols
                size = Int32(present if whole else present & (col + col_offset < cols * ELEMENT_BYTES)) * 16
                shared_offset = chunk * layout.chunk_bytes + first // 8 * 8 * layout.row_bytes
                cp_async_16(target, address, size, shared_offset, col_offset)
            address = address + step
        cute.arch.cp_async_mbarrier_arrive_noinc(barrier)
