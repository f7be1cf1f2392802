"""Tiles of 8-bit K and V from the pages of a pool: each loading warp brings rows of its own as bytes through TMA and
converts them where they lie.

A row has as many bytes as a chunk of the 16-bit tile has room for. A warp's rows come into the last chunk of their own
places in the tile; what becomes of their first half goes into the first chunk, and that of the other half over the
bytes, once all of them are in registers.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.fp8 import KINDS
from flash_attn_sm120.device.load_pages import PagedBoxes, PageLoader
from flash_attn_sm120.device.ptx import (
    again,
    fp8_to_pairs,
    lane_anew,
    load_global_b32_if,
    load_shared_v4,
    store_shared_v4,
    thread_anew,
)
from flash_attn_sm120.device.scheduler import read_block_count, read_blocks
from flash_attn_sm120.device.seqlen import divide
from flash_attn_sm120.device.stage import Stage

UNIT_BYTES = 16
ROWS_A_PASS = 8  # of a warp: four lanes a row, a unit of a half each
HALVES = 2  # of a row of bytes; each becomes a chunk


class Fp8BoxLoader(PageLoader):
    """Q as CpAsyncLoader, all blocks through TMA: those rows that aren't there become zeros on the way."""

    converts, starts_early = True, False

    def __init__(self, config, k: PagedBoxes, v: PagedBoxes, head_kv: Int32, *inputs):
        """k, v: of pools whose columns are read as 16-bit elements, two each; inputs: as CpAsyncLoader takes them."""
        super().__init__(config, k, v, head_kv, *inputs)
        self.kind = KINDS[config.problem.kv_dtype]
        self.table = inputs[-1].page_table
        self.note = self.shared + config.plan.note_offset

    @cute.jit
    def feed(self, stage: Stage):
        """All tiles, K and V of a block in turn, with the same code but for what bytes become. What notes hold is read
        anew for each, as few registers are left beside the conversion."""
        self._look_up(read_blocks(self.note).end - 1)
        turn = Int32(0)
        while turn < 2 * read_block_count(self.note):
            n, is_v = read_blocks(self.note).end - 1 - (turn >> 1), turn & 1
            cute.arch.mbarrier_wait(stage.bars["k_free"] + 2 * is_v, (turn >> 1 & 1) ^ 1)
            self._bring(n, is_v, stage.shared + self.config.offset_k + is_v * self.config.layout_k.bytes)
            self._convert(stage, turn)
            cute.arch.sync_warp()
            self._arrive(stage.bars["k_full"] + 2 * (again(turn) & 1))
            cute.arch.fence_proxy("async.shared", space="cta")  # before the copies that come next
            turn = turn + 1

    def _look_up(self, n: Int32) -> None:
        self.page[0] = self._numbers(n)

    @cute.jit
    def _bring(self, n: Int32, is_v: Int32, shared: Int32):
        """The bytes of the warp's rows of tile n of K or V, which begins at `shared`. The warp's mbarrier counts one
        after the other. Page numbers of the tile after are looked up while V's bytes come."""
        layout, barrier = self.config.layout_k, self._own_barrier()
        if lane_anew() == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.own_rows * layout.row_bytes)
        cute.arch.sync_warp()
        if is_v == 0:
            self._start(self.boxes_k, self._places(n), shared + layout.chunk_bytes, barrier)
        else:
            self._start(self.boxes_v, self._places(n), shared + layout.chunk_bytes, barrier)
            self._look_up(n - 1)
        cute.arch.mbarrier_wait(barrier, is_v)

    def _own_barrier(self) -> cute.Pointer:
        plan = self.config.plan
        number = cute.arch.make_warp_uniform((thread_anew() >> 5) - plan.num_warps)
        address = self.shared + plan.loader_barrier_offset + 8 * number
        return cute.make_ptr(cutlass.Int64, address, cute.AddressSpace.smem, assumed_align=8)

    def _numbers(self, n: Int32) -> Int32:
        _, _, batch, length = load_shared_v4(self.note)
        keys, lane = self.keys, lane_anew()
        key = cutlass.max(n * keys.tile_n + self._first_row() + lane * self.boxes_k.rows, Int32(0))
        last = divide(cutlass.max(length, Int32(1)) - 1, keys.page_size)
        index = cutlass.min(divide(key, keys.page_size), last)
        row = self.table.iterator.toint() + Int64(batch) * Int64(self.table.stride[0]) * 4
        return load_global_b32_if(row + Int64(index) * 4, Int32((lane < self.count) & (length > 0)))

    @cute.jit
    def _convert(self, stage: Stage, turn: Int32):
        """Each lane its unit, K's to what Q K^T multiplies and V's to what P V does."""
        layout, lane, is_v = self.config.layout_k, lane_anew(), again(turn) & 1
        row, unit = _row_of(lane), lane & 3
        first = stage.shared + self.config.offset_k + is_v * layout.bytes + (self._first_row() + row) * layout.row_bytes
        source = first + layout.chunk_bytes + (unit ^ row) * UNIT_BYTES
        target = first + (2 * unit ^ row) * UNIT_BYTES
        if is_v == 0:
            self._convert_rows(source, target, turn, self.config.mma_dtype)
        else:
            self._convert_rows(source, target, turn, self.config.pv_dtype)

    @cute.jit
    def _convert_rows(self, source: Int32, target: Int32, turn: Int32, dtype: cutlass.Constexpr):
        """source, target: of the lane's unit of a row's first half, as bytes and as what they become."""
        layout = self.config.layout_k
        for i in cutlass.range(HALVES * self.own_rows // ROWS_A_PASS, unroll=1):
            half, beyond = i & 1, (i >> 1) * ROWS_A_PASS
            words = load_shared_v4((source ^ half * (layout.row_bytes // HALVES)) + beyond * layout.row_bytes)
            cute.arch.sync_warp()  # the second half's take the place of a row's bytes
            if turn < 2:
                words = self._present(words, beyond)
            place = target + half * layout.chunk_bytes + beyond * layout.row_bytes
            for j in cutlass.range_constexpr(2):
                pairs = [pair for word in words[2 * j : 2 * j + 2] for pair in fp8_to_pairs(word, self.kind, dtype)]
                store_shared_v4(place ^ j * UNIT_BYTES, pairs)

    def _present(self, words: list[Int32], beyond: Int32) -> list[Int32]:
        """Zeros in a row that isn't there, as may be in the last block of keys; it is `beyond` rows on from the lane's
        first."""
        row, (_, _, _, length) = _row_of(lane_anew()), load_shared_v4(self.note)
        first = (read_blocks(self.note).end - 1) * self.keys.tile_n + self._first_row()
        return [cutlass.select_(first + row + beyond < length, word, Int32(0)) for word in words]


def _row_of(lane: Int32) -> Int32:
    """Of a pass: eight lanes that go together take rows r and r ^ 5, whose units lie in eight bank groups both as bytes
    and as what they become."""
    return (lane >> 3) ^ (lane >> 2 & 1) * 5
