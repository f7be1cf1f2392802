"""Tiles of 8-bit K and V from the pages of a pool: each loading warp brings rows of its own as bytes through TMA and
converts them where they lie.

A row has as many bytes as a chunk of the 16-bit tile has room for. A warp's rows come into the last chunk of their own
places in the tile; what becomes of their first half goes into the first chunk, and that of the other half over the
bytes, once all of them are in registers.

What a loading warp issues takes the matrix warps' turns, so there is little of it: a look-up serves many tiles, and
what differs from pass to pass stands in the instructions.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.fp8 import KINDS
from flash_attn_sm120.device.load_pages import PagedBoxes, PageLoader
from flash_attn_sm120.device.ptx import (
    fp8_to_f16,
    lane_anew,
    lane_apart,
    load_global_b32_if,
    load_shared_v4,
    store_shared_v4,
    thread_anew,
)
from flash_attn_sm120.device.scheduler import read_block_count, read_blocks
from flash_attn_sm120.device.seqlen import clamp, divide
from flash_attn_sm120.device.stage import Stage

UNIT_BYTES = 16
ROWS_A_PASS = 8  # of a warp: four lanes a row, a unit of a half each
LANES = 32


class Fp8BoxLoader(PageLoader):
    """All blocks through TMA: those rows of V that aren't there become zeros on the way, K's are masked."""

    converts, starts_early = True, False

    def __init__(self, config, k: PagedBoxes, v: PagedBoxes, head_kv: Int32, *inputs):
        """k, v: of pools whose columns are read as 16-bit elements, two each; inputs: as CpAsyncLoader takes them."""
        super().__init__(config, k, v, head_kv, *inputs)
        self.kind = KINDS[config.problem.kv_dtype]
        self.table = inputs[-1].page_table
        self.note = self.shared + config.plan.note_offset
        self.tiles = LANES // self.count  # that a look-up serves
        self.box_bits = (self.keys.page_size // k.rows - 1).bit_length()
        self.number = cute.make_rmem_tensor((1,), Int32)  # of the warp, among those that load

    @cute.jit
    def feed(self, stage: Stage):
        """All tiles, K and V of a block in turn. What notes hold is read anew for each block, as few registers are left
        beside the conversion."""
        self.number[0] = cute.arch.make_warp_uniform((thread_anew() >> 5) - self.config.plan.num_warps)
        i = Int32(0)
        while i < read_block_count(self.note):
            if i % self.tiles == 0:
                self._look_up(read_blocks(self.note).end - 1 - i)
            self._bring(stage, i, False)
            self._bring(stage, i, True)
            self._turn()
            i = i + 1

    def _turn(self) -> None:
        """The next tile's boxes come to the first lanes, so that a tile's place among those looked up isn't needed."""
        self.page[0] = cute.arch.shuffle_sync_down(self.page[0], offset=self.count)

    def _look_up(self, n: Int32) -> None:
        self.page[0] = self._numbers(n)

    def _numbers(self, n: Int32) -> Int32:
        """Lane j has the warp's box j % count of tile n - j // count: its page's number, and behind that the box's in
        the page, which a division for each tile would take registers for."""
        _, _, batch, length = load_shared_v4(self.note)
        keys, lane, rows = self.keys, lane_anew(), self.boxes_k.rows
        key = (n - lane // self.count) * keys.tile_n + self._first_row() + lane % self.count * rows
        key = cutlass.max(key, Int32(0))
        own, last = divide(key, keys.page_size), divide(cutlass.max(length, Int32(1)) - 1, keys.page_size)
        row = self.table.iterator.toint() + Int64(batch) * Int64(self.table.stride[0]) * 4
        page = load_global_b32_if(row + Int64(cutlass.min(own, last)) * 4, Int32(length > 0))
        page = clamp(page, Int32(0), keys.num_pages - 1)
        return page << self.box_bits | (key - own * keys.page_size) // rows

    @cute.jit
    def _bring(self, stage: Stage, i: Int32, is_v: cutlass.Constexpr):
        """The warp's rows of K or V of the i-th block. The warp's mbarrier counts one after the other."""
        layout, barrier = self.config.layout_k, self._own_barrier()
        offset = self.config.offset_v if is_v else self.config.offset_k
        full, free = (stage.bars[("v_" if is_v else "k_") + name] for name in ("full", "free"))
        cute.arch.mbarrier_wait(free, i & 1 ^ 1)
        if lane_anew() == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.own_rows * layout.row_bytes)
        cute.arch.sync_warp()
        self._start_boxes(self.boxes_v if is_v else self.boxes_k, offset + layout.chunk_bytes, barrier)
        cute.arch.mbarrier_wait(barrier, int(is_v))
        if cutlass.const_expr(is_v):
            if i == 0:
                self._clear(offset + layout.chunk_bytes)
        self._convert(offset, self._lane(is_v))
        cute.arch.sync_warp()
        self._arrive(full)
        if cutlass.const_expr(is_v):  # before the copies into both rooms that come next
            cute.arch.fence_proxy("async.shared", space="cta")

    def _start_boxes(self, boxes: PagedBoxes, offset: int, barrier: cute.Pointer) -> None:
        first = self._first_row()
        for j in range(self.count):
            place = cute.arch.shuffle_sync(self.page[0], j)
            room = self.shared + offset + (first + j * boxes.rows) * boxes.layout.row_bytes
            box = place & (1 << self.box_bits) - 1
            boxes.load(room, self.head_kv, place >> self.box_bits, box, barrier)

    def _first_row(self) -> Int32:
        return self.number[0] * self.own_rows

    def _own_barrier(self) -> cute.Pointer:
        plan = self.config.plan
        address = self.shared + plan.loader_barrier_offset + 8 * self.number[0]
        return cute.make_ptr(cutlass.Int64, address, cute.AddressSpace.smem, assumed_align=8)

    def _lane(self, is_v: bool) -> Int32:
        """ptxas would hold K's places for V's, and hasn't the registers."""
        return lane_apart() if is_v else lane_anew()

    def _place(self, lane: Int32) -> tuple[Int32, Int32, Int32]:
        """(row of a pass, byte offset of the lane's unit of the first half of its bytes, of the first unit that those
        become) in the tile's chunks. Eight lanes that go together take rows r and r ^ 5, whose units lie in eight bank
        groups both as bytes and as what they become."""
        layout = self.config.layout_k
        row, unit = (lane >> 3) ^ (lane >> 2 & 1) * 5, lane & 3
        first = (self._first_row() + row) * layout.row_bytes
        return row, first + (unit ^ row) * UNIT_BYTES, first + (2 * unit ^ row) * UNIT_BYTES

    @cute.jit
    def _clear(self, offset: cutlass.Constexpr):
        """Zeros in the bytes of rows that aren't there, as may be in the last block of keys."""
        layout, (row, source, _) = self.config.layout_k, self._place(self._lane(True))
        _, _, _, length = load_shared_v4(self.note)
        first = (read_blocks(self.note).end - 1) * self.keys.tile_n + self._first_row() + row
        for beyond in range(0, self.own_rows, ROWS_A_PASS):
            if first + beyond >= length:
                for half in range(2):
                    place = (source ^ half * (layout.row_bytes // 2)) + offset + beyond * layout.row_bytes
                    store_shared_v4(self.shared + place, [Int32(0)] * 4)
        cute.arch.sync_warp()

    def _convert(self, offset: int, lane: Int32) -> None:
        """The warp's rows of the tile at `offset`: first halves, then second ones over the bytes."""
        layout, (_, source, target) = self.config.layout_k, self._place(lane)
        source, target = self.shared + source, self.shared + target
        passes = [offset + beyond * layout.row_bytes for beyond in range(0, self.own_rows, ROWS_A_PASS)]
        for half in range(2):
            unit = source ^ half * (layout.row_bytes // 2)
            loaded = [load_shared_v4(unit + away + layout.chunk_bytes) for away in passes]
            if half:
                cute.arch.sync_warp()
            for away, words in zip(passes, loaded, strict=True):
                for j in range(2):
                    four = words[2 * j : 2 * j + 2]
                    pairs = [pair for word in four for pair in fp8_to_f16(word, self.kind)]
                    store_shared_v4((target ^ j * UNIT_BYTES) + away + half * layout.chunk_bytes, pairs)
