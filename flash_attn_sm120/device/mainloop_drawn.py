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
    load_shared_b32,
    load_shared_v2,
    mbarrier_arrive_after,
    store_shared_b32,
    store_shared_v2,
    thread_anew,
)
from flash_attn_sm120.device.scheduler import read_block_count


class DrawnTile(ForwardTile):
    """A ForwardTile of 32 or 64 columns. There is room for what is drawn of one block; that all of it is written, V's
    barrier says, and that the matrix warps of a strip of 32 rows have read theirs, an mbarrier of the strip."""

    @property
    def drawn(self) -> Int32:
        """Where that lies: of a strip, of a lane, a word for each 32 columns."""
        return self.note - self.config.plan.drawn_bytes

    @property
    def strips(self) -> int:
        return self.config.plan.tile_m // GROUP

    @property
    def lane_bytes(self) -> int:
        return self.config.plan.tile_n // GROUP * 4

    def strip_of(self, warp: Int32) -> Int32:
        """Of a matrix warp."""
        return warp >> (GROUP // self.config.warp_rows).bit_length() - 1

    def is_read(self, strip: Int32) -> cute.Pointer:
        """Its mbarrier."""
        shared = self.drawn + self.strips * (32 * self.lane_bytes) + 8 * strip
        return cute.make_ptr(cutlass.Int64, shared, cute.AddressSpace.smem, assumed_align=8)

    def init_barriers(self) -> None:
        super().init_barriers()
        for strip in range(self.strips):
            cute.arch.mbarrier_init(self.is_read(Int32(strip)), GROUP // self.config.warp_rows)

    def notices(self, barrier: str) -> int:
        return super().notices(barrier) + (self.strips if barrier == "v_full" else 0)

    @cute.jit
    def draw(self):
        """A drawing warp: every third or so of the strips, block after block."""
        plan = self.config.plan
        first = self.warp - (plan.num_warps + plan.loading_warps - plan.drawing_warps)
        i, strip = Int32(0), first
        while i < read_block_count(self.note):
            self.draw_strip(strip, i)
            strip = strip + plan.drawing_warps
            if strip >= self.strips:
                i, strip = i + 1, first

    def draw_strip(self, strip: Int32, i: Int32) -> None:
        """Of the i-th block."""
        plan = self.config.plan
        words = self.dropper(i, strip * (GROUP // self.config.warp_rows), lane_anew()).draw(plan.tile_n)
        cute.arch.mbarrier_wait(self.is_read(strip), (i & 1) ^ 1)
        place = self.drawn + (strip * 32 + lane_anew()) * self.lane_bytes
        if len(words) == 1:
            store_shared_b32(place, words[0])
        else:
            store_shared_v2(place, words)
        self.arrive(self.stage(i).bars["v_full"], None)

    def drop(self, tOrP: list, i: Int32) -> list:
        place = self.strip_of(thread_anew() >> 5) * 32 + lane_anew() if self.config.warp_rows < GROUP else thread_anew()
        place = self.drawn + place * self.lane_bytes
        left = drop(tOrP, [load_shared_b32(place)] if self.lane_bytes == 4 else load_shared_v2(place))
        self.give_back([left[0][0][0].bitcast(Float32)])
        return left

    def skip(self, i: Int32) -> None:
        super().skip(i)
        self.give_back([])

    def give_back(self, results: list[Float32]) -> None:
        """What is drawn has been read. results: what depends on it, no NaN."""
        cute.arch.sync_warp()
        strip = self.strip_of(thread_anew() >> 5)
        mbarrier_arrive_after(self.is_read(strip).toint(), results, Int32(self.lane == 0))
