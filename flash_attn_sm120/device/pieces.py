"""Which piece of a decode a thread block computes: (batch, m_block, part of the keys).

All sequences together are cut into equal parts of `chunk` granules, so that one long sequence among short ones is shared
out as well as many of one length. Only lengths on the device decide, so that a captured graph follows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
from cutlass import Int32, cute

from flash_attn_sm120.device.paged_kv import divide


@dataclass(frozen=True)
class Piece:
    """splits: how many parts the sequence has, >= 1; chunk: granules of a part. valid False: nothing to do."""

    batch: Int32
    m_block: Int32
    split: Int32
    splits: Int32
    chunk: Int32
    valid: cutlass.Boolean


def parts(granules: Int32, chunk: Int32) -> Int32:
    """A sequence without keys has one part too, which writes that there are none."""
    return cutlass.max(divide(granules + chunk - 1, chunk), Int32(1))


@cute.jit
def warp_sum(value: Int32) -> Int32:
    for step in cutlass.range_constexpr(5):
        value = value + cute.arch.shuffle_sync_bfly(value, offset=1 << step)
    return value


@cute.jit
def before_and_own(value: Int32, lane: Int32) -> Int32:
    """Sum of the values of the lanes up to this one."""
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, offset=1 << step, mask_and_clamp=0)
        if lane >= 1 << step:
            value = value + below
    return value


@cute.jit
def chunk_for(
    extent: cutlass.Constexpr[Callable], batch: Int32, num_splits: Int32, unit: cutlass.Constexpr, lane: Int32
) -> Int32:
    """Granules of a part, a multiple of `unit`, so that no sequence has more than num_splits and all have num_splits +
    batch parts at most. extent(b) -> (m_blocks, granules) of a sequence."""
    work = Int32(0)
    for first in cutlass.range(0, batch, 32, unroll=1):
        index = first + lane
        if index < batch:
            m_blocks, granules = extent(index)
            work = work + m_blocks * granules
    if batch > 1:
        work = warp_sum(work)
    else:
        work = cute.arch.shuffle_sync(work, 0)
    chunk = divide(work + num_splits - 1, num_splits)
    return cutlass.max(divide(chunk + unit - 1, unit), Int32(1)) * unit


@cute.jit
def find_piece(
    extent: cutlass.Constexpr[Callable], index: Int32, batch: Int32, chunk: Int32, lane: Int32
) -> Piece:
    """The piece number `index`: sequences one behind the other, in a sequence part after part, in a part its m_blocks.

    Every warp looks at 32 sequences at a time; an index past the last piece gives an invalid one.
    """
    found_batch, found_before = Int32(-1), Int32(0)
    found_blocks, found_splits = Int32(1), Int32(1)
    before, first = Int32(0), Int32(0)
    while first < batch and found_batch < 0:
        mine = first + lane
        m_blocks, splits = Int32(0), Int32(0)
        if mine < batch:
            m_blocks, granules = extent(mine)
            splits = parts(granules, chunk)
        end = m_blocks * splits
        if batch > 1:
            end = before_and_own(end, lane)
        holders = cute.arch.vote_ballot_sync(before + end > index)
        if holders != 0:
            owner = cute.arch.popc(~holders & (holders - 1))
            found_batch = first + owner
            found_blocks = cute.arch.shuffle_sync(m_blocks, owner)
            found_splits = cute.arch.shuffle_sync(splits, owner)
            found_before = before + cute.arch.shuffle_sync(end, owner) - found_blocks * found_splits
        before = before + cute.arch.shuffle_sync(end, 31)
        first = first + 32
    within = cutlass.max(index - found_before, Int32(0))
    split = divide(within, found_blocks)
    return Piece(found_batch, within - split * found_blocks, split, found_splits, chunk, found_batch >= 0)
