"""Two query groups on one KV head, cut into strips: which strips a thread block has, and which KV blocks it goes over.

A strip is the rows of one warp: neighbouring rows of one query head of one group. Those of a sequence and KV head stand
in the order of how far they reach, heads side by side, and a thread block has as many neighbours as it has warps. So
its strips need nearly the same keys, whichever group or head they belong to, and the ranges' union is little more than
each range.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, cute

from flash_attn_sm120.device.block_range import BlockRange, block_range
from flash_attn_sm120.device.ptx import load_shared_v2, load_shared_v4, store_shared_v4
from flash_attn_sm120.device.scheduler import find_sequence
from flash_attn_sm120.device.seqlen import Sequence, clamp, divide
from flash_attn_sm120.problem import AttentionProblem

FAR = 1 << 30  # beyond any block


@dataclass(frozen=True)
class Place:
    """Where a thread block stands: which of the sequence's blocks of strips it has. valid False: nothing to do."""

    batch: Int32
    first_strip: Int32
    valid: cutlass.Boolean


def find_place(
    block: Int32,
    batch: Int32,
    totals: tuple,
    marks: tuple,
    heads_per_kv: Int32,
    strip_rows: int,
    warps: int,
    lane: Int32,
) -> Place:
    """block in [0, most_blocks(...)). totals, marks: rows and cu_seqlens of both groups' tensors."""

    def count_of(index: Int32) -> Int32:
        strips = Int32(0)
        for total, mark in zip(totals, marks, strict=True):
            start = clamp(mark[index], Int32(0), total)
            strips = strips + (clamp(mark[index + 1], start, total) - start + strip_rows - 1) // strip_rows
        return (strips * heads_per_kv + warps - 1) // warps

    found_batch, found_block, _ = find_sequence(block, batch, count_of, lane)
    return Place(found_batch, found_block * warps, found_batch >= 0)


def most_blocks(totals: tuple, batch: Int32, heads_per_kv: Int32, strip_rows: int, warps: int) -> Int32:
    """At least the thread blocks that a KV head's sequences have together."""
    strips = sum((total // strip_rows + batch for total in totals), Int32(0)) * heads_per_kv
    return strips // warps + batch


@dataclass(frozen=True)
class Strip:
    """group: 0 or 1. first_row: in the sequence. head: query head. seq_q: the group's rows of the sequence. seqlen_k:
    keys in the group's range. blocks: what the strip's rows see; all 0 where it has no rows or they see nothing."""

    group: Int32
    first_row: Int32
    head: Int32
    seq_q: Sequence
    seqlen_k: Int32
    blocks: BlockRange


def strip_at(
    problem: AttentionProblem,
    index: Int32,
    seqs_q: tuple[Sequence, Sequence],
    seqlens_k: tuple[Int32, Int32],
    head_kv: Int32,
    heads_per_kv: Int32,
    strip_rows: int,
    tile_n: int,
    numbers,
) -> Strip:
    """The strip of a sequence and KV head at `index` of their order, or one without rows behind the last. A lane may
    have an index of its own.

    The group whose range ends last comes first, its last rows before the others, as under a causal mask they see most.
    """
    one_first = seqlens_k[1] >= seqlens_k[0]

    def pick(one, zero):
        return cutlass.select_(one_first, one, zero)

    counts = [(seq.length + (strip_rows - 1)) // strip_rows for seq in seqs_q]
    count, other_count = pick(counts[1], counts[0]), pick(counts[0], counts[1])
    turn = divide(index, heads_per_kv)
    is_first = turn < count
    exists = turn < count + other_count
    number = cutlass.select_(is_first, count - 1 - turn, count + other_count - 1 - turn)
    number = cutlass.max(number, Int32(0))
    group = Int32(is_first == one_first)
    zero, one = seqs_q
    length = cutlass.select_(exists, cutlass.select_(group == 1, one.length, zero.length), Int32(0))
    start = cutlass.select_(group == 1, one.start, zero.start)
    seq_q = Sequence(start, Int32(0), length, length)
    seqlen_k = cutlass.select_(group == 1, seqlens_k[1], seqlens_k[0])
    blocks = block_range(problem, number, strip_rows, tile_n, length, seqlen_k, seqlen_k, numbers)
    sees = exists & (Int32(blocks.begin) < Int32(blocks.end))
    own = [cutlass.select_(sees, Int32(value), Int32(0)) for value in vars_of(blocks)]
    head = head_kv * heads_per_kv + index - turn * heads_per_kv
    return Strip(group, number * strip_rows, head, seq_q, seqlen_k, BlockRange(*own))


def vars_of(blocks: BlockRange) -> tuple:
    return blocks.begin, blocks.end, blocks.left_edge, blocks.right_edge


def strip_of(strip: Strip, seqs_q: tuple[Sequence, Sequence], lane: Int32) -> Strip:
    """The one that `lane` holds."""

    def there(value: Int32) -> Int32:
        return cute.arch.shuffle_sync(value, lane)

    group, length = there(strip.group), there(strip.seq_q.length)
    start = cutlass.select_(group == 1, seqs_q[1].start, seqs_q[0].start)
    blocks = BlockRange(*map(there, vars_of(strip.blocks)))
    seq_q = Sequence(start, Int32(0), length, length)
    return Strip(group, there(strip.first_row), there(strip.head), seq_q, there(strip.seqlen_k), blocks)


@dataclass(frozen=True)
class Target:
    """Where a strip's results go: address of the strip's first row of out, bytes from row to row, address of its first
    row of lse, rows of lse from the sequence's first that there is room for."""

    out: Int64
    row_stride: Int32
    lse: Int64
    lse_rows: Int32


def write_strip(shared: Int32, first_row: Int32, strip: Strip, target: Target) -> None:
    """A warp's note: positions and blocks where scheduler.py's functions read them, the rest where they read nothing.
    first_row: as those functions mean it."""
    seqlen_q, seqlen_k = strip.seq_q.length, strip.seqlen_k
    store_shared_v4(shared, (first_row, strip.head, Int32(0), seqlen_k))
    store_shared_v4(shared + 16, (target.row_stride, seqlen_q, target.lse_rows, seqlen_k - seqlen_q))
    store_shared_v4(shared + 32, vars_of(strip.blocks))
    words = [word for address in (target.out, target.lse) for word in (Int32(address), Int32(address >> 32))]
    store_shared_v4(shared + 48, words)


def read_strip(shared: Int32) -> tuple[Int32, Int32, Int32, Target]:
    """(first_row, head, seqlen_q, target) as written."""
    first_row, head, _, _ = load_shared_v4(shared)
    row_stride, seqlen_q, lse_rows, _ = load_shared_v4(shared + 16)
    words = load_shared_v4(shared + 48)
    out, lse = (Int64(cutlass.Uint32(words[i])) | Int64(words[i + 1]) << 32 for i in (0, 2))
    return first_row, head, seqlen_q, Target(out, row_stride, lse, lse_rows)


def over_strips(value: Int32, combine, warps: int) -> Int32:
    """Of the values that lanes 0 to warps - 1 hold; lane + warps holds what lane does."""
    step = 1
    while step < warps:
        value = combine(value, cute.arch.shuffle_sync_bfly(value, offset=step))
        step *= 2
    return value


@dataclass(frozen=True)
class Way:
    """The KV blocks that a thread block goes over, from last to first: from end - 1 down to gap_end, then `gap` blocks
    are left out, `count` blocks in all. seqlen_k: keys that a strip may see."""

    end: Int32
    count: Int32
    gap_end: Int32 | int
    gap: Int32 | int
    seqlen_k: Int32

    @property
    def begin(self) -> Int32:
        """So that begin < end says whether there are any."""
        return self.end - self.count

    def number(self, i: Int32) -> Int32:
        """Of the i-th block."""
        n = self.end - 1 - i
        if isinstance(self.gap, int):
            return n - self.gap
        return n - cutlass.select_(n < self.gap_end, self.gap, Int32(0))


def way_over(strip: Strip, warps: int, may_have_gap: bool) -> Way:
    """strip: of each lane, see over_strips. Of each group a block has neighbouring rows, so that what a group's strips
    see has no gap, and between the two groups there is one at most."""
    sees = strip.blocks.begin < strip.blocks.end
    seqlen_k = over_strips(cutlass.select_(sees, strip.seqlen_k, Int32(0)), cutlass.max, warps)
    if not may_have_gap:  # all begin at block 0
        end = over_strips(strip.blocks.end, cutlass.max, warps)
        return Way(end, end, 0, 0, seqlen_k)
    begins, ends = [], []
    for group in range(2):
        own = sees & (strip.group == group)
        begins.append(over_strips(cutlass.select_(own, strip.blocks.begin, Int32(FAR)), cutlass.min, warps))
        ends.append(over_strips(cutlass.select_(own, strip.blocks.end, Int32(0)), cutlass.max, warps))
    end, begin = cutlass.max(*ends), cutlass.min(*begins)
    gap_end = cutlass.select_(ends[1] >= ends[0], begins[1], begins[0])  # of the group that ends last
    lower_end = cutlass.min(*ends)
    # a group that sees nothing ends at 0 and has nothing below the other
    gap = cutlass.select_(lower_end > 0, cutlass.max(gap_end - lower_end, Int32(0)), Int32(0))
    begin = cutlass.min(begin, end)
    return Way(end, end - begin - gap, gap_end, gap, seqlen_k)


def write_way(shared: Int32, way: Way, start_k: Int32) -> None:
    """start_k: of the sequence's keys."""
    store_shared_v4(shared, (way.end, way.count, Int32(way.gap_end), Int32(way.gap)))
    store_shared_v4(shared + 16, (start_k, Int32(0), Int32(0), Int32(0)))


def read_way(shared: Int32, may_have_gap: bool) -> Way:
    """As written, without seqlen_k."""
    if not may_have_gap:
        end, _ = load_shared_v2(shared)
        return Way(end, end, 0, 0, Int32(0))
    return Way(*load_shared_v4(shared), Int32(0))


def read_start_k(shared: Int32) -> Int32:
    """As written."""
    start, _ = load_shared_v2(shared + 16)
    return start
