"""One Q tile against the KV blocks that lists name: those of the mask list, then those of the full list, ascending.

A listed block holds one tile of K and V or several.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.ptx import (
    load_global_b32_if,
    load_shared_b32,
    load_shared_v4,
    store_shared_b32,
)
from flash_attn_sm120.device.scheduler import read_blocks
from flash_attn_sm120.device.seqlen import clamp, divide
from flash_attn_sm120.dispatch import SECOND_NOTE_BYTES

FIRST = 3  # tiles whose numbers are read at the start
EDGE = 1 << 30  # beside a tile's number: it is at an edge of what may be seen


def address_of(tensor: cute.Tensor, place: tuple) -> Int64:
    """Of the 32-bit element at `place`, the first coordinates; those left out are 0."""
    steps = zip(place, tensor.stride[: len(place)], strict=True)
    return tensor.iterator.toint() + sum((Int64(at) * Int64(stride) for at, stride in steps), Int64(0)) * 4


class SparseTile(ForwardTile):
    """A ForwardTile whose blocks are listed. Its arguments are ForwardTile's."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.first = cute.make_rmem_tensor((FIRST,), Int32)  # of a loading warp: numbers of the first tiles

    @property
    def tiles_a_block(self) -> int:
        return self.config.problem.sparse_block[1] // self.config.plan.tile_n

    @property
    def masks(self) -> bool:
        """Whether there is a mask list."""
        return self.config.problem.mask_mod is not None

    def listed(self) -> tuple[Int32, Int32, Int64, Int64]:
        """(tiles of the mask list, of the full list, address of the first's blocks, of the second's)."""
        lists = self.modifiers.blocks
        mask_tiles, mask_at = Int32(0), Int64(0)
        if self.masks:
            mask_tiles, mask_at = self._listed(lists.mask_cnt, lists.mask_idx)
        full_tiles, full_at = self._listed(lists.full_cnt, lists.full_idx)
        return mask_tiles, full_tiles, mask_at, full_at

    def _listed(self, cnt: cute.Tensor, idx: cute.Tensor) -> tuple[Int32, Int64]:
        """(tiles, address of the blocks) of one list."""
        tile, exists = self.tile, self.has_row(cnt)
        place = (tile.batch, tile.head, cutlass.min(self.sparse_row(), cnt.shape[2] - 1))
        count = load_global_b32_if(address_of(cnt, place), Int32(exists))
        return clamp(count, Int32(0), idx.shape[3]) * self.tiles_a_block, address_of(idx, place)

    def sparse_row(self) -> Int32:
        """Of the lists."""
        return divide(self.tile.m_block, self.config.problem.sparse_block[0] // self.config.plan.tile_m)

    def has_row(self, cnt: cute.Tensor) -> cutlass.Boolean:
        """Whether lists say anything of the tile's rows."""
        return (self.sparse_row() < cnt.shape[2]) & (self.seq_q.length > 0) & (self.seq_k.length > 0)

    def number(self, i: Int32) -> Int32:
        """Of K's and V's tiles, the i-th that is listed. Whatever the lists hold, it is neither negative nor far beyond
        the sequence's end, which loads and masks know."""
        _, _, _, seqlen_k = load_shared_v4(self.note)
        mask_tiles, full_tiles = self.counts()
        words = load_shared_v4(self.second_note + 32)
        masked = i < mask_tiles
        low, high = (cutlass.select_(masked, words[word], words[word + 2]) for word in range(2))
        j = i - cutlass.select_(masked, Int32(0), mask_tiles)
        address = Int64(cutlass.Uint32(low)) | Int64(high) << 32
        return self.load_number(address, j, i < mask_tiles + full_tiles, seqlen_k)

    def first_numbers(self, mask_tiles: Int32, full_tiles: Int32, mask_at: Int64, full_at: Int64) -> list[Int32]:
        """The first three, as number gives them, before there is a note. Without a mask list their loads don't wait for
        the counts."""
        found, full_cnt, width = [], self.modifiers.blocks.full_cnt, self.modifiers.blocks.full_idx.shape[3]
        for i in range(FIRST):
            if self.masks:
                masked = i < mask_tiles
                j = i - cutlass.select_(masked, Int32(0), mask_tiles)
                address, exists = cutlass.select_(masked, mask_at, full_at), i < mask_tiles + full_tiles
            else:
                j, address = Int32(i), full_at
                exists = self.has_row(full_cnt) & (i // self.tiles_a_block < width)
            found.append(self.load_number(address, j, exists, self.seq_k.length))
        return found

    def load_number(self, address: Int64, j: Int32, exists: cutlass.Boolean, seqlen_k: Int32) -> Int32:
        """Of the j-th tile of the list at an address."""
        within = divide(j, self.tiles_a_block)
        block = load_global_b32_if(address + Int64(within) * 4, Int32(exists))
        return self.first_tile(block, seqlen_k) + (j - within * self.tiles_a_block)

    def first_tile(self, block: Int32, seqlen_k: Int32) -> Int32:
        """Of a listed block, which is at most the one behind the sequence's end."""
        cols = self.config.problem.sparse_block[1]
        return clamp(block, Int32(0), divide(seqlen_k + (cols - 1), cols)) * self.tiles_a_block

    def number_anew(self, i: Int32) -> Int32:
        return load_shared_b32(self.told_at(i)) & (EDGE - 1)

    def counts(self) -> tuple[Int32, Int32]:
        """(tiles of the mask list, of the full list) as write_note wrote them."""
        mask_tiles, full_tiles, _, _ = load_shared_v4(self.second_note + 16)
        return mask_tiles, full_tiles

    @cute.jit
    def load_first(self, blocks: BlockRange):
        """Before there is a note to read."""
        mask_tiles, full_tiles, mask_at, full_at = self.listed()
        for i, bs_n in enumerate(self.first_numbers(mask_tiles, full_tiles, mask_at, full_at)):
            self.first[i] = bs_n
        if mask_tiles + full_tiles > 0:
            self.loader.start_list(self.first[0])
            self.loader.load_listed(self.first[0], self.first[0], self.stage(0), lambda: None)

    @cute.jit
    def feed(self, blocks: BlockRange):
        """A loading warp. The next tile's number is on its way while it waits for room."""
        self.tell(Int32(0), self.first[0])
        self.tell(Int32(1), self.first[1])
        self.told(Int32(0))
        mask_tiles, full_tiles = self.counts()
        bs_n, bs_next = self.first[1], self.first[2]
        self.loader.start_list(bs_n)
        for i in cutlass.range(1, mask_tiles + full_tiles, unroll=1):
            bs_after = self.number(i + 2)
            self.loader.load_listed(bs_n, bs_next, self.stage(i), lambda i=i, n=bs_next: self.tell_next(i, n))
            bs_n, bs_next = bs_next, bs_after

    def tell_next(self, i: Int32, n: Int32) -> None:
        """With the i-th tile's K, n of the next, so that no matrix warp works it out again."""
        self.tell(i + 1, n)
        self.told(i)

    @cute.jit
    def tell(self, i: Int32, n: Int32):
        """Writes down the i-th tile's number for the matrix warps."""
        blocks = read_blocks(self.note)
        edge = (n >= blocks.right_edge) | (n < blocks.left_edge)
        if (self.warp == self.config.plan.num_warps) & (self.lane == 0):
            store_shared_b32(self.told_at(i), n | cutlass.select_(edge, Int32(EDGE), Int32(0)))

    @cute.jit
    def told(self, i: Int32):
        if self.warp == self.config.plan.num_warps:
            self.arrive(self.stage(i).bars["k_full"], None)

    def told_at(self, i: Int32) -> Int32:
        """Where the i-th tile's number lies until the third one after it has room."""
        return self.second_note + SECOND_NOTE_BYTES + (i & 3) * 4

    def notices(self, barrier: str) -> int:
        return super().notices(barrier) + (barrier == "k_full")

    @cute.jit
    def multiply(self):
        """A matrix warp: the mask list's blocks, whose places mask_mod says, then the full list's."""
        self.start_multiplying()
        self.at_edge, bs_i = None, Int32(0)
        if cutlass.const_expr(self.config.problem.mask_mod is not None):
            while bs_i < self.counts()[0]:
                self.find_q()
                self.stage(bs_i).wait_for_k()
                self.block(None, bs_i, True, True)
                bs_i = bs_i + 1
        self.at_edge = cute.make_rmem_tensor((1,), Int32)
        blocks, bs_n = read_blocks(self.note), self.number(bs_i)
        self.at_edge[0] = Int32((bs_n >= blocks.right_edge) | (bs_n < blocks.left_edge))
        while bs_i < self.counts()[0] + self.counts()[1]:
            self.find_q()
            self.stage(bs_i).wait_for_k()
            self.visit_listed(bs_i)
            bs_i = bs_i + 1
        self.stop_multiplying()

    @cute.jit
    def visit_listed(self, i: Int32):
        """The i-th block, of the full list. ptxas gives the body that stands first the better registers."""
        if cutlass.const_expr(self.config.problem.mask == "full"):
            if self.at_edge[0] == 0:
                self.block(None, i, False, False)
            else:
                self.block(None, i, True, False)
        else:
            if self.at_edge[0] != 0:
                self.block(None, i, True, False)
            else:
                self.block(None, i, False, False)

    def look_ahead(self, i: Int32) -> None:
        """While the i-th block is worked on: whether the next is at an edge."""
        if self.at_edge is not None:  # in the mask list it makes no difference
            self.at_edge[0] = load_shared_b32(self.told_at(i + 1)) & EDGE

    @property
    def holds_q_place(self) -> bool:
        return not self.fills_registers

    @property
    def elects(self) -> bool:
        """Not where registers are short: ptxas keeps what it elects with."""
        return super().elects and not self.fills_registers
