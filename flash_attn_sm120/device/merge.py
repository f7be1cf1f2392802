"""The warps of a block bring their rows together, and write them to out and lse or to the partials of a split."""

from __future__ import annotations

import math
import operator

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute

from flash_attn_sm120.device.mainloop_decode import DecodeLoop
from flash_attn_sm120.device.parts import LaneColumns, add_parts, part_weights
from flash_attn_sm120.device.ptx import (
    exp2,
    fma,
    load_fresh_f32,
    load_fresh_v4_f32,
    load_shared_f32,
    log2,
    pack_pair,
    reciprocal,
    store_global_v2,
    store_global_v4,
    store_global_v4_f32,
    store_shared_f32,
    take_ticket,
)
from flash_attn_sm120.device.rows import RowTile
from flash_attn_sm120.device.seqlen import divide
from flash_attn_sm120.device.softmax import NEG_INF, tree_reduce
from flash_attn_sm120.dispatch import MAX_SPLITS

LOADS_AT_ONCE = 16  # of a lane, while parts are brought together


class Merge:
    """shared: of the block, free but for what this writes; a warp stages its O in its own ring."""

    def __init__(self, config, loop: DecodeLoop, rows: RowTile, splits: Int32, shared: Int32, warp: Int32, modifiers):
        """splits: parts that the sequence has."""
        self.config, self.loop, self.rows, self.piece, self.modifiers = config, loop, rows, rows.piece, modifiers
        self.splits, self.shared, self.warp, self.lane = splits, shared, warp, loop.lane
        self.group, self.quad = self.lane // 4, self.lane % 4
        self.notes = shared + config.memory.notes_offset
        self.row_bytes = config.memory.staged_row_bytes
        self.own_rows = config.plan.tile_m // 8
        self.parts_at_once = LOADS_AT_ONCE // -(-config.problem.head_dim_v // 128)

    @cute.jit
    def run(self, mO: cute.Tensor, mLSE: cute.Tensor | None, partials: cutlass.Constexpr):
        self.note()
        cute.arch.sync_warp()  # the ring has been read
        self.stage()
        cute.arch.sync_threads()
        if cutlass.const_expr(not self.config.problem.split):
            self.store_out(mO, mLSE)
        else:
            if self.splits == 1:
                self.store_out(mO, mLSE)
            else:
                self.store_part(partials)
                self.combine(mO, mLSE, partials)

    @cute.jit
    def note(self):
        """The warp's maximum and sum of each row."""
        statistics = self.loop.statistics()
        if self.quad == 0:
            for r in cutlass.range_constexpr(self.own_rows):
                row = self.warp * self.config.plan.tile_m + 8 * r + self.group
                store_shared_f32(self.notes + row * 8, statistics[r])

    @cute.jit
    def stage(self):
        """Puts the warp's O, of rows that exist, into its ring."""
        staged = self.shared + self.warp * self.config.memory.ring_bytes
        for r in cutlass.range_constexpr(self.own_rows):
            if 8 * r < self.rows.rows_left:
                if 8 * r + self.group < self.rows.rows_left:
                    self.stage_row(staged + (8 * r + self.group) * self.row_bytes, r)

    def stage_row(self, shared: Int32, r: int) -> None:
        tOrO, operands = self.loop.tOrO, self.loop.operands
        values = {}
        for n in range(tOrO.shape[1]):
            for i in range(2):
                lane_col, col = operands.column(n, i)
                values[col] = tOrO[r // 2, n, 2 * (r % 2) + i]
        count = operands.columns_together
        for col in values:
            if col % count == 0:
                store_shared_f32(shared + operands.staged(lane_col + col), [values[col + i] for i in range(count)])

    def weights(self, row: Int32) -> tuple[list[Float32], Float32]:
        """(what each warp's O of a row is multiplied by, LSE of the row over all warps)."""
        config = self.config
        tops, sums = zip(
            *(
                load_shared_f32(self.notes + (warp * config.plan.tile_m + row) * 8, 2)
                for warp in range(config.plan.num_warps)
            ),
            strict=True,
        )
        top = tree_reduce(list(tops), cute.arch.fmax)
        sink = None
        if config.problem.sink:
            sink = self.sink(row)
            top = cute.arch.fmax(top, sink)
        base = cutlass.select_(top == NEG_INF, Float32(0.0), top)
        factors = [exp2(own - base) for own in tops]
        total = tree_reduce([factor * own for factor, own in zip(factors, sums, strict=True)], operator.add)
        if sink is not None:
            total = total + exp2(sink - base)
        is_row = self.rows.first_row + row < self.rows.seq_q.length * self.rows.heads.per_kv
        empty = (total == 0.0) | (is_row == Boolean(False))
        scale = cutlass.select_(empty, Float32(0.0), reciprocal(total))
        if config.problem.v_descale:
            scale = scale * self.modifiers.v_descale[self.piece.batch, self.rows.head_kv]
        lse = cutlass.select_(empty, Float32(NEG_INF), (base + log2(total)) * math.log(2.0))
        return [factor * scale for factor in factors], lse

    def sink(self, row: Int32) -> Float32:
        """In base 2; counts once, in a sequence's first part."""
        value = Float32(self.modifiers.learnable_sink[self.rows.head(row)]) * math.log2(math.e)
        if self.config.problem.split:
            value = cutlass.select_(self.piece.split == 0, value, Float32(NEG_INF))
        return value

    @cute.jit
    def store_out(self, mO: cute.Tensor, mLSE: cute.Tensor | None):
        """All threads add the warps' shares up, 8 columns at a time."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        units = config.problem.head_dim_v // 8
        threads = 32 * config.plan.num_warps
        for turn in cutlass.range_constexpr(-(-config.plan.tile_m * units // threads)):
            place = thread + turn * threads
            row = divide(place, units)
            if (row < config.plan.tile_m) & (row < self.rows.rows_left):
                unit = place - row * units
                weights, lse = self.weights(row)
                values = self.added(row, unit * 8, 8, weights)
                pairs = [pack_pair(values[i], values[i + 1], config.dtype) for i in range(0, 8, 2)]
                store_global_v4(self.rows.out_address(mO, row) + Int64(unit * 16), pairs)
                if cutlass.const_expr(mLSE is not None):
                    if unit == 0:
                        write(mLSE, self.rows.lse_offset(mLSE, row), lse)

    @cute.jit
    def store_part(self, partials: cutlass.Constexpr):
        """A warp adds up and stores the rows that it will combine if this part is the last one to be done."""
        columns = LaneColumns(self.config.problem.head_dim_v, self.lane)
        split = Int64(self.piece.split)
        for row in cutlass.range(self.warp, self.num_rows(), self.config.plan.num_warps, unroll=1):
            weights, lse = self.weights(row)
            address = self.rows.out_address(partials.out, row) + Int64(self.lane * 16)
            address = address + split * Int64(partials.out.stride[0]) * 4
            for turn in cutlass.range_constexpr(columns.turns):
                if columns.exist[turn]:
                    store_global_v4_f32(address + turn * 512, self.added(row, columns.first[turn], 4, weights))
            if self.lane == 0:
                offset = self.rows.lse_offset(partials.lse, row) + split * Int64(partials.lse.stride[0])
                write(partials.lse, offset, lse)

    def num_rows(self) -> Int32:
        return cutlass.min(self.rows.rows_left, Int32(self.config.plan.tile_m))

    def added(self, row: Int32, col: Int32, cols: int, weights: list[Float32]) -> list[Float32]:
        shared = self.shared + row * self.row_bytes
        places = [shared + self.loop.operands.staged(col + first) for first in range(0, cols, 4)]
        values = [Float32(0.0)] * cols
        for warp, weight in enumerate(weights):
            for first, place in zip(range(0, cols, 4), places, strict=True):
                share = load_shared_f32(place + warp * self.config.memory.ring_bytes, 4)
                values[first : first + 4] = [
                    fma(own, weight, value) for own, value in zip(share, values[first : first + 4], strict=True)
                ]
        return values

    @cute.jit
    def combine(self, mO: cute.Tensor, mLSE: cute.Tensor | None, partials: cutlass.Constexpr):
        """The rows of which all other parts have been stored, from their parts; a row is the business of one warp."""
        warps = self.config.plan.num_warps
        number = self.rows.tile_number() * self.rows.heads.heads_kv + self.rows.head_kv
        own_row = self.warp + self.lane * warps
        is_last = Boolean(False)
        cute.arch.sync_warp()
        if own_row < self.num_rows():
            place = partials.tickets.iterator.toint() + Int64(number * self.config.plan.tile_m + own_row) * 4
            is_last = take_ticket(place, self.splits - 1) == self.splits - 1
        last_rows = cute.arch.vote_ballot_sync(is_last)
        cute.arch.sync_warp()
        for row in cutlass.range(self.warp, self.num_rows(), warps, unroll=1):
            if (last_rows & 1) != 0:
                self.combine_row(mO, mLSE, partials, row)
            last_rows = last_rows >> 1

    @cute.jit
    def combine_row(self, mO: cute.Tensor, mLSE: cute.Tensor | None, partials: cutlass.Constexpr, row: Int32):
        columns = LaneColumns(self.config.problem.head_dim_v, self.lane)
        sums = cute.make_rmem_tensor((4 * columns.turns,), Float32)
        sums.fill(0.0)
        address = self.rows.out_address(partials.out, row)
        step = Int64(partials.out.stride[0]) * 4
        first_parts = self.load(address, step, columns, 0)  # on their way while the weights are worked out
        weights, lse = part_weights(self.part_lses(partials.lse, row))
        self.add(sums, first_parts, weights[0])
        for first in cutlass.range(self.parts_at_once, self.splits, self.parts_at_once, unroll=1):
            weight = weights[0]
            if first >= 32:
                weight = weights[1]
            weight = cute.arch.shuffle_sync(weight, (self.lane + first) % 32)
            self.add(sums, self.load(address + Int64(first) * step, step, columns, first), weight)
        target = self.rows.out_address(mO, row) + Int64(self.lane * 8)
        for turn in cutlass.range_constexpr(columns.turns):
            if columns.exist[turn]:
                pairs = [pack_pair(sums[4 * turn + i], sums[4 * turn + i + 1], self.config.dtype) for i in (0, 2)]
                store_global_v2(target + turn * 256, pairs)
        if cutlass.const_expr(mLSE is not None):
            offset = self.rows.lse_offset(mLSE, row)
            if self.lane == 0:
                write(mLSE, offset, lse)

    def load(self, place: Int64, step: Int64, columns: LaneColumns, first) -> list:
        """Starts the loads of a row of some parts, [part][turn] -> four columns; behind the last part it comes again.
        place: of the row in part `first`; step: bytes from a part to the next."""
        loaded = []
        for i in range(self.parts_at_once):
            if i:  # from part to part, as a multiplication each would keep the first load waiting
                place = place + cutlass.select_(first + i < self.splits, step, Int64(0))
            loaded.append([load_fresh_v4_f32(place + Int64(col * 4)) for col in columns.within])
        return loaded

    def add(self, sums: cute.Tensor, loaded: list, weight: Float32) -> None:
        """weight: lane i has that of part i of those loaded."""
        add_parts(sums, loaded, [cute.arch.shuffle_sync(weight, i) for i in range(self.parts_at_once)])

    def part_lses(self, mLSE: cute.Tensor, row: Int32) -> list:
        """Of part lane, lane + 32, ..."""
        start, lses = mLSE.iterator.toint() + self.rows.lse_offset(mLSE, row) * 4, []
        for first in range(0, MAX_SPLITS, 32):
            split = Int32(first + self.lane)
            number = cutlass.min(split, self.splits - 1)
            value = load_fresh_f32(start + Int64(number) * (Int64(mLSE.stride[0]) * 4))
            lses.append(cutlass.select_(split < self.splits, value, Float32(NEG_INF)))
        return lses


def write(tensor: cute.Tensor, offset: Int64, value: Float32) -> None:
    """offset: elements."""
    cute.make_tensor(tensor.iterator + offset, cute.make_layout(1))[0] = value
