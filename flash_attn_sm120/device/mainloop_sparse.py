"""One Q tile against the KV blocks that lists name: those of the mask list, then those of the full list, ascending.

A listed block holds one tile of K and V or several.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.mainloop import ForwardTile
from flash_attn_sm120.device.ptx import load_global_b32_if, load_shared_v4
from flash_attn_sm120.device.scheduler import read_blocks
from flash_attn_sm120.device.seqlen import clamp, divide


class SparseTile(ForwardTile):
    """A ForwardTile whose blocks are listed."""

    @property
    def tiles_a_block(self) -> int:
        return self.config.problem.sparse_block[1] // self.config.plan.tile_n

    @property
    def starts_early(self) -> bool:
        return False

    def listed(self) -> tuple[Int32, Int32, Int64, Int64]:
        """(tiles of the mask list, of the full list, address of the first's blocks, of the second's)."""
        lists, tile = self.modifiers.blocks, self.tile
        row = divide(tile.m_block, self.config.problem.sparse_block[0] // self.config.plan.tile_m)
        counts, addresses = [], []
        for cnt, idx in ((lists.mask_cnt, lists.mask_idx), (lists.full_cnt, lists.full_idx)):
            place = (tile.batch, tile.head, cutlass.min(row, cnt.shape[2] - 1))
            steps = zip(place, cnt.stride, strict=True)
            offset = sum((Int64(at) * Int64(stride) for at, stride in steps), Int64(0))
            exists = (row < cnt.shape[2]) & (self.seq_q.length > 0) & (self.seq_k.length > 0)
            count = load_global_b32_if(cnt.iterator.toint() + offset * 4, Int32(exists))
            counts.append(clamp(count, Int32(0), idx.shape[3]) * self.tiles_a_block)
            steps = zip(place, idx.stride[:3], strict=True)
            offset = sum((Int64(at) * Int64(stride) for at, stride in steps), Int64(0))
            addresses.append(idx.iterator.toint() + offset * 4)
        return (*counts, *addresses)

    def number(self, i: Int32) -> Int32:
        """Of K's and V's tiles, the i-th that is listed. Whatever the lists hold, it is neither negative nor far beyond
        the sequence's end, which loads and masks know."""
        _, _, _, seqlen_k = load_shared_v4(self.note)
        mask_tiles, full_tiles = self.counts()
        words = load_shared_v4(self.second_note + 32)
        masked = i < mask_tiles
        low, high = (cutlass.select_(masked, words[word], words[word + 2]) for word in range(2))
        j = i - cutlass.select_(masked, Int32(0), mask_tiles)
        within = divide(j, self.tiles_a_block)
        address = Int64(cutlass.Uint32(low)) | Int64(high) << 32
        block = load_global_b32_if(address + Int64(within) * 4, Int32(i < mask_tiles + full_tiles))
        cols = self.config.problem.sparse_block[1]
        block = clamp(block, Int32(0), divide(seqlen_k + (cols - 1), cols))  # of the last, the one behind the end
        return block * self.tiles_a_block + (j - within * self.tiles_a_block)

    def number_anew(self, i: Int32) -> Int32:
        return self.number(i)

    def counts(self) -> tuple[Int32, Int32]:
        """(tiles of the mask list, of the full list) as write_note wrote them."""
        mask_tiles, full_tiles, _, _ = load_shared_v4(self.second_note + 16)
        return mask_tiles, full_tiles

    @cute.jit
    def feed(self, blocks: BlockRange):
        """A loading warp. The next tile's number is on its way while it waits for room."""
        mask_tiles, full_tiles = self.counts()
        bs_n = self.number(Int32(0))
        self.loader.start_list(bs_n)
        for i in cutlass.range(mask_tiles + full_tiles, unroll=1):
            bs_next = self.number(i + 1)
            self.loader.load_listed(bs_n, bs_next, self.stage(i))
            bs_n = bs_next

    @cute.jit
    def multiply(self):
        """A matrix warp: the mask list's blocks, whose places mask_mod says, then the full list's."""
        self.start_multiplying()
        self.at_edge, bs_i = None, Int32(0)
        if cutlass.const_expr(self.config.problem.mask_mod is not None):
            while bs_i < self.counts()[0]:
                self.stage(bs_i).wait_for_k()
                self.block(None, bs_i, True, True)
                bs_i = bs_i + 1
        self.at_edge = cute.make_rmem_tensor((1,), Int32)
        self.look_ahead(bs_i - 1)
        while bs_i < self.counts()[0] + self.counts()[1]:
            self.stage(bs_i).wait_for_k()
            if self.at_edge[0] != 0:
                self.block(None, bs_i, True, False)
            else:
                self.block(None, bs_i, False, False)
            bs_i = bs_i + 1
        self.stop_multiplying()

    def look_ahead(self, i: Int32) -> None:
        """Finds out, while the i-th block is worked on, whether the next is at an edge: lists take time to be read."""
        if self.at_edge is None:  # in the mask list it makes no difference
            return
        blocks, n = read_blocks(self.note), self.number(i + 1)
        self.at_edge[0] = Int32((n >= blocks.right_edge) | (n < blocks.left_edge))
