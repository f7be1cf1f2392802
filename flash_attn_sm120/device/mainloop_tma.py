"""The main loop with loads in a warp of their own: TMA fills K and V, mbarriers say when a tile is full or free."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32, cute
from cutlass.cute.nvgpu import cpasync

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.ptx import mbarrier_arrive
from flash_attn_sm120.device.scheduler import read_edges
from flash_attn_sm120.device.tile import TileLayout

SWIZZLE_BITS = {64: 3, 32: 2, 16: 1}  # by columns of a chunk; 16-byte units as in TileLayout.unit_offset
BARRIERS = ("q_full", "k_full", "k_free", "v_full", "v_free")
LOADING_REGISTERS = 24
MATRIX_REGISTERS = {8: 240, 4: 232}  # by matrix warps; with the loading group's, what a launch of equal shares had
MATRIX_BARRIER = 1  # named barrier of the matrix warps


def chunk_layout(layout: TileLayout) -> cute.ComposedLayout:
    """One chunk (rows, chunk_cols) as a TMA box writes it."""
    plain = cute.make_layout((layout.rows, layout.chunk_cols), stride=(layout.chunk_cols, 1))
    return cute.make_composed_layout(cute.make_swizzle(SWIZZLE_BITS[layout.chunk_cols], 4, 3), 0, plain)


def rows_first(tensor: cute.Tensor) -> cute.Tensor:
    """(batch, seqlen, heads, d) -> (seqlen, d, heads, batch)."""
    return cute.make_tensor(tensor.iterator, cute.select(tensor.layout, [1, 3, 2, 0]))


@dataclass(frozen=True)
class TmaSource:
    """atom and coordinate tensor (seqlen, d, heads, batch) of one input, and where its tile lies in shared memory."""

    atom: cute.CopyAtom
    coordinates: cute.Tensor
    dtype: type
    layout: TileLayout
    offset: int

    def load(self, shared: cute.Pointer, head: Int32, batch: Int32, block: Int32, barrier: cute.Pointer) -> None:
        """Starts the copy of row tile `block`, a box for each chunk; rows beyond the tensor become zeros."""
        layout = self.layout
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


class TmaForwardTile(ForwardTile):
    """ForwardTile of a kernel whose last warp loads and whose other warps multiply."""

    def barriers(self, shared: cute.Pointer) -> dict[str, cute.Pointer]:
        first = cute.recast_ptr(shared + self.config.plan.barrier_offset, dtype=cutlass.Int64)
        return {name: first + i for i, name in enumerate(BARRIERS)}

    @cute.jit
    def run(
        self,
        shared: cute.Pointer,
        sources: dict,
        blocks: BlockRange,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
    ):
        """Both roles: the loading warps give their registers to the matrix warps."""
        self.start(shared, blocks)
        if self.warp >= self.config.plan.num_warps:
            cute.arch.setmaxregister_decrease(LOADING_REGISTERS)
            if self.warp == self.config.plan.num_warps:
                self.feed(shared, sources, blocks)
        else:
            cute.arch.setmaxregister_increase(MATRIX_REGISTERS[self.config.plan.num_warps])
            self.multiply(shared, blocks)
            self.store(mO, mLSE)

    @cute.jit
    def start(self, shared: cute.Pointer, blocks: BlockRange):
        barriers = self.barriers(shared)
        if self.thread == 0:
            self.write_note(blocks)
            for name in BARRIERS:
                count = self.config.plan.num_warps if name.endswith("free") else 1
                cute.arch.mbarrier_init(barriers[name], count)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

    @cute.jit
    def feed(self, shared: cute.Pointer, sources: dict, blocks: BlockRange):
        """The loading warp: Q and the last KV block at once, each other tile as soon as its place is free."""
        bars = self.barriers(shared)
        tile, layouts = self.tile, self.config
        begin, end = blocks.begin, blocks.end
        if begin < end:
            self.expect(bars["q_full"], layouts.layout_q.bytes)
            sources["q"].load(shared, tile.head, tile.batch, tile.m_block, bars["q_full"])
        for i in cutlass.range(end - begin, unroll=1):
            n = end - 1 - i
            free = (i & 1) ^ 1
            cute.arch.mbarrier_wait(bars["k_free"], free)
            self.expect(bars["k_full"], layouts.layout_k.bytes)
            sources["k"].load(shared, self.head_kv, tile.batch, n, bars["k_full"])
            cute.arch.mbarrier_wait(bars["v_free"], free)
            self.expect(bars["v_full"], layouts.layout_v.bytes)
            sources["v"].load(shared, self.head_kv, tile.batch, n, bars["v_full"])

    @cute.jit
    def expect(self, barrier: cute.Pointer, size: cutlass.Constexpr):
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, size)

    @cute.jit
    def multiply(self, shared: cute.Pointer, blocks: BlockRange):
        """A matrix warp: the main loop on what the loading warp brings."""
        bars = self.barriers(shared)
        begin, end = blocks.begin, blocks.end
        left_edge, right_edge = blocks.left_edge, blocks.right_edge
        if begin < end:
            cute.arch.mbarrier_wait(bars["q_full"], 0)
        for i in cutlass.range(end - begin, unroll=1):
            if cutlass.const_expr(self.config.edges_in_memory):
                left_edge, right_edge, end = read_edges(self.note)
            n = end - 1 - i
            if (n >= right_edge) | (n < left_edge):
                self.fed_block(bars, n, i & 1, True)
            else:
                self.fed_block(bars, n, i & 1, False)
        cute.arch.barrier(barrier_id=MATRIX_BARRIER, number_of_threads=32 * self.config.plan.num_warps)

    def fed_block(self, bars: dict, n: Int32, phase: Int32, masked: bool) -> None:
        first_lane = Int32(self.lane == 0)
        cute.arch.mbarrier_wait(bars["k_full"], phase)
        self.scores(0)
        mbarrier_arrive(bars["k_free"].toint(), first_lane)
        cute.arch.mbarrier_wait(bars["v_full"], phase)
        self.accumulate(n, 0, masked)
        mbarrier_arrive(bars["v_free"].toint(), first_lane)
