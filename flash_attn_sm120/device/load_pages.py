"""Tiles from the pages of a pool through TMA: boxes of rows that lie in one page, its number as a coordinate.

The last block is copied with cp.async, as rows beyond a sequence's end have to be zeros and its last page has others.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.load_cp_async import CpAsyncLoader
from flash_attn_sm120.device.load_tma import SWIZZLE_BITS, aligned, chunk_layout, rows_first
from flash_attn_sm120.device.ptx import cp_async_arrive, lane_anew, load_global_b32_if, thread_anew
from flash_attn_sm120.device.seqlen import clamp, divide
from flash_attn_sm120.device.stage import Stage
from flash_attn_sm120.device.tile import TileLayout


def box_rows(page_size: int, rows: int) -> int:
    """Rows of a box: the most that divide a page and the `rows` that a warp loads, a power of two."""
    return min(page_size & -page_size, rows)


@dataclass(frozen=True)
class PagedBoxes:
    """atom and coordinate tensor (page_size, d, heads_kv, num_pages) of a pool, whose tile has `layout`."""

    atom: cute.CopyAtom
    coordinates: cute.Tensor
    dtype: type
    layout: TileLayout
    rows: int

    @staticmethod
    def map(tensor: cute.Tensor, layout: TileLayout, rows: int) -> tuple[cute.CopyAtom, cute.Tensor]:
        """On the host: what a pool (num_pages, page_size, heads_kv, d) needs for boxes of `rows` rows."""
        box = TileLayout(rows, layout.cols)
        op = cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(op, rows_first(tensor), chunk_layout(box), (rows, layout.chunk_cols))

    @cute.jit
    def load(self, shared: Int32, head: Int32, page: Int32, block: Int32, barrier: cute.Pointer):
        """Starts the copy of the block-th box of a page, a part for each chunk, to where its rows begin."""
        layout = self.layout
        swizzle = cute.make_swizzle(SWIZZLE_BITS[layout.chunk_cols], 4, 3)
        pointer = cute.recast_ptr(aligned(shared), swizzle, self.dtype)
        place = (self.rows, layout.chunk_cols, layout.chunks)
        stride = (layout.chunk_cols, 1, layout.rows * layout.chunk_cols)
        s = cute.make_tensor(pointer, cute.make_layout(place, stride=stride))
        # (rows, chunk_cols, boxes of a page, chunks)
        g = cute.local_tile(self.coordinates[None, None, head, page], place[:2], (None, None))
        one = cute.make_layout(1)
        s, g = cpasync.tma_partition(self.atom, 0, one, cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2))
        for chunk in range(layout.chunks):
            cute.copy(self.atom, g[None, block, chunk], s[None, chunk], tma_bar_ptr=barrier)


class PageLoader(CpAsyncLoader):
    """Q and the last block as CpAsyncLoader; of the other blocks each copying warp loads a part through TMA."""

    def __init__(self, config, k: PagedBoxes, v: PagedBoxes, head_kv: Int32, *inputs):
        """inputs: as CpAsyncLoader takes them."""
        super().__init__(config, *inputs)
        self.boxes_k, self.boxes_v, self.head_kv = k, v, head_kv
        self.arrivals = self.warps
        self.own_rows = config.plan.tile_n // self.warps
        self.count = self.own_rows // k.rows  # boxes of a warp
        # Lane j has the page numbers of box j, of the tile whose K was loaded last and of the one whose K comes next.
        self.page, self.next_page = (cute.make_rmem_tensor((1,), Int32) for _ in range(2))

    def begin(self, blocks: BlockRange, stage: Stage) -> None:
        super().begin(blocks, stage)
        self.next_page[0] = self._numbers(blocks.end - 2)

    def load_k(self, n: Int32, stage: Stage) -> None:
        self.page[0] = self.next_page[0]
        self.next_page[0] = self._numbers(n - 1)
        places = self._places(n)
        stage.wait_for_k_room()
        self._load(self.boxes_k, places, stage.shared + self.config.offset_k, stage.bars["k_full"])

    def load_v(self, n: Int32, stage: Stage) -> None:
        places = self._places(n)
        stage.wait_for_v_room()
        self._load(self.boxes_v, places, stage.shared + self.config.offset_v, stage.bars["v_full"])

    def _first_row(self) -> Int32 | int:
        """Of those of a tile that the warp loads."""
        if self.warps == 1:
            return 0
        return cute.arch.make_warp_uniform((thread_anew() >> 5) - self.config.plan.num_warps) * self.own_rows

    def _numbers(self, n: Int32) -> Int32:
        """Starts the look-up of the page numbers of tile n; entries beyond the sequence aren't read."""
        keys, lane = self.keys, lane_anew()
        key = cutlass.max(n * keys.tile_n + self._first_row() + lane * self.boxes_k.rows, Int32(0))
        index = cutlass.min(divide(key, keys.page_size), keys.last_page)
        needed = (lane < self.count) & (keys.length > 0)
        return load_global_b32_if(keys.table + Int64(index) * 4, Int32(needed))

    def _places(self, n: Int32) -> list[tuple[Int32, Int32]]:
        """(page, box in it) of each of the warp's boxes of tile n."""
        keys, rows = self.keys, self.boxes_k.rows
        places = []
        for j in range(self.count):
            key = n * keys.tile_n + self._first_row() + j * rows
            page = clamp(cute.arch.shuffle_sync(self.page[0], j), Int32(0), keys.num_pages - 1)
            in_page = key - divide(key, keys.page_size) * keys.page_size
            places.append((page, in_page // rows))
        return places

    def _load(self, boxes: PagedBoxes, places: list, shared: Int32, barrier: cute.Pointer) -> None:
        self._expect(barrier, self.own_rows * boxes.layout.row_bytes * boxes.layout.chunks)
        self._start(boxes, places, shared, barrier)

    def _start(self, boxes: PagedBoxes, places: list, shared: Int32, barrier: cute.Pointer) -> None:
        """The warp's boxes of a tile."""
        for j, (page, box) in enumerate(places):
            row = self._first_row() + j * boxes.rows
            boxes.load(shared + row * boxes.layout.row_bytes, self.head_kv, page, box, barrier)

    @cute.jit
    def _expect(self, barrier: cute.Pointer, size: cutlass.Constexpr):
        """The warp's arrival, and the bytes of its boxes."""
        if lane_anew() == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, size)

    def arrive_copied(self, barrier: cute.Pointer) -> None:
        """The warp's arrival behind those of its copies, which nobody else counts."""
        cp_async_arrive(barrier.toint())
        cute.arch.sync_warp()
        self._arrive(barrier)

    @cute.jit
    def _arrive(self, barrier: cute.Pointer):
        if lane_anew() == 0:
            cute.arch.mbarrier_arrive(barrier)
