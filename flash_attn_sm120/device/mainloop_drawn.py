"""A tile with dropout whose numbers the idle loading warps draw, beside the products; a bit a weight says what stays.

They take as many instructions as a third of the rest, which a matrix warp would have to fit between its products.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute

from flash_attn_sm120.device.dropout import compared, drop, packed_signs, philox, unpacked_signs
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.ptx import (
    lane_anew,
    load_shared_v2,
    load_shared_v4,
    mbarrier_arrive_after,
    store_shared_b32,
    thread_anew,
)
from flash_attn_sm120.device.scheduler import read_block_count
from flash_attn_sm120.dispatch import drawn_bits_bytes

LANE_BYTES = 8  # of what a lane keeps of a block: a word for each of its two strips of 16 rows by 64 columns


class DrawnTile(ForwardTile):
    """A ForwardTile of 32 rows a warp and 64 columns. A matrix warp has room for what it keeps of one block, and two
    mbarriers: one says that both strips are written, the other that they are read."""

    @property
    def drawn(self) -> Int32:
        """Where that lies."""
        return self.note - self.config.plan.drawn_bytes

    @property
    def strips(self) -> int:
        """Of the tile: a power of two."""
        return self.config.plan.tile_m // 16

    def barriers_of(self, warp: Int32) -> tuple[cute.Pointer, cute.Pointer]:
        """(written, read) of a matrix warp."""
        shared = self.drawn + drawn_bits_bytes(self.config.plan) + 16 * warp
        written = cute.make_ptr(cutlass.Int64, shared, cute.AddressSpace.smem, assumed_align=8)
        return written, written + 1

    def init_barriers(self) -> None:
        super().init_barriers()
        for warp in range(self.config.plan.num_warps):
            written, read = self.barriers_of(Int32(warp))
            cute.arch.mbarrier_init(written, 2)
            cute.arch.mbarrier_init(read, 1)

    @cute.jit
    def draw(self):
        """A drawing warp: every third or so of the strips, block after block, each as soon as its matrix warp has read
        that of the block before."""
        j = self.first_strip()
        while self.block_of(j) < read_block_count(self.note):
            i = self.block_of(j)
            strip = j - i * self.strips
            word = self.draw_strip(self.number_anew(i), strip)
            written, read = self.barriers_of(strip >> 1)
            cute.arch.mbarrier_wait(read, (i & 1) ^ 1)
            place = (strip >> 1) * (32 * LANE_BYTES) + (strip & 1) * 4
            store_shared_b32(self.drawn + place + lane_anew() * LANE_BYTES, word)
            self.arrive(written, None)
            j = self.next_strip(j)

    def first_strip(self) -> Int32:
        """That the warp has."""
        plan = self.config.plan
        return self.warp - (plan.num_warps + plan.loading_warps - plan.drawing_warps)

    def next_strip(self, j: Int32) -> Int32:
        """Strips are counted on from block to block, and a warp has the same of each."""
        after = j + self.config.plan.drawing_warps
        within = after & self.strips - 1
        return after - cutlass.select_(within < self.config.plan.drawing_warps, within - self.first_strip(), Int32(0))

    def block_of(self, j: Int32) -> Int32:
        return j >> self.strips.bit_length() - 1

    def draw_strip(self, n: Int32, strip: Int32) -> Int32:
        """What stays of a strip of block n, as unpacked_signs takes it. Registers are few here, so the threshold is read
        once the numbers are drawn."""
        first_row, head, batch, _ = load_shared_v4(self.note)
        _, low, high, _ = load_shared_v4(self.second_note)
        lane = lane_anew()
        row = (first_row >> 1) + 8 * strip + lane // 4
        group = 8 * n + lane % 4
        drawn = [philox((group + 4 * half, row, head, batch), (low, high)) for half in range(2)]
        _, _, _, threshold = load_shared_v4(self.second_note)
        _, _, carry, _ = load_shared_v4(self.second_note + 16)
        return packed_signs([compared(words, threshold, carry) for words in drawn])

    def wait_for_v(self, i: Int32) -> None:
        """And for what is drawn, so that no further wait splits the softmax."""
        super().wait_for_v(i)
        written, _ = self.barriers_of(thread_anew() >> 5)
        cute.arch.mbarrier_wait(written, i & 1)

    def drop(self, tOrP: list, i: Int32) -> list:
        words = load_shared_v2(self.drawn + thread_anew() * LANE_BYTES)
        left = drop(tOrP, [unpacked_signs(word) for word in words])
        self.give_back([left[0][0][0].bitcast(Float32)])
        return left

    def skip(self, i: Int32) -> None:
        super().skip(i)
        self.give_back([])

    def give_back(self, results: list[Float32]) -> None:
        """What is drawn has been read; results: what depends on it, no NaN."""
        cute.arch.sync_warp()
        _, read = self.barriers_of(thread_anew() >> 5)
        mbarrier_arrive_after(read.toint(), results, Int32(self.lane == 0))
