"""Tiles of 8-bit K and V from the pages of a pool: the loading warps ask for the bytes of a tile to be brought into L1
while the one before is worked on, and convert them from there once there is room.

What comes late is what the matrix warps wait for, and they leave few registers for it: so bytes wait in L1 and not in
registers, and what notes hold is read anew for each tile.
"""

from __future__ import annotations

import os
import cutlass
from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.fp8 import KINDS
from flash_attn_sm120.device.load_cp_async import QueryLoader
from flash_attn_sm120.device.paged_kv import LANES, PAGE_UNIT
from flash_attn_sm120.device.ptx import (
    fp8_to_pairs,
    lane_anew,
    load_global_b32_if,
    load_global_v4_if,
    load_shared_v2,
    load_shared_v4,
    prefetch_l1_if,
    store_shared_v2,
    touch,
    store_shared_v4,
    thread_anew,
)
from flash_attn_sm120.device.scheduler import Tile, read_block_count, read_blocks
from flash_attn_sm120.device.seqlen import Sequence, clamp, divide
from flash_attn_sm120.device.stage import Stage

UNIT_BYTES = 16  # of a lane's load
ROW_BYTES = 128  # of 8-bit columns, two chunks of 16-bit ones
ROWS_A_PASS = 8  # of a warp: four lanes a row, a unit of one half each


class Fp8LineLoader(QueryLoader):
    """Q as CpAsyncLoader. Each copying warp has rows of its own of every tile, 16 that begin at a multiple of 16."""

    converts, starts_early = True, False

    def __init__(
        self,
        config,
        head_kv: Int32,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        shared: Int32,
        tile: Tile,
        seq_q: Sequence,
        seq_k: Sequence,
        lengths,
    ):
        super().__init__(config, mQ, shared, tile, seq_q, config.plan.copying_warps)
        self.arrivals, self.kind = self.warps, KINDS[config.problem.kv_dtype]
        self.pools, self.table, self.head_kv = (mK, mV), lengths.page_table, head_kv
        self.page_size, self.tile_n = config.problem.page_size, config.plan.tile_n
        self.own_rows = self.tile_n // self.warps
        self.note = shared + config.plan.note_offset
        # Lane j has the page numbers of rows 8 j to 8 j + 7 of the warp's, of the tile whose K was loaded last and of the
        # one whose K comes next.
        self.page, self.next_page = (cute.make_rmem_tensor((1,), Int32) for _ in range(2))

    @cute.jit
    def feed(self, stage: Stage):
        """All tiles, K and V of a block in turn, with the same code."""
        self._look_up(read_blocks(self.note).end - 1)
        self._aim(read_blocks(self.note).end - 1, Int32(0))
        turn = Int32(0)
        while turn < 2 * read_block_count(self.note):
            is_v = turn & 1
            barriers = stage.bars["k_full"].toint() + 16 * is_v
            self._wait(barriers + 8, (turn >> 1 & 1) ^ 1)
            self._fill(is_v, stage.shared)
            cute.arch.sync_warp()
            self._arrive(barriers)
            turn = turn + 1
            self._aim(read_blocks(self.note).end - 1 - (turn >> 1), turn & 1)

    def _wait(self, barrier: Int32, phase: Int32) -> None:
        cute.arch.mbarrier_wait(self._barrier(barrier), phase)

    @cute.jit
    def _arrive(self, barrier: Int32):
        if lane_anew() == 0:
            cute.arch.mbarrier_arrive(self._barrier(barrier))

    def _barrier(self, address: Int32) -> cute.Pointer:
        return cute.make_ptr(cutlass.Int64, address, cute.AddressSpace.smem, assumed_align=8)

    def _first_row(self) -> Int32:
        """Of the warp's in a tile."""
        return cute.arch.make_warp_uniform((thread_anew() >> 5) - self.config.plan.num_warps) * self.own_rows

    def _look_up(self, n: Int32) -> None:
        """Starts the look-up of the page numbers of tile n; entries outside the blocks or the sequence aren't read."""
        _, _, batch, length = load_shared_v4(self.note)
        lane = lane_anew()
        key = n * self.tile_n + self._first_row() + lane * PAGE_UNIT
        exists = (lane < self.own_rows // PAGE_UNIT) & (n >= read_blocks(self.note).begin) & (key < length)
        row = self.table.iterator.toint() + Int64(batch) * Int64(self.table.stride[0]) * 4
        self.next_page[0] = load_global_b32_if(row + Int64(divide(key, self.page_size)) * 4, Int32(exists))

    def _turn_page(self, n: Int32) -> None:
        self.page[0] = clamp(self.next_page[0], Int32(0), self.pools[0].shape[0] - 1)
        self._look_up(n - 1)

    def _own_row(self) -> tuple[Int32, Int32]:
        """(row, unit) of the lane in a pass. Eight lanes that store together have an even and an odd row, so that what
        they store lies in eight bank groups."""
        lane = lane_anew()
        return (lane >> 3) * 2 + (lane >> 2 & 1), lane & 3

    def _aims(self) -> Int32:
        """Where the lane's addresses lie, 8 bytes a pass."""
        copying = thread_anew() - LANES * self.config.plan.num_warps
        return self.shared + self.config.plan.aim_offset + copying * (8 * self.own_rows // ROWS_A_PASS)

    @cute.jit
    def _aim(self, n: Int32, is_v: Int32):
        """Works out where tile n of K or V lies and asks for its bytes to be brought into L1."""
        if is_v == 0:
            self._turn_page(n)
        row, unit = self._own_row()
        _, _, _, length = load_shared_v4(self.note)
        key = n * self.tile_n + self._first_row() + row
        begin = read_blocks(self.note).begin
        both = []
        for beyond in cutlass.range_constexpr(0, self.own_rows, ROWS_A_PASS):
            page = cute.arch.shuffle_sync(self.page[0], beyond >> 3)
            address = self._address(is_v, page, key + beyond) + Int64(unit * UNIT_BYTES)
            exists = (n >= begin) & (key + beyond < length)
            address = cutlass.select_(exists, address, Int64(0))
            store_shared_v2(self._aims() + beyond, [Int32(address), Int32(address >> 32)])
            if cutlass.const_expr(os.environ.get("TOUCH") is None):
                for half in cutlass.range_constexpr(2):
                    prefetch_l1_if(address + half * (ROW_BYTES // 2), Int32(exists))
            else:
                both.append((address, Int32(exists)))
        if cutlass.const_expr(os.environ.get("TOUCH") is not None):
            touch([a for a, _ in both], [e for _, e in both], 64)

    def _address(self, is_v: Int32, page: Int32, key: Int32) -> Int64:
        """Of a key's row in a page of the pool."""
        row = key - divide(key, self.page_size) * self.page_size
        base, page_stride, row_stride, head_stride = (
            cutlass.select_(is_v == 0, k, v) for k, v in zip(*map(self._strides, self.pools), strict=True)
        )
        return base + Int64(page) * page_stride + Int64(row) * row_stride + Int64(self.head_kv) * head_stride

    def _strides(self, pool: cute.Tensor) -> tuple[Int64, ...]:
        return pool.iterator.toint(), *(Int64(stride) for stride in pool.stride[:3])

    @cute.jit
    def _fill(self, is_v: Int32, shared: Int32):
        config = self.config
        place = shared + config.offset_k + is_v * config.layout_k.bytes
        if cutlass.const_expr(config.pv_dtype == config.mma_dtype):
            self._convert(place, config.mma_dtype)
        else:
            if is_v == 0:
                self._convert(place, config.mma_dtype)
            else:
                self._convert(place, config.pv_dtype)

    @cute.jit
    def _convert(self, shared: Int32, dtype: cutlass.Constexpr):
        """The tile that was aimed at last; rows that aren't there become zeros."""
        row, unit = self._own_row()
        layout = self.config.layout_k
        target = shared + (self._first_row() + row) * layout.row_bytes + (2 * unit ^ row) * UNIT_BYTES
        for i in cutlass.range(2 * self.own_rows // ROWS_A_PASS, unroll=1):
            half, beyond = i & 1, (i >> 1) * ROWS_A_PASS
            low, high = load_shared_v2(self._aims() + beyond)
            address = Int64(cutlass.Uint32(low)) | (Int64(high) << 32)
            words = load_global_v4_if(address + Int64(half * (ROW_BYTES // 2)), low | high)
            place = target + half * layout.chunk_bytes + beyond * layout.row_bytes
            for j in cutlass.range_constexpr(2):
                pairs = [
                    pair
                    for word in words[2 * j : 2 * j + 2]
                    for pair in fp8_to_pairs(word, self.kind, dtype)
                ]
                store_shared_v4(place ^ j * UNIT_BYTES, pairs)
