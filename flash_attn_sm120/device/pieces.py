"""Which piece of a decode a thread block computes: (batch, m_block, part of the keys).

All sequences together are cut into parts of one size, so that one long sequence among short ones is shared out as well
as many of one length. Only lengths on the device decide, so that a captured graph follows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
from cutlass import Int32, cute

from flash_attn_sm120.device.ptx import warp_sum
from flash_attn_sm120.device.seqlen import divide

WHOLE = 1 << 30  # granules of a part: all that a sequence can have


@dataclass(frozen=True)
class Piece:
    """split: number of the part; chunk: granules of a part. valid False: nothing to do."""

    batch: Int32
    m_block: Int32
    split: Int32
    chunk: Int32
    valid: cutlass.Boolean


def rounded_up(granules: Int32, unit: int) -> Int32:
    """At least one unit."""
    return cutlass.max(divide(granules + unit - 1, unit), Int32(1)) * unit


def parts(granules: Int32, chunk: Int32) -> Int32:
    """A sequence without keys has one part too, which writes that there are none."""
    return cutlass.max(divide(granules + chunk - 1, chunk), Int32(1))


@cute.jit
def before_and_own(value: Int32, lane: Int32) -> Int32:
    """Sum of the values of the lanes up to this one."""
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, offset=1 << step, mask_and_clamp=0)
        if lane >= 1 << step:
            value = value + below
    return value


@dataclass(frozen=True)
class Cut:
    """How sequences are cut: into parts of one size, of which `slots` make up all the work, but into no more than
    num_splits each. A part is a multiple of `unit` granules."""

    slots: Int32
    num_splits: Int32
    unit: int


def chunk_of(cut: Cut | None, work: Int32, granules: Int32) -> Int32:
    """Granules of a part of a sequence. work: granules of all sequences, once for each m_block; cut None: all."""
    if cut is None:
        return Int32(WHOLE)
    shared = divide(work + cut.slots - 1, cut.slots)
    own = divide(granules + cut.num_splits - 1, cut.num_splits)
    return rounded_up(cutlass.max(shared, own), cut.unit)


@cute.jit
def find_piece(
    extent: cutlass.Constexpr[Callable], cut: cutlass.Constexpr, index: Int32, batch: Int32, lane: Int32
) -> Piece:
    """The piece number `index`. extent(b) -> (m_blocks, granules) of a sequence; cut: None leaves sequences whole."""
    m_blocks, granules = extent(Int32(0))
    own = extent(cutlass.min(lane, batch - 1))  # here, so that its loads and those of sequence 0 are waited for once
    owner, before, chunk = Int32(0), Int32(0), chunk_of(cut, m_blocks * granules, granules)
    if batch > 1:
        owner, m_blocks, chunk, before = owner_of(extent, cut, index, batch, lane, *own)
    split, m_block = index - before, Int32(0)
    if m_blocks > 1:
        within = split
        split = divide(within, m_blocks)
        m_block = within - split * m_blocks
    valid = owner >= 0
    if batch == 1:
        valid = (split == 0) & (m_blocks > 0)
        if cutlass.const_expr(cut is not None):  # a sequence without rows has no granules
            valid = valid | (split * chunk < granules)  # not counting the parts spares a division
    return Piece(owner, m_block, split, chunk, valid)


@cute.jit
def owner_of(
    extent: cutlass.Constexpr[Callable],
    cut: cutlass.Constexpr,
    index: Int32,
    batch: Int32,
    lane: Int32,
    m_blocks: Int32,
    granules: Int32,
):
    """(sequence, its m_blocks, granules of its parts, pieces before it) for the piece number `index`: sequences one
    behind the other, in a sequence part after part, in a part its m_blocks; sequence -1 past the last piece.

    Every warp looks at 32 sequences at a time; m_blocks, granules: of the lane's among the first 32.
    """
    work = cutlass.select_(lane < batch, m_blocks * granules, Int32(0))
    for first in cutlass.range(32, batch, 32, unroll=1):
        if first + lane < batch:
            own_blocks, own_granules = extent(first + lane)
            work = work + own_blocks * own_granules
    work = warp_sum(work)
    found_batch, found_before, found_chunk, found_blocks = Int32(-1), Int32(0), Int32(1), Int32(1)
    before, first = Int32(0), Int32(0)
    while first < batch and found_batch < 0:
        mine = first + lane
        if first > 0 and mine < batch:
            m_blocks, granules = extent(mine)
        chunk = chunk_of(cut, work, granules)
        own = cutlass.select_(mine < batch, m_blocks * parts(granules, chunk), Int32(0))
        end = before_and_own(own, lane)
        holders = cute.arch.vote_ballot_sync(before + end > index)
        if holders != 0:
            owner = cute.arch.popc(~holders & (holders - 1))
            found_batch = first + owner
            found_blocks = cute.arch.shuffle_sync(m_blocks, owner)
            found_chunk = cute.arch.shuffle_sync(chunk, owner)
            found_before = before + cute.arch.shuffle_sync(end - own, owner)
        before = before + cute.arch.shuffle_sync(end, 31)
        first = first + 32
    return found_batch, found_blocks, found_chunk, found_before
