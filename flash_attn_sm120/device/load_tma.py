"""Tiles through TMA: one warp starts the copies, mbarriers count their bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
from cutlass import Int32, cute
from cutlass.cute.nvgpu import cpasync

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.scheduler import Tile
from flash_attn_sm120.device.stage import Stage
from flash_attn_sm120.device.tile import TileLayout

SWIZZLE_BITS = {64: 3, 32: 2, 16: 1}  # by columns of a chunk; 16-byte units as in TileLayout.unit_offset


def chunk_layout(layout: TileLayout) -> cute.ComposedLayout:
    """One chunk (rows, chunk_cols) as a TMA box writes it."""
    plain = cute.make_layout((layout.rows, layout.chunk_cols), stride=(layout.chunk_cols, 1))
    return cute.make_composed_layout(cute.make_swizzle(SWIZZLE_BITS[layout.chunk_cols], 4, 3), 0, plain)


def rows_first(tensor: cute.Tensor) -> cute.Tensor:
    """(batch, seqlen, heads, d) -> (seqlen, d, heads, batch)."""
    return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, [1, 3, 2, 0]))


def tile_maps(tensors: tuple, layouts: tuple) -> tuple:
    """On the host: atom and coordinate tensor of each tensor (batch, seqlen, heads, d), whose tiles have `layouts`."""
    op, maps = cpasync.CopyBulkTensorTileG2SOp(), []
    for tensor, layout in zip(tensors, layouts, strict=True):
        box = (layout.rows, layout.chunk_cols)
        maps += [*cpasync.make_tiled_tma_atom(op, rows_first(tensor), chunk_layout(layout), box)]
    return tuple(maps)


def aligned(shared: Int32) -> cute.Pointer:
    """To a place in shared memory that a swizzle may start at."""
    return cute.make_ptr(cutlass.Uint8, shared, cute.AddressSpace.smem, assumed_align=1024)


@dataclass(frozen=True)
class TmaSource:
    """atom and coordinate tensor (seqlen, d, heads, batch) of one input, and where its tile lies in shared memory."""

    atom: cute.CopyAtom
    coordinates: cute.Tensor
    dtype: type
    layout: TileLayout
    offset: int

    @cute.jit
    def load(self, shared: cute.Pointer, head: Int32, batch: Int32, block: Int32, barrier: cute.Pointer):
        """Starts the copy of row tile `block`, a box for each chunk; rows beyond the tensor become zeros."""
        layout = self.layout
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, layout.bytes)
        swizzle = cute.make_swizzle(SWIZZLE_BITS[layout.chunk_cols], 4, 3)
        pointer = cute.recast_ptr(shared + self.offset, swizzle, self.dtype)
        place = (layout.rows, layout.chunk_cols, layout.chunks)
        stride = (layout.chunk_cols, 1, layout.rows * layout.chunk_cols)
        s = cute.make_tensor(pointer, cute.make_layout(place, stride=stride))
        # (rows, chunk_cols, row tiles, chunks)
        g = cute.local_tile(self.coordinates[None, None, head, batch], place[:2], (None, None))
        one = cute.make_layout(1)
        s, g = cpasync.tma_partition(self.atom, 0, one, cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2))
        for chunk in range(layout.chunks):
            cute.copy(self.atom, g[None, block, chunk], s[None, chunk], tma_bar_ptr=barrier)


@dataclass(frozen=True)
class TmaLoader:
    """Brings the tiles of (m_block, head, batch) and of its KV head to `shared`."""

    q: TmaSource
    k: TmaSource
    v: TmaSource
    shared: cute.Pointer
    tile: Tile
    head_kv: Int32

    q_arrivals = arrivals = warps = 1
    converts = False
    starts_early = True

    def begin(self, blocks: BlockRange, stage: Stage) -> None:
        self._load(self.k, blocks.end - 1, stage, "k_full")
        self._load(self.v, blocks.end - 1, stage, "v_full")

    def start_list(self, n: Int32) -> None:
        """Nothing is to be known of the first listed tile."""

    def load_listed(self, n: Int32, following: Int32, stage: Stage, told: Callable[[], None]) -> None:
        self.load_k(n, stage)
        told()
        self.load_v(n, stage)

    def load_q(self, barrier: cute.Pointer) -> None:
        self.q.load(self.shared, self.tile.head, self.tile.batch, self.tile.m_block, barrier)

    def load_k(self, n: Int32, stage: Stage) -> None:
        stage.wait_for_k_room()
        self._load(self.k, n, stage, "k_full")

    def load_v(self, n: Int32, stage: Stage) -> None:
        stage.wait_for_v_room()
        self._load(self.v, n, stage, "v_full")

    def _load(self, source: TmaSource, n: Int32, stage: Stage, barrier: str) -> None:
        source.load(aligned(stage.shared), self.head_kv, self.tile.batch, n, stage.bars[barrier])
