"""A tile with dropout whose numbers the idle loading warps draw, beside the products; a bit a weight says what goes.

A matrix warp would have to fit that between its products.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute

from flash_attn_sm120.device.dropout import GROUP, drop
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.ptx import (
    lane_anew,
    load_shared_v2,
    mbarrier_arrive_after,
    store_shared_v2,
    thread_anew,
)
from flash_attn_sm120.device.scheduler import read_block_count

LANE_BYTES = 8  # of a block, of a matrix warp's lane: the words of two groups


class DrawnTile(ForwardTile):
    """A ForwardTile of 32 rows a warp and 64 columns. There is room for what is drawn of one block; that all of it is
    written, V's barrier says, and that a matrix warp has read its part, an mbarrier of the warp."""

    @property
    def drawn(self) -> Int32:
        """Where that lies."""
        return self.note - self.config.plan.drawn_bytes

    def is_read(self, warp: Int32) -> cute.Pointer:
        """The mbarrier of a matrix warp."""
        shared = self.drawn + self.config.plan.num_warps * (32 * LANE_BYTES) + 8 * warp
        return cute.make_ptr(cutlass.Int64, shared, cute.AddressSpace.smem, assumed_align=8)

    def init_barriers(self) -> None:
        super().init_barriers()
        for warp in range(self.config.plan.num_warps):
            cute.arch.mbarrier_init(self.is_read(Int32(warp)), 1)

    def notices(self, barrier: str) -> int:
        return super().notices(barrier) + (self.config.plan.num_warps if barrier == "v_full" else 0)

    @cute.jit
    def draw(self):
        """A drawing warp: for every third or so of the matrix warps, block after block."""
        plan = self.config.plan
        first = self.warp - (plan.num_warps + plan.loading_warps - plan.drawing_warps)
        i, warp = Int32(0), first
        while i < read_block_count(self.note):
            self.draw_for(warp, i)
            warp = warp + plan.drawing_warps
            if warp >= plan.num_warps:
                i, warp = i + 1, first

    def draw_for(self, warp: Int32, i: Int32) -> None:
        """A matrix warp's part of the i-th block."""
        words = self.dropper(i, warp, lane_anew()).draw(2, 2 * GROUP // 8)
        cute.arch.mbarrier_wait(self.is_read(warp), (i & 1) ^ 1)
        store_shared_v2(self.drawn + (warp * 32 + lane_anew()) * LANE_BYTES, words)
        self.arrive(self.stage(i).bars["v_full"], None)

    def drop(self, tOrP: list, i: Int32) -> list:
        left = drop(tOrP, load_shared_v2(self.drawn + thread_anew() * LANE_BYTES))
        self.give_back([left[0][0][0].bitcast(Float32)])
        return left

    def skip(self, i: Int32) -> None:
        super().skip(i)
        self.give_back([])

    def give_back(self, results: list[Float32]) -> None:
        """What is drawn has been read. results: what depends on it, no NaN."""
        cute.arch.sync_warp()
        mbarrier_arrive_after(self.is_read(thread_anew() >> 5).toint(), results, Int32(self.lane == 0))
