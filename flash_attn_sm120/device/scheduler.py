"""Which tile a thread block computes: heaviest first, and neighbours that share K and V in L2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.block_range import BlockRange
from flash_attn_sm120.device.ptx import load_shared_v4, store_shared_b32, take_ticket
from flash_attn_sm120.device.seqlen import Sequence, clamp

L2_BYTES_FOR_KV = 16 << 20  # of the 24 MB that the smallest chip of the family has


@dataclass(frozen=True)
class Tile:
    """valid False: nothing to do."""

    m_block: Int32
    head: Int32
    batch: Int32
    valid: cutlass.Boolean


@dataclass(frozen=True)
class TileQueue:
    """Tiles 0 <= index < count. The first `blocks` of them are the thread blocks' own, that of this one `first`; the
    others go to who asks next.

    locate: index -> (Tile, BlockRange). ticket: address of a counter of the questions, which come to `count` in all,
    one for each tile that a block had; the last one leaves it at 0."""

    locate: Callable
    count: Int32
    first: Int32
    blocks: Int32
    ticket: Int64

    @cute.jit
    def next(self, lane: Int32):
        """Index of the block's next tile, at least `count` where there is none; asked by a warp when the one before is
        about to be done, as who asks early takes a tile that others could have begun."""
        ticket = Int32(0)
        if lane == 0:
            ticket = take_ticket(self.ticket, self.count - 1)
        return self.blocks + cute.arch.shuffle_sync(ticket, 0)


def write_tile_note(
    shared: Int32, first_row: Int32, tile: Tile, seq_q: Sequence, seqlen_k: Int32, total_k: Int32, blocks: BlockRange
) -> None:
    """Keeps in shared memory what is needed seldom, so that no register holds it through the main loop."""
    shift = total_k - seq_q.length
    values = (first_row, tile.head, tile.batch, seqlen_k, seq_q.start, seq_q.length, seq_q.room, shift)
    values += (blocks.begin, blocks.end, blocks.left_edge, blocks.right_edge)  # read in fours
    for i, value in enumerate(values):
        store_shared_b32(shared + 4 * i, value)


def write_second_note(shared: Int32, offset_k: Int32, lists: tuple) -> None:
    """What changes need, likewise. offset_k: of SeqlenInfo; lists: (tiles of the mask list, tiles of the full list,
    address of the first's blocks, of the second's)."""
    zero = Int32(0)
    words = [offset_k, zero, zero, zero, *lists[:2], zero, zero]  # read in fours
    words += [word for address in lists[2:] for word in (Int32(address), Int32(address >> 32))]
    for i, word in enumerate(words):
        store_shared_b32(shared + 4 * i, word)


def read_tile_note(shared: Int32, packed: bool) -> tuple[Int32, Int32, Int32, Sequence]:
    """(first_row, head, batch, seq_q) as written."""
    first_row, head, batch, _ = load_shared_v4(shared)
    start, length, room, _ = load_shared_v4(shared + 16)
    return first_row, head, batch, Sequence(start, Int32(0) if packed else batch, length, room)


def read_blocks(shared: Int32) -> BlockRange:
    """As written."""
    return BlockRange(*load_shared_v4(shared + 32))


def read_block_count(shared: Int32) -> Int32:
    begin, end, _, _ = load_shared_v4(shared + 32)
    return end - begin


@dataclass(frozen=True)
class Positions:
    """first_row: of the tile. shift: from a row to its position, total_k - seqlen_q. seqlen_k: local columns; total_k:
    those of all context-parallel ranks."""

    first_row: Int32
    shift: Int32
    seqlen_k: Int32
    total_k: Int32


def read_positions(shared: Int32) -> Positions:
    """As written."""
    first_row, _, _, seqlen_k = load_shared_v4(shared)
    _, seqlen_q, _, shift = load_shared_v4(shared + 16)
    return Positions(first_row, shift, seqlen_k, seqlen_q + shift)


def dense_tile(block: Int32, m_blocks: Int32, heads: Int32, batch: Int32, group: Int32) -> Tile:
    """block in [0, m_blocks * heads * batch). Heads (of all batches) go in groups whose K and V fit L2; in a group the
    last m_block, which has the most KV blocks under a causal mask, comes first, for all of its heads."""
    all_heads = heads * batch
    section = block // (group * m_blocks)
    within = block - section * group * m_blocks
    first = section * group
    width = cutlass.min(group, all_heads - first)
    turn = within // width
    flat = first + within - turn * width
    index = flat // heads
    return Tile(m_blocks - 1 - turn, flat - index * heads, index, cutlass.Boolean(True))


def heads_in_l2(heads_per_kv: Int32, seqlen_k: Int32, kv_row_bytes: int) -> Int32:
    """How many query heads' K and V (seqlen_k rows of kv_row_bytes each) L2 holds together."""
    held = Int32(L2_BYTES_FOR_KV // kv_row_bytes) // cutlass.max(seqlen_k, Int32(1))
    return cutlass.max(held, Int32(1)) * heads_per_kv


@cute.jit
def find_sequence(block: Int32, batch: Int32, count_of: cutlass.Constexpr, lane: Int32) -> tuple[Int32, Int32, Int32]:
    """Whose `block` is where sequence i has count_of(i) blocks, one sequence's behind another's: (sequence, or -1 past
    the last block; the block's number in it; its count). Every warp looks 32 sequences at a time."""
    found_batch, found_block, found_count = Int32(-1), Int32(0), Int32(0)
    blocks_before = Int32(0)
    first = Int32(0)
    while first < batch and found_batch < 0:
        index = first + lane
        count = Int32(0)
        if index < batch:
            count = count_of(index)
        before_end = count
        for step in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(before_end, offset=1 << step, mask_and_clamp=0)
            if lane >= 1 << step:
                before_end = before_end + below
        holders = cute.arch.vote_ballot_sync(blocks_before + before_end > block)
        if holders != 0:
            owner = cute.arch.popc(~holders & (holders - 1))
            found_batch = first + owner
            found_count = cute.arch.shuffle_sync(count, owner)
            found_block = block - (blocks_before + cute.arch.shuffle_sync(before_end, owner) - found_count)
        blocks_before = blocks_before + cute.arch.shuffle_sync(before_end, 31)
        first = first + 32
    return found_batch, found_block, found_count


def packed_tile(
    block: Int32, head: Int32, batch: Int32, total: Int32, mCuSeqlensQ: cute.Tensor, tile_m: int, lane: Int32
) -> Tile:
    """block in [0, total // tile_m + batch), an upper bound of the tiles that a head's sequences have together; a block
    past the last tile is invalid."""

    def count_of(index: Int32) -> Int32:
        start = clamp(mCuSeqlensQ[index], Int32(0), total)
        return (clamp(mCuSeqlensQ[index + 1], start, total) - start + tile_m - 1) // tile_m

    found_batch, found_tile, found_count = find_sequence(block, batch, count_of, lane)
    return Tile(found_count - 1 - found_tile, head, found_batch, found_batch >= 0)
