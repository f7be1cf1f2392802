"""A thread block that works on one Q tile after another; a tile's first loads run under the end of the one before.

Which tile comes next is asked of a counter in global memory, so that blocks that got short tiles take more of them.
"""

from __future__ import annotations

from dataclasses import replace

import cutlass
from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.epilogue import store_transposed
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.ptx import (
    lane_anew,
    load_shared_v4,
    mbarrier_arrive_after,
    store_shared_b32,
    store_shared_v4,
)
from flash_attn_sm120.device.scheduler import Tile, TileQueue, read_blocks

STOP = -1  # in place of a turn: there is no tile left


class PersistentTile(ForwardTile):
    """A ForwardTile for a loader with one stage, and dense inputs, whose lengths are those of every tile.

    i counts a thread block's KV blocks through all of its tiles, as the phases of the barriers do, and BlockRange.end
    in the note has those of the tiles before added. `turn` counts the tiles. q_full says that Q and the note are there.
    """

    def run(self, loader, queue: TileQueue, mO: cute.Tensor, mLSE: cute.Tensor | None) -> None:
        """loader: for any tile."""
        self.loader, self.queue = loader, queue
        plan = self.config.plan
        self.turn_note = self.shared + plan.turn_offset
        self.done = self.q_full + 1 + 4 * plan.stages  # the matrix warps have stored the tile
        self.start(None)
        self.play_role(None, mO, mLSE)

    @cute.jit
    def start(self, blocks: BlockRange | None):
        if self.warp == self.config.plan.num_warps:
            if self.lane == 0:
                self.init_barriers()
            cute.arch.mbarrier_init_fence()
        if self.thread == 0:
            self.write_note(BlockRange(0, 0, 0, 0))
        cute.arch.sync_threads()

    def init_barriers(self) -> None:
        super().init_barriers()
        cute.arch.mbarrier_init(self.done, 32 * self.config.plan.num_warps)

    @property
    def q_arrivals(self) -> int:
        return self.loader.q_arrivals + 1

    @cute.jit
    def feed(self, blocks: BlockRange | None):
        """The loading warp: all tiles. A tile's Q and first K are asked for as soon as the last products with those
        before are done, which K's room says."""
        index, base, turn, before = self.queue.first, Int32(0), Int32(0), Int32(1)
        while index < self.queue.count:
            tile, own = self.queue.locate(index)
            count = own.end - own.begin
            loader = replace(self.loader, tile=tile, head_kv=tile.head // self.heads_per_kv)
            self.wait_for_q_room(base, turn, before)
            loader.load_q(self.q_full)
            if count > 0:
                loader.load_k(own.end - 1, self.stage(base))
            cute.arch.mbarrier_wait(self.done, (turn & 1) ^ 1)
            self.announce(tile, replace(own, end=own.end + base), turn)
            self.arrive_at_q()
            for i in cutlass.range(count, unroll=1):
                n = own.end - 1 - i
                loader.load_v(n, self.stage(base + i))
                if i + 1 < count:
                    loader.load_k(n - 1, self.stage(base + i + 1))
            before, base, turn = count, base + count, turn + 1
            index = self.queue.next(self.lane)
        cute.arch.mbarrier_wait(self.done, (turn & 1) ^ 1)
        self.announce_end()
        self.arrive_at_q()
        self.arrive_at_q()

    def wait_for_q_room(self, base: Int32, turn: Int32, before: Int32) -> None:
        """before: blocks of the tile before. Where it had none, no room for K says that Q has been read."""
        k_free = self.stage(base).bars["k_free"]
        barrier = cutlass.select_(before > 0, k_free.toint(), self.done.toint())
        phase = cutlass.select_(before > 0, base, turn) & 1
        pointer = cute.make_ptr(cutlass.Int64, barrier, cute.AddressSpace.smem, assumed_align=8)
        cute.arch.mbarrier_wait(pointer, phase ^ 1)

    @cute.jit
    def announce(self, tile: Tile, blocks: BlockRange, turn: Int32):
        """Writes what differs from the note of the tile before."""
        if self.lane == 0:
            head = (tile.m_block * self.config.plan.tile_m, tile.head, tile.batch)
            for i, value in enumerate(head):
                store_shared_b32(self.note + 4 * i, value)
            for i, value in enumerate((blocks.begin, blocks.end, blocks.left_edge, blocks.right_edge)):
                store_shared_b32(self.note + 32 + 4 * i, value)
            self.write_turn(turn)
        cute.arch.sync_warp()

    @cute.jit
    def announce_end(self):
        if self.lane == 0:
            self.write_turn(Int32(STOP))
        cute.arch.sync_warp()

    def arrive_at_q(self) -> None:
        """One of two arrivals that a tile takes; the other is that of its Q."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.q_full)

    def write_turn(self, turn: Int32) -> None:
        store_shared_v4(self.turn_note, [turn] * 4)

    def read_turn(self) -> Int32:
        return load_shared_v4(self.turn_note)[0]

    @cute.jit
    def multiply_and_store(self, mO: cute.Tensor, mLSE: cute.Tensor | None):
        """A matrix warp: all tiles, in one loop over all of their blocks, as ptxas needs more registers for two."""
        cute.arch.mbarrier_wait(self.q_full, 0)
        self.take_q()
        i = Int32(0)
        while self.has_work():
            blocks, stage = read_blocks(self.note), self.stage(i)
            if i < blocks.end - blocks.begin:
                self.find_q()
                stage.wait_for_k()
                self.visit(blocks, blocks.end - 1 - i, i)
                i = i + 1
            else:
                self.store(mO, mLSE)
                turn = self.read_turn()
                mbarrier_arrive_after(self.done.toint(), [turn.bitcast(Float32)], Int32(1))  # each lane for itself
                cute.arch.mbarrier_wait(self.q_full, (turn + 1) & 1)
                self.take_q()
                self.tOrO.fill(0.0)

    def has_work(self) -> cutlass.Boolean:
        return self.read_turn() != STOP

    @property
    def holds_q_place(self) -> bool:
        return self.is_roomy

    def all_reads(self, results: cute.Tensor) -> list[Float32]:
        """Those of Q too, whose room is free when K's is: of each row of blocks one."""
        return super().all_reads(results) + [results[m, 0, 0] for m in range(1, results.shape[0])]

    def store_rows(self, factors: list[Float32], glob: Int64, stride: Int32, rows_left: Int32) -> None:
        """By way of the warp's lanes alone, as shared memory fills with the next tile."""
        store_transposed(self.tOrO, factors, glob, stride, lane_anew(), rows_left, self.config.dtype)
